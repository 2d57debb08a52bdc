// Package encryptionkey is the kind of key that applications encrypt data with
// themselves: 128, 192 or 256 random bits.
//
// Its roles are key rings: consumers can decrypt with a new key before any of
// them encrypts with it, and with an old one until it is retired, which may be
// years later, because what it encrypted is still there.
package encryptionkey

import (
	"context"
	"encoding/base64"
	"fmt"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	defaultBits    = 256
	maxRetireAfter = 10 * 365 * 24 * time.Hour
)

// Kind is the encryption-key kind. Its zero value is ready to use.
type Kind struct{}

var (
	_ kind.Ring    = Kind{}
	_ kind.Adopter = Kind{}
)

// Name is what users type.
func (Kind) Name() string { return "encryption-key" }

// ConnectionType is empty: there is no server to tell.
func (Kind) ConnectionType() string { return "" }

// Fields are the role fields that only some kinds have.
func (Kind) Fields() []string {
	return []string{"strategy", "length", "propagation_delay", "retire_after", "require_reencryption_ack", "next_field", "keys_field"}
}

// Complete fills in the defaults. To complete a spec again changes nothing.
func (Kind) Complete(spec *kind.Spec) error {
	if err := checkForeign(*spec); err != nil {
		return err
	}
	if err := kind.CompleteRing("encryption-key", spec); err != nil {
		return err
	}
	if spec.Length == 0 {
		spec.Length = defaultBits
	}
	if err := checkLength(spec.Length); err != nil {
		return err
	}
	switch after := spec.RetireAfter; {
	case after == 0:
	case after < 0 || after > maxRetireAfter:
		return fmt.Errorf("retire_after is %s: up to 87600h are allowed, or 0 to keep keys until retire/ is written", after)
	case after < spec.PropagationDelay:
		return fmt.Errorf("retire_after is %s, but a consumer may encrypt with an earlier key for propagation_delay, %s, after its rotation: give more than that", after, spec.PropagationDelay)
	}
	return nil
}

// checkForeign refuses what belongs to other kinds.
func checkForeign(spec kind.Spec) error {
	const why = "which is not for kind encryption-key: leave it out"
	switch {
	case spec.Username != "":
		return fmt.Errorf("username is %.64q, but an encryption-key has none: leave username out", spec.Username)
	case spec.PasswordPolicy != "":
		return fmt.Errorf("password_policy is %.64q, "+why, spec.PasswordPolicy)
	case spec.Encoding != "":
		return fmt.Errorf("encoding is %.64q, "+why+" (keys are base64)", spec.Encoding)
	case spec.Prefix != "":
		return fmt.Errorf("prefix is %.64q, "+why, spec.Prefix)
	case spec.Algorithm != "":
		return fmt.Errorf("algorithm is %.64q, "+why+" and choose the size with length", spec.Algorithm)
	case spec.MaxTokenTTL != 0:
		return fmt.Errorf("max_token_ttl is %s, "+why+" and give retire_after where keys may go by themselves", spec.MaxTokenTTL)
	case spec.PublicJWKS:
		return fmt.Errorf("public_jwks is true, " + why)
	}
	return nil
}

func checkLength(bits int) error {
	if bits != 128 && bits != 192 && bits != 256 {
		return fmt.Errorf("length is %d: an encryption-key has 128, 192 or 256 bits", bits)
	}
	return nil
}

// CheckInitial refuses a key that is not of the role's length: the next rotation
// would change the length that applications have to cope with.
func (Kind) CheckInitial(spec kind.Spec, secret string) error {
	const want = "standard base64, with padding and nothing else"
	if secret == "" {
		return fmt.Errorf("initial_value is empty: give a key in " + want + ", or leave it out and one is generated")
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(secret)
	// The decoder passes over new lines, which others do not.
	if err != nil || base64.StdEncoding.EncodeToString(raw) != secret {
		return fmt.Errorf("initial_value is not " + want + ": encode the bytes of the key so, and check that its file does not end with a new line")
	}
	bits := len(raw) * 8
	if err := checkLength(bits); err != nil {
		return fmt.Errorf("initial_value has %d bits: 128, 192 or 256 are allowed", bits)
	}
	if bits != spec.Length {
		return fmt.Errorf("initial_value has %d bits, but length is %d: give length=%d", bits, spec.Length, bits)
	}
	return nil
}

// Adopt makes material of a key that CheckInitial has accepted.
func (Kind) Adopt(_ context.Context, _ kind.Spec, secret string, source kind.Source) (kind.Material, error) {
	return material(secret, source)
}

// Generate makes a new key.
func (Kind) Generate(_ context.Context, spec kind.Spec, source kind.Source) (kind.Material, error) {
	m, err := generate(spec, source)
	if err != nil {
		return kind.Material{}, fmt.Errorf("generate an encryption-key for role %q: %w", spec.Role, err)
	}
	return m, nil
}

func generate(spec kind.Spec, source kind.Source) (kind.Material, error) {
	if err := checkLength(spec.Length); err != nil { // nobody but Complete knows the default
		return kind.Material{}, kind.Definitely("%w", err)
	}
	raw, err := kind.RandomBytes(source, spec.Length/8)
	if err != nil {
		return kind.Material{}, err
	}
	return material(base64.StdEncoding.EncodeToString(raw), source)
}

// material names a key. The name is random: what is encrypted carries it, and a
// digest of the key would tell something of the key.
func material(secret string, source kind.Source) (kind.Material, error) {
	id, err := kind.RandomKeyID(source)
	if err != nil {
		return kind.Material{}, err
	}
	return kind.Material{Secret: secret, KeyID: id}, nil
}

// Verifying is the key itself: what encrypts is what decrypts.
func (Kind) Verifying(m kind.Material) (string, error) { return m.Secret, nil }
