// Package rabbitmq rotates the passwords of RabbitMQ users.
//
// A user has one password, kept as a salted hash in a database that all brokers
// of a cluster share. Everything here follows from that: the new password takes
// the place of the old one at once (swap), or two users take turns (alternate); a
// change is a request to the management API of any broker and carries the hash
// alone; and the proof is a login over AMQP at every broker, because a cluster
// that has come apart still answers for the whole of it.
//
//	rabbitmq.go    the kind: fields, generation
//	hash.go        password hashes
//	rights.go      what a user may do, as the lines of its profile
//	management.go  requests to the management API, and what its answers mean
//	amqp.go        logins over AMQP 0-9-1
//	cluster.go     which brokers there are
//	verify.go      what a connection is checked for when it is written
//	preflight.go, probe.go, change.go, create.go, sessions.go   the Target
package rabbitmq

import (
	"context"
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
	// maxSecret stays below the 4096 bytes that a broker reads in one frame from a
	// client that has not logged in yet.
	maxSecret = 2048
)

// Names that need no care in URLs, configuration files and shells. One of dots
// alone would be another path.
var (
	usernamePattern = regexp.MustCompile(`^[A-Za-z0-9_.@:=/+-]{1,128}$`)
	onlyDots        = regexp.MustCompile(`^\.+$`)
)

// Kind is the rabbitmq kind. Its zero value is ready to use.
type Kind struct{}

var _ kind.Kind = Kind{}

// Name is what users type.
func (Kind) Name() string { return "rabbitmq" }

// ConnectionType is the type of connection that roles of this kind need.
func (Kind) ConnectionType() string { return connection.TypeRabbitMQ }

// Fields are the role fields that only some kinds have.
func (Kind) Fields() []string {
	return []string{"username", "usernames", "strategy", "password_policy", "length", "close_connections"}
}

// Complete fills in strategy and length and refuses what RabbitMQ cannot do.
func (Kind) Complete(spec *kind.Spec) error {
	if spec.Strategy == kind.Overlap {
		return fmt.Errorf("strategy is %q: a rabbitmq user has one password, so rabbitmq roles rotate with \"swap\", or with \"alternate\" and two users", spec.Strategy)
	}
	if err := spec.CompleteUsers("rabbitmq", kind.Swap, misnamed, kind.Swap, kind.Alternate); err != nil {
		return err
	}
	if spec.Length == 0 {
		spec.Length = defaultLength
	}
	if spec.Length < minLength || spec.Length > maxLength {
		return fmt.Errorf("length is %d: a rabbitmq password has %d to %d characters", spec.Length, minLength, maxLength)
	}
	return nil
}

// misnamed says why name cannot be that of a user, "" where it can.
func misnamed(name string) string {
	if usernamePattern.MatchString(name) && !onlyDots.MatchString(name) {
		return ""
	}
	return "a rabbitmq role needs the name of a user, 1 to 128 letters, digits and _ . @ : = / + -"
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

// Generate makes a new password from letters and digits, which mean themselves
// in the URLs that clients put them into, or by the role's password policy.
func (Kind) Generate(ctx context.Context, spec kind.Spec, source kind.Source) (kind.Material, error) {
	if spec.PasswordPolicy == "" {
		secret, err := kind.RandomString(source, max(spec.Length, minLength), alphabet)
		if err != nil {
			return kind.Material{}, fmt.Errorf("generate a rabbitmq password for role %q: %w", spec.Role, err)
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
