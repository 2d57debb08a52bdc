package schedule_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // local times with folds and gaps, wherever the tests run

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
)

const (
	day  = 24 * time.Hour
	role = "a-role"
)

func at(t testing.TB, s string) time.Time {
	t.Helper()
	got, err := time.Parse("2006-01-02 15:04:05", s)
	if err != nil {
		got, err = time.Parse("2006-01-02 15:04", s)
	}
	require.NoError(t, err)
	return got.UTC()
}

func cron(s string) schedule.Spec { return schedule.Spec{Cron: s} }

func TestValidateAccepts(t *testing.T) {
	for _, spec := range []schedule.Spec{
		{},
		{Disabled: true},
		{Period: time.Minute},
		{Period: 768 * time.Hour, Disabled: true},
		cron("* * * * *"),
		cron("? ? ? ? ?"),
		cron("  0   3 * * MON-FRI "),
		cron("*/15 0,12 1-7/2 jan-Mar 0,6"),
		cron("0 0 29 2 *"),
		cron("0 0 30 2 1"), // the 30th never comes, the Mondays do
		cron("0 0 */7 * */7"),
		cron("@hourly"), cron("@daily"), cron("@midnight"), cron("@weekly"),
		cron("@monthly"), cron("@yearly"), cron("@annually"),
		{Cron: "0 3 * * *", Window: time.Minute},
		{Cron: "0 3 * * *", Window: day},
		{Cron: "0 3 * * *", Zone: "America/Argentina/Buenos_Aires", Window: time.Hour, Jitter: 59 * time.Minute, Missed: schedule.MissedNext},
		{Cron: "@hourly", Zone: "Etc/GMT+5", Jitter: 30*time.Minute - time.Second, Missed: schedule.MissedAtOnce},
		{Cron: "0 0 29 2 *", Window: 30 * day},
	} {
		require.NoError(t, schedule.Validate(spec), "%+v", spec)
	}
}

func TestValidateRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spec schedule.Spec
		says []string
	}{
		"negative period":           {schedule.Spec{Period: -time.Hour}, []string{"rotation_period", "-1h", "at least 1m"}},
		"short period":              {schedule.Spec{Period: 59 * time.Second}, []string{"rotation_period", "59s", "at least 1m"}},
		"period and schedule":       {schedule.Spec{Period: time.Hour, Cron: "@daily"}, []string{"rotation_period is 1h", `rotation_schedule is "@daily"`, "only one"}},
		"window alone":              {schedule.Spec{Window: time.Hour}, []string{"rotation_window is 1h", "rotation_schedule"}},
		"window with period":        {schedule.Spec{Period: time.Hour, Window: time.Hour}, []string{"rotation_window is 1h", "with a schedule only"}},
		"short window":              {schedule.Spec{Cron: "@daily", Window: time.Second}, []string{"rotation_window is 1s", "at least 1m"}},
		"negative window":           {schedule.Spec{Cron: "@daily", Window: -time.Hour}, []string{"rotation_window is -1h", "at least 1m"}},
		"window beyond the gap":     {schedule.Spec{Cron: "0 3,9 * * *", Window: 7 * time.Hour}, []string{"rotation_window is 7h", "after 6h"}},
		"time zone":                 {cron("TZ=Europe/Berlin 0 3 * * *"), []string{"time zone", "rotation_timezone"}},
		"cron time zone":            {cron("CRON_TZ=UTC 0 3 * * *"), []string{"time zone", "rotation_timezone"}},
		"time zone, lower case":     {cron(" cron_tz=UTC 0 3 * * *"), []string{"time zone", "rotation_timezone"}},
		"time zone and nothing":     {cron("TZ=UTC"), []string{"time zone"}},
		"time zone inside":          {cron("0 TZ=UTC * * *"), []string{"hour", "0-23"}},
		"@every":                    {cron("@every 1h"), []string{"@every", "rotation_period"}},
		"@reboot":                   {cron("@reboot"), []string{`"@reboot"`, "@daily"}},
		"descriptor, upper case":    {cron("@DAILY"), []string{`"@DAILY"`, "@daily"}},
		"blank":                     {cron("  "), []string{"five fields"}},
		"a word":                    {cron("daily"), []string{"1 fields"}},
		"four fields":               {cron("0 3 * *"), []string{"4 fields", "must have 5"}},
		"seconds":                   {cron("0 0 3 * * *"), []string{"6 fields", "seconds"}},
		"7 as Sunday":               {cron("0 3 * * 7"), []string{"day of week", `"7"`, "use 0 for Sunday"}},
		"range up to 7":             {cron("0 3 * * 1-7"), []string{`"1-7"`, "use 0"}},
		"list with 7":               {cron("0 3 * * 1,07"), []string{`"1,07"`, "use 0"}},
		"steps from 7":              {cron("0 3 * * 7/2"), []string{"use 0"}},
		"minute 60":                 {cron("60 3 * * *"), []string{"minute", `"60"`, "0-59"}},
		"hour 24":                   {cron("0 24 * * *"), []string{"hour", `"24"`, "0-23"}},
		"day 0":                     {cron("0 3 0 * *"), []string{"day of month", `"0"`, "1-31"}},
		"month 13":                  {cron("0 3 * 13 *"), []string{"month", `"13"`, "1-12"}},
		"range downwards":           {cron("0 3 * * FRI-MON"), []string{"day of week", "low to high"}},
		"step 0":                    {cron("*/0 3 * * *"), []string{"minute", `"*/0"`}},
		"empty list":                {cron(", 3 * * *"), []string{"minute", `","`}},
		"trailing comma":            {cron("1, 3 * * *"), []string{"minute", `"1,"`}},
		"half a range of stars":     {cron("*-5 3 * * *"), []string{"minute", `"*-5"`}},
		"Quartz' last":              {cron("0 3 L * *"), []string{"day of month", `"L"`}},
		"Quartz' nth":               {cron("0 3 * * 1#2"), []string{"day of week", `"1#2"`}},
		"number beyond an int":      {cron("99999999999999999999 3 * * *"), []string{"minute"}},
		"very long":                 {cron(strings.Repeat("1,", 300) + "1 * * * *"), []string{"characters long", "512"}},
		"never fires: 30 February":  {cron("0 0 30 2 *"), []string{`"0 0 30 2 *"`, "never fires"}},
		"never fires: 31st, short":  {cron("0 0 31 2,4,6,9,11 *"), []string{"never fires"}},
		"zone without schedule":     {schedule.Spec{Period: day, Zone: "Europe/Berlin"}, []string{"rotation_timezone", "with a schedule only"}},
		"zone that is none":         {schedule.Spec{Cron: "@daily", Zone: "Mars/Olympus"}, []string{`"Mars/Olympus"`, "Europe/Berlin"}},
		"zone of the node":          {schedule.Spec{Cron: "@daily", Zone: "Local"}, []string{`"Local"`, "IANA"}},
		"zone with leap seconds":    {schedule.Spec{Cron: "@daily", Zone: "right/Europe/Berlin"}, []string{"IANA"}},
		"zone that is a path":       {schedule.Spec{Cron: "@daily", Zone: "../../etc/passwd"}, []string{"IANA"}},
		"jitter alone":              {schedule.Spec{Jitter: time.Hour}, []string{"jitter is 1h", "neither rotation_period nor rotation_schedule"}},
		"jitter of half the gap":    {schedule.Spec{Cron: "0 3,9 * * *", Jitter: 3 * time.Hour}, []string{"jitter is 3h", "6h apart", "less than half"}},
		"jitter of half the period": {schedule.Spec{Period: time.Hour, Jitter: 30 * time.Minute}, []string{"jitter is 30m", "less than half"}},
		"jitter of a part second":   {schedule.Spec{Period: time.Hour, Jitter: time.Millisecond}, []string{"at least 1s"}},
		"negative jitter":           {schedule.Spec{Period: time.Hour, Jitter: -time.Minute}, []string{"jitter is -1m", "at least 1s"}},
		"jitter beyond the window":  {schedule.Spec{Cron: "@daily", Window: time.Hour, Jitter: time.Hour}, []string{"jitter is 1h", "rotation_window is 1h", "shorter"}},
		"policy that is none":       {schedule.Spec{Period: time.Hour, Missed: "never"}, []string{`"never"`, "at_once", "next"}},
		"policy alone":              {schedule.Spec{Missed: schedule.MissedNext}, []string{"missed_policy is next", "neither"}},
		"at_once within a window":   {schedule.Spec{Cron: "@daily", Window: time.Hour, Missed: schedule.MissedAtOnce}, []string{"missed_policy is at_once", "rotation_window is 1h", "clear one"}},
		"never fires, while off":    {schedule.Spec{Cron: "0 0 30 2 *", Disabled: true}, []string{"never fires"}},
		"never fires, with window":  {schedule.Spec{Cron: "0 0 30 2 *", Window: time.Hour}, []string{"never fires"}},
		"short period, while off":   {schedule.Spec{Period: time.Second, Disabled: true}, []string{"at least 1m"}},
		"new line in the schedule":  {cron("0 3 * * *\n0 4 * * *"), []string{"10 fields"}},
		"invalid UTF-8 in schedule": {cron("0 3 * * \xff"), []string{"day of week"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := schedule.Validate(c.spec)
			require.Error(t, err)
			for _, say := range c.says {
				require.ErrorContains(t, err, say)
			}
			require.NotContains(t, err.Error(), "\n")
			require.Less(t, len(err.Error()), 400)
		})
	}
}

