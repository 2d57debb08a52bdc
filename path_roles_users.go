package harmonyflow

import (
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
)

// Roles of users of a server may have two of them, and say what else becomes of
// them there.

func userFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"usernames": {
			Type:        framework.TypeCommaStringSlice,
			Description: "Two users that take turns (strategy alternate), the one in use first. The other is created like it where it does not exist. Given once.",
		},
		"close_connections":   {Type: framework.TypeBool, Description: "End what is still open with the previous credential once that is refused. With alternate those of its user, with swap those from before the change, with overlap all that are open then, because nobody can tell."},
		"valid_until":         {Type: framework.TypeDurationSecond, Description: "Of a postgresql role: how long after it was made the server itself ends a password (VALID UNTIL); empty for never. Longer than two rotations are apart."},
		"allow_self_rotation": {Type: framework.TypeBool, Description: "Of a postgresql role: the user changes its own password, and the connection's admin needs no right to."},
		"auto_reconcile":      {Type: framework.TypeBool, Description: "Look every quarter of an hour whether the target still accepts what is served, and reconcile where it does not."},
	}
}

func userAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"usernames":           listField("Users that take turns, with strategy alternate."),
		"close_connections":   boolField("Whether what is open with the previous credential is ended."),
		"valid_until":         durationField("After how long the server ends a password, in seconds, of a postgresql role; 0: never."),
		"allow_self_rotation": boolField("Whether the user changes its own password, of a postgresql role."),
		"auto_reconcile":      boolField("Whether drift is looked for and mended."),
	}
}

func describeUsers(r *rotation.Role, data map[string]any) {
	data["usernames"], data["close_connections"] = orEmpty(r.Spec.Usernames), r.Spec.CloseConnections
	data["auto_reconcile"] = r.AutoReconcile
	if r.Kind == "postgresql" {
		data["valid_until"], data["allow_self_rotation"] = seconds(r.Spec.ValidFor), r.Spec.SelfRotation
	}
}

func applyUsersSpec(s *kind.Spec, d *framework.FieldData) {
	setStrings(d, "usernames", &s.Usernames)
	for name, to := range map[string]*bool{"close_connections": &s.CloseConnections, "allow_self_rotation": &s.SelfRotation} {
		if v, ok := d.GetOk(name); ok {
			*to = v.(bool)
		}
	}
	if _, ok := d.GetOk("valid_until"); ok {
		s.ValidFor = duration(d, "valid_until")
	}
}

// applyUsers sets what concerns the users of a role and is no affair of its kind.
func applyUsers(r *rotation.Role, k *kindEntry, d *framework.FieldData) error {
	v, ok := d.GetOk("auto_reconcile")
	if !ok {
		return nil
	}
	if v.(bool) && k.open == nil {
		return fmt.Errorf("auto_reconcile is true, and secrets of kind %s are at no server that could be mended; leave it out", r.Kind)
	}
	r.SetAutoReconcile(v.(bool), time.Now())
	return nil
}

// checkExpiry refuses passwords that their server could end while they are served.
func checkExpiry(r *rotation.Role, c rotation.Config, req *logical.Request) error {
	valid := r.Spec.ValidFor
	if valid == 0 {
		if given := req.Data["valid_until"]; !cleared(given) && isNew(r) {
			return fmt.Errorf("valid_until is %v; give a duration such as 2160h, or empty for never", given)
		}
		return nil
	}
	gap := schedule.LargestGap(r.Schedule, time.Now())
	if gap == 0 {
		return fmt.Errorf("valid_until is %s, and nothing rotates by itself, so that the password would end while it is served; give rotation_period or rotation_schedule", valid)
	}
	if least := 2*gap + r.Longest(c); valid < least {
		return fmt.Errorf("valid_until is %s; rotations may be %s apart, and one that fails is to leave time for another, so give at least %s", valid, gap, least)
	}
	return nil
}

// firstUser is the user that a role of users begins with.
func firstUser(s kind.Spec) string {
	if len(s.Usernames) > 0 {
		return s.Usernames[0]
	}
	return s.Username
}

// sameUsers refuses to change who takes turns.
func sameUsers(r *rotation.Role, d *framework.FieldData) error {
	if v, ok := d.GetOk("usernames"); ok && !slices.Equal(v.([]string), r.Given.Usernames) {
		return fmt.Errorf("usernames of role %q are %q and cannot be changed to %q; create another role", r.Name, r.Given.Usernames, v)
	}
	return nil
}
