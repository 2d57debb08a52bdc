// Package postgresql rotates the passwords of PostgreSQL login roles.
//
// PostgreSQL keeps one password a user, in a catalog that all databases of a
// server share and that reaches standbys with everything else that is
// replicated. Everything here follows from that: the new password takes the
// place of the old one at once (strategy swap), unless two users take turns
// (alternate); it is changed at the primary alone, and a standby is asked only
// once it has what the primary had. A change sends a SCRAM verifier and never a
// password; a login proves a password only if the server asked for one.
//
//	postgresql.go  the kind: fields, generation
//	verifier.go    the form in which a password is sent to change it
//	url.go         what connection_url may say
//	login.go       one login, and what the server asked for during it
//	session.go     what sessions are asked, and what their errors mean
//	fleet.go       which nodes there are, and what they are
//	profile.go     what a user is beside its password, as lines
//	catalog.go     how that is read
//	preflight.go, probe.go, change.go   the Target
//	create.go      users that are created, and made the same as others
//	self.go        users that change their own password
//	sessions.go    who is logged in, and how that ends
//	verify.go      what a connection is checked for when it is written
package postgresql

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
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
	// minValidFor leaves time for a rotation, and for clocks that differ.
	minValidFor = time.Hour
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
	return []string{
		"username", "usernames", "strategy", "password_policy", "length", "valid_until", "close_connections", "allow_self_rotation",
	}
}

// Complete fills in strategy and length and refuses what PostgreSQL cannot do.
func (Kind) Complete(spec *kind.Spec) error {
	if err := spec.CompleteUsers("postgresql", kind.Swap, unnameable, kind.Swap, kind.Alternate); err != nil {
		return err
	}
	if spec.Length == 0 {
		spec.Length = defaultLength
	}
	if spec.Length < minLength || spec.Length > maxLength {
		return fmt.Errorf("length is %d: a postgresql password has %d to %d characters", spec.Length, minLength, maxLength)
	}
	if spec.ValidFor != 0 && spec.ValidFor < minValidFor {
		return fmt.Errorf("valid_until is %s: a postgresql password is valid for %s at least, or without it for ever", spec.ValidFor, minValidFor)
	}
	if spec.SelfRotation && spec.ValidFor != 0 {
		return fmt.Errorf("valid_until is %s and allow_self_rotation is true: a postgresql user may not move its own VALID UNTIL, so leave out one or the other", spec.ValidFor)
	}
	if spec.SelfRotation && spec.Strategy == kind.Alternate {
		return errors.New("allow_self_rotation is true and strategy is alternate: the user whose turn it is has no password to log in with, so leave out one or the other")
	}
	return nil
}

// unnameable says why a name cannot be one of a user, or "".
func unnameable(username string) string {
	if username != "" && len(username) <= maxUsername && utf8.ValidString(username) && !strings.ContainsFunc(username, unicode.IsControl) {
		return ""
	}
	return fmt.Sprintf("a postgresql role needs the name of a user, 1 to %d bytes of UTF-8 without control characters", maxUsername)
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
		return ending(spec, secret), nil
	}
	secret, err := source.FromPolicy(ctx, spec.PasswordPolicy)
	if err != nil {
		return kind.Material{}, fmt.Errorf("password_policy %q of role %q: %w", spec.PasswordPolicy, spec.Role, err)
	}
	if fault := unusable(secret); fault != "" {
		return kind.Material{}, kind.Definitely("what password_policy %q made for role %q %s: correct the policy", spec.PasswordPolicy, spec.Role, fault)
	}
	return ending(spec, secret), nil
}

// ending is new material, with the end that the server gives it.
func ending(spec kind.Spec, secret string) kind.Material {
	m := kind.Material{Username: spec.Username, Secret: secret}
	if spec.ValidFor > 0 {
		m.Expires = time.Now().UTC().Truncate(time.Second).Add(spec.ValidFor)
	}
	return m
}
