package harmonyflow

import (
	"context"
	"fmt"
	"slices"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// maxSecretHosts bounds where the secret of a role may be sent.
const maxSecretHosts = 16

// maxConsumers bounds the consumers of a role.
const maxConsumers = 16

func consumerFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"consumers":    {Type: framework.TypeCommaStringSlice, Description: "Consumers that have to run with a new version, proven, before the previous one is refused."},
		"on_failure":   {Type: framework.TypeString, Description: "What becomes of a rotation whose consumers fail: rollback (default), or hold, until resume/<id> or cancel/<id> is written."},
		"secret_hosts": {Type: framework.TypeCommaStringSlice, Description: "Hosts that checks of these consumers may send the secret to, where a template names it: exact names or addresses, with :port where it is not 443; none by default."},
	}
}

func consumerAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"consumers": listField("Consumers."), "on_failure": stringField("rollback or hold."),
		"secret_hosts": listField("Hosts that checks may send the secret to."),
	}
}

func describeConsumers(r *rotation.Role, data map[string]any) {
	data["consumers"], data["on_failure"], data["secret_hosts"] = orEmpty(r.Consumers), "rollback", orEmpty(r.SecretHosts)
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
	if err := applySecretHosts(r, d); err != nil {
		return err
	}
	if isKept(r) && len(r.Consumers) > 0 {
		return fmt.Errorf("consumers names %q, and nobody reads the secret of kind %s; leave it out", r.Consumers, r.Kind)
	}
	return nil
}

// applySecretHosts keeps each host in one spelling.
func applySecretHosts(r *rotation.Role, d *framework.FieldData) error {
	v, ok := d.GetOk("secret_hosts")
	if !ok {
		return nil
	}
	given := v.([]string)
	switch {
	case len(given) > maxSecretHosts:
		return fmt.Errorf("secret_hosts names %d; a role may have %d", len(given), maxSecretHosts)
	case len(given) > 0 && !sendsSecret(r):
		return fmt.Errorf("secret_hosts names %.200q, and the keys of kind %s are sent to nobody; leave it out", given, r.Kind)
	}
	r.SecretHosts = nil
	for _, text := range given {
		h, err := consumer.ParseSecretHost(text)
		if err != nil {
			return fmt.Errorf("secret_hosts holds %.80q; %w", text, err)
		}
		r.SecretHosts = append(r.SecretHosts, h.String())
	}
	slices.Sort(r.SecretHosts)
	r.SecretHosts = slices.Compact(r.SecretHosts)
	return nil
}

// checkConsumers refuses consumers that do not exist, or do not allow the role.
func (b *backend) checkConsumers(ctx context.Context, role string, d *framework.FieldData) error {
	v, ok := d.GetOk("consumers")
	if !ok {
		return nil
	}
	return b.serves(ctx, role, v.([]string))
}

// serves is checkConsumers for those that a role has.
func (b *backend) serves(ctx context.Context, role string, consumers []string) error {
	for _, name := range consumers {
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
