// Package kind says what a kind of secret is to the rotation engine.
//
// A kind (redis, api-key, …) knows how to make new material and, where a
// server has to be told about it, how to ask that server which material it
// accepts and how to change that. It knows nothing about phases, storage or
// schedules: the engine in backend/rotation decides what happens next, a kind
// does it. Adding a kind is one folder below this one and one line in the
// registry of the root package; the suite in kindtest says what it must do.
package kind

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// Strategy is how a new version takes the place of the current one at the
// target.
type Strategy string

const (
	// Overlap: the target accepts the old and the new material side by side
	// until the old one is retired.
	Overlap Strategy = "overlap"
	// Swap: the target knows one material; the new one replaces the old one at
	// once.
	Swap Strategy = "swap"
	// Alternate: two users take turns. The idle one has no password; it is given
	// the new one and takes over, and both are accepted until the other's is taken
	// away.
	Alternate Strategy = "alternate"
	// KeyRing: consumers hold several keys, one of which signs or encrypts. A new
	// one is shown to all of them before it is used, and an old one stays until
	// nothing that was made with it counts any more.
	KeyRing Strategy = "key-ring"
)

// Material is the secret content of one version of a role. It prints as a
// fixed text, whatever the verb, so that it cannot reach a log or an error by
// accident; only its JSON form, which goes into Vault's encrypted storage,
// holds the secret.
type Material struct {
	Username string `json:"username,omitempty"`
	Secret   string `json:"secret"`
	// KeyID names a key of a ring. It belongs to the material: a rolled back
	// rotation serves it again with the key.
	KeyID string `json:"kid,omitempty"`
	// Expires is when the server itself ends it; zero where it does not.
	Expires time.Time `json:"expires,omitzero"`
}

const redacted = "(secret)"

// Format implements fmt.Formatter for every verb, %#v included.
func (m Material) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// Same reports whether m and other are the same credential. Versions are
// compared by what they hold, never by number: a rolled back rotation serves
// old material under a new number.
func (m Material) Same(other Material) bool {
	return m.Username == other.Username && m.Secret == other.Secret
}

// Zero reports whether m holds nothing.
func (m Material) Zero() bool { return m.Secret == "" && m.Username == "" }

// Spec is the part of a role that its kind interprets.
type Spec struct {
	Role           string   `json:"-"`
	Username       string   `json:"username,omitempty"`
	Usernames      []string `json:"usernames,omitempty"` // two, of strategy Alternate; Username is empty then
	Strategy       Strategy `json:"strategy,omitempty"`
	PasswordPolicy string   `json:"password_policy,omitempty"`
	Length         int      `json:"length,omitempty"`   // characters of the generated secret
	Encoding       string   `json:"encoding,omitempty"` // alphabet of an api-key
	Prefix         string   `json:"prefix,omitempty"`   // of an api-key
	PreviousField  string   `json:"previous_field,omitempty"`

	// ValidFor is after how long the server itself ends a password; 0: never.
	ValidFor time.Duration `json:"valid_until,omitempty"`
	// CloseConnections ends what is still open with the previous credential once
	// that is refused.
	CloseConnections bool `json:"close_connections,omitempty"`
	// SelfRotation: the user changes its own password, logged in as itself.
	SelfRotation bool `json:"allow_self_rotation,omitempty"`

	// Of key rings.
	Algorithm string `json:"algorithm,omitempty"`
	// NextField is where the next key stands until it is used, and KeysField
	// where all keys do, by id.
	NextField string `json:"next_field,omitempty"`
	KeysField string `json:"keys_field,omitempty"`
	// PropagationDelay is how long consumers take at most to read what changed.
	PropagationDelay time.Duration `json:"propagation_delay,omitempty"`
	// MaxTokenTTL is how long what was signed last stays valid.
	MaxTokenTTL time.Duration `json:"max_token_ttl,omitempty"`
	// RetireAfter is how old an earlier key that decrypts may become; 0: until it
	// is retired by hand.
	RetireAfter            time.Duration `json:"retire_after,omitempty"`
	RequireReencryptionAck bool          `json:"require_reencryption_ack,omitempty"`
	// PublicJWKS lets anybody read the public keys.
	PublicJWKS bool `json:"public_jwks,omitempty"`

	// Of secrets that another Vault keeps: where it keeps them.
	Mount                string `json:"mount,omitempty"`
	Key                  string `json:"key,omitempty"`
	MinDecryptionVersion int    `json:"min_decryption_version,omitempty"`
}

