package schedule_test

import (
	"strings"
	"testing"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
)

// FuzzSchedule: a schedule is refused with one sentence, or its slots follow each other
// for ever, and what is due was due.
func FuzzSchedule(f *testing.F) {
	for _, s := range []string{
		"0 3 * * *", "*/5 * * * *", "0 0 29 2 *", "0 0 30 2 *", "@daily", "@every 1s", "TZ=Europe/Zurich 0 3 * * *", "TZ=", "59 23 31 12 0", "0 0 1-7 * MON", "*-5 * * * *",
		"0,,1 * * * *", "? ? ? ? ?", "1-0 * * * *", "0 0 * * 7", "00 0000000003 * * *",
	} {
		f.Add(s, "", int64(0), int64(0), int64(0), "", int64(1700000000))
		f.Add(s, "Europe/Zurich", int64(time.Hour), int64(time.Minute), int64(0), "next", int64(1711846800))
	}
	f.Add("", "", int64(0), int64(0), int64(24*time.Hour), "at_once", int64(-1))
	f.Add("", "../../etc/passwd", int64(-1), int64(-1), int64(1), "never", int64(1)<<40)
	f.Fuzz(func(t *testing.T, cron, zone string, window, jitter, period int64, missed string, at int64) {
		spec := schedule.Spec{
			Cron: cron, Zone: zone, Window: time.Duration(window), Jitter: time.Duration(jitter), Period: time.Duration(period), Missed: missed,
		}
		if err := schedule.Validate(spec); err != nil {
			if text := err.Error(); strings.ContainsAny(text, "\n\x1b") || len(text) > 3000 {
				t.Fatalf("%q is no sentence", text)
			}
			return
		}
		now := time.Unix(at%(1<<33), 0).UTC()
		schedule.Notes(spec)
		next := schedule.Next(spec, "role", now)
		if next.IsZero() {
			return
		}
		if !next.After(now) {
			t.Fatalf("%+v: %s comes after %s", spec, next, now)
		}
		if due, _, _ := schedule.Due(spec, "role", next, next.Add(-time.Second)); due {
			t.Fatalf("%+v: %s is due before", spec, next)
		}
		following, _ := schedule.Served(spec, "role", next, next)
		if !following.IsZero() && !following.After(next) {
			t.Fatalf("%+v: after %s comes %s", spec, next, following)
		}
		if gap := schedule.SmallestGap(spec); gap < schedule.Minimum {
			t.Fatalf("%+v: gap %s", spec, gap)
		}
	})
}