func TestNext(t *testing.T) {
	for name, c := range map[string]struct {
		spec        schedule.Spec
		after, want string
	}{
		"period":                     {schedule.Spec{Period: 36 * time.Hour}, "2026-03-01 10:00:07", "2026-03-02 22:00:07"},
		"cron":                       {cron("30 3 * * *"), "2026-03-01 03:29:59", "2026-03-01 03:30"},
		"cron, at its very time":     {cron("30 3 * * *"), "2026-03-01 03:30", "2026-03-02 03:30"},
		"@weekly is Sunday":          {cron("@weekly"), "2026-03-02 00:00", "2026-03-08 00:00"},
		"@monthly":                   {cron("@monthly"), "2026-01-31 23:59", "2026-02-01 00:00"},
		"day of month or of week":    {cron("0 0 13 * 5"), "2026-03-10 00:00", "2026-03-13 00:00"},
		"or: Friday after the 13th":  {cron("0 0 13 * 5"), "2026-03-13 00:00", "2026-03-20 00:00"},
		"31st skips short months":    {cron("0 0 31 * *"), "2026-03-31 00:00", "2026-05-31 00:00"},
		"leap day":                   {cron("0 0 29 2 *"), "2026-03-01 00:00", "2028-02-29 00:00"},
		"leap day over 2100":         {cron("0 0 29 2 *"), "2096-02-29 00:00", "2104-02-29 00:00"},
		"leap day, asked in 2097":    {cron("0 0 29 2 *"), "2097-01-01 00:00", "2104-02-29 00:00"},
		"step beyond the end, short": {cron("*/40 * * * *"), "2026-03-01 00:40", "2026-03-01 01:00"},
	} {
		t.Run(name, func(t *testing.T) {
			got := schedule.Next(c.spec, role, at(t, c.after))
			require.Equal(t, at(t, c.want), got)
			require.Equal(t, time.UTC, got.Location())
		})
	}
}

func TestNextIsZeroWithoutAutomaticRotation(t *testing.T) {
	now := at(t, "2026-03-01 00:00")
	for _, spec := range []schedule.Spec{
		{},
		{Disabled: true},
		{Period: time.Hour, Disabled: true},
		{Cron: "@daily", Disabled: true},
		cron("not a cron"),
	} {
		require.Zero(t, schedule.Next(spec, role, now), "%+v", spec)
	}
}

