package kind

import "context"

// Kept: another server makes and keeps the secret, and nobody sees it. A rotation
// asks that server for a new version of it.
const Kept Strategy = "kept"

// Keeper is a server that keeps secrets itself: it makes a new version when it is
// asked to, and never shows one. What it did may or may not be seen afterwards,
// by the number of the version that it shows. As with Target every method takes
// a list and answers in its order, the context has a deadline, and nothing that a
// call sends may be sent after it.
type Keeper interface {
	// Look changes nothing. It says for each secret how it stands, and whether a
	// new version could be asked for.
	Look(ctx context.Context, subjects []Subject) []Sight
	// Turn asks for a new version of each, once: it repeats nothing by itself but
	// what is known to have had no effect.
	Turn(ctx context.Context, subjects []Subject) []Turned
	// Limit ends the use of versions older than the subject's
	// MinDecryptionVersion. It is idempotent, and takes nothing back. It is called
	// only where Look shows a version.
	Limit(ctx context.Context, subjects []Subject) []error
}

// Subject names a secret that a Keeper keeps.
type Subject struct {
	Role string
	Spec Spec
	// Rotation is the id of the rotation that asks, "" outside of one: for the
	// server's own records.
	Rotation string
}

// Sight is what Look saw.
type Sight struct {
	// Err, when set, is why no answer could be had at all.
	Err error
	// Problems are definite reasons against a rotation, each a sentence that says
	// what to do.
	Problems []string
	// Notes are worth telling and no reason to stop.
	Notes []string
	// Version is the newest version, 0 where the server shows none.
	Version int
	// MinDecryptionVersion is the oldest version that is still of use, 0 where the
	// server shows none.
	MinDecryptionVersion int
}

// Turned is what became of a Turn.
type Turned struct {
	// Err is nil when the server answered that it was done.
	Err error
	// NoEffect: nothing of it happened, nor will. Where Err is definite that is
	// understood; otherwise the outcome is unknown without it.
	NoEffect bool
	// Evidence is what the server answered, in words: its id of the request.
	Evidence string
}

// Owns is what only one role may rotate at its target: a secret that is kept
// there, a user, or both users of strategy Alternate.
func (s Spec) Owns() []string {
	switch {
	case s.Key != "":
		return []string{s.Mount + "/" + s.Key}
	case len(s.Usernames) > 0:
		return s.Usernames
	}
	return []string{s.Username}
}
