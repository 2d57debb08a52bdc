// Package kindtest is the contract of kind.Target as tests. A kind that talks
// to a server passes all of them before it is registered:
//
//	func TestContract(t *testing.T) { kindtest.Run(t, harness(t)) }
//
// A Harness says how to reach, prepare and break that server; the cases know
// nothing about it.
package kindtest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Node is one server of the target, as an operator (or a fault) handles it.
type Node interface {
	Kill() error
	Start(ctx context.Context) error
	Pause() error
	Resume() error
}

// Network is the way between the engine and every node.
type Network interface {
	// Blackhole swallows what is sent.
	Blackhole(on bool)
	// LoseReplyTo drops every answer from the first request on that holds text.
	LoseReplyTo(text string)
	// Heal ends both.
	Heal()
}

// Harness is a running target and what the cases need beside it. Targets that
// know one password a user (strategy swap) set Single.
type Harness struct {
	Target  kind.Target
	Nodes   []Node // killing the last one alone must not stop the others
	Network Network

	// Username, when set, is the one user to test with; otherwise every case
	// makes its own.
	Username string
	// NewUser makes username exist at every node and accept exactly accepted.
	NewUser func(t testing.TB, username string, accepted ...kind.Material)
	// OpenUser, when set, makes username accept every password.
	OpenUser func(t testing.TB, username string)
	// WrongAdmin reaches the same servers with a wrong admin password.
	WrongAdmin kind.Target
	// ChangeRequest is text that a request to change a user holds; "" where it is
	// encrypted.
	ChangeRequest string
	// Capture, when set, records all that leaves the engine and all that the
	// servers log about it, until stop. Kinds that have to send plaintext leave
	// it nil.
	Capture func(t testing.TB) (stop func() []byte)
	// Settle waits until the target is whole again after nodes were restarted.
	Settle func(t testing.TB)
	// Single: a user has one password at a time.
	Single bool
	// Shared: a user has credentials that belong to others, so a probe counts none
	// that nobody asked about.
	Shared bool
	// Together: nodes share one database, so that a change waits for a node that
	// hangs.
	Together bool

	// Grant, when set, gives username a right that users of NewUser do not have,
	// Drop removes it from every node.
	Grant, Drop func(t testing.TB, username string)
	// Hold, when set, logs in with m at a node and keeps the session open until the
	// test ends; alive reports whether it still is.
	Hold func(t testing.TB, m kind.Material) (alive func() bool)
	// Admin, when set, is the credential of a second admin user that the cases may
	// change, and AdminTarget the same servers, logged in to with the first of
	// candidates that they accept. The user is left with Admin.
	Admin       kind.Material
	AdminTarget func(candidates ...kind.Material) kind.Target
}

// Run runs every case against h, one after the other.
func Run(t *testing.T, h Harness) {
	h.Target = Watch(h.Target)
	if h.WrongAdmin != nil {
		h.WrongAdmin = Watch(h.WrongAdmin)
	}
	for _, c := range []struct {
		name string
		skip bool
		run  func(*testing.T, Harness)
	}{
		{"change is idempotent", false, changeIsIdempotent},
		{"probe counts what nobody asked about", h.Single || h.Shared, probeCountsExtra},
		{"probe is never vacuous", h.OpenUser == nil, probeIsNeverVacuous},
		{"exclusive refuses the old", false, exclusiveRefusesTheOld},
		{"refusing one keeps the others", h.Single, refusingOneKeepsTheOthers},
		{"a batch is answered item by item", false, batchIsAnsweredItemByItem},
		{"preflight finds a good user", false, preflightFindsGoodUser},
		{"a lost reply can be repeated", h.ChangeRequest == "", lostReplyCanBeRepeated},
		{"a wrong admin password may mend", false, wrongAdminPasswordMayMend},
		{"no plaintext leaves", h.Capture == nil, noPlaintextLeaves},
		{"a target that hangs returns by the deadline", false, hangingTargetReturnsByDeadline},
		{"one node of several is down", len(h.Nodes) < 2, oneNodeOfSeveralIsDown},
		{"one node of several hangs", len(h.Nodes) < 2 || h.Together, oneNodeOfSeveralHangs},
		{"a target that was down comes back as it was", false, targetDownMayComeBack},
		{"a refusal survives a restart", false, refusalSurvivesRestart},
		{"a user without a password is refused", false, noPasswordIsRefused},
		{"a user is created like another", h.Drop == nil, createdLikeAnother},
		{"differences between users are named, and mended", h.Grant == nil, differencesAreNamed},
		{"a user that was dropped is created again", h.Drop == nil, droppedIsCreatedAgain},
		{"sessions are counted, and closed", h.Hold == nil, sessionsAreClosed},
		{"an admin changes its own password", h.AdminTarget == nil, adminChangesItself},
		{"an admin's lost reply can be repeated", h.AdminTarget == nil || h.ChangeRequest == "", adminLosesReply},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.skip {
				t.Skip("does not apply to this target")
			}
			c.run(t, h)
		})
	}
}