// The next time is stored and read by other nodes, so it must not compare by
// the monotonic clock of this one.
func TestNextHasNoMonotonicClock(t *testing.T) {
	got := schedule.Next(schedule.Spec{Period: time.Hour}, role, time.Now()).String()
	require.NotContains(t, got, "m=")
}

func TestNextKnowsNoSummerTime(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	require.NoError(t, err)
	spec := cron("30 2 * * *")
	// 02:30 does not exist in Berlin on 29 March 2026 and comes twice on 25
	// October: in UTC it comes once on each day.
	for _, s := range []string{"2026-03-28 12:00", "2026-10-24 12:00"} {
		next := at(t, s)
		for range 3 {
			after := next
			next = schedule.Next(spec, role, after.In(berlin))
			require.Equal(t, schedule.Next(spec, role, after), next)
			require.Equal(t, "02:30", next.Format("15:04"))
		}
		require.Equal(t, at(t, s).Add(2*day+14*time.Hour+30*time.Minute), next)
	}
}

func TestDue(t *testing.T) {
	spec := cron("0 3 * * *")
	windowed := schedule.Spec{Cron: "0 3 * * *", Window: 2 * time.Hour}
	full := schedule.Spec{Cron: "0 3 * * *", Window: day}
	const next = "2026-03-01 03:00"
	for name, c := range map[string]struct {
		spec  schedule.Spec
		now   string
		due   bool
		moved string
	}{
		"before":                         {spec, "2026-03-01 02:59:59", false, ""},
		"at":                             {spec, "2026-03-01 03:00", true, ""},
		"a year late":                    {spec, "2027-03-01 00:00", true, ""},
		"period":                         {schedule.Spec{Period: time.Hour}, "2026-03-01 03:00", true, ""},
		"disabled":                       {schedule.Spec{Period: time.Hour, Disabled: true}, "2026-03-02 03:00", false, ""},
		"by hand only":                   {schedule.Spec{}, "2026-03-02 03:00", false, ""},
		"before the window":              {windowed, "2026-03-01 02:59", false, ""},
		"window opens":                   {windowed, "2026-03-01 03:00", true, ""},
		"last moment of the window":      {windowed, "2026-03-01 04:59:59", true, ""},
		"window has ended":               {windowed, "2026-03-01 05:00", false, "2026-03-02 03:00"},
		"just before the next window":    {windowed, "2026-03-02 02:59", false, "2026-03-02 03:00"},
		"in the next window":             {windowed, "2026-03-02 03:00", true, "2026-03-02 03:00"},
		"in a later window":              {windowed, "2026-03-09 04:00", true, "2026-03-09 03:00"},
		"after that window":              {windowed, "2026-03-09 05:00", false, "2026-03-10 03:00"},
		"window as long as the gap":      {full, "2026-03-02 02:59", true, ""},
		"window as long as the gap ends": {full, "2026-03-02 03:00", true, "2026-03-02 03:00"},
	} {
		t.Run(name, func(t *testing.T) {
			due, moved, _ := schedule.Due(c.spec, role, at(t, next), at(t, c.now))
			require.Equal(t, c.due, due)
			if c.moved == "" {
				require.Zero(t, moved)
				return
			}
			require.Equal(t, at(t, c.moved), moved)
		})
	}
	due, moved, _ := schedule.Due(spec, role, time.Time{}, at(t, next))
	require.False(t, due, "nothing is stored")
	require.Zero(t, moved)
}