// Source makes randomness into passwords. Vault's password policies are read
// through it, so kinds need no Vault.
type Source interface {
	io.Reader
	FromPolicy(ctx context.Context, policy string) (string, error)
}

// Kind is one sort of secret.
type Kind interface {
	// Name is the word users type: "redis", "api-key".
	Name() string
	// ConnectionType is the type of connection that roles of this kind need,
	// or "" where no server has to be told about a rotation.
	ConnectionType() string
	// Fields names the role fields that this kind understands, beyond those
	// that every role has.
	Fields() []string
	// Complete fills defaults into spec and refuses what the kind cannot do
	// with one sentence that names the field, what was given and what is
	// allowed.
	Complete(spec *Spec) error
	// CheckInitial refuses a secret that an existing role cannot be adopted
	// with.
	CheckInitial(spec Spec, secret string) error
	// Generate makes new material. It talks to nobody but source.
	Generate(ctx context.Context, spec Spec, source Source) (Material, error)
}

// Ring is a kind of strategy KeyRing.
type Ring interface {
	Kind
	// Verifying is the form of a key that verifies or decrypts and does no more:
	// the key itself where there is only one form of it, its public half otherwise.
	Verifying(m Material) (string, error)
}

// Adopter is a kind whose material is more than a user and a secret.
type Adopter interface {
	// Adopt makes material of a secret that CheckInitial has accepted.
	Adopt(ctx context.Context, spec Spec, secret string, source Source) (Material, error)
}

// Target is a server (or a set of servers that hold the same users) that
// accepts or refuses material. Every method takes a list, because many users
// of one server should share connections, round trips and the cost of making a
// change durable, and answers in the order of the list. The context of a call
// has a deadline: nothing that a call sends may be sent after it.
//
// A Target is used by several goroutines at once, never for the same user.
type Target interface {
	// Preflight changes nothing. It says for each user whether a rotation could
	// succeed: admin login and privileges, the user as it stands, whether each
	// node can make a change survive its restart.
	Preflight(ctx context.Context, users []User) []Finding
	// Probe changes nothing. It asks every known node, by a fresh login for each
	// material, what it accepts.
	Probe(ctx context.Context, questions []Question) []Answer
	// Change makes every known node that can be reached accept and refuse what
	// is asked, durably. It is idempotent. It says per node what happened; a
	// node that was not asked or did not answer in time has an error of
	// class Unavailable, and its change may or may not have happened.
	Change(ctx context.Context, changes []Change) []Outcome
}

// User names whom a call is about.
type User struct {
	Role     string
	Username string
	// Known are nodes that held this user when it was last proven, as the
	// Target named them. A node that discovery no longer finds, but cannot
	// show to have left, still counts.
	Known []string
	// Like, when set, names another user of the target, whose turn it is before or
	// after this one's (strategy Alternate): Preflight finds a problem in each
	// difference between what the two may do, and none in that this user does not
	// exist if it can be created like the other.
	Like string
	// Profile is what this user was found to be (Finding.Profile), or is to be. A
	// Change that has it accept something creates the user with it where there is
	// none, and Preflight finds no problem in that, unless it could not be done.
	// Without a profile no user is ever created.
	Profile []string
	// Admin: it is the user that the engine itself logs in as, which every role but
	// the connection's own must not be.
	Admin bool
	// Dated: every new password of the user has an end (Material.Expires), so that
	// one that is past is no reason against another.
	Dated bool
	// Self, when set, are the credentials that the user may have now. It changes
	// its own password then, logged in with the one that is accepted, and the
	// connection's admin only looks.
	Self []Material
}

// Exists reports whether the user has to exist already.
func (u User) Exists() bool { return u.Like == "" && len(u.Profile) == 0 }

// Finding is what Preflight found for one user.
type Finding struct {
	// Err, when set, is why no answer could be had at all.
	Err error
	// Problems are definite reasons against a rotation, each a sentence that
	// says what to do.
	Problems []string
	// Notes are worth telling and no reason to stop.
	Notes []string
	// Nodes are the nodes that hold the user.
	Nodes []NodeError
	// HasCredential reports that the user can be logged in to with some
	// password now: its role may not be created without saying which.
	HasCredential bool
	// Profile is all that the user is beside its password, as sorted lines without
	// secrets that say the same of users who may do the same; nil where it does not
	// exist, or could not be read. What the lines mean is the target's own affair.
	Profile []string
}

// NodeError is a node, and why it could not be asked (nil when it could).
type NodeError struct {
	Node string
	Err  error
}

