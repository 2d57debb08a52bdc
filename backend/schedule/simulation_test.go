package schedule_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
)

// chance is rapid's, where a failure is to be made small, or a seeded
// generator's, where there is much to play.
type chance func(low, high int) int

func (c chance) one(of ...string) string { return of[c(0, len(of)-1)] }

func (c chance) duration(low, high time.Duration) time.Duration {
	return time.Duration(c(int(low/time.Second), int(high/time.Second))) * time.Second
}

// plan is a spec and, for a cron, what it says in the words of this test.
type plan struct {
	schedule.Spec
	fires func(day time.Time) bool
	clock []time.Duration // times of the day
}

func (c chance) plan() plan {
	p := c.cronPlan()
	if c(0, 5) == 0 {
		p = plan{Spec: schedule.Spec{Period: c.duration(time.Hour, 40*day)}}
	}
	gap := schedule.SmallestGap(p.Spec)
	if p.Cron != "" && c(0, 2) == 0 {
		p.Window = min(gap, c.duration(time.Minute, 12*time.Hour))
	}
	if c(0, 1) == 0 {
		p.Jitter = min((gap-1)/2, 6*time.Hour, c.duration(time.Second, 6*time.Hour)).Truncate(time.Second)
	}
	if p.Window > 0 && p.Jitter >= p.Window {
		p.Jitter = 0
	}
	if p.Window == 0 {
		p.Missed = c.one("", schedule.MissedAtOnce, schedule.MissedNext)
	}
	return p
}

var playZones = []string{
	"", "Europe/Berlin", "America/New_York", "America/Santiago", "Africa/Cairo", "Africa/Casablanca", "Asia/Kathmandu",
	"Australia/Lord_Howe", "Pacific/Chatham", "America/St_Johns", "Antarctica/Troll", "Asia/Beirut",
}

func (c chance) cronPlan() plan {
	p := plan{Spec: schedule.Spec{Zone: c.one(playZones...)}}
	minute := c(0, 59)
	var hours []string
	every := []int{1, 4, 8, 12, 24}[min(4, c(0, 19))]
	for h := c(0, every-1); h < 24; h += every {
		hours = append(hours, fmt.Sprint(h))
		p.clock = append(p.clock, time.Duration(h)*time.Hour+time.Duration(minute)*time.Minute)
	}
	days := c.one("* * *", "* * 0", "* * 1,4", "1 * *", "31 * *", "*/2 * *", "1 */3 *", "* 2-4,10 *")
	p.fires = map[string]func(time.Time) bool{
		"* * *":   func(time.Time) bool { return true },
		"* * 0":   func(d time.Time) bool { return d.Weekday() == time.Sunday },
		"* * 1,4": func(d time.Time) bool { return d.Weekday() == time.Monday || d.Weekday() == time.Thursday },
		"1 * *":   func(d time.Time) bool { return d.Day() == 1 },
		"31 * *":  func(d time.Time) bool { return d.Day() == 31 },
		"*/2 * *": func(d time.Time) bool { return d.Day()%2 == 1 },
		"1 */3 *": func(d time.Time) bool { return d.Day() == 1 && d.Month()%3 == 1 },
		"* 2-4,10 *": func(d time.Time) bool {
			return d.Month() >= 2 && d.Month() <= 4 || d.Month() == 10
		},
	}[days]
	p.Cron = fmt.Sprintf("%d %s %s", minute, strings.Join(hours, ","), days)
	return p
}

// slots are all times after one and up to another at which a cron's role is to
// rotate, found by going through a calendar.
func (p plan) slots(t require.TestingT, name string, after, to time.Time) []time.Time {
	in, err := time.LoadLocation(p.Zone)
	require.NoError(t, err)
	known := after.Add(-4 * day).Truncate(day)
	turned := append([]time.Time{known}, turns(in, known, to.Add(3*day))...)
	var slots []time.Time
	for d := after.Truncate(day).Add(-2 * day); d.Before(to.Add(2 * day)); d = d.Add(day) {
		for _, clock := range p.clock {
			if p.fires(d) {
				slots = append(slots, p.delayed(name, instant(d.Add(clock), in, turned)))
			}
		}
	}
	slices.SortFunc(slots, time.Time.Compare)
	slots = slices.CompactFunc(slots, time.Time.Equal) // hours that a clock skips become one
	return slices.DeleteFunc(slots, func(s time.Time) bool { return !s.After(after) || s.After(to) })
}

// instant is the first at which the clock shows a time or a later one.
func instant(local time.Time, in *time.Location, turned []time.Time) time.Time {
	for i, begin := range turned {
		_, offset := begin.In(in).Zone()
		at := local.Add(-time.Duration(offset) * time.Second)
		if at.Before(begin) {
			at = begin
		}
		if i+1 == len(turned) || at.Before(turned[i+1]) {
			return at
		}
	}
	panic("no clock was ever turned")
}

// delayed asks the package for the delay by way of a period, which knows no
// calendar.
func (p plan) delayed(name string, slot time.Time) time.Time {
	const period = 10_000 * time.Hour
	return schedule.Next(schedule.Spec{Period: period, Jitter: p.Jitter}, name, slot.Add(-period))
}

// entry is what a role's entry holds, in JSON as in storage.
type entry struct {
	Spec   schedule.Spec
	Next   time.Time
	Missed int
}

// ledger is what became of each slot.
type ledger struct{ slots, served, missed, doubled int }

// player plays one role through a stretch of time.
type player struct {
	require.TestingT
	chance
	plan
	name     string
	now, end time.Time
	entry    entry             // in storage
	node     schedule.Calendar // in memory
	slots    []time.Time       // not yet served or missed; nil for a period
	ledger   ledger
}