func TestMissedPolicyNext(t *testing.T) {
	const next = "2026-03-01 03:00"
	for name, c := range map[string]struct {
		spec         schedule.Spec
		now          string
		due          bool
		moved, last  string
		passedSoMany int
	}{
		"within an hour":   {schedule.Spec{Cron: "0 3 * * *", Missed: schedule.MissedNext}, "2026-03-01 03:59:59", true, "", "", 0},
		"after an hour":    {schedule.Spec{Cron: "0 3 * * *", Missed: schedule.MissedNext}, "2026-03-01 04:00", false, "2026-03-02 03:00", next, 1},
		"days later":       {schedule.Spec{Cron: "0 3 * * *", Missed: schedule.MissedNext}, "2026-03-04 03:30", true, "2026-03-04 03:00", "2026-03-03 03:00", 3},
		"period":           {schedule.Spec{Period: day, Missed: schedule.MissedNext}, "2026-03-03 04:00", false, "2026-03-04 03:00", "2026-03-03 03:00", 3},
		"period, due":      {schedule.Spec{Period: day, Missed: schedule.MissedNext}, "2026-03-03 03:59", true, "2026-03-03 03:00", "2026-03-02 03:00", 2},
		"at once, at last": {schedule.Spec{Period: day, Missed: schedule.MissedAtOnce}, "2026-03-09 03:00", true, "", "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			due, moved, passed := schedule.Due(c.spec, role, at(t, next), at(t, c.now))
			require.Equal(t, c.due, due)
			require.Equal(t, c.passedSoMany, passed.Count)
			if c.moved == "" {
				require.Zero(t, moved)
				return
			}
			require.Equal(t, at(t, c.moved), moved)
			require.Equal(t, at(t, c.last), passed.Last)
		})
	}
}

// Vault's database engine computes the next time anew when a node becomes
// active, so a slot that passed meanwhile is skipped.
func TestUpstreamMissedScheduleOverFailover(t *testing.T) {
	spec := cron("0 3 * * *")
	stored := schedule.Next(spec, role, at(t, "2026-03-01 00:00"))
	// The active node dies at 02:59, another takes over at 03:10.
	due, moved, _ := schedule.Due(spec, role, stored, at(t, "2026-03-01 03:10"))
	require.True(t, due)
	require.Zero(t, moved)
}

// With a window the same engine skips the next slot as well: it is never in
// the window of a time that it computes from now.
func TestUpstreamMissedWindowOverFailoverSkipsTheNextToo(t *testing.T) {
	spec := schedule.Spec{Cron: "0 3 * * *", Window: time.Hour}
	stored := schedule.Next(spec, role, at(t, "2026-03-01 00:00"))

	due, _, _ := schedule.Due(spec, role, stored, at(t, "2026-03-01 03:10"))
	require.True(t, due, "a node that takes over within the window rotates")

	due, moved, _ := schedule.Due(spec, role, stored, at(t, "2026-03-01 04:10"))
	require.False(t, due, "after the window the slot is lost")
	require.Equal(t, at(t, "2026-03-02 03:00"), moved)

	due, _, _ = schedule.Due(spec, role, moved, at(t, "2026-03-02 03:01"))
	require.True(t, due, "and the next one is not")
}

// hashicorp/vault#31918: the TTL rolls over at the cron's time although the
// password has not changed, and consumers keep the old one for a whole period.
func TestUpstream31918StoredNextStaysUntilRotated(t *testing.T) {
	spec := cron("0 3 * * *")
	stored := at(t, "2026-03-01 03:00")
	for now := stored; now.Before(stored.Add(3 * day)); now = now.Add(7 * time.Minute) {
		due, moved, _ := schedule.Due(spec, role, stored, now)
		require.True(t, due)
		require.Zero(t, moved, "only a rotation moves the slot")
	}
}

// Vault accepts 30 February, is told the zero time as next, and rotates in a
// hot loop, as that is always in the past.
func TestUpstreamCronThatNeverFiresInAHotLoop(t *testing.T) {
	spec := cron("0 0 30 2 *")
	require.Error(t, schedule.Validate(spec))

	now := at(t, "2026-03-01 00:00")
	next := schedule.Next(spec, role, now)
	require.Zero(t, next)
	for range 1000 {
		due, moved, _ := schedule.Due(spec, role, next, now)
		require.False(t, due)
		require.Zero(t, moved)
	}
	require.Zero(t, schedule.SmallestGap(spec))
}

