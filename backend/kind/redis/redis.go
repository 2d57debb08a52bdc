// Package redis rotates the passwords of Redis ACL users, the default user of
// requirepass installations included.
//
// Redis keeps a list of password hashes for each user, on each node, and
// replicates none of it. Everything here follows from that: two passwords can
// live side by side (overlap), a change sends hashes and never plaintext, it
// has to reach every node and be saved there, and a node that could not be
// asked is a node that still has the old list.
//
//	redis.go       the kind: fields, generation
//	verify.go      what a connection is checked for when it is written
//	session.go     one connection to one node, and what its errors mean
//	discover.go    which nodes there are
//	preflight.go, probe.go, change.go, replication.go   the Target
//	profile.go     what a user may do, read and written
//	clients.go     who is logged in, and closing that
//	sentinel.go    who watches the nodes, and logs in to them
package redis

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	alphabet      = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	minLength     = 16
	maxLength     = 512
	defaultLength = 32
	// maxSecret stays below the 16 KiB that Redis reads from a client that has
	// not logged in yet.
	maxSecret = 4096
)

// Redis saves names unquoted: with a quote or a space in one of them the
// server does not start again.
var usernamePattern = regexp.MustCompile(`^[A-Za-z0-9_.@:-]{1,128}$`)

// Kind is the redis kind. Its zero value is ready to use.
type Kind struct{}

var _ kind.Kind = Kind{}

// Name is what users type.
func (Kind) Name() string { return "redis" }

// ConnectionType is the type of connection that roles of this kind need.
func (Kind) ConnectionType() string { return connection.TypeRedis }

// Fields are the role fields that only some kinds have.
func (Kind) Fields() []string {
	return []string{"username", "usernames", "strategy", "password_policy", "length", "close_connections"}
}

// Complete fills in strategy and length and refuses what Redis cannot do.
func (Kind) Complete(spec *kind.Spec) error {
	named := func(name string) string {
		switch {
		case !usernamePattern.MatchString(name):
			return "a redis role needs the names of ACL users, 1 to 128 letters, digits and _ . @ : -"
		case name == "default" && spec.Strategy == kind.Alternate:
			// It can neither be created nor removed, and who sends a password without a
			// name logs in as it: those clients cannot follow to another user.
			return "clients that send no name log in as default, so it cannot take turns with another user: give two others, or rotate it with overlap"
		}
		return ""
	}
	err := spec.CompleteUsers("redis", kind.Overlap, named, kind.Overlap, kind.Swap, kind.Alternate)
	if err != nil {
		return err
	}
	if spec.Length == 0 {
		spec.Length = defaultLength
	}
	if spec.Length < minLength || spec.Length > maxLength {
		return fmt.Errorf("length is %d: a redis password has %d to %d characters", spec.Length, minLength, maxLength)
	}
	return nil
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
	}
	return ""
}

// Generate makes a new password from letters and digits, or by the role's
// password policy.
func (Kind) Generate(ctx context.Context, spec kind.Spec, source kind.Source) (kind.Material, error) {
	if spec.PasswordPolicy == "" {
		secret, err := kind.RandomString(source, max(spec.Length, minLength), alphabet)
		if err != nil {
			return kind.Material{}, fmt.Errorf("generate a redis password for role %q: %w", spec.Role, err)
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

// hashOf is the form in which Redis stores a password, and the only one in
// which it is sent to change a user.
func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}
