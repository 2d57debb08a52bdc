package jwt

import (
	"fmt"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Bounds on the life of a token.
const (
	minTokenTTL = time.Second
	maxTokenTTL = 365 * 24 * time.Hour
)

// Complete fills in the defaults. To complete a spec again changes nothing.
func (Kind) Complete(spec *kind.Spec) error {
	if err := checkForeign(*spec); err != nil {
		return err
	}
	if err := kind.CompleteRing("jwt", spec); err != nil {
		return err
	}
	if spec.Algorithm == "" {
		spec.Algorithm = defaultAlgorithm
	}
	a, err := algorithmOf(spec.Algorithm)
	if err != nil {
		return err
	}
	if a.symmetric() && spec.Encoding == "" {
		spec.Encoding = Base64
	}
	if spec.Length == 0 {
		spec.Length = a.defaultLength()
	}
	if err := a.checkSize(*spec); err != nil {
		return err
	}
	if a.symmetric() && spec.PublicJWKS {
		return fmt.Errorf("public_jwks is true, but a key of %s is a shared secret and has no public half: clear it, or give algorithm=RS256, ES256 or EdDSA", a.name)
	}
	return checkTokenTTL(spec.MaxTokenTTL)
}

func (a algorithm) defaultLength() int {
	if a.keys == rsaKeys {
		return defaultBits
	}
	return a.size
}

// checkTokenTTL has no default to fall back to: one that is too short would cut
// sessions, and nobody but the user knows how long tokens live.
func checkTokenTTL(ttl time.Duration) error {
	switch {
	case ttl == 0:
		return fmt.Errorf("max_token_ttl is missing: give the longest life of a token that these keys sign, for example 1h; an earlier key verifies until the last token that it signed has run out")
	case ttl < minTokenTTL, ttl > maxTokenTTL:
		return fmt.Errorf("max_token_ttl is %s: 1s to 8760h are allowed", ttl)
	}
	return nil
}

// checkForeign refuses what belongs to other kinds.
func checkForeign(spec kind.Spec) error {
	const why = "which is not for kind jwt: leave it out"
	switch {
	case spec.Username != "":
		return fmt.Errorf("username is %.64q, but a jwt key has none: leave username out", spec.Username)
	case spec.PasswordPolicy != "":
		return fmt.Errorf("password_policy is %.64q, "+why, spec.PasswordPolicy)
	case spec.Prefix != "":
		return fmt.Errorf("prefix is %.64q, "+why, spec.Prefix)
	case spec.RetireAfter != 0:
		return fmt.Errorf("retire_after is %s, "+why+" and give max_token_ttl", spec.RetireAfter)
	case spec.RequireReencryptionAck:
		return fmt.Errorf("require_reencryption_ack is true, " + why)
	}
	return nil
}
