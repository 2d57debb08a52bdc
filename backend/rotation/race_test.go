//go:build race

package rotation

// stride is how many operations there are to one that meets faults; without the race
// detector all of them do.
const stride = 5
