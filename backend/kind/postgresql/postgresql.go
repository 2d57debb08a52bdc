// Package postgresql rotates the passwords of PostgreSQL login roles.
//
// PostgreSQL keeps one password a user, in a catalog that all databases of a
// server share and that reaches standbys with everything else that is
// replicated. Everything here follows from that: the new password takes the
// place of the old one at once (strategy swap), it is changed at the primary
// alone, and a standby is asked only once it has what the primary had. A change
// sends a SCRAM verifier and never a password; a login proves a password only
// if the server asked for one.
//
//	postgresql.go  the kind: fields, generation
//	verifier.go    the form in which a password is sent to change it
//	url.go         what connection_url may say
//	login.go       one login, and what the server asked for during it
//	session.go     what sessions are asked, and what their errors mean
//	fleet.go       which nodes there are, and what they are
//	preflight.go, probe.go, change.go   the Target
//	verify.go      what a connection is checked for when it is written
package postgresql

import (
	"context"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	// alphabet needs no quoting in a URL, a connection string or a shell.
	alphabet      = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	minLength     = 16
	maxLength     = 512
	defaultLength = 32
	// maxSecret stays below what older clients and poolers cut off.
	maxSecret = 996
	// maxUsername is what PostgreSQL cuts names to, in bytes.
	maxUsername = 63
)

// Kind is the postgresql kind. Its zero value is ready to use.
type Kind struct{}

var _ kind.Kind = Kind{}

// Name is what users type.
func (Kind) Name() string { return "postgresql" }

// ConnectionType is the type of connection that roles of this kind need.
func (Kind) ConnectionType() string { return connection.TypePostgreSQL }

// Fields are the role fields that only some kinds have.
func (Kind) Fields() []string {
	return []string{"username", "strategy", "password_policy", "length"}
}

// Complete fills in strategy and length and refuses what PostgreSQL cannot do.
func (Kind) Complete(spec *kind.Spec) error {
	if !usable(spec.Username) {
		return fmt.Errorf("username is %.64q: a postgresql role needs the name of one user, 1 to %d bytes of UTF-8 without control characters", spec.Username, maxUsername)
	}
	if spec.Strategy == "" {
		spec.Strategy = kind.Swap
	}
	if spec.Strategy != kind.Swap {
		return fmt.Errorf("strategy is %q: postgresql roles rotate with \"swap\", because a postgresql user has one password", spec.Strategy)
	}
	if spec.Length == 0 {
		spec.Length = defaultLength
	}
	if spec.Length < minLength || spec.Length > maxLength {
		return fmt.Errorf("length is %d: a postgresql password has %d to %d characters", spec.Length, minLength, maxLength)
	}
	return nil
}

func usable(username string) bool {
	return username != "" && len(username) <= maxUsername && utf8.ValidString(username) &&
		!strings.ContainsFunc(username, unicode.IsControl)
}

// CheckInitial refuses a password that could not be verified or served
// unchanged. It need not look like a generated one.
func (Kind) CheckInitial(_ kind.Spec, secret string) error {
	if fault := unusable(secret); fault != "" {
		return fmt.Errorf("initial_password %s: give 1 to %d bytes of UTF-8 without control characters, and check that its file does not end with a new line", fault, maxSecret)
	}
	return nil
}

func unusable(secret string) string {
	switch {
	case secret == "":
		return "is empty"
	case len(secret) > maxSecret:
		return fmt.Sprintf("has %d bytes", len(secret))
	case !utf8.ValidString(secret):
		return "is not valid UTF-8"
	case strings.ContainsFunc(secret, unicode.IsControl):
		return "holds a control character"
	case !agreed(secret):
		return "holds characters that not all clients send alike (they are changed by SASLprep)"
	}
	return ""
}

// Generate makes a new password from letters and digits, or by the role's
// password policy.
func (Kind) Generate(ctx context.Context, spec kind.Spec, source kind.Source) (kind.Material, error) {
	if spec.PasswordPolicy == "" {
		secret, err := kind.RandomString(source, max(spec.Length, minLength), alphabet)
		if err != nil {
			return kind.Material{}, fmt.Errorf("generate a postgresql password for role %q: %w", spec.Role, err)
		}
		return kind.Material{Username: spec.Username, Secret: secret}, nil
	}
	secret, err := source.FromPolicy(ctx, spec.PasswordPolicy)
	if err != nil {
		return kind.Material{}, fmt.Errorf("password_policy %q of role %q: %w", spec.PasswordPolicy, spec.Role, err)
	}
	if fault := unusable(secret); fault != "" {
		return kind.Material{}, kind.Definitely("what password_policy %q made for role %q %s: correct the policy", spec.PasswordPolicy, spec.Role, fault)
	}
	return kind.Material{Username: spec.Username, Secret: secret}, nil
}
