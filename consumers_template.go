package harmonyflow

import (
	"context"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// secretOf is a role as templates of checks see it. Keys that sign or decrypt are sent
// to nobody.
func (b *backend) secretOf(ctx context.Context, role string) (*consumer.Source, error) {
	if checkName(role) != nil {
		return nil, nil //nolint:nilnil,nilerr // no role has such a name
	}
	r, err := b.engine.Store().Role(ctx, role)
	if err != nil || r == nil {
		return nil, err
	}
	s := &consumer.Source{Role: r.Name, Consumers: r.Consumers, Hosts: r.SecretHosts}
	current := r.With(version.Current)
	if current == nil || !sendsSecret(r) {
		return s, nil
	}
	if m := current.Material; m.Username != "" {
		s.Fields = map[string]string{"username": m.Username, "password": m.Secret}
	} else {
		s.Fields = map[string]string{"value": m.Secret}
	}
	return s, nil
}

// sendsSecret reports whether the secret of a role is one that its owner shows to
// servers.
func sendsSecret(r *rotation.Role) bool {
	return r.Spec.Strategy != kind.KeyRing && !isKept(r) && !r.Root()
}