// A long outage is one rotation, not one for each slot that it swallowed.
func TestLateRotationIsOneRotation(t *testing.T) {
	spec := cron("0 * * * *")
	now := at(t, "2026-03-05 12:34")
	due, _, _ := schedule.Due(spec, role, at(t, "2026-03-01 03:00"), now)
	require.True(t, due)
	require.Equal(t, at(t, "2026-03-05 13:00"), schedule.Next(spec, role, now))
}

func TestSmallestGap(t *testing.T) {
	for _, c := range []struct {
		cron string
		want time.Duration
	}{
		{"* * * * *", time.Minute},
		{"*/15 * * * *", 15 * time.Minute},
		{"*/40 * * * *", 20 * time.Minute},
		{"0,59 * * * *", time.Minute}, // 00:59 to 01:00
		{"0 3,9 * * *", 6 * time.Hour},
		{"0 0,23 * * *", time.Hour}, // over midnight
		{"0 0,23 * * 1", 23 * time.Hour},
		{"0 3 * * *", day},
		{"0 3 * * 1,4", 3 * day},
		{"@weekly", 7 * day},
		{"@monthly", 28 * day},
		{"0 0 29 * *", 29 * day},
		{"0 0 31 * *", 31 * day},
		{"0 0 1 1,3 *", 59 * day},
		{"0 0 31 12 *", 365 * day},
		{"0 0 29 2 *", 4*365*day + day},
		{"0 0 13 * 5", day}, // a Friday before the 13th
		{"0 0 29 2 1", day}, // 29 February next to a Monday
		{"0 0 1 1 0", day},  // 1 January on a Saturday
		{"0 0 31 12 ?", 365 * day},
	} {
		t.Run(c.cron, func(t *testing.T) {
			require.Equal(t, c.want, schedule.SmallestGap(cron(c.cron)))
		})
	}
	require.Equal(t, 36*time.Hour, schedule.SmallestGap(schedule.Spec{Period: 36 * time.Hour}))
	require.Zero(t, schedule.SmallestGap(schedule.Spec{}))
	require.Zero(t, schedule.SmallestGap(cron("nonsense")))
}

func TestCheckGap(t *testing.T) {
	for name, c := range map[string]struct {
		spec    schedule.Spec
		minimum time.Duration
		says    []string
	}{
		"longer":             {schedule.Spec{Period: 2 * time.Hour}, time.Hour, nil},
		"as long":            {schedule.Spec{Period: time.Hour}, time.Hour, []string{"rotation_period is 1h,", "may take 1h "}},
		"shorter":            {schedule.Spec{Period: time.Hour}, 70 * time.Minute, []string{"rotation_period is 1h,", "1h10m", "grace_period"}},
		"cron, longer":       {cron("@daily"), time.Hour, nil},
		"cron, smallest gap": {cron("0 3,4 * * *"), 90 * time.Minute, []string{`"0 3,4 * * *"`, "after 1h", "1h30m"}},
		"by hand only":       {schedule.Spec{}, time.Hour, nil},
		"disabled":           {schedule.Spec{Period: time.Minute, Disabled: true}, time.Hour, nil},
	} {
		t.Run(name, func(t *testing.T) {
			err := schedule.CheckGap(c.spec, c.minimum)
			if c.says == nil {
				require.NoError(t, err)
				return
			}
			for _, say := range c.says {
				require.ErrorContains(t, err, say)
			}
		})
	}
}

func TestNotes(t *testing.T) {
	for _, s := range []string{"0 0 13 * 5", "0 0 */2 * 1", "0 0 1-15 * MON-FRI"} {
		notes := schedule.Notes(cron(s))
		require.Len(t, notes, 1, s)
		require.Contains(t, notes[0], fmt.Sprintf("%q", s))
		require.Contains(t, notes[0], "either")
	}
	for _, s := range []string{"", "0 0 13 * *", "0 0 * * 5", "0 0 ? * 5", "@monthly", "nonsense"} {
		require.Empty(t, schedule.Notes(cron(s)), s)
	}
}
