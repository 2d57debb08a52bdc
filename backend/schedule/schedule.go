// Package schedule says when a role rotates by itself: every so often
// (rotation_period), at the times of a cron (rotation_schedule, perhaps only
// within a rotation_window after each), or never.
//
// It holds no clock and no state. The next time is computed once, by Next, when
// a role is created, rotated or given another schedule, and is stored with the
// role; from then on Due compares that stored time with the clock:
//
//	          next              next+window
//	───────────┼───────────────────┼───────────────▶ now
//	  not due  │        due        │ without a window: still due
//	           │                   │ with one: not due, moved to a later slot
//
// Vault's own engines compute the next time from the current one instead. So a
// slot that passes while no node is active is lost, and what they tell
// consumers rolls over before the password has changed (hashicorp/vault#31918).
//
// All times are UTC, where no day lacks an hour or has one twice.
package schedule

import (
	"fmt"
	"strings"
	"time"
)

// Minimum is the shortest rotation_period and rotation_window. Crons have
// minutes too, and Vault asks plugins what is due once a minute.
const Minimum = time.Minute

// Spec is the part of a role that says when it rotates by itself. Its zero
// value is a role that is rotated by hand only.
type Spec struct {
	Period   time.Duration `json:"rotation_period,omitempty"`
	Cron     string        `json:"rotation_schedule,omitempty"`
	Window   time.Duration `json:"rotation_window,omitempty"`
	Disabled bool          `json:"disable_automated_rotation,omitempty"`
}

// Validate refuses, with one sentence, what Next and Due could not do as meant.
// A disabled schedule is held to the same rules: it will be enabled again.
func Validate(spec Spec) error {
	if spec.Period != 0 && spec.Period < Minimum {
		return fmt.Errorf("rotation_period is %s: it must be at least %s, or 0 for no period",
			text(spec.Period), text(Minimum))
	}
	if spec.Period != 0 && spec.Cron != "" {
		return fmt.Errorf("rotation_period is %s and rotation_schedule is %s: only one of them is allowed, so clear the other",
			text(spec.Period), quote(spec.Cron))
	}
	if spec.Cron != "" {
		c, err := parse(spec.Cron)
		if err != nil {
			return err
		}
		if c.daysBetween() == 0 {
			return fmt.Errorf("rotation_schedule is %q, which never fires: give a day that its months have", spec.Cron)
		}
	}
	return validateWindow(spec)
}

func validateWindow(spec Spec) error {
	if spec.Window == 0 {
		return nil
	}
	if spec.Cron == "" {
		return fmt.Errorf("rotation_window is %s, but there is no rotation_schedule: a window is allowed with a schedule only, so clear it or give a schedule",
			text(spec.Window))
	}
	if spec.Window < Minimum {
		return fmt.Errorf("rotation_window is %s: it must be at least %s, or 0 for no window",
			text(spec.Window), text(Minimum))
	}
	if gap := SmallestGap(spec); spec.Window > gap {
		return fmt.Errorf("rotation_window is %s, but rotation_schedule %q fires again after %s: the window must not be longer than that",
			text(spec.Window), spec.Cron, text(gap))
	}
	return nil
}

// Notes says what is worth knowing about a valid spec and is no reason to
// refuse it.
func Notes(spec Spec) []string {
	c, err := parse(spec.Cron)
	if err != nil || !c.daysAreJoinedByOr() {
		return nil
	}
	return []string{fmt.Sprintf("rotation_schedule %q restricts day of month and day of week: as in every cron it fires on a day that matches either of them, not only on days that match both",
		spec.Cron)}
}

// Next is the first slot strictly after the given time, in UTC, or the zero
// time when spec never rotates by itself.
//
// After a rotation, after is the time at which it ran, not the slot that it
// took: slots missed meanwhile are made up for by that one rotation.
func Next(spec Spec, after time.Time) time.Time {
	// Round drops the monotonic clock: the result is for storage, and compared
	// with the clock of whichever node is active then.
	after = after.Round(0).UTC()
	switch {
	case spec.Disabled:
		return time.Time{}
	case spec.Period > 0:
		return after.Add(spec.Period)
	}
	c, err := parse(spec.Cron)
	if err != nil {
		return time.Time{}
	}
	return c.next(after)
}

// Due says whether the stored next time has come.
//
// Without a window a slot stays due, however late, until it is taken. With one
// it is due until the window ends; after that moved is the slot to store in its
// stead: the first that follows and whose own window has not ended, and due
// says whether that one is due already. Otherwise moved is zero and the stored
// time stays.
func Due(spec Spec, next, now time.Time) (due bool, moved time.Time) {
	if !automatic(spec) || next.IsZero() || now.Before(next) {
		return false, time.Time{}
	}
	if spec.Window <= 0 || now.Before(next.Add(spec.Window)) {
		return true, time.Time{}
	}
	// A slot's window has not ended when the slot is later than this.
	moved = Next(spec, now.Add(-spec.Window))
	return !moved.IsZero() && !moved.After(now), moved
}

// SmallestGap is the shortest time between two slots of spec, whether disabled
// or not, or zero when it has none.
func SmallestGap(spec Spec) time.Duration {
	if spec.Period > 0 {
		return spec.Period
	}
	c, err := parse(spec.Cron)
	if err != nil {
		return 0
	}
	return c.smallestGap()
}

// CheckGap refuses a spec whose next slot could come while the rotation of the
// last one still runs: minimum is how long one may take, its grace and the
// timeouts of its phases.
func CheckGap(spec Spec, minimum time.Duration) error {
	if !automatic(spec) {
		return nil
	}
	gap := SmallestGap(spec)
	if gap > minimum {
		return nil
	}
	given := "rotation_period is " + text(spec.Period)
	if spec.Cron != "" {
		given = fmt.Sprintf("rotation_schedule %q fires again after %s", spec.Cron, text(gap))
	}
	return fmt.Errorf("%s, but one rotation may take %s (grace_period and timeouts): it must be longer than that, so rotate less often or shorten grace_period",
		given, text(minimum))
}

func automatic(spec Spec) bool {
	return !spec.Disabled && (spec.Period > 0 || spec.Cron != "")
}

// text writes a duration as users type it: 1h, not 1h0m0s.
func text(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
