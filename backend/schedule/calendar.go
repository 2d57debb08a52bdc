package schedule

import (
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// calendar is what a Spec means for one role.
type calendar struct {
	Spec
	role string
	cron cron
	zone *time.Location
}

// newCalendar reads what Validate accepts. A cron that it does not never fires.
func newCalendar(spec Spec, role string) calendar {
	c := calendar{role: role}
	if !automatic(spec) {
		return c
	}
	c.Spec = spec
	cron, badCron := parse(spec.Cron)
	in, badZone := zone(spec.Zone)
	if badCron == nil && badZone == nil {
		c.cron, c.zone = cron, in
	}
	return c
}

// slot is the first slot of the cron strictly after a time, without its delay.
func (c calendar) slot(after time.Time) time.Time {
	if c.cron.SpecSchedule == nil {
		return time.Time{}
	}
	local := c.cron.next(reached(after, c.zone))
	if local.IsZero() {
		return local
	}
	return firstInstant(local, c.zone)
}

// delayed adds the delay of a slot. It follows from role and slot alone, so
// that it is the same whoever computes it, and differs from role to role and
// from slot to slot.
func (c calendar) delayed(slot time.Time) time.Time {
	if slot.IsZero() || c.Jitter < time.Second {
		return slot
	}
	hash := sha256.Sum256(slot.UTC().AppendFormat([]byte(c.role+" "), time.RFC3339))
	seconds := time.Duration(binary.BigEndian.Uint32(hash[:])) % (c.Jitter / time.Second)
	return slot.Add(seconds * time.Second)
}

// next is when the role rotates next, strictly after a time.
func (c calendar) next(after time.Time) time.Time {
	switch {
	case c.Period > 0:
		return c.delayed(after.Add(c.Period))
	case c.Jitter == 0:
		return c.slot(after)
	}
	// Slots keep their order but for the night on which clocks are turned
	// forward, which may bring two of them closer than their delays.
	var first time.Time
	for slot := c.slot(after.Add(-c.Jitter)); !slot.IsZero() && (first.IsZero() || slot.Before(first)); slot = c.slot(slot) {
		if at := c.delayed(slot); at.After(after) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// served is Served.
func (c calendar) served(next, now time.Time) (following time.Time, passed Passed) {
	following = c.next(now)
	if c.Period > 0 || next.IsZero() || next.After(now) {
		return following, passed // periods begin anew with each rotation
	}
	return following, c.pass(next, now.Add(1))
}

// due is Due.
func (c calendar) due(next, now time.Time) (due bool, moved time.Time, passed Passed) {
	if !automatic(c.Spec) || next.IsZero() || now.Before(next) {
		return false, time.Time{}, Passed{}
	}
	if c.patience() == 0 || now.Before(c.opened(next).Add(c.patience())) {
		return true, time.Time{}, Passed{}
	}
	moved, passed = c.move(next, now)
	return !moved.IsZero() && !moved.After(now), moved, passed
}

// opened is when the window of a stored time began: at its slot, whatever the
// delay. A time that is no slot was set by hand, and is its own.
func (c calendar) opened(next time.Time) time.Time {
	if c.Jitter == 0 {
		return next
	}
	for slot := c.slot(next.Add(-c.Jitter)); !slot.IsZero() && !slot.After(next); slot = c.slot(slot) {
		if c.delayed(slot).Equal(next) {
			return slot
		}
	}
	return next
}

// move is the first slot whose time has not run out at now, after a stored one
// whose has.
func (c calendar) move(next, now time.Time) (moved time.Time, passed Passed) {
	earliest := now.Add(-c.patience())
	if c.Period > 0 {
		n := earliest.Sub(next)/c.Period + 1
		last := next.Add((n - 1) * c.Period)
		return c.delayed(next.Add(n * c.Period)), Passed{Count: int(n), Last: last}
	}
	moved = c.delayed(c.slot(earliest))
	if moved.IsZero() {
		return moved, Passed{Count: 1, Last: next}
	}
	passed = c.pass(next, moved)
	return moved, Passed{Count: passed.Count + 1, Last: later(next, passed.Last)}
}

// pass counts the slots of the cron between two times.
func (c calendar) pass(after, before time.Time) (passed Passed) {
	for at := c.next(after); !at.IsZero() && at.Before(before) && passed.Count < mostCounted; at = c.next(at) {
		passed.Count++
		passed.Last = at
	}
	return passed
}

// mostCounted bounds what a role costs that nobody has looked at for decades.
const mostCounted = 100_000

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
