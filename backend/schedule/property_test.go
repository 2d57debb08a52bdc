package schedule_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
)

func moments() *rapid.Generator[time.Time] {
	return rapid.Custom(func(t *rapid.T) time.Time {
		seconds := rapid.Int64Range(0, 150*365*24*3600).Draw(t, "seconds")
		nanos := rapid.Int64Range(0, 999_999_999).Draw(t, "nanos")
		return time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(seconds) * time.Second).Add(time.Duration(nanos))
	})
}

func crons() *rapid.Generator[string] {
	return rapid.Custom(func(t *rapid.T) string {
		return strings.Join([]string{
			rapid.SampledFrom([]string{"0", "30", "*/15", "*/40", "5,6", "59", "10-20/5"}).Draw(t, "minute"),
			rapid.SampledFrom([]string{"*", "0", "3", "3,9", "*/6", "0,23", "1-5"}).Draw(t, "hour"),
			rapid.SampledFrom([]string{"*", "*", "1", "13", "29", "31", "*/2", "1-7"}).Draw(t, "day"),
			rapid.SampledFrom([]string{"*", "*", "2", "JAN,MAR", "*/3"}).Draw(t, "month"),
			rapid.SampledFrom([]string{"*", "*", "?", "0", "MON-FRI", "5,6"}).Draw(t, "weekday"),
		}, " ")
	})
}

// specs are valid and automatic, with and without a window.
func specs() *rapid.Generator[schedule.Spec] {
	return rapid.Custom(func(t *rapid.T) schedule.Spec {
		if rapid.IntRange(0, 3).Draw(t, "sort") == 0 {
			seconds := rapid.IntRange(60, 400*24*3600).Draw(t, "period")
			return schedule.Spec{Period: time.Duration(seconds) * time.Second}
		}
		spec := schedule.Spec{Cron: crons().Draw(t, "cron")}
		if gap := schedule.SmallestGap(spec); gap > 0 && rapid.Bool().Draw(t, "windowed") {
			spec.Window = time.Duration(rapid.Int64Range(int64(time.Minute), int64(gap)).Draw(t, "window"))
		}
		return spec
	}).Filter(func(s schedule.Spec) bool { return schedule.Validate(s) == nil })
}

func TestNextIsStrictlyAfter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec, after := specs().Draw(t, "spec"), moments().Draw(t, "after")
		next := schedule.Next(spec, role, after)
		require.True(t, next.After(after), "%s is not after %s", next, after)
		require.Equal(t, time.UTC, next.Location())
	})
}

func TestNextIsTheSameInEveryTimeZone(t *testing.T) {
	zones := []string{"Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe", "Pacific/Apia"}
	rapid.Check(t, func(t *rapid.T) {
		spec, after := specs().Draw(t, "spec"), moments().Draw(t, "after")
		zone, err := time.LoadLocation(rapid.SampledFrom(zones).Draw(t, "zone"))
		require.NoError(t, err)
		require.Equal(t, schedule.Next(spec, role, after), schedule.Next(spec, role, after.In(zone)))
	})
}

func TestNextLeavesNoSlotOut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := schedule.Spec{Cron: crons().Filter(valid).Draw(t, "cron")}
		after := moments().Draw(t, "after")
		next := schedule.Next(spec, role, after)
		between := after.Add(time.Duration(rapid.Int64Range(0, int64(next.Sub(after))-1).Draw(t, "between")))
		require.Equal(t, next, schedule.Next(spec, role, between))
	})
}

func TestSlotsAreNeverCloserThanSmallestGap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := specs().Draw(t, "spec")
		slot := schedule.Next(spec, role, moments().Draw(t, "after"))
		gap := schedule.SmallestGap(spec)
		require.Positive(t, gap)
		for range 20 {
			following := schedule.Next(spec, role, slot)
			require.GreaterOrEqual(t, following.Sub(slot), gap)
			slot = following
		}
	})
}