// subject is the user of one case, with an old and a new password.
type subject struct {
	kind.User
	old, new kind.Material
}

func (h Harness) subject(t *testing.T, name string) subject {
	t.Helper()
	username := h.Username
	if username == "" {
		username = "case-" + name
	}
	s := subject{
		User: kind.User{Role: "role-" + name, Username: username},
		old:  kind.Material{Username: username, Secret: "old-password-of-" + name},
		new:  kind.Material{Username: username, Secret: "new-password-of-" + name},
	}
	h.NewUser(t, username, s.old)
	return s
}

// both accepts the new password, beside the old one where that is possible.
func (h Harness) both(s subject) kind.Change {
	if h.Single {
		return s.only(s.new)
	}
	return kind.Change{User: s.User, Accept: []kind.Material{s.new, s.old}, Lead: s.new}
}

func (s subject) only(m kind.Material) kind.Change {
	return kind.Change{User: s.User, Accept: []kind.Material{m}, Exclusive: true, Lead: m}
}

// asks returns the question whether old and new are accepted, in that order.
func (s subject) asks() kind.Question {
	return kind.Question{User: s.User, Materials: []kind.Material{s.old, s.new}}
}

// within bounds what a call may take; each call has its own context.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func mustChange(t *testing.T, target kind.Target, c kind.Change) {
	t.Helper()
	out := target.Change(within(t, kind.CallTimeout), []kind.Change{c})
	require.Len(t, out, 1)
	require.NoError(t, out[0].Err)
	require.NotEmpty(t, out[0].Nodes)
	for _, n := range out[0].Nodes {
		require.NoError(t, n.Err, n.Node)
	}
}

// mustAccept requires that every node can be asked and accepts (old, new) as
// told, by a login that proves something, and nothing else.
func mustAccept(t *testing.T, target kind.Target, s subject, old, new bool) {
	t.Helper()
	answers := target.Probe(within(t, kind.CallTimeout), []kind.Question{s.asks()})
	require.Len(t, answers, 1)
	require.NoError(t, answers[0].Err)
	require.NotEmpty(t, answers[0].Nodes)
	for _, n := range answers[0].Nodes {
		require.NoError(t, n.Err, n.Node)
		require.Equal(t, []bool{old, new}, n.Accepts, n.Node)
		require.Zero(t, n.Extra, n.Node)
		require.Empty(t, n.Problem, n.Node)
	}
}

func changeIsIdempotent(t *testing.T, h Harness) {
	s := h.subject(t, "idempotent")
	mustAccept(t, h.Target, s, true, false)
	for range 3 {
		mustChange(t, h.Target, h.both(s))
		mustAccept(t, h.Target, s, !h.Single, true)
	}
	for range 3 {
		mustChange(t, h.Target, s.only(s.new))
		mustAccept(t, h.Target, s, false, true)
	}
}

