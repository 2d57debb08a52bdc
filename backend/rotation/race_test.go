//go:build race

package rotation

// stride is how many operations there are to one that meets faults: what the race
// detector watches for does not depend on the operation, and all of them are tried
// without it.
const stride = 5
