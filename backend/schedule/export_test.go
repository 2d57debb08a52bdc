package schedule

import "time"

// Calendar is what a node keeps of a role between two restarts of the
// simulation, which would otherwise read every schedule a hundred times.
type Calendar struct{ calendar }

func NewCalendar(spec Spec, role string) Calendar { return Calendar{newCalendar(spec, role)} }

func (c Calendar) Served(next, now time.Time) (time.Time, Passed) { return c.served(next, now) }

func (c Calendar) Due(next, now time.Time) (bool, time.Time, Passed) { return c.due(next, now) }

func (c Calendar) Next(after time.Time) time.Time { return c.next(after) }
