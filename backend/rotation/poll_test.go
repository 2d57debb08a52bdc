package rotation

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestPollsLessOften: a consumer where nothing moves is looked at less and less often,
// soon again when something does, and at the deadline.
func TestPollsLessOften(t *testing.T) {
	t.Parallel()
	began := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	const patience = 5 * time.Minute
	r := &Role{Name: "a", Consumers: []string{"c1"}, Run: &Run{Rotation: "r", Trigger: Manual, Phase: Restart, Promoted: true}}
	now, looks, waits := began, 0, "none of its pods is new"
	look := func() (pause time.Duration) {
		d := &decider{role: r, now: now, facts: &facts{progress: map[string]Progress{"c1": {Waits: waits}}, patience: patience}}
		s := d.deliver()
		looks++
		until := s.until
		if s.act == store {
			r, until = s.next, s.next.Run.RetryAt
		} else {
			require.Equal(t, wait, s.act)
		}
		pause = until.Sub(now)
		now = until
		return pause
	}
	require.Equal(t, pollPause, look())
	deadline := r.Run.Deadline
	require.Equal(t, began.Add(patience), deadline)
	longest := time.Duration(0)
	for now.Before(began.Add(time.Minute)) {
		longest = max(longest, look())
	}
	require.Equal(t, longestPoll, longest)
	require.LessOrEqual(t, looks, 15, "in a minute")
	waits = "half of its pods are new"
	require.Equal(t, pollPause, look(), "something moves")
	for now.Before(deadline) {
		look()
	}
	require.Equal(t, deadline, now, "not later than it may take")
	require.LessOrEqual(t, looks, 50, "in five minutes")
}