func probeCountsExtra(t *testing.T, h Harness) {
	s := h.subject(t, "extra")
	mustChange(t, h.Target, h.both(s))
	answers := h.Target.Probe(within(t, kind.CallTimeout), []kind.Question{{User: s.User, Materials: []kind.Material{s.new, s.new}}})
	for _, n := range answers[0].Nodes {
		require.NoError(t, n.Err)
		require.Equal(t, []bool{true, true}, n.Accepts)
		require.Equal(t, 1, n.Extra, "the old password")
	}
}

func probeIsNeverVacuous(t *testing.T, h Harness) {
	s := h.subject(t, "vacuous")
	h.OpenUser(t, s.Username)
	t.Cleanup(func() { h.NewUser(t, s.Username, s.old) })
	answers := h.Target.Probe(within(t, kind.CallTimeout), []kind.Question{s.asks()})
	for _, n := range answers[0].Nodes {
		require.NoError(t, n.Err)
		require.Equal(t, -1, n.Extra)
		require.NotEmpty(t, n.Problem)
	}
	findings := h.Target.Preflight(within(t, kind.CallTimeout), []kind.User{s.User})
	require.NotEmpty(t, findings[0].Problems)
	require.True(t, findings[0].HasCredential)

	out := h.Target.Change(within(t, kind.CallTimeout), []kind.Change{h.both(s)})
	if !h.Single {
		for _, n := range out[0].Nodes {
			require.True(t, kind.IsDefinite(n.Err), "adding a password would lock out who sends none: %v", n.Err)
		}
	}
	mustChange(t, h.Target, s.only(s.new))
	mustAccept(t, h.Target, s, false, true)
}

func exclusiveRefusesTheOld(t *testing.T, h Harness) {
	s := h.subject(t, "exclusive")
	mustChange(t, h.Target, s.only(s.new))
	mustAccept(t, h.Target, s, false, true)
	mustChange(t, h.Target, s.only(s.old))
	mustAccept(t, h.Target, s, true, false)
}

func refusingOneKeepsTheOthers(t *testing.T, h Harness) {
	s := h.subject(t, "refuse")
	mustChange(t, h.Target, h.both(s))
	refuse := kind.Change{User: s.User, Refuse: []kind.Material{s.old}, Lead: s.new}
	for range 2 { // what is refused already is no error
		mustChange(t, h.Target, refuse)
		mustAccept(t, h.Target, s, false, true)
	}
	refuse.Accept, refuse.Refuse = []kind.Material{s.new}, []kind.Material{s.new, s.old}
	mustChange(t, h.Target, refuse) // what is to be accepted is not refused
	mustAccept(t, h.Target, s, false, true)
}

func batchIsAnsweredItemByItem(t *testing.T, h Harness) {
	s := h.subject(t, "batch")
	nobody := s
	nobody.User = kind.User{Role: "nobody", Username: "nobody-has-this-name"}
	out := h.Target.Change(within(t, kind.CallTimeout), []kind.Change{nobody.only(s.new), s.only(s.new)})
	require.Len(t, out, 2)
	for _, n := range out[0].Nodes {
		require.True(t, kind.IsDefinite(n.Err), "%v", n.Err)
		require.NotContains(t, n.Err.Error(), s.new.Secret)
	}
	for _, n := range out[1].Nodes {
		require.NoError(t, n.Err)
	}
	mustAccept(t, h.Target, s, false, true)

	answers := h.Target.Probe(within(t, kind.CallTimeout), []kind.Question{nobody.asks(), s.asks()})
	require.Len(t, answers, 2)
	for _, n := range answers[0].Nodes {
		require.NoError(t, n.Err)
		require.Equal(t, []bool{false, false}, n.Accepts, "a change never creates a user")
	}
	findings := h.Target.Preflight(within(t, kind.CallTimeout), []kind.User{nobody.User, s.User})
	require.NotEmpty(t, findings[0].Problems)
	require.False(t, findings[0].HasCredential)
	require.Empty(t, findings[1].Problems)
}

