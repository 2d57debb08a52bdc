package harmonyflow

import (
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// The grace of two users that take turns may end when nobody uses the earlier one any
// more.

func graceFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"grace_until_unused": {Type: framework.TypeBool, Description: "With strategy alternate: grace ends as soon as no session of the previous user was seen at any node twice in a row, and at grace_period at the latest."},
		"grace_minimum":      {Type: framework.TypeDurationSecond, Description: "With grace_until_unused: how long the previous version stays accepted at least; empty for 5m, or grace_period where that is shorter."},
	}
}

func graceAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"grace_until_unused": boolField("Whether grace ends when nobody uses the previous version any more."),
		"grace_minimum":      durationField("How long it stays accepted at least, in seconds, with grace_until_unused."),
	}
}

func describeGrace(r *rotation.Role, c rotation.Config, data map[string]any) {
	if r.Spec.Strategy != kind.Alternate {
		return
	}
	data["grace_until_unused"] = r.UntilUnused
	if r.UntilUnused {
		data["grace_minimum"] = seconds(r.Minimum(c))
	}
}

// applyUnused sets whether, and when at the earliest, grace ends before its time.
func applyUnused(r *rotation.Role, c rotation.Config, req *logical.Request, d *framework.FieldData) error {
	if v, ok := d.GetOk("grace_until_unused"); ok {
		r.UntilUnused = v.(bool)
	}
	if given, ok := req.Data["grace_minimum"]; ok {
		least := duration(d, "grace_minimum")
		if r.GraceMinimum = &least; cleared(given) {
			r.GraceMinimum = nil
		}
	}
	switch {
	case r.UntilUnused && r.Spec.Strategy != kind.Alternate:
		return fmt.Errorf("grace_until_unused is true, and strategy is %s, where the sessions of the previous version cannot be told from those of the next: give two usernames and strategy=alternate, or leave it out", r.Spec.Strategy)
	case r.GraceMinimum == nil:
		return nil
	case !r.UntilUnused:
		return fmt.Errorf("grace_minimum is %s, and is for roles whose grace may end before grace_period: set grace_until_unused=true, or clear it", *r.GraceMinimum)
	case *r.GraceMinimum < 0 || *r.GraceMinimum > r.Grace(c):
		return fmt.Errorf("grace_minimum is %s; it may be 0 to grace_period, which is %s", r.GraceMinimum.Round(time.Second), r.Grace(c))
	}
	return nil
}
