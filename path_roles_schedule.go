package harmonyflow

import (
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
)

// scheduleFields say when a role rotates by itself.
func scheduleFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"rotation_period":            {Type: framework.TypeDurationSecond, Description: "Rotate this long after the last rotation, at least 1m; empty, or 0 beside rotation_schedule and of a role that exists, for none."},
		"rotation_schedule":          {Type: framework.TypeString, Description: "Rotate by a cron of five fields; empty for none."},
		"rotation_timezone":          {Type: framework.TypeString, Description: "Time zone of rotation_schedule, by its IANA name, for example Europe/Berlin. A minute that the clocks skip fires when they have, one that they show twice fires once. Default UTC."},
		"rotation_window":            {Type: framework.TypeDurationSecond, Description: "How long after a slot of rotation_schedule a rotation may still begin; without it a missed slot stays due."},
		"jitter":                     {Type: framework.TypeDurationSecond, Description: "Delay each slot by up to this, always the same for a role and slot, so that roles of one schedule do not all rotate at once."},
		"missed_policy":              {Type: framework.TypeString, Description: "What becomes of a slot that could not be served: at_once (it stays due; default without a window) or next (it is passed over when its window, or an hour, has ended)."},
		"next_rotation":              {Type: framework.TypeString, Description: "Set the next time once: RFC 3339, or a duration from now. Any rotation before it computes the next time anew; empty does so now."},
		"apart_from":                 {Type: framework.TypeString, Description: "Role that this one must not rotate close to, for example the other of a pair. Set it at both; rotations by hand do not wait."},
		"apart_by":                   {Type: framework.TypeDurationSecond, Description: "A due slot waits until the last rotation of apart_from ended this long ago."},
		"disable_automated_rotation": {Type: framework.TypeBool, Description: "Keep the schedule and do not act on it."},
	}
}

func scheduleAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"rotation_period": durationField("Period, in seconds."), "rotation_schedule": stringField("Cron."),
		"rotation_timezone": stringField("Time zone of the cron."), "rotation_window": durationField("Window, in seconds."),
		"jitter": durationField("Greatest delay of a slot, in seconds."), "missed_policy": stringField("at_once or next, as it applies; empty without a schedule."),
		"apart_from": stringField("Role to keep a distance from."), "apart_by": durationField("The distance, in seconds."),
		"disable_automated_rotation": boolField("Whether the schedule is off."),
		"next_rotation":              stringField("Stored time of the next scheduled rotation, RFC 3339. One that has passed is due."),
		"next_rotations":             listField("The next three times, RFC 3339."),
		"missed_slots":               intField("How many slots came due and had no rotation of their own."),
		"last_missed":                stringField("The latest of them, RFC 3339."),
	}
}

// nextRotationsField is in the answer to every write of a role with a schedule.
func nextRotationsField() *framework.FieldSchema {
	return listField("The next three times at which the role rotates by itself, RFC 3339.")
}

func describeSchedule(r *rotation.Role, data map[string]any) {
	s := r.Schedule
	data["rotation_period"], data["rotation_schedule"], data["rotation_timezone"] = seconds(s.Period), s.Cron, s.Zone
	data["rotation_window"], data["jitter"], data["missed_policy"] = seconds(s.Window), seconds(s.Jitter), s.Policy()
	if s.Period == 0 && s.Cron == "" {
		data["missed_policy"] = "" // there are no slots that it could be of
	}
	data["apart_from"], data["apart_by"] = r.ApartFrom, seconds(r.ApartBy)
	data["disable_automated_rotation"], data["next_rotation"] = s.Disabled, formatTime(r.Next)
	data["next_rotations"] = nextRotations(r)
	data["missed_slots"], data["last_missed"] = int64(r.MissedSlots), formatTime(r.LastMissed)
}

func nextRotations(r *rotation.Role) []string {
	times := []string{}
	for _, at := range r.NextRotations(time.Now(), 3) {
		times = append(times, formatTime(at))
	}
	return times
}

// tellNext adds to the answer of a write when the role rotates next.
func tellNext(resp *logical.Response, r *rotation.Role) {
	if r == nil {
		return
	}
	if times := nextRotations(r); len(times) > 0 {
		resp.Data["next_rotations"] = times
	}
	resp.Warnings = append(resp.Warnings, schedule.Notes(r.Schedule)...)
}

