package schedule_test

import (
	"archive/zip"
	"fmt"
	"go/build"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
)

// allZones are the names in the time zone data that Go comes with.
func allZones(t *testing.T) []string {
	t.Helper()
	data, err := zip.OpenReader(filepath.Join(build.Default.GOROOT, "lib", "time", "zoneinfo.zip"))
	if err != nil {
		t.Skipf("this Go has no time zone data of its own: %v", err)
	}
	defer func() { require.NoError(t, data.Close()) }()
	var names []string
	for _, f := range data.File {
		if name := f.Name; !strings.HasSuffix(name, "/") && name != "Factory" {
			names = append(names, name)
		}
	}
	require.Greater(t, len(names), 400)
	return names
}

func wall(t time.Time) time.Time {
	_, offset := t.Zone()
	return t.UTC().Add(time.Duration(offset) * time.Second)
}

// turns are the instants at which a zone's clocks are turned, to the quarter of
// an hour, in which all of them are since 1973.
func turns(in *time.Location, from, to time.Time) []time.Time {
	var found []time.Time
	for at := from; at.Before(to); at = at.Add(day) {
		for q := at; !wall(at.Add(day).In(in)).Equal(wall(at.In(in)).Add(day)) && q.Before(at.Add(day)); q = q.Add(15 * time.Minute) {
			next := q.Add(15 * time.Minute).In(in)
			if !wall(next).Equal(wall(q.In(in)).Add(15 * time.Minute)) {
				found = append(found, next.UTC())
			}
		}
	}
	return found
}

// slotsByTheClock watches a clock, minute after minute: a slot is the first
// instant at which it shows a minute of the schedule, or has passed it.
func slotsByTheClock(in *time.Location, from, to time.Time, fires func(local time.Time) bool) []time.Time {
	var slots []time.Time
	latest := wall(from.Add(-2 * day).In(in))
	for at := from.Add(-2 * day); at.Before(to); at = at.Add(time.Minute) {
		due := false
		for showing := wall(at.In(in)); latest.Before(showing); {
			latest = latest.Add(time.Minute)
			due = due || fires(latest)
		}
		if due && at.After(from) {
			slots = append(slots, at)
		}
	}
	return slots
}

var clockCrons = map[string]func(local time.Time) bool{
	"30 2 * * *": func(l time.Time) bool { return l.Hour() == 2 && l.Minute() == 30 },
	"0,59 0,23 * * *": func(l time.Time) bool {
		return (l.Minute() == 0 || l.Minute() == 59) && (l.Hour() == 0 || l.Hour() == 23)
	},
	"*/30 * * * *": func(l time.Time) bool { return l.Minute()%30 == 0 },
	"5 1-3 * * SUN": func(l time.Time) bool {
		return l.Minute() == 5 && l.Hour() >= 1 && l.Hour() <= 3 && l.Weekday() == time.Sunday
	},
	"0 0,1,2,3 */2 * *": func(l time.Time) bool { return l.Minute() == 0 && l.Hour() < 4 && l.Day()%2 == 1 },
}

// TestEverySlotOnceInEveryZone: wherever and however clocks are turned, no slot
// is left out and none comes twice.
func TestEverySlotOnceInEveryZone(t *testing.T) {
	checked := 0
	watched := map[string][]time.Time{} // clocks that are turned alike
	names, first := allZones(t), rand.IntN(oneIn)
	t.Logf("zones %d, %d…", first, first+oneIn)
	for i := first; i < len(names); i += oneIn {
		name := names[i]
		in, err := time.LoadLocation(name)
		require.NoError(t, err)
		require.NoError(t, schedule.Validate(schedule.Spec{Cron: "30 2 * * *", Zone: name}))
		for _, turn := range turns(in, at(t, "2026-01-01 00:00"), at(t, "2028-01-01 00:00")) {
			checked++
			for c, fires := range clockCrons {
				key := fmt.Sprint(c, wall(turn.Add(-1).In(in)), wall(turn.In(in)), turn)
				if _, ok := watched[key]; !ok {
					watched[key] = slotsByTheClock(in, turn.Add(-26*time.Hour), turn.Add(26*time.Hour), fires)
				}
				requireSlots(t, schedule.Spec{Cron: c, Zone: name}, turn, watched[key])
			}
		}
	}
	require.Greater(t, checked, 400/oneIn)
}

// TestADayThatIsSkipped: Samoa went over the date line, and had no 30 December.
func TestADayThatIsSkipped(t *testing.T) {
	in, err := time.LoadLocation("Pacific/Apia")
	require.NoError(t, err)
	turn := at(t, "2011-12-30 10:00")
	for c, fires := range clockCrons {
		requireSlots(t, schedule.Spec{Cron: c, Zone: "Pacific/Apia"}, turn, slotsByTheClock(in, turn.Add(-26*time.Hour), turn.Add(26*time.Hour), fires))
	}
	require.Equal(t, turn, schedule.Next(schedule.Spec{Cron: "0 12 30 12 *", Zone: "Pacific/Apia"}, role, at(t, "2011-06-01 00:00")))
}

