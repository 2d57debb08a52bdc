//go:build race

package schedule_test

// oneIn is how much of the simulation is played: the race detector makes it ten
// times slower and has nothing to find in what one goroutine computes. make
// test plays all of it without.
const oneIn = 10
