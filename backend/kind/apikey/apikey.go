// Package apikey is the kind of secret that no server has to be told about: API
// keys, admin tokens and other strings that the applications themselves hold
// and compare.
//
// The engine makes it, serves it and gets it into every pod. Where the role
// names a previous_field, both values stand side by side in what consumers
// read, and an application that accepts either has no interval without a valid
// key (strategy overlap). Without one the new value replaces the old at once
// (strategy swap), and callers are refused until they have the new one too.
package apikey

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

// The encodings of the generated part.
const (
	Alphanumeric = "alphanumeric" // A-Z, a-z, 0-9
	Hex          = "hex"          // lower case
	Base64URL    = "base64url"    // RFC 4648 section 5, without padding
)

const (
	alphabet  = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	maxSecret = 32 << 10 // bytes: several versions of it share one storage entry
)

// Kind is the api-key kind. Its zero value is ready to use.
type Kind struct{}

var _ kind.Kind = Kind{}

// Name is what users type.
func (Kind) Name() string { return "api-key" }

// ConnectionType is empty: there is no server to tell.
func (Kind) ConnectionType() string { return "" }

// Fields are the role fields that only some kinds have.
func (Kind) Fields() []string {
	return []string{"strategy", "length", "encoding", "prefix", "password_policy", "previous_field"}
}

// CheckInitial refuses a value that could not be stored and served unchanged.
// It need not look like a generated one.
func (Kind) CheckInitial(_ kind.Spec, secret string) error {
	switch {
	case secret == "":
		return fmt.Errorf("initial_value is empty: give 1 to %d bytes, or leave it out and a value is generated", maxSecret)
	case len(secret) > maxSecret:
		return fmt.Errorf("initial_value is %d bytes long: at most %d are allowed", len(secret), maxSecret)
	case !utf8.ValidString(secret):
		// Storage and the API are JSON, which would replace such bytes silently.
		return fmt.Errorf("initial_value is not valid UTF-8: encode it as text (base64, hex) first")
	case strings.ContainsFunc(secret, unicode.IsControl):
		return fmt.Errorf("initial_value holds a control character: no NUL, tab or new line is allowed, so check that its file does not end with a new line")
	}
	return nil
}

// Generate makes a new value: the prefix, then random characters in the
// encoding that was asked for, or what the password policy makes.
func (Kind) Generate(ctx context.Context, spec kind.Spec, source kind.Source) (kind.Material, error) {
	random, err := generate(ctx, spec, source)
	if err != nil {
		return kind.Material{}, fmt.Errorf("generate an api-key for role %q: %w", spec.Role, err)
	}
	return kind.Material{Secret: spec.Prefix + random}, nil
}

func generate(ctx context.Context, spec kind.Spec, source kind.Source) (string, error) {
	if spec.PasswordPolicy != "" {
		return fromPolicy(ctx, spec, source)
	}
	// Nobody but Complete knows the defaults. A spec that it has not seen must
	// not end as a prefix and nothing more.
	if err := checkGenerated(&spec); err != nil {
		return "", kind.Definitely("%w", err)
	}
	if spec.Encoding == Alphanumeric {
		return kind.RandomString(source, spec.Length, alphabet)
	}
	// Encoded bytes, not characters of the encoding's alphabet: decoders refuse
	// text that no bytes encode to.
	if spec.Encoding == Hex {
		raw, err := kind.RandomBytes(source, spec.Length/2)
		return hex.EncodeToString(raw), err
	}
	raw, err := kind.RandomBytes(source, spec.Length*6/8)
	return base64.RawURLEncoding.EncodeToString(raw), err
}

// fromPolicy checks what the policy made: it is written by others, and may ask
// for characters that no header or environment variable can carry.
func fromPolicy(ctx context.Context, spec kind.Spec, source kind.Source) (string, error) {
	made, err := source.FromPolicy(ctx, spec.PasswordPolicy)
	if err != nil {
		return "", fmt.Errorf("password_policy %q: %w", spec.PasswordPolicy, err)
	}
	switch {
	case made == "":
		return "", kind.Definitely("password_policy %q made an empty value: correct the policy", spec.PasswordPolicy)
	case len(spec.Prefix)+len(made) > maxSecret:
		return "", kind.Definitely("password_policy %q made a value of %d bytes: at most %d are allowed with the prefix, so shorten it",
			spec.PasswordPolicy, len(made), maxSecret-len(spec.Prefix))
	case !utf8.ValidString(made) || strings.ContainsFunc(made, unprintable):
		return "", kind.Definitely("password_policy %q made a value with characters that cannot be printed: correct its charsets",
			spec.PasswordPolicy)
	}
	return made, nil
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }
