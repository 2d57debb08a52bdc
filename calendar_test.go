package harmonyflow

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func instant(t testing.TB, s any) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339, s.(string))
	require.NoError(t, err)
	return at
}

func TestWritesAnswerWithTheNextThreeTimes(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	tokyo, err := time.LoadLocation("Asia/Tokyo")
	require.NoError(t, err)
	hour := 2 // or another that does not come while this runs
	if now := time.Now().In(tokyo).Hour(); now < 8 || now >= 20 {
		hour = 14
	}
	r := m.must("roles/token", map[string]any{
		"kind": "api-key", "rotation_schedule": fmt.Sprintf("30 %d * * *", hour), "rotation_timezone": "Asia/Tokyo", "rotation_window": "3h", "jitter": "45m",
	})
	times := r.data["next_rotations"].([]string)
	require.Len(t, times, 3)
	role := m.read("roles/token").data
	require.Equal(t, times, role["next_rotations"])
	require.Equal(t, times[0], role["next_rotation"])
	require.Equal(t, "Asia/Tokyo", role["rotation_timezone"])
	require.EqualValues(t, 2700, role["jitter"])
	require.Equal(t, "next", role["missed_policy"], "what a window does")
	for i, s := range times {
		at := instant(t, s)
		local := at.In(tokyo)
		slot := time.Date(local.Year(), local.Month(), local.Day(), hour, 30, 0, 0, tokyo)
		require.True(t, !at.Before(slot) && at.Before(slot.Add(45*time.Minute)), "%s", s)
		if i > 0 {
			require.InDelta(t, 24, at.Sub(instant(t, times[i-1])).Hours(), 0.75)
		}
	}
	creds := m.creds("token")
	require.Equal(t, "Asia/Tokyo", creds["rotation_timezone"])
	require.InDelta(t, time.Until(instant(t, times[0])).Seconds(), creds["ttl"], 60, "the delay is in the stored time")

	// The same after a restart, and after a write that changes nothing of it.
	m.restart()
	require.Equal(t, times, m.must("roles/token", map[string]any{"description": "the token"}).data["next_rotations"])
	require.NotContains(t, m.must("roles/token", map[string]any{"disable_automated_rotation": true}).data, "next_rotations")
	require.NotContains(t, m.creds("token"), "ttl")
}

func TestNextRotationIsSetOnce(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	given := time.Now().Add(40 * time.Hour).UTC().Truncate(time.Second)
	r := m.must("roles/token", map[string]any{"kind": "api-key", "rotation_period": "24h", "next_rotation": given.Format(time.RFC3339)})
	require.Equal(t, given.Format(time.RFC3339), r.data["next_rotations"].([]string)[0], "given when creating")
	require.Equal(t, given.Add(24*time.Hour), instant(t, r.data["next_rotations"].([]string)[1]))

	r = m.must("roles/token", map[string]any{"next_rotation": "90m"})
	next := instant(t, r.data["next_rotations"].([]string)[0])
	require.InDelta(t, 90, time.Until(next).Minutes(), 1)
	require.InDelta(t, 5400, m.creds("token")["ttl"], 60)
	m.must("roles/token", map[string]any{"rotation_period": "48h", "next_rotation": "36h"})
	require.InDelta(t, 36*3600, m.creds("token")["ttl"], 60, "a new schedule and its first time")
	m.must("roles/token", map[string]any{"description": "the token"})
	require.InDelta(t, 36*3600, m.creds("token")["ttl"], 60)
	m.must("roles/token", map[string]any{"next_rotation": ""})
	require.InDelta(t, 48*3600, m.creds("token")["ttl"], 60, "empty: what the schedule says")

	// Any rotation computes it anew.
	m.must("roles/token", map[string]any{"next_rotation": "300h", "grace_period": "0"})
	m.ended(id(m.must("rotate/api-key/token", nil)))
	require.InDelta(t, 48*3600, m.creds("token")["ttl"], 60)
	require.EqualValues(t, 0, m.read("roles/token").data["missed_slots"])
}