func preflightFindsGoodUser(t *testing.T, h Harness) {
	s := h.subject(t, "preflight")
	f := h.Target.Preflight(within(t, kind.CallTimeout), []kind.User{s.User})
	require.Len(t, f, 1)
	require.NoError(t, f[0].Err)
	require.Empty(t, f[0].Problems)
	require.True(t, f[0].HasCredential)
	require.Len(t, f[0].Nodes, len(h.Nodes))
	for _, n := range f[0].Nodes {
		require.NoError(t, n.Err)
	}
	mustAccept(t, h.Target, s, true, false)
}

func lostReplyCanBeRepeated(t *testing.T, h Harness) {
	s := h.subject(t, "lost-reply")
	h.Network.LoseReplyTo(h.ChangeRequest)
	t.Cleanup(h.Network.Heal)
	out := h.Target.Change(within(t, 500*time.Millisecond), []kind.Change{h.both(s)})
	mustBeUnavailable(t, out[0])
	h.Network.Heal()
	mustChange(t, h.Target, h.both(s))
	mustAccept(t, h.Target, s, !h.Single, true)
}

func mustBeUnavailable(t *testing.T, out kind.Outcome) {
	t.Helper()
	errs := []error{out.Err}
	for _, n := range out.Nodes {
		errs = append(errs, n.Err)
	}
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	require.NotEmpty(t, errs)
	for _, err := range errs {
		require.False(t, kind.IsDefinite(err), "%v", err)
	}
}

func wrongAdminPasswordMayMend(t *testing.T, h Harness) {
	s := h.subject(t, "wrong-admin")
	mustBeUnavailable(t, h.WrongAdmin.Change(within(t, kind.CallTimeout), []kind.Change{s.only(s.new)})[0])
	f := h.WrongAdmin.Preflight(within(t, kind.CallTimeout), []kind.User{s.User})
	require.Error(t, f[0].Err)
	probed := h.WrongAdmin.Probe(within(t, kind.CallTimeout), []kind.Question{s.asks()})[0].Err
	require.Error(t, probed)
	for _, err := range []error{f[0].Err, probed} {
		require.False(t, kind.IsUnreachable(err), "clients reach a node that refuses the engine: %v", err)
	}
	mustAccept(t, h.Target, s, true, false)
}

func noPlaintextLeaves(t *testing.T, h Harness) {
	s := h.subject(t, "plaintext")
	stop := h.Capture(t)
	mustChange(t, h.Target, h.both(s))
	mustChange(t, h.Target, s.only(s.new))
	seen := stop()
	require.Contains(t, string(seen), s.Username, "the capture saw the change")
	for _, m := range []kind.Material{s.old, s.new} {
		require.False(t, bytes.Contains(seen, []byte(m.Secret)), "a password was sent, or logged, in plaintext")
	}
}

func hangingTargetReturnsByDeadline(t *testing.T, h Harness) {
	s := h.subject(t, "hang")
	for name, fault := range map[string]struct{ on, off func() }{
		"network": {func() { h.Network.Blackhole(true) }, h.Network.Heal},
		"server":  {func() { h.each(t, Node.Pause) }, func() { h.each(t, Node.Resume) }},
	} {
		fault.on()
		const patience = 300 * time.Millisecond
		began := time.Now()
		out := h.Target.Change(within(t, patience), []kind.Change{s.only(s.new)})
		answers := h.Target.Probe(within(t, patience), []kind.Question{s.asks()})
		findings := h.Target.Preflight(within(t, patience), []kind.User{s.User})
		took := time.Since(began)
		fault.off()
		require.Less(t, took, 3*patience+kind.CallTimeout, name)
		mustBeUnavailable(t, out[0])
		require.Error(t, answers[0].Err, name)
		require.Error(t, findings[0].Err, name)
	}
	h.Settle(t)
	mustAccept(t, h.Target, s, true, false)
}

func (h Harness) each(t *testing.T, do func(Node) error) {
	t.Helper()
	for _, n := range h.Nodes {
		require.NoError(t, do(n))
	}
}