func requireSlots(t *testing.T, spec schedule.Spec, turn time.Time, want []time.Time) {
	t.Helper()
	got, c := []time.Time(nil), schedule.NewCalendar(spec, role)
	for slot := c.Next(turn.Add(-26 * time.Hour)); slot.Before(turn.Add(26 * time.Hour)); slot = c.Next(slot) {
		got = append(got, slot)
	}
	if len(want) == 0 && len(got) == 0 {
		return // require.Equal would tell nil from empty
	}
	require.Equal(t, want, got, "%s in %s around %s", spec.Cron, spec.Zone, turn)
}

// What robfig/cron v3 does here: it leaves 29 March out, and fires twice on 25
// October (facts of this project, vault.md §c 30).
func TestGapAndFold(t *testing.T) {
	for name, c := range map[string]struct {
		cron, zone, after string
		want              []string
	}{
		"gap":             {"30 2 * * *", "Europe/Berlin", "2026-03-28 12:00", []string{"2026-03-29 01:00", "2026-03-30 00:30"}},
		"fold":            {"30 2 * * *", "Europe/Berlin", "2026-10-24 12:00", []string{"2026-10-25 00:30", "2026-10-26 01:30"}},
		"asked in fold":   {"30 2 * * *", "Europe/Berlin", "2026-10-25 01:10", []string{"2026-10-26 01:30"}},
		"hours meet":      {"0 2,3 * * *", "Europe/Berlin", "2026-03-28 12:00", []string{"2026-03-29 01:00", "2026-03-30 00:00"}},
		"midnight, gap":   {"0 0 * * *", "Africa/Cairo", "2026-04-23 12:00", []string{"2026-04-23 22:00", "2026-04-24 21:00"}},
		"half an hour":    {"15 2 * * *", "Australia/Lord_Howe", "2026-10-03 00:00", []string{"2026-10-03 15:30", "2026-10-04 15:15"}},
		"leap day, local": {"0 0 29 2 *", "Asia/Tokyo", "2026-01-01 00:00", []string{"2028-02-28 15:00", "2032-02-28 15:00"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := at(t, c.after)
			for _, want := range c.want {
				got = schedule.Next(schedule.Spec{Cron: c.cron, Zone: c.zone}, role, got)
				require.Equal(t, at(t, want), got)
			}
		})
	}
}

func TestJitterIsStableSpreadAndBounded(t *testing.T) {
	spec := schedule.Spec{Cron: "0 3 * * *", Zone: "Europe/Berlin", Jitter: time.Hour}
	after := at(t, "2026-06-01 00:00")
	slot := at(t, "2026-06-01 01:00")
	quarters := [4]int{}
	for i := range 4000 {
		name := fmt.Sprint("role-", i)
		fires := schedule.Next(spec, name, after)
		require.Equal(t, fires, schedule.Next(spec, name, after.Add(13*time.Minute)), "whoever asks, and whenever")
		delay := fires.Sub(slot)
		require.True(t, delay >= 0 && delay < time.Hour, "%s", delay)
		quarters[delay/(15*time.Minute)]++
	}
	for _, n := range quarters {
		require.InDelta(t, 1000, n, 120)
	}
	other := schedule.Next(spec, role, slot.Add(time.Hour)).Sub(slot) - day
	require.NotEqual(t, schedule.Next(spec, role, after).Sub(slot), other, "slots of a role differ, too")
}

// A window belongs to the slot, not to the delay: 03:00 to 04:00 stays that.
func TestWindowOfADelayedSlotEndsWithItsSlot(t *testing.T) {
	spec := schedule.Spec{Cron: "0 3 * * *", Window: time.Hour, Jitter: 50 * time.Minute}
	next := schedule.Next(spec, role, at(t, "2026-03-01 00:00"))
	end := at(t, "2026-03-01 04:00")
	due, moved, _ := schedule.Due(spec, role, next, end.Add(-1))
	require.True(t, due)
	require.Zero(t, moved)
	due, moved, passed := schedule.Due(spec, role, next, end)
	require.False(t, due)
	require.Equal(t, schedule.Next(spec, role, next), moved)
	require.Equal(t, schedule.Passed{Count: 1, Last: next}, passed)
	// A time set by hand is no slot: its window is its own.
	byHand := at(t, "2026-03-01 12:34")
	due, _, _ = schedule.Due(spec, role, byHand, byHand.Add(59*time.Minute))
	require.True(t, due)
}

func TestNextN(t *testing.T) {
	spec := cron("0 3 * * *")
	stored := at(t, "2026-03-01 12:00") // set by hand
	require.Equal(t, []time.Time{stored, at(t, "2026-03-02 03:00"), at(t, "2026-03-03 03:00")}, schedule.NextN(spec, role, stored, 3))
	require.Empty(t, schedule.NextN(spec, role, time.Time{}, 3))
	require.Len(t, schedule.NextN(schedule.Spec{}, role, stored, 3), 1, "nothing follows the stored one")
}