// The smallest gap is met, not only a lower bound, wherever ten years show it.
func TestSmallestGapIsMet(t *testing.T) {
	for _, s := range []string{"0 0 13 * 5", "*/40 0,23 * * *", "59 23 */2 * *", "0 3,9 * * 1,4", "0 0 1-7 * *", "0 0 31 * *"} {
		spec := cron(s)
		want, met := schedule.SmallestGap(spec), false
		end := at(t, "2036-01-01 00:00")
		for slot := schedule.Next(spec, role, at(t, "2026-01-01 00:00")); slot.Before(end) && !met; {
			following := schedule.Next(spec, role, slot)
			met = following.Sub(slot) == want
			slot = following
		}
		require.True(t, met, "%s never has a gap of %s", s, want)
	}
}

func TestDueIsNeverTrueBeforeNext(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := specs().Draw(t, "spec")
		next := schedule.Next(spec, role, moments().Draw(t, "after"))
		early := next.Add(-time.Duration(rapid.Int64Range(1, int64(1000*day)).Draw(t, "early")))
		due, moved, _ := schedule.Due(spec, role, next, early)
		require.False(t, due)
		require.Zero(t, moved)
	})
}

// Looks at a role at random times, as nodes come and go, and follows every
// slot: it is taken within its window, or passed over after its window ended.
func TestEverySlotIsTakenOrMoved(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		spec := specs().Draw(t, "spec")
		now := moments().Draw(t, "now")
		stored := schedule.Next(spec, role, now)
		gap := schedule.SmallestGap(spec)
		for range 30 {
			now = now.Add(time.Duration(rapid.Int64Range(1, 3*int64(gap)).Draw(t, "wait")))
			due, moved, _ := schedule.Due(spec, role, stored, now)
			if !moved.IsZero() {
				requirePassedOver(t, spec, stored, moved, now)
				stored = moved
			}
			require.Equal(t, due, !now.Before(stored), "a slot that came and was not moved is due")
			if due {
				require.True(t, spec.Window == 0 || now.Before(stored.Add(spec.Window)), "taken outside its window")
				stored = schedule.Next(spec, role, now)
			}
		}
	})
}

// requirePassedOver checks that no slot from stored up to moved could still be
// taken, and that moved could.
func requirePassedOver(t *rapid.T, spec schedule.Spec, stored, moved, now time.Time) {
	t.Helper()
	require.Positive(t, spec.Window, "only a window moves a slot")
	require.True(t, moved.Add(spec.Window).After(now))
	for slot := stored; !slot.Equal(moved); slot = schedule.Next(spec, role, slot) {
		require.True(t, slot.Before(moved), "%s is not a slot", moved)
		require.False(t, slot.Add(spec.Window).After(now), "%s could still be taken", slot)
	}
}

// What users type must never panic, and what is accepted must fire.
func TestValidateOfAnything(t *testing.T) {
	piece := rapid.SampledFrom([]string{
		"0", "7", "31", "*", "/", "-", ",", " ", "  ", "?", "@", "@every ", "@daily",
		"TZ=", "CRON_TZ=UTC ", "MON", "sun", "99", "L", "#", "\x00", "é", "\xff",
	})
	rapid.Check(t, func(t *rapid.T) {
		spec := schedule.Spec{
			Cron:   strings.Join(rapid.SliceOfN(piece, 0, 20).Draw(t, "pieces"), ""),
			Window: time.Duration(rapid.Int64Range(-1, int64(2*day)).Draw(t, "window")),
		}
		now := moments().Draw(t, "now")
		schedule.Notes(spec)
		next := schedule.Next(spec, role, now)
		due, _, _ := schedule.Due(spec, role, now, now)
		if spec.Cron != "" && schedule.Validate(spec) == nil {
			require.True(t, next.After(now))
			require.True(t, due)
		}
	})
}

func valid(s string) bool { return schedule.Validate(schedule.Spec{Cron: s}) == nil }

func BenchmarkValidateRareCron(b *testing.B) {
	for b.Loop() {
		_ = schedule.Validate(schedule.Spec{Cron: "0 0 29 2 *", Window: time.Hour})
	}
}

func BenchmarkNextRareCron(b *testing.B) {
	after := time.Date(2096, 3, 1, 0, 0, 0, 0, time.UTC)
	for b.Loop() {
		schedule.Next(schedule.Spec{Cron: "0 0 29 2 *"}, role, after)
	}
}

func BenchmarkNextInAZone(b *testing.B) {
	after := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	for b.Loop() {
		schedule.Next(schedule.Spec{Cron: "0 3 * * *", Zone: "Europe/Berlin"}, role, after)
	}
}
