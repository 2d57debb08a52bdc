//go:build race

package rotation

// stride is how many operations there are to one that meets faults.
const stride = 20
