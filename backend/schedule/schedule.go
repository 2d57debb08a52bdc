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
// A cron fires at minutes of a local clock (rotation_timezone, else UTC), each
// once, however that clock is turned; see firstInstant. Each slot may be
// delayed, always by the same time (jitter), so that roles of one schedule do
// not all rotate at once. Times that are stored and returned are UTC.
package schedule

import (
	"fmt"
	"strings"
	"time"
)

// Minimum is the shortest rotation_period and rotation_window. Crons have
// minutes too, and Vault asks plugins what is due once a minute.
const Minimum = time.Minute

// Tolerance is how late a slot without a window may be served where those that
// are missed wait for the next one.
const Tolerance = time.Hour

// What missed_policy may be: what becomes of a slot that nobody could serve.
const (
	MissedAtOnce = "at_once" // it stays due; the default without a window
	MissedNext   = "next"    // it is passed over, and counted; what a window does
)

// Spec is the part of a role that says when it rotates by itself. Its zero
// value is a role that is rotated by hand only.
type Spec struct {
	Period   time.Duration `json:"rotation_period,omitempty"`
	Cron     string        `json:"rotation_schedule,omitempty"`
	Zone     string        `json:"rotation_timezone,omitempty"`
	Window   time.Duration `json:"rotation_window,omitempty"`
	Jitter   time.Duration `json:"jitter,omitempty"`
	Missed   string        `json:"missed_policy,omitempty"`
	Disabled bool          `json:"disable_automated_rotation,omitempty"`
}

// Policy is what becomes of missed slots, given or not.
func (s Spec) Policy() string {
	if s.Missed == "" && s.Window > 0 {
		return MissedNext
	}
	if s.Missed == "" {
		return MissedAtOnce
	}
	return s.Missed
}

// patience is how long after its slot a rotation may begin; 0: any time.
func (s Spec) patience() time.Duration {
	switch {
	case s.Window > 0:
		return s.Window
	case s.Missed == MissedNext:
		return Tolerance
	}
	return 0
}

// Passed are slots that came and went without a rotation of their own.
type Passed struct {
	Count int
	Last  time.Time
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
	for _, check := range []func(Spec) error{validateZone, validateWindow, validateJitter, validateMissed} {
		if err := check(spec); err != nil {
			return err
		}
	}
	return nil
}

func validateZone(spec Spec) error {
	if spec.Zone != "" && spec.Cron == "" {
		return fmt.Errorf("rotation_timezone is %s, but there is no rotation_schedule: a time zone is allowed with a schedule only, so clear it or give a schedule",
			quote(spec.Zone))
	}
	_, err := zone(spec.Zone)
	return err
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
	if gap := gapOfSlots(spec); spec.Window > gap {
		return fmt.Errorf("rotation_window is %s, but rotation_schedule %q fires again after %s: the window must not be longer than that",
			text(spec.Window), spec.Cron, text(gap))
	}
	return nil
}

func validateJitter(spec Spec) error {
	if spec.Jitter == 0 {
		return nil
	}
	if !scheduled(spec) {
		return fmt.Errorf("jitter is %s, but there is neither rotation_period nor rotation_schedule: clear it or give one of them", text(spec.Jitter))
	}
	if spec.Jitter < time.Second {
		return fmt.Errorf("jitter is %s: it must be at least 1s, or 0 for none", text(spec.Jitter))
	}
	if gap := gapOfSlots(spec); spec.Jitter >= (gap+1)/2 {
		return fmt.Errorf("jitter is %s, but two slots may be %s apart: it must be less than half of that", text(spec.Jitter), text(gap))
	}
	if spec.Window != 0 && spec.Jitter >= spec.Window {
		return fmt.Errorf("jitter is %s, but rotation_window is %s: it must be shorter, or a delayed slot would miss its window", text(spec.Jitter), text(spec.Window))
	}
	return nil
}

