package schedule

import (
	"fmt"
	"regexp"
	"time"
	_ "time/tzdata" // a minimal host has no zones of its own
)

// zoneName leaves out what a host may have beside the zones: localtime,
// posixrules, and right/…, whose clocks count leap seconds.
var zoneName = regexp.MustCompile(`^[A-Z][A-Za-z0-9_+-]*(/[A-Z][A-Za-z0-9_+-]*)*$`)

// zone finds a zone by its IANA name; UTC without one.
func zone(name string) (*time.Location, error) {
	if name == "" {
		return time.UTC, nil
	}
	if zoneName.MatchString(name) && name != "Local" { // Local is whatever the node that is active has
		if found, err := time.LoadLocation(name); err == nil {
			return found, nil
		}
	}
	return nil, fmt.Errorf("rotation_timezone is %s: give a name of the IANA time zone database, like Europe/Berlin, or clear it for UTC", quote(name))
}

// A slot of a cron is a minute of a local clock. It fires at the first instant
// at which that clock shows the minute or a later one. So a minute that the
// clock skips fires when it has skipped it, one that it shows twice fires at
// the first time, and later minutes never fire before earlier ones. The cron
// library fires the one not at all and the other twice (robfig/cron v3.0.1).
//
// Local times are held as if they were UTC, which has every minute once.

// shown is what a clock in t's zone shows at t.
func shown(t time.Time) time.Time {
	_, offset := t.Zone()
	return t.UTC().Add(time.Duration(offset) * time.Second)
}

// aDay is more than clocks differ from UTC, and than they are ever turned back.
const aDay = 24 * time.Hour

// reached is the latest time that a clock has shown by an instant: later than
// what it shows then, after it was turned back.
func reached(at time.Time, in *time.Location) time.Time {
	at = at.In(in)
	latest := shown(at)
	for before := at; ; {
		start, _ := before.ZoneBounds()
		if start.IsZero() || start.Before(at.Add(-aDay)) {
			return latest
		}
		before = start.Add(-1)
		if earlier := shown(before); earlier.After(latest) {
			latest = earlier
		}
	}
}

// firstInstant is the first at which a clock shows a local time or a later one.
func firstInstant(local time.Time, in *time.Location) time.Time {
	for at := local.Add(-aDay).In(in); ; {
		_, offset := at.Zone()
		_, end := at.ZoneBounds()
		instant := local.Add(-time.Duration(offset) * time.Second)
		if instant.Before(at) { // the clock was turned past it
			instant = at
		}
		if end.IsZero() || instant.Before(end) {
			return instant.UTC()
		}
		at = end
	}
}
