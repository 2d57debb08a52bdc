package schedule

import (
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"regexp"
	"strings"
	"time"

	cronparser "github.com/robfig/cron/v3"
)

// longestCron is more than any cron needs: a list of all minutes has 169
// characters.
const longestCron = 512

const wanted = "give five fields (minute, hour, day of month, month, day of week), or @hourly, @daily, @weekly, @monthly or @yearly"

type field struct {
	name, allowed string
	option        cronparser.ParseOption
}

// fields are the five of a cron, in order.
var fields = [...]field{
	{"minute", "0-59", cronparser.Minute},
	{"hour", "0-23", cronparser.Hour},
	{"day of month", "1-31", cronparser.Dom},
	{"month", "1-12 or JAN-DEC", cronparser.Month},
	{"day of week", "0-6 or SUN-SAT", cronparser.Dow},
}

// item is one part of a field's list. The parser takes more than this for
// granted: an empty list never fires, *-5 is *, and a TZ= without a space after
// it makes it panic.
var item = regexp.MustCompile(`^([*?]|[0-9A-Za-z]+(-[0-9A-Za-z]+)?)(/[0-9]+)?$`)

// seven is Sunday to some crons and an error to others.
var seven = regexp.MustCompile(`(^|[,-])0*7([,/-]|$)`)

type cron struct{ *cronparser.SpecSchedule }

// parse reads a cron, or says in one sentence what to give instead. It fires at
// minutes of a clock without a zone, which is what UTC stands for here.
func parse(given string) (cron, error) {
	s := strings.TrimSpace(given)
	if err := checkForm(s); err != nil {
		return cron{}, fmt.Errorf("rotation_schedule is %s: %w", quote(given), err)
	}
	parsed, err := cronparser.ParseStandard(s)
	if err != nil {
		return cron{}, fmt.Errorf("rotation_schedule is %s: %w; %s", quote(given), err, wanted)
	}
	spec, ok := parsed.(*cronparser.SpecSchedule)
	if !ok { // @every, which checkForm has refused
		return cron{}, fmt.Errorf("rotation_schedule is %s: %s", quote(given), wanted)
	}
	spec.Location = time.UTC
	return cron{spec}, nil
}

func checkForm(s string) error {
	upper := strings.ToUpper(s)
	switch {
	case s == "":
		return errors.New(wanted)
	case len(s) > longestCron:
		return fmt.Errorf("it is %d characters long and at most %d are allowed", len(s), longestCron)
	case strings.HasPrefix(upper, "TZ=") || strings.HasPrefix(upper, "CRON_TZ="):
		return errors.New("a time zone is not allowed here, give it as rotation_timezone (UTC without one)")
	case strings.HasPrefix(upper, "@EVERY"):
		return errors.New("@every is not allowed, give the interval as rotation_period")
	case strings.HasPrefix(s, "@"):
		return checkDescriptor(s)
	}
	return checkFields(strings.Fields(s))
}

func checkDescriptor(s string) error {
	switch s {
	case "@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually":
		return nil
	}
	return errors.New(wanted)
}

func checkFields(given []string) error {
	if len(given) != len(fields) {
		hint := ""
		if len(given) == len(fields)+1 {
			hint = "; seconds and years are not allowed"
		}
		return fmt.Errorf("it has %d fields and must have 5, minute, hour, day of month, month and day of week%s", len(given), hint)
	}
	for i, f := range fields {
		if err := f.check(given[i]); err != nil {
			return fmt.Errorf("the %s is %q: %w", f.name, given[i], err)
		}
	}
	return nil
}

func (f field) check(given string) error {
	if f.option == cronparser.Dow && seven.MatchString(given) {
		return errors.New("7 is not a day, use 0 for Sunday")
	}
	understood := true
	for part := range strings.SplitSeq(given, ",") {
		understood = understood && item.MatchString(part)
	}
	if understood {
		_, err := cronparser.NewParser(f.option).Parse(given)
		understood = err == nil
	}
	if !understood {
		return fmt.Errorf("allowed are %s, lists (1,3), ranges from low to high (1-5), steps (*/5) and *", f.allowed)
	}
	return nil
}

