package apikey

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	defaultLength = 32
	minLength     = 16
	maxLength     = 4096
	maxPrefix     = 64
)

// fieldName is what a key of a Kubernetes Secret may be.
var fieldName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,253}$`)

// taken are the names in the body of creds/<name>, which holds the previous
// value beside them.
var taken = []string{
	"value", "previous_value", "previous_valid_until",
	"username", "password", "previous_username", "previous_password",
	"private_key", "public_key", "kid", "algorithm", "keys", "previous_private_key", "previous_public_key", "previous_kid",
	"next_value", "next_public_key", "next_kid",
	"version", "last_vault_rotation", "rotation_period", "rotation_schedule", "rotation_timezone", "rotation_window", "ttl",
}

// Complete fills in the defaults. To complete a spec again changes nothing.
func (Kind) Complete(spec *kind.Spec) error {
	if spec.Username != "" {
		return fmt.Errorf("username is %q, but an api-key has none: leave username out", spec.Username)
	}
	if err := checkPrefix(spec.Prefix); err != nil {
		return err
	}
	if err := checkPreviousField(spec.PreviousField); err != nil {
		return err
	}
	if err := completeStrategy(spec); err != nil {
		return err
	}
	if spec.PasswordPolicy != "" {
		return checkPolicyAlone(spec)
	}
	if spec.Length == 0 {
		spec.Length = defaultLength
	}
	if spec.Encoding == "" {
		spec.Encoding = Alphanumeric
	}
	return checkGenerated(spec)
}

// completeStrategy holds to the rule that the two strategies differ in nothing
// but whether consumers can read the previous value.
func completeStrategy(spec *kind.Spec) error {
	possible, why := kind.Swap, "without previous_field consumers see one value only, so give previous_field or strategy=swap"
	if spec.PreviousField != "" {
		possible, why = kind.Overlap, "with previous_field consumers see both values, so clear previous_field or give strategy=overlap"
	}
	switch spec.Strategy {
	case "", possible:
		spec.Strategy = possible
		return nil
	case kind.Overlap, kind.Swap:
		return fmt.Errorf("strategy is %q: %s", spec.Strategy, why)
	default:
	}
	return fmt.Errorf("strategy is %q: an api-key allows overlap (with previous_field) or swap (without)", spec.Strategy)
}

func checkPrefix(prefix string) error {
	if len(prefix) > maxPrefix {
		return fmt.Errorf("prefix is %d bytes long: at most %d are allowed", len(prefix), maxPrefix)
	}
	if strings.ContainsFunc(prefix, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("prefix is %q: only printable ASCII characters are allowed, without spaces", prefix)
	}
	return nil
}

func checkPreviousField(field string) error {
	switch {
	case field == "":
		return nil
	case len(field) > 253:
		return fmt.Errorf("previous_field is %d bytes long: at most 253 are allowed", len(field))
	case !fieldName.MatchString(field):
		return fmt.Errorf("previous_field is %q: only letters, digits, dot, dash and underscore are allowed", field)
	case field == "." || strings.HasPrefix(field, ".."):
		// Kubernetes refuses such a key: as a file it would be a directory.
		return fmt.Errorf("previous_field is %q: a name that is . or begins with .. is not allowed", field)
	case slices.Contains(taken, field):
		return fmt.Errorf("previous_field is %q, which creds/ uses itself: give another name, such as API_KEY_PREVIOUS", field)
	}
	return nil
}

func checkPolicyAlone(spec *kind.Spec) error {
	const why = "and password_policy is %q, which decides that itself: clear one of them"
	if spec.Encoding != "" {
		return fmt.Errorf("encoding is %q "+why, spec.Encoding, spec.PasswordPolicy)
	}
	if spec.Length != 0 {
		return fmt.Errorf("length is %d "+why, spec.Length, spec.PasswordPolicy)
	}
	return nil
}

// checkGenerated checks the fields of a value that no policy makes.
func checkGenerated(spec *kind.Spec) error {
	switch spec.Encoding {
	case Alphanumeric, Hex, Base64URL:
	default:
		return fmt.Errorf("encoding is %q: allowed are %s, %s and %s", spec.Encoding, Alphanumeric, Hex, Base64URL)
	}
	if spec.Length < minLength || spec.Length > maxLength {
		return fmt.Errorf("length is %d: %d to %d characters are allowed", spec.Length, minLength, maxLength)
	}
	if spec.Encoding == Hex && spec.Length%2 != 0 {
		return fmt.Errorf("length is %d: with encoding hex, of two characters a byte, it must be even", spec.Length)
	}
	if spec.Encoding == Base64URL && spec.Length%4 == 1 {
		return fmt.Errorf("length is %d: nothing has base64url text of that length, so give one more or one less", spec.Length)
	}
	return nil
}
