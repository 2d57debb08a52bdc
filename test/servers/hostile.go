package servers

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Hostile is a server that says the same to everybody, whatever it is asked, once it is
// asked anything.
type Hostile struct {
	// Begins is said at once, and GoesOn after it for as long as somebody listens,
	// "" for a server that then says nothing.
	Begins, GoesOn string
	// Pause is between one GoesOn and the next.
	Pause time.Duration
}

// Start returns the address of a server that lives as long as the test.
func (h Hostile) Start(t testing.TB) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				if _, err := c.Read(make([]byte, 1)); err != nil {
					return
				}
				wg.Go(func() { _, _ = io.Copy(io.Discard, c) })
				h.talk(c, stop)
			})
		}
	})
	t.Cleanup(func() { close(stop); _ = l.Close(); wg.Wait() })
	return l.Addr().String()
}

func (h Hostile) talk(c net.Conn, stop <-chan struct{}) {
	_, err := io.WriteString(c, h.Begins)
	said := []byte(h.GoesOn)
	if h.GoesOn != "" && h.Pause == 0 {
		said = bytes.Repeat(said, 1+64<<10/len(said))
	}
	for err == nil && len(said) > 0 {
		select {
		case <-stop:
			return
		case <-time.After(h.Pause):
		}
		_ = c.SetWriteDeadline(time.Now().Add(time.Minute))
		_, err = c.Write(said)
	}
	if err == nil {
		<-stop
	}
}