func TestCalendarMistakes(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/hand", map[string]any{"kind": "api-key"})
	m.must("roles/off", map[string]any{"kind": "api-key", "rotation_period": "24h", "disable_automated_rotation": true})
	m.must("roles/daily", map[string]any{"kind": "api-key", "rotation_schedule": "0 3 * * *"})
	m.must("roles/busy", map[string]any{"kind": "api-key", "rotation_period": "24h", "previous_field": "OLD"})
	m.alter("busy", func(r *rotation.Role) { r.Run = &rotation.Run{Rotation: "none", Phase: rotation.Preflight} })
	stored := m.stored(t)
	for _, c := range []struct {
		path, field string
		value       any
		says        string
	}{
		{"roles/daily", "rotation_timezone", "Mars/Olympus", "like Europe/Berlin"},
		{"roles/daily", "rotation_timezone", "Local", "like Europe/Berlin"},
		{"roles/daily", "rotation_timezone", "../etc/passwd", "IANA"},
		{"roles/hand", "rotation_timezone", "Europe/Berlin", "there is no rotation_schedule"},
		{"roles/daily", "jitter", "12h", "less than half"},
		{"roles/daily", "jitter", "-1s", "negative"},
		{"roles/hand", "jitter", "1h", "neither rotation_period nor rotation_schedule"},
		{"roles/daily", "missed_policy", "sometimes", "at_once"},
		{"roles/daily", "apart_from", "hand", "give both"},
		{"roles/daily", "apart_by", "1h", "give both"},
		{"roles/hand", "missed_policy", "next", "neither"},
		{"roles/daily", "next_rotation", "soon", "a time like"},
		{"roles/daily", "next_rotation", "2020-01-01T00:00:00Z", "has passed"},
		{"roles/daily", "next_rotation", "-5m", "a time like"},
		{"roles/daily", "next_rotation", "9999-12-31T00:00:00Z", "ten years"},
		{"roles/hand", "next_rotation", "1h", "neither rotation_period nor rotation_schedule"},
		{"roles/off", "next_rotation", "1h", "disable_automated_rotation is true"},
		{"roles/busy", "next_rotation", "1h", "not next_rotation"},
		{"config", "freeze_until", "1h", "write freeze=true"},
		{"config", "freeze_reason", "a move", "write freeze=true"},
	} {
		r := m.write(c.path, map[string]any{c.field: c.value})
		require.Contains(t, []int{http.StatusBadRequest, http.StatusConflict}, r.code, "%s %v", c.field, c.value)
		require.Contains(t, r.message, c.says)
		require.Contains(t, r.message, c.field)
		require.NotContains(t, r.message, "\n")
	}
	require.Equal(t, http.StatusBadRequest, m.write("config", map[string]any{"freeze": true, "freeze_until": "2020-01-01T00:00:00Z"}).code)
	require.Equal(t, http.StatusBadRequest, m.write("config", map[string]any{"freeze": true, "freeze_reason": "two\nlines"}).code)
	require.Equal(t, http.StatusBadRequest, m.write("roles/daily", map[string]any{"rotation_window": "1h", "missed_policy": "at_once"}).code)
	for says, data := range map[string]map[string]any{
		"another role": {"apart_from": "daily", "apart_by": "1h"},
		"a name":       {"apart_from": "a/b", "apart_by": "1h"},
		"shorter":      {"apart_from": "hand", "apart_by": "24h"},
	} {
		r := m.write("roles/daily", data)
		require.Equal(t, http.StatusBadRequest, r.code, says)
		require.Contains(t, r.message, "apart_")
	}
	require.Equal(t, http.StatusBadRequest, m.write("roles/hand", map[string]any{"apart_from": "daily", "apart_by": "1h"}).code)
	require.Equal(t, stored, m.stored(t), "something was stored")
}

// TestPairsKeepTheirDistance: both are due, and only one begins; the other
// stays due until the first has ended long enough ago.
func TestPairsKeepTheirDistance(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for name, other := range map[string]string{"blue": "green", "green": "blue"} {
		m.must("roles/"+name, map[string]any{
			"kind": "api-key", "rotation_period": "24h", "grace_period": "0", "apart_from": other, "apart_by": "6h",
		})
	}
	m.b.Cleanup(context.Background())
	long := func(r *rotation.Role) {
		r.Next = time.Now().Add(-30 * time.Minute)
		r.LastRotation, r.LastRun.At = time.Now().Add(-25*time.Hour), time.Now().Add(-25*time.Hour)
	}
	m.alter("blue", long)
	m.alter("green", long)
	m.start()
	require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
	require.Eventually(t, func() bool { return m.creds("blue")["version"] == int64(2) && m.role("blue").Run == nil }, patience, glance)
	require.EqualValues(t, 1, m.creds("green")["version"])
	require.EqualValues(t, 0, m.creds("green")["ttl"], "it stays due")
	require.Equal(t, []string{"api-key/green"}, m.read("status").data["due"])

	m.b.Cleanup(context.Background())
	m.start() // whoever takes over waits as well
	require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
	m.must("rotate/api-key/green", nil) // by hand it does not wait
	require.EqualValues(t, 2, m.creds("green")["version"])
	m.b.Cleanup(context.Background())
	m.alter("blue", long)
	m.alter("green", func(r *rotation.Role) {
		r.LastRotation, r.LastRun.At = time.Now().Add(-7*time.Hour), time.Now().Add(-7*time.Hour)
	})
	m.start()
	require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
	require.Eventually(t, func() bool { return m.creds("blue")["version"] == int64(3) }, patience, glance, "long enough ago")
}