// applySchedule sets schedule and grace together: a slot must not come before
// the rotation of the one before it can have ended.
func applySchedule(r *rotation.Role, c rotation.Config, req *logical.Request, d *framework.FieldData) error {
	s := &r.Schedule
	if _, ok := d.GetOk("rotation_period"); ok {
		s.Period = duration(d, "rotation_period")
	}
	setString(d, "rotation_schedule", &s.Cron, "")
	// A new role that never rotates was hardly meant; what one reads may be written.
	if given := req.Data["rotation_period"]; s.Period == 0 && s.Cron == "" && !cleared(given) && isNew(r) {
		return fmt.Errorf("rotation_period is %v; it must be at least %s, or empty for none", given, schedule.Minimum)
	}
	setString(d, "rotation_timezone", &s.Zone, "")
	setString(d, "missed_policy", &s.Missed, "")
	setString(d, "apart_from", &r.ApartFrom, "")
	for name, to := range map[string]*time.Duration{"rotation_window": &s.Window, "jitter": &s.Jitter, "apart_by": &r.ApartBy} {
		if _, ok := d.GetOk(name); ok {
			*to = duration(d, name)
		}
	}
	if v, ok := d.GetOk("disable_automated_rotation"); ok {
		s.Disabled = v.(bool)
	}
	if err := applyGrace(r, req, d); err != nil {
		return err
	}
	if err := schedule.Validate(*s); err != nil {
		return err
	}
	if err := schedule.CheckGap(*s, r.Longest(c)); err != nil {
		return err
	}
	if err := checkApart(r); err != nil {
		return err
	}
	return applyNext(r, d)
}

// isNew says whether a role is being created.
func isNew(r *rotation.Role) bool { return r.Run == nil && len(r.Versions) == 0 }

// checkApart does not ask for the other role: of a pair one is created first.
func checkApart(r *rotation.Role) error {
	if r.ApartFrom == "" && r.ApartBy == 0 {
		return nil
	}
	gap := schedule.SmallestGap(r.Schedule)
	switch {
	case r.ApartFrom == "" || r.ApartBy == 0:
		return fmt.Errorf("apart_from is %.64q and apart_by is %s; give both or clear both", r.ApartFrom, r.ApartBy)
	case checkName(r.ApartFrom) != nil || r.ApartFrom == r.Name:
		return fmt.Errorf("apart_from is %.64q; give the name of another role", r.ApartFrom)
	case gap == 0:
		return errors.New("apart_from is for scheduled rotations, and there is neither rotation_period nor rotation_schedule; clear it or give one of them")
	case r.ApartBy >= gap:
		return fmt.Errorf("apart_by is %s, but the role rotates again after %s; the distance must be shorter than that", r.ApartBy, gap)
	}
	return nil
}

func applyGrace(r *rotation.Role, req *logical.Request, d *framework.FieldData) error {
	v, ok := req.Data["grace_period"]
	if !ok {
		return nil
	}
	if r.Spec.Strategy == kind.KeyRing && !cleared(v) {
		return fmt.Errorf("grace_period is %v, but role %q is a key ring: its earlier keys stay for max_token_ttl (kind jwt), "+
			"or until retire_after or retire/ (kind encryption-key); leave grace_period out", v, r.Name)
	}
	grace := duration(d, "grace_period")
	r.GracePeriod = &grace
	if cleared(v) {
		r.GracePeriod = nil
	}
	if grace < 0 || grace > 90*24*time.Hour {
		return fmt.Errorf("grace_period is %s; it may be 0 to 2160h", grace)
	}
	return nil
}

// applyNext sets the next time once. A time without a schedule is refused: it
// would look like one that comes again.
func applyNext(r *rotation.Role, d *framework.FieldData) error {
	given, ok := d.GetOk("next_rotation")
	if !ok {
		return nil
	}
	now := time.Now()
	if given == "" {
		r.Next = schedule.Next(r.Schedule, r.Name, now)
		return nil
	}
	at, err := moment("next_rotation", given.(string), now)
	switch {
	case err != nil:
		return err
	case r.Schedule.Disabled:
		return fmt.Errorf("next_rotation is %.64q, but disable_automated_rotation is true and nothing rotates by itself; enable it, or write rotate/%s/%s when it is time",
			given, r.Kind, r.Name)
	case r.Schedule.Period == 0 && r.Schedule.Cron == "":
		return fmt.Errorf("next_rotation is %.64q, but there is neither rotation_period nor rotation_schedule that it could be the next time of; give one of them", given)
	}
	r.Next = at
	return nil
}

// farthest bounds times that are given: those beyond it are slips.
const farthest = 10 * 365 * 24 * time.Hour

// moment reads a time to come: RFC 3339, or a duration from now.
func moment(field, given string, now time.Time) (time.Time, error) {
	at, err := time.Parse(time.RFC3339, given)
	if err != nil {
		d := framework.FieldData{
			Raw: map[string]any{"in": given}, Schema: map[string]*framework.FieldSchema{"in": {Type: framework.TypeDurationSecond}},
		}
		in, _, err := d.GetOkErr("in")
		if err != nil {
			return at, fmt.Errorf("%s is %.64q; give a time like 2026-11-30T03:00:00Z, or a duration from now like 36h", field, given)
		}
		at = now.Add(time.Duration(in.(int)) * time.Second)
	}
	at = at.Round(0).UTC()
	switch {
	case !at.After(now):
		return at, fmt.Errorf("%s is %.64q, which has passed; give a time to come", field, given)
	case at.Sub(now) > farthest:
		return at, fmt.Errorf("%s is %.64q; it may be ten years away at most", field, given)
	}
	return at, nil
}
