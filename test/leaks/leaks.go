// Package leaks finds what tests have let out: goroutines that are left running, and
// secrets in what anybody may see.
package leaks

import (
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience is how long goroutines that are ending may take. goleak itself waits
// for less than half a second, in which a busy machine may not get to them.
const patience = 30 * time.Second

// Main runs the tests of a package, and then looks for what they left, and for planted
// secrets. It is called by TestMain and does not return.
func Main(m *testing.M, options ...goleak.Option) {
	code := m.Run()
	for _, look := range []func() error{Leaked, func() error { return Find(options...) }} {
		if code != 0 {
			break
		}
		if err := look(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// Find returns an error that names what is still running when all that was ending
// has ended.
func Find(options ...goleak.Option) error {
	for end := time.Now().Add(patience); ; {
		err := goleak.Find(options...)
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}
