package harmonyflow

import (
	"context"
	"fmt"
	"slices"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// maxConsumers bounds the consumers of a role.
const maxConsumers = 16

func consumerFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"consumers":  {Type: framework.TypeCommaStringSlice, Description: "Consumers that have to run with a new version, proven, before the previous one is refused."},
		"on_failure": {Type: framework.TypeString, Description: "What becomes of a rotation whose consumers fail: rollback (default), or hold, until resume/<id> or cancel/<id> is written."},
	}
}

func consumerAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"consumers": listField("Consumers."), "on_failure": stringField("rollback or hold."),
	}
}

func describeConsumers(r *rotation.Role, data map[string]any) {
	data["consumers"], data["on_failure"] = orEmpty(r.Consumers), "rollback"
	if r.HoldOnFailure {
		data["on_failure"] = "hold"
	}
}

// applyConsumers sets who has to follow. That they exist and allow the role is
// checked when they are named, and by each rotation.
func applyConsumers(r *rotation.Role, d *framework.FieldData) error {
	if v, ok := d.GetOk("consumers"); ok {
		r.Consumers = slices.Compact(slices.Sorted(slices.Values(v.([]string))))
	}
	if len(r.Consumers) > maxConsumers {
		return fmt.Errorf("consumers names %d; a role may have %d", len(r.Consumers), maxConsumers)
	}
	if v, ok := d.GetOk("on_failure"); ok {
		switch v.(string) {
		case "", "rollback":
			r.HoldOnFailure = false
		case "hold":
			r.HoldOnFailure = true
		default:
			return fmt.Errorf("on_failure is %.64q; allowed are rollback and hold", v)
		}
	}
	if isKept(r) && len(r.Consumers) > 0 {
		return fmt.Errorf("consumers names %q, and nobody reads the secret of kind %s; leave it out", r.Consumers, r.Kind)
	}
	return nil
}

// checkConsumers refuses consumers that do not exist, or do not allow the role.
func (b *backend) checkConsumers(ctx context.Context, role string, d *framework.FieldData) error {
	v, ok := d.GetOk("consumers")
	if !ok {
		return nil
	}
	for _, name := range v.([]string) {
		if err := checkName(name); err != nil {
			return badRequest("consumers: %w", err)
		}
		c, err := b.consumers.Must(ctx, name)
		if err != nil {
			return err
		}
		if !c.AllowsRole(role) {
			return badRequest("consumer %q does not allow role %q; add it to its allowed_roles", name, role)
		}
	}
	return nil
}
