package harmonyflow

import (
	"context"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// ringFields are what only key rings have.
func ringFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"algorithm":                {Type: framework.TypeString, Description: "Of a jwt role: HS256 (default), HS384, HS512, RS256, RS384, RS512, ES256, ES384, ES512 or EdDSA. Given once."},
		"max_token_ttl":            {Type: framework.TypeDurationSecond, Description: "Of a jwt role, required: the longest life of a token. An earlier key verifies until the last token that it signed has run out."},
		"propagation_delay":        {Type: framework.TypeDurationSecond, Description: "Of a key ring: how long consumers take at most to read a change, 1s to 24h. A key is shown that long before it is used. Default 5m."},
		"next_field":               {Type: framework.TypeString, Description: "Field of the document that holds the next key of a ring until it is used. Given once."},
		"keys_field":               {Type: framework.TypeString, Description: "Field of the document that holds all keys of a ring, as JSON: {id: key}. Given once."},
		"retire_after":             {Type: framework.TypeDurationSecond, Description: "Of an encryption-key role: how long an earlier key still decrypts; 0 (default): until retire/ is written."},
		"require_reencryption_ack": {Type: framework.TypeBool, Description: "Keep earlier keys of an encryption-key role until ack/ says of each that what it encrypted was encrypted anew."},
		"public_jwks":              {Type: framework.TypeBool, Description: "Let anybody read the public keys of a jwt role at jwks/<name>."},
	}
}

func ringAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"algorithm": stringField("Algorithm, of a jwt role."), "max_token_ttl": durationField("Longest life of a token, in seconds, of a jwt role."),
		"propagation_delay": durationField("How long a key is shown before it is used, in seconds, of a key ring."),
		"next_field":        stringField("Field of the next key, of a key ring."), "keys_field": stringField("Field of all keys, of a key ring."),
		"retire_after":             durationField("How long an earlier key decrypts, in seconds, of an encryption-key role; 0: until it is retired."),
		"require_reencryption_ack": boolField("Whether earlier keys of an encryption-key role wait for ack/."),
		"public_jwks":              boolField("Whether anybody may read the public keys of a jwt role."),
	}
}

// describeRing shows what only key rings have. How long their earlier keys stay
// is no grace that a role or the mount could set.
func describeRing(r *rotation.Role, data map[string]any) {
	s := r.Spec
	if s.Strategy != kind.KeyRing {
		return
	}
	delete(data, "grace_period")
	data["propagation_delay"], data["next_field"], data["keys_field"] = seconds(s.PropagationDelay), s.NextField, s.KeysField
	if s.MaxTokenTTL > 0 {
		data["algorithm"], data["max_token_ttl"], data["public_jwks"] = s.Algorithm, seconds(s.MaxTokenTTL), s.PublicJWKS
	} else {
		data["retire_after"], data["require_reencryption_ack"] = seconds(s.RetireAfter), s.RequireReencryptionAck
	}
}

// nameAsBefore gives a key that a deleted role had the id that it had there:
// tokens and data name it by that.
func (b *backend) nameAsBefore(ctx context.Context, r *rotation.Role, m *kind.Material) error {
	t, err := b.engine.Store().Tombstone(ctx, r.Name)
	for ; err == nil && t != nil; t = t.Earlier {
		if t.Role.Kind != r.Kind {
			continue
		}
		for _, v := range t.Role.Versions {
			if v.Material.Same(*m) && v.Material.KeyID != "" {
				m.KeyID = v.Material.KeyID
			}
		}
	}
	return err
}
