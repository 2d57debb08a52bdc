package main

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// series is one figure, once a round.
type series []float64

// median of the rounds.
func (s series) median() float64 { return quantile(s, 0.5) }

// over divides round by round: what disturbed a round disturbed both.
func (s series) over(t series) series {
	out := make(series, min(len(s), len(t)))
	for i := range out {
		out[i] = s[i] / t[i]
	}
	return out
}

// String is the median, and between what the rounds were.
func (s series) String() string {
	if len(s) == 0 {
		return "not measured"
	}
	return fmt.Sprintf("%s (%s–%s)", digits(s.median()), digits(slices.Min(s)), digits(slices.Max(s)))
}

// quantile of values in any order; not a number where there are none.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	low := int(at)
	high := min(low+1, len(sorted)-1)
	return sorted[low] + (at-float64(low))*(sorted[high]-sorted[low])
}

// digits prints a figure as exactly as it is known.
func digits(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case a >= 10000:
		return fmt.Sprintf("%.0f", math.Round(v/100)*100)
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.095:
		return fmt.Sprintf("%.2f", v)
	case a == 0:
		return "0"
	default:
		return fmt.Sprintf("%.4f", v)
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// turns calls f for each of n competitors, rounds times. Each round begins with
// another one, so that none always follows the same.
func turns(rounds, n int, f func(round, which int) error) error {
	for round := range rounds {
		for i := range n {
			if err := f(round, (round+i)%n); err != nil {
				return err
			}
		}
	}
	return nil
}