func TestFreezeSaysUntilWhenAndWhy(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{"kind": "api-key", "rotation_period": "24h", "grace_period": "0"})
	until := time.Now().Add(time.Hour).UTC().Truncate(time.Second).Format(time.RFC3339)
	m.must("config", map[string]any{"freeze": true, "freeze_until": until, "freeze_reason": "the database moves"})
	for _, path := range []string{"rotate/api-key/token", "rotate/all", "rollback/api-key/token"} {
		r := m.write(path, nil)
		require.Equal(t, http.StatusConflict, r.code)
		require.Contains(t, r.message, "until "+until)
		require.Contains(t, r.message, "the database moves")
	}
	status := m.read("status").data
	require.Equal(t, true, status["frozen"])
	require.Equal(t, until, status["frozen_until"])
	require.Equal(t, "the database moves", status["freeze_reason"])
	m.must("config", map[string]any{"workers": 8})
	require.Equal(t, until, m.read("config").data["freeze_until"], "what is not given stays")
	m.must("config", map[string]any{"freeze": false})
	config := m.read("config").data
	require.Equal(t, "", config["freeze_until"])
	require.Equal(t, "", config["freeze_reason"])

	// A freeze that has an end ends by itself, and the slot that waited is served.
	m.b.Cleanup(context.Background())
	m.alter("token", func(r *rotation.Role) { r.Next = time.Now().Add(-time.Minute) })
	require.NoError(t, rotation.NewStore(m.storage).PutConfig(context.Background(), frozenUntil(time.Now().Add(300*time.Millisecond))))
	m.start()
	require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
	require.Eventually(t, func() bool { return m.creds("token")["version"] == int64(2) }, patience, glance)
	require.Equal(t, false, m.read("config").data["freeze"])
	require.Equal(t, "", m.read("config").data["freeze_reason"])
}

func frozenUntil(at time.Time) rotation.Config {
	c := rotation.DefaultConfig()
	c.Freeze, c.FreezeUntil, c.FreezeReason = true, at, "a short one"
	return c
}

// TestMissedSlotsAreAccountedFor: whoever reads the role sees that a slot came
// and went.
func TestMissedSlotsAreAccountedFor(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	daily := fullHour()
	m.must("roles/windowed", map[string]any{"kind": "api-key", "rotation_schedule": daily, "rotation_window": "1m", "grace_period": "0"})
	m.must("roles/patient", map[string]any{"kind": "api-key", "rotation_schedule": daily, "grace_period": "0"})
	m.must("roles/changed", map[string]any{"kind": "api-key", "rotation_schedule": daily, "grace_period": "0"})
	m.b.Cleanup(context.Background())
	slot := func(r *rotation.Role) { r.Next = r.Next.Add(-72 * time.Hour) }
	m.alter("windowed", slot)
	m.alter("patient", slot)
	last := m.role("windowed").Next.Add(48 * time.Hour)
	m.start()
	require.NoError(t, m.b.PeriodicFunc(context.Background(), &logical.Request{Storage: m.storage}))
	require.Eventually(t, func() bool {
		return m.creds("patient")["version"] == int64(2) && m.role("windowed").Next.After(time.Now()) && m.role("patient").Run == nil
	}, patience, glance)
	windowed, patient := m.read("roles/windowed").data, m.read("roles/patient").data
	require.EqualValues(t, 3, windowed["missed_slots"])
	require.EqualValues(t, 2, patient["missed_slots"], "one of three was made up for")
	require.Equal(t, last, instant(t, windowed["last_missed"]))
	require.Equal(t, last, instant(t, patient["last_missed"]))
	require.EqualValues(t, 1, m.creds("windowed")["version"])

	// A slot that was due under a schedule that is changed has not vanished.
	m.must("config", map[string]any{"freeze": true})
	m.alter("changed", slot)
	m.must("roles/changed", map[string]any{"rotation_schedule": strings.Replace(daily, "0", "1", 1)})
	require.EqualValues(t, 3, m.read("roles/changed").data["missed_slots"])
}
