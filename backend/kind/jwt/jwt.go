// Package jwt is the kind of key that signs JSON Web Tokens: shared secrets
// (HS256, HS384, HS512) and key pairs (RS*, ES*, EdDSA).
//
// Its roles are key rings: verifiers see a new key before anything is signed
// with it, and an old one until the last token that it signed has run out.
//
// A shared secret is a text, and the key is the bytes of that text as they
// stand: nobody decodes it, neither who signs nor who verifies. A key pair is
// stored as its private half, PKCS #8 in PEM; whoever verifies is given the
// public half, as PKIX in PEM or as a JSON Web Key.
package jwt

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// The encodings of a shared secret.
const (
	Base64    = "base64"    // RFC 4648 section 4, with padding
	Base64URL = "base64url" // RFC 4648 section 5, without padding
	Hex       = "hex"       // lower case
)

const (
	// minInitial lets installations adopt secrets that are weaker than RFC 7518
	// section 3.2 asks for, to get rid of them by a rotation, but none that can
	// be guessed from one token.
	minInitial = 16
	maxInitial = 8 << 10 // bytes: several keys share one storage entry
)

// Kind is the jwt kind. Its zero value is ready to use.
type Kind struct{}

var (
	_ kind.Ring    = Kind{}
	_ kind.Adopter = Kind{}
)

// Name is what users type.
func (Kind) Name() string { return "jwt" }

// ConnectionType is empty: there is no server to tell.
func (Kind) ConnectionType() string { return "" }

// Fields are the role fields that only some kinds have.
func (Kind) Fields() []string {
	return []string{
		"strategy", "algorithm", "length", "encoding", "max_token_ttl", "propagation_delay", "next_field", "keys_field", "public_jwks",
	}
}

// CheckInitial refuses a key that is not one of the role's algorithm.
func (Kind) CheckInitial(spec kind.Spec, secret string) error {
	a, err := algorithmOf(spec.Algorithm)
	if err != nil {
		return err
	}
	switch {
	case secret == "":
		return fmt.Errorf("initial_value is empty: give the key that signs now, or leave it out and one is generated")
	case len(secret) > maxInitial:
		return fmt.Errorf("initial_value is %d bytes long: at most %d are allowed", len(secret), maxInitial)
	case a.symmetric():
		return checkShared(a, secret)
	}
	_, err = adoptPrivate(a, secret)
	return err
}

func checkShared(a algorithm, secret string) error {
	switch {
	case strings.Contains(secret, "-----BEGIN"):
		return fmt.Errorf("initial_value is PEM, but algorithm %s signs with a shared secret: give that, or the algorithm of the key, such as RS256", a.name)
	case len(secret) < minInitial:
		return fmt.Errorf("initial_value is %d bytes long: at least %d are needed, and %s asks for %d; leave it out and a key is generated", len(secret), minInitial, a.name, a.size)
	case !utf8.ValidString(secret):
		// Storage and the API are JSON, which would replace such bytes silently.
		return fmt.Errorf("initial_value is not valid UTF-8: a key of bytes that are no text cannot be adopted")
	case strings.ContainsFunc(secret, unicode.IsControl):
		return fmt.Errorf("initial_value holds a control character: no NUL, tab or new line is allowed, so check that its file does not end with a new line")
	}
	return nil
}

// Adopt makes material of a key that CheckInitial has accepted.
func (Kind) Adopt(_ context.Context, spec kind.Spec, secret string, source kind.Source) (kind.Material, error) {
	a, err := algorithmOf(spec.Algorithm)
	if err != nil {
		return kind.Material{}, kind.Definitely("%w", err)
	}
	if a.symmetric() {
		return sharedMaterial(secret, source)
	}
	key, err := adoptPrivate(a, secret)
	if err != nil {
		return kind.Material{}, kind.Definitely("%w", err)
	}
	return pairMaterial(key)
}

// Generate makes a new key.
func (Kind) Generate(ctx context.Context, spec kind.Spec, source kind.Source) (kind.Material, error) {
	m, err := generate(ctx, spec, source)
	if err != nil {
		return kind.Material{}, fmt.Errorf("generate a jwt key for role %q: %w", spec.Role, err)
	}
	return m, nil
}

func generate(ctx context.Context, spec kind.Spec, source kind.Source) (kind.Material, error) {
	if err := ctx.Err(); err != nil { // an RSA key takes a while
		return kind.Material{}, err
	}
	// Nobody but Complete knows the defaults.
	a, err := algorithmOf(spec.Algorithm)
	if err == nil {
		err = a.checkSize(spec)
	}
	if err != nil {
		return kind.Material{}, kind.Definitely("%w", err)
	}
	if !a.symmetric() {
		key, err := a.generate(spec.Length, source)
		if err != nil {
			return kind.Material{}, err
		}
		return pairMaterial(key)
	}
	raw, err := kind.RandomBytes(source, spec.Length)
	if err != nil {
		return kind.Material{}, err
	}
	return sharedMaterial(encode(spec.Encoding, raw), source)
}

func encode(encoding string, raw []byte) string {
	switch encoding {
	case Hex:
		return hex.EncodeToString(raw)
	case Base64URL:
		return base64.RawURLEncoding.EncodeToString(raw)
	}
	return base64.StdEncoding.EncodeToString(raw)
}

func sharedMaterial(secret string, source kind.Source) (kind.Material, error) {
	id, err := kind.RandomKeyID(source)
	if err != nil {
		return kind.Material{}, err
	}
	return kind.Material{Secret: secret, KeyID: id}, nil
}

// Verifying is what a verifier needs of a key: a shared secret itself, or the
// public half of a pair as PKIX in PEM.
func (Kind) Verifying(m kind.Material) (string, error) {
	if !isPair(m) {
		return m.Secret, nil
	}
	key, err := public(m)
	if err != nil {
		return "", err
	}
	return encodePublic(key)
}
