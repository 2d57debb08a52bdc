package jwt

import (
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// ContentType is that of a JSON Web Key Set (RFC 7517 section 8.5).
const ContentType = "application/jwk-set+json"

// Publishable reports whether keys of an algorithm have a public half.
func Publishable(name string) bool {
	a, err := algorithmOf(name)
	return err == nil && !a.symmetric()
}

// JWKS is the JSON Web Key Set (RFC 7517) of the public halves of keys, in their
// order, each once. The same keys give the same bytes.
func JWKS(keys []kind.Material, name string) ([]byte, error) {
	if !Publishable(name) {
		return nil, kind.Definitely("keys of algorithm %.64q have no public half", name)
	}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, m := range keys {
		if slices.ContainsFunc(set.Keys, func(k jose.JSONWebKey) bool { return k.KeyID == m.KeyID }) {
			continue
		}
		// A shared secret is no pair, and fails here.
		key, err := public(m)
		if err != nil {
			return nil, err
		}
		k := jose.JSONWebKey{Key: key, KeyID: m.KeyID, Algorithm: name, Use: "sig"}
		if !k.IsPublic() || !k.Valid() {
			return nil, kind.Definitely("the stored key %.64q has no public half that can be shown", m.KeyID)
		}
		set.Keys = append(set.Keys, k)
	}
	return json.Marshal(set)
}

// thumbprint is the id of a public key: its SHA-256 thumbprint, as RFC 7638 and
// RFC 8037 say.
func thumbprint(key crypto.PublicKey) (string, error) {
	k := jose.JSONWebKey{Key: key}
	sum, err := k.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("the new key has no thumbprint: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}