// known remembers the nodes of s, as the engine does after each proof.
func (h Harness) known(t *testing.T, s *subject) {
	t.Helper()
	answers := h.Target.Probe(within(t, kind.CallTimeout), []kind.Question{s.asks()})
	require.NoError(t, answers[0].Err)
	for _, n := range answers[0].Nodes {
		s.Known = append(s.Known, n.Node)
	}
	require.Len(t, s.Known, len(h.Nodes))
}

func oneNodeOfSeveralIsDown(t *testing.T, h Harness) {
	s := h.subject(t, "one-down")
	h.known(t, &s)
	last := h.Nodes[len(h.Nodes)-1]
	require.NoError(t, last.Kill())
	h.withoutLast(t, &s)
	require.NoError(t, last.Start(t.Context()))
	h.Settle(t)
	mustChange(t, h.Target, s.only(s.new))
	mustAccept(t, h.Target, s, false, true)
}

func oneNodeOfSeveralHangs(t *testing.T, h Harness) {
	s := h.subject(t, "one-hangs")
	h.known(t, &s)
	last := h.Nodes[len(h.Nodes)-1]
	require.NoError(t, last.Pause())
	h.withoutLast(t, &s)
	require.NoError(t, last.Resume())
	h.Settle(t)
	mustChange(t, h.Target, s.only(s.new))
	mustAccept(t, h.Target, s, false, true)
}

// withoutLast requires that a change reaches every node but one, and that the
// one is named in the answers: promotion is blocked by it.
func (h Harness) withoutLast(t *testing.T, s *subject) {
	t.Helper()
	const patience = kind.CallTimeout // as the engine has
	out := h.Target.Change(within(t, patience), []kind.Change{h.both(*s)})
	require.NoError(t, out[0].Err)
	require.Len(t, out[0].Nodes, len(h.Nodes), "a node that died still counts")
	failed := 0
	for _, n := range out[0].Nodes {
		if n.Err != nil {
			failed++
			require.False(t, kind.IsDefinite(n.Err), "%v", n.Err)
			require.True(t, kind.IsUnreachable(n.Err), "allow_partial could not pass it over: %v", n.Err)
		}
	}
	require.Equal(t, 1, failed, fmt.Sprint(out[0].Nodes))
	answers := h.Target.Probe(within(t, patience), []kind.Question{s.asks()})
	require.NoError(t, answers[0].Err)
	require.Len(t, answers[0].Nodes, len(h.Nodes))
	failed = 0
	for _, n := range answers[0].Nodes {
		if n.Err != nil {
			failed++
			require.True(t, kind.IsUnreachable(n.Err), "allow_partial could not pass it over: %v", n.Err)
			continue
		}
		require.Equal(t, []bool{!h.Single, true}, n.Accepts, n.Node)
	}
	require.Equal(t, 1, failed)
	findings := h.Target.Preflight(within(t, patience), []kind.User{s.User})
	require.NoError(t, findings[0].Err)
	for _, n := range findings[0].Nodes {
		require.True(t, n.Err == nil || kind.IsUnreachable(n.Err), "%v", n.Err)
	}
}

// What was accepted before the target went down is accepted when it is back:
// the change was saved.
func targetDownMayComeBack(t *testing.T, h Harness) {
	s := h.subject(t, "down")
	mustChange(t, h.Target, h.both(s))
	h.each(t, Node.Kill)
	mustBeUnavailable(t, h.Target.Change(within(t, time.Second), []kind.Change{s.only(s.new)})[0])
	require.Error(t, h.Target.Probe(within(t, time.Second), []kind.Question{s.asks()})[0].Err)
	h.each(t, func(n Node) error { return n.Start(t.Context()) })
	h.Settle(t)
	mustAccept(t, h.Target, s, !h.Single, true)
}

// What was refused before a restart is not accepted again after it.
func refusalSurvivesRestart(t *testing.T, h Harness) {
	s := h.subject(t, "durable")
	mustChange(t, h.Target, h.both(s))
	mustChange(t, h.Target, s.only(s.new))
	h.each(t, Node.Kill)
	h.each(t, func(n Node) error { return n.Start(t.Context()) })
	h.Settle(t)
	mustAccept(t, h.Target, s, false, true)
}