func validateMissed(spec Spec) error {
	switch spec.Missed {
	case "":
		return nil
	case MissedAtOnce, MissedNext:
	default:
		return fmt.Errorf("missed_policy is %s: allowed are at_once (a missed slot stays due) and next (it is passed over)", quote(spec.Missed))
	}
	if !scheduled(spec) {
		return fmt.Errorf("missed_policy is %s, but there is neither rotation_period nor rotation_schedule: clear it or give one of them", spec.Missed)
	}
	if spec.Missed == MissedAtOnce && spec.Window > 0 {
		return fmt.Errorf("missed_policy is at_once, but rotation_window is %s, and no scheduled rotation begins outside its window: clear one of them", text(spec.Window))
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

// Next is when a role rotates by itself, strictly after the given time, in UTC,
// or the zero time when it never does.
//
// Of a role whose schedule is new, after is now. What follows a rotation is told
// by Served.
func Next(spec Spec, role string, after time.Time) time.Time {
	return newCalendar(spec, role).next(onTheWall(after))
}

// NextN is the first n times of a role from a stored one on, which counts; with
// none stored there are none.
func NextN(spec Spec, role string, stored time.Time, n int) []time.Time {
	c := newCalendar(spec, role)
	var times []time.Time
	for at := onTheWall(stored); !at.IsZero() && len(times) < n; at = c.next(at) {
		times = append(times, at)
	}
	return times
}

// Served is what follows a rotation that ran at now, while next was stored: the
// time to store in its stead, and the slots that came while that one waited and
// are made up for by this rotation.
func Served(spec Spec, role string, next, now time.Time) (following time.Time, passed Passed) {
	return newCalendar(spec, role).served(onTheWall(next), onTheWall(now))
}

// Due says whether the stored next time has come.
//
// Without a window a slot stays due, however late, until it is taken. With one,
// or with missed_policy next, it is due until its time has run out. After that
// moved is the slot to store in its stead, the first that follows and whose own
// time has not run out, and passed is what was passed over on the way there;
// due says whether the moved one is due already. Otherwise moved is zero and
// the stored time stays.
func Due(spec Spec, role string, next, now time.Time) (due bool, moved time.Time, passed Passed) {
	return newCalendar(spec, role).due(onTheWall(next), onTheWall(now))
}

// onTheWall drops the monotonic clock: times are for storage, and compared with
// the clock of whichever node is active then.
func onTheWall(t time.Time) time.Time { return t.Round(0).UTC() }

// SmallestGap is the shortest time between two rotations of spec, whether
// disabled or not, or zero when it has none. It is told by the clock on the
// wall: the night on which clocks are turned forward may bring two closer, and
// the later one then waits for the other, like any that comes too early.
func SmallestGap(spec Spec) time.Duration {
	gap := gapOfSlots(spec)
	if spec.Cron != "" && gap > 0 {
		gap -= spec.Jitter
	}
	return gap
}

// LargestGap is the longest time between two of the coming rotations of a spec; 0
// where nothing rotates by itself.
func LargestGap(spec Spec, now time.Time) time.Duration {
	if !automatic(spec) {
		return 0
	}
	if spec.Period > 0 {
		return spec.Period + spec.Jitter
	}
	gap := time.Duration(0)
	slots := NextN(spec, "", now, slotsLookedAt)
	for i, slot := range slots[min(1, len(slots)):] {
		gap = max(gap, slot.Sub(slots[i]))
	}
	return gap + spec.Jitter
}

// slotsLookedAt is enough for every cron that does not count years.
const slotsLookedAt = 800

// gapOfSlots is the same before any slot is delayed.
func gapOfSlots(spec Spec) time.Duration {
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
		given = fmt.Sprintf("rotation_schedule %q fires again after %s", spec.Cron, text(gap+spec.Jitter))
		if spec.Jitter > 0 {
			given += fmt.Sprintf(", less %s of jitter", text(spec.Jitter))
		}
	}
	return fmt.Errorf("%s, but one rotation may take %s (grace_period and timeouts): it must be longer than that, so rotate less often or shorten grace_period",
		given, text(minimum))
}

func automatic(spec Spec) bool { return !spec.Disabled && scheduled(spec) }

func scheduled(spec Spec) bool { return spec.Period > 0 || spec.Cron != "" }

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