// quote keeps what a user sent short enough for one sentence.
func quote(s string) string {
	if len(s) > longestCron {
		return fmt.Sprintf("%q…", s[:40])
	}
	return fmt.Sprintf("%q", s)
}

// next is the first firing strictly after a time.
func (c cron) next(after time.Time) time.Time {
	// The parser's library looks five years ahead. 29 February can be eight years
	// away (2096 to 2104), so it is asked again from where it stopped looking.
	for range 2 {
		if next := c.SpecSchedule.Next(after); !next.IsZero() {
			return next
		}
		after = time.Date(after.Year()+6, time.January, 1, 0, 0, 0, 0, time.UTC).Add(-time.Second)
	}
	return time.Time{}
}

// star is set in a field that was given as * (or ?), which restricts nothing.
const star = 1 << 63

func (c cron) daysAreJoinedByOr() bool { return c.Dom&star == 0 && c.Dow&star == 0 }

// smallestGap is exact: every day that fires does so at the same minutes, so it
// is the smallest gap within a day, or the one over the fewest days. It is 0 for
// a cron that never fires.
func (c cron) smallestGap() time.Duration {
	days := c.daysBetween()
	if days == 0 {
		return 0
	}
	first, last, within := c.minutes()
	gap := days*24*60 - (last - first)
	if within > 0 {
		gap = min(gap, within)
	}
	return time.Duration(gap) * time.Minute
}

// minutes are the first and the last minute of a day that fires, and the
// smallest gap between two of them (0 when there is one only).
func (c cron) minutes() (first, last, gap int) {
	first = bits.TrailingZeros64(c.Hour)*60 + bits.TrailingZeros64(c.Minute)
	last = -1
	for at := first; at < 24*60; at++ {
		if c.Hour&(1<<(at/60)) == 0 || c.Minute&(1<<(at%60)) == 0 {
			continue
		}
		if last >= 0 && (gap == 0 || at-last < gap) {
			gap = at - last
		}
		last = at
	}
	return first, last, gap
}

// cycle is the number of days after which the calendar repeats, weekdays
// included: 400 years.
const cycle = 400*365 + 97

// daysBetween is the smallest number of days from one day that fires to the
// next, or 0 when none ever does. It is exact, as it looks at a whole cycle.
func (c cron) daysBetween() int {
	first, last, smallest := -1, -1, cycle
	for day := range c.days() {
		if first < 0 {
			first = day
		} else {
			smallest = min(smallest, day-last)
		}
		if smallest == 1 {
			return 1
		}
		last = day
	}
	if first < 0 {
		return 0
	}
	return min(smallest, first+cycle-last)
}

// days are the days of one cycle that fire, counted from 1 January 2000, a
// Saturday.
func (c cron) days() iter.Seq[int] {
	return func(yield func(int) bool) {
		begin := 0
		for i := range 400 * 12 {
			year, month := 2000+i/12, time.Month(i%12+1)
			length := time.Date(year, month+1, 0, 0, 0, 0, 0, time.UTC).Day()
			firing := c.daysOf(month, length, (begin+int(time.Saturday))%7)
			for ; firing != 0; firing &= firing - 1 { // clears the lowest bit
				if !yield(begin + bits.TrailingZeros64(firing) - 1) {
					return
				}
			}
			begin += length
		}
	}
}

// daysOf has bit n set when the n-th of a month fires that begins on a weekday.
func (c cron) daysOf(month time.Month, length, weekday int) uint64 {
	if c.Month&(1<<month) == 0 {
		return 0
	}
	const sixTimes = 1 | 1<<7 | 1<<14 | 1<<21 | 1<<28 | 1<<35
	weeks := (c.Dow & 0x7f) * sixTimes >> weekday << 1
	firing := c.Dom & weeks
	if c.daysAreJoinedByOr() {
		firing = c.Dom | weeks
	}
	return firing & (1<<(length+1) - 2)
}