// The invariant: every due slot is served once, or accounted for as missed, and
// none is served twice.
func (c chance) play(t require.TestingT, length time.Duration) ledger {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Add(c.duration(0, 365*day))
	p := &player{TestingT: t, chance: c, plan: c.plan(), name: fmt.Sprint("role-", c(0, 1000)), now: begin, end: begin.Add(length)}
	require.NoError(t, schedule.Validate(p.Spec), "%+v", p.Spec)
	if p.Cron != "" {
		p.slots = p.plan.slots(t, p.name, begin, p.end.Add(day))
	}
	p.entry = entry{Spec: p.Spec, Next: schedule.Next(p.Spec, p.name, begin)}
	p.restart()
	for p.wait(); p.now.Before(p.end); p.wait() {
		p.look()
	}
	next := p.entry.Next
	require.True(t, len(p.slots) == 0 || !p.slots[0].Before(next), "%s was passed over silently: %+v", p.slots, p.Spec)
	require.Zero(t, p.ledger.doubled, "served twice, or one before it left out: %+v", p.Spec)
	require.Equal(t, p.ledger.slots, p.ledger.served+p.ledger.missed)
	require.Equal(t, p.ledger.missed, p.entry.Missed)
	return p.ledger
}

// restart leaves of a node what it has stored.
func (p *player) restart() {
	raw, err := json.Marshal(p.entry)
	require.NoError(p, err)
	p.entry = entry{}
	require.NoError(p, json.Unmarshal(raw, &p.entry))
	p.node = schedule.NewCalendar(p.entry.Spec, p.name)
}

// wait lets time pass until somebody looks at the role: mostly when it is due,
// sometimes early, sometimes after nobody was active for long.
func (p *player) wait() {
	at := p.entry.Next.Add(p.duration(0, 90*time.Second))
	switch p.one("on time", "on time", "on time", "on time", "on time", "on time", "early", "late", "down") {
	case "early":
		at = p.now.Add(p.duration(time.Second, 2*day))
	case "late":
		at = at.Add(p.duration(0, 2*time.Hour))
	case "down":
		p.restart()
		at = at.Add(p.duration(0, 6*time.Hour))
		if p.chance(0, 19) == 0 {
			at = at.Add(p.duration(0, 20*day))
		}
	}
	if at.After(p.now) {
		p.now = at
	}
}

func (p *player) look() {
	e := &p.entry
	due, moved, passed := p.node.Due(e.Next, p.now)
	switch {
	case !moved.IsZero():
		p.pass(passed, e.Next, moved)
		e.Next = moved
	case due && p.chance(0, 9) == 0: // it fails, or the node dies in the middle
		p.now = p.now.Add(p.duration(time.Second, time.Hour))
		p.restart()
	case due:
		p.serve(e)
	default:
		require.True(p, p.now.Before(e.Next), "%s is left at %s: %+v", e.Next, p.now, e.Spec)
	}
}

func (p *player) serve(e *entry) {
	p.ledger.slots++
	p.ledger.served++
	switch {
	case p.Cron == "":
	case len(p.slots) > 0 && p.slots[0].Equal(e.Next):
		p.slots = p.slots[1:]
	default:
		p.ledger.doubled++
	}
	p.now = p.now.Add(p.duration(0, 5*time.Minute)) // until it is promoted
	next, passed := p.node.Served(e.Next, p.now)
	require.True(p, next.After(p.now))
	p.pass(passed, e.Next, next)
	e.Next = next
}

// pass checks what the package says it passed over against the calendar.
func (p *player) pass(passed schedule.Passed, from, to time.Time) {
	p.ledger.slots += passed.Count
	p.ledger.missed += passed.Count
	p.entry.Missed += passed.Count
	if p.Cron == "" {
		return
	}
	var missed []time.Time
	for len(p.slots) > 0 && p.slots[0].Before(to) {
		missed, p.slots = append(missed, p.slots[0]), p.slots[1:]
	}
	require.Equal(p, len(missed), passed.Count, "from %s to %s: %+v", from, to, p.Spec)
	if len(missed) > 0 {
		require.Equal(p, missed[len(missed)-1], passed.Last)
	}
}

func TestEveryDueSlotIsServedOnceOrAccountedFor(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		chance(func(low, high int) int { return rapid.IntRange(low, high).Draw(t, "chance") }).play(t, 60*day)
	})
}

// TestAYear prints what a year of a thousand schedules comes to.
func TestAYear(t *testing.T) {
	var sum ledger
	first := rand.Uint64N(oneIn)
	t.Logf("seeds %d, %d…", first, first+oneIn)
	for seed := first; seed < 1000; seed += oneIn {
		random := rand.New(rand.NewPCG(seed, 20261122))
		one := chance(func(low, high int) int { return low + random.IntN(high-low+1) }).play(t, 365*day)
		sum.slots += one.slots
		sum.served += one.served
		sum.missed += one.missed
		sum.doubled += one.doubled
	}
	line := fmt.Sprintf("%d schedules, 1 year: %d slots, %d served, %d missed and accounted for, %d doubled\n",
		1000/oneIn, sum.slots, sum.served, sum.missed, sum.doubled)
	fmt.Print(line)
	// go test shows what a package prints only with -v; make shows this.
	if file := os.Getenv("YEAR_FILE"); file != "" && oneIn == 1 {
		require.NoError(t, os.WriteFile(file, []byte(line), 0o600))
	}
	require.Equal(t, sum.slots, sum.served+sum.missed)
	require.Zero(t, sum.doubled)
	require.Greater(t, sum.missed, 10_000/oneIn, "downtimes are long enough to matter")
}
