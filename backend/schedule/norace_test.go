//go:build !race

package schedule_test

const oneIn = 1