// Question asks which of Materials the nodes accept for a user.
type Question struct {
	User
	Materials []Material
	// Concluded are those of Materials that need not be tried where another is found
	// accepted, and the user can have only one: that they are refused follows from it. Of
	// all others a refusal is one that the node gave.
	Concluded []Material
}

// Concludes reports whether m is one of Concluded.
func (q Question) Concludes(m Material) bool { return slices.ContainsFunc(q.Concluded, m.Same) }

// Answer is what the nodes said to a Question.
type Answer struct {
	// Err, when set, is why no node could be asked at all (discovery failed).
	Err   error
	Nodes []NodeAnswer
}

// NodeAnswer is what one node said.
type NodeAnswer struct {
	Node string
	// Err, when set, is why this node could not be asked; the rest is void then.
	Err error
	// Accepts answers Question.Materials in order: proven by a fresh login.
	Accepts []bool
	// Extra counts credentials that the node accepts for the user and that are
	// none of Question.Materials; -1 when it accepts any.
	Extra int
	// Problem, when not empty, is a sentence about why an accepted material is
	// not good enough at this node (a replication link that cannot log in, a
	// login that proves nothing).
	Problem string
}

// Change is what nodes are asked to do for a user.
type Change struct {
	User
	// Accept is accepted afterwards.
	Accept []Material
	// Refuse is refused afterwards.
	Refuse []Material
	// Exclusive refuses everything that is not in Accept.
	Exclusive bool
	// Lead is what the nodes themselves use where they log in to each other as
	// this user (replication).
	Lead Material
	// Align makes a user that differs from User.Profile the same as it.
	Align bool
	// CloseBefore, when set, ends sessions of the user that were opened before that
	// time, once everything is refused that is to be. One that cannot be ended is
	// no failure of the change: Outcome.Notes say so.
	CloseBefore time.Time
}

// Outcome is what became of a Change.
type Outcome struct {
	// Err, when set, is why no node was asked at all.
	Err   error
	Nodes []NodeError
	// Notes are worth telling: what was created, aligned or closed, and what could
	// not be closed.
	Notes []string
}

// Observer is a Target that knows who is logged in.
type Observer interface {
	// Sessions changes nothing. It says which sessions of each user were opened
	// before a time.
	Sessions(ctx context.Context, questions []SessionsQuestion) []SessionsAnswer
}

// SessionsQuestion asks for sessions of a user that were opened before a time.
type SessionsQuestion struct {
	User
	Before time.Time
}

// SessionsAnswer is what the nodes that could be asked said to a
// SessionsQuestion, in no order. What a server does about its own replication is
// no session.
type SessionsAnswer struct {
	// Err, when set, is why the number is not known, or not of all nodes.
	Err      error
	Sessions []Session
}

// Session is one that is open.
type Session struct {
	Node   string
	Client string // address of who opened it, without the port; "" where that is not known
	Name   string // what the client calls itself, "" where it does not
	Opened time.Time
}

// Class tells the engine what an error means for a rotation.
type Class int

const (
	// Unavailable: unreachable, timed out, forbidden for now, overloaded, or of
	// unknown outcome. Waiting may help.
	Unavailable Class = iota
	// Definite: the target answered, and the answer will not change by itself.
	Definite
	// Unreachable: no connection to the node could be had, or it was lost or
	// timed out. Waiting may help, as with Unavailable; beyond that it says that
	// the node answered nothing, so that allow_partial may pass it over.
	Unreachable
)

// Error is an error with its class. Its text holds no secret.
type Error struct {
	Class Class
	Err   error
}

func (e *Error) Error() string { return e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Definitely makes an error that waiting does not mend.
func Definitely(format string, args ...any) error {
	return &Error{Class: Definite, Err: fmt.Errorf(format, args...)}
}

// IsDefinite reports whether err is known not to go away by itself. Unknown
// errors are not definite: a wrong guess in that direction only waits.
func IsDefinite(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Class == Definite
}

// CannotReach marks err as a failure to get any answer from a node.
func CannotReach(err error) error { return &Error{Class: Unreachable, Err: err} }

// IsUnreachable reports whether err is known to be the lack of any answer.
// Unknown errors are not: a node that refuses only the engine still serves its
// clients, and must not be passed over.
func IsUnreachable(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Class == Unreachable
}

// CallTimeout bounds one call of a Target, and so how long a change may still
// land after the worker that asked for it has died.
const CallTimeout = 10 * time.Second
