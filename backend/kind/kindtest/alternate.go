package kindtest

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// pair is two users that take turns: a is in use, b idle.
func (h Harness) pair(t *testing.T, name string) (a, b subject) {
	t.Helper()
	if h.Username != "" {
		t.Skip("this target is tested with one user")
	}
	return h.subject(t, name+"-a"), h.subject(t, name+"-b")
}

func (h Harness) preflight(t *testing.T, users ...kind.User) []kind.Finding {
	t.Helper()
	found := h.Target.Preflight(within(t, kind.CallTimeout), users)
	require.Len(t, found, len(users))
	for _, f := range found {
		require.NoError(t, f.Err)
		for _, n := range f.Nodes {
			require.NoError(t, n.Err, n.Node)
		}
	}
	return found
}

// without takes every password away from s.
func (s subject) without() kind.Change { return kind.Change{User: s.User, Exclusive: true} }

// The idle one of two users has no password, and that lets nobody in.
func noPasswordIsRefused(t *testing.T, h Harness) {
	s := h.subject(t, "no-password")
	if h.Username != "" {
		t.Skip("nodes log in to each other as this user")
	}
	for range 2 {
		mustChange(t, h.Target, s.without())
		mustAccept(t, h.Target, s, false, false)
	}
	f := h.preflight(t, s.User)[0]
	require.Empty(t, f.Problems)
	require.False(t, f.HasCredential)
	empty := kind.Question{User: s.User, Materials: []kind.Material{{Username: s.Username, Secret: ""}}}
	for _, n := range h.Target.Probe(within(t, kind.CallTimeout), []kind.Question{empty})[0].Nodes {
		require.Equal(t, []bool{false}, n.Accepts, "an empty password lets nobody in")
	}
	mustChange(t, h.Target, s.only(s.new))
	mustAccept(t, h.Target, s, false, true)
}

func createdLikeAnother(t *testing.T, h Harness) {
	a, b := h.pair(t, "like")
	if h.Grant != nil {
		h.Grant(t, a.Username)
	}
	h.Drop(t, b.Username)
	b.Like = a.Username
	found := h.preflight(t, a.User, b.User)
	require.Empty(t, found[0].Problems)
	require.Empty(t, found[1].Problems, "it can be created")
	require.NotEmpty(t, found[0].Profile)
	require.Empty(t, found[1].Profile, "it does not exist")
	require.False(t, found[1].HasCredential)

	mustRefuse(t, h, b.only(b.new)) // nobody said what it is to be
	b.Profile = found[0].Profile
	for range 2 {
		mustChange(t, h.Target, b.only(b.new))
		mustAccept(t, h.Target, b, false, true)
	}
	mustAccept(t, h.Target, a, true, false)
	found = h.preflight(t, a.User, b.User)
	require.Empty(t, found[1].Problems)
	require.Equal(t, found[0].Profile, found[1].Profile)
}

// mustRefuse requires that a change is definitely not made, at any node.
func mustRefuse(t *testing.T, h Harness, c kind.Change) {
	t.Helper()
	out := h.Target.Change(within(t, kind.CallTimeout), []kind.Change{c})[0]
	require.NoError(t, out.Err)
	for _, n := range out.Nodes {
		require.True(t, kind.IsDefinite(n.Err), "%v", n.Err)
	}
}

func differencesAreNamed(t *testing.T, h Harness) {
	a, b := h.pair(t, "differ")
	h.Grant(t, a.Username)
	b.Like = a.Username
	found := h.preflight(t, a.User, b.User)
	require.Empty(t, found[0].Problems)
	require.NotEmpty(t, found[1].Problems)
	require.Contains(t, found[1].Problems[0], b.Username)
	require.Contains(t, found[1].Problems[0], a.Username)
	t.Log(found[1].Problems[0])
	require.NotEqual(t, found[0].Profile, found[1].Profile)

	c := b.only(b.new)
	c.Profile = found[0].Profile
	mustChange(t, h.Target, c)
	require.NotEmpty(t, h.preflight(t, a.User, b.User)[1].Problems, "nobody asked for more than a password")
	c.Align = true
	for range 2 {
		mustChange(t, h.Target, c)
	}
	found = h.preflight(t, a.User, b.User)
	require.Empty(t, found[1].Problems)
	require.Equal(t, found[0].Profile, found[1].Profile)
	mustAccept(t, h.Target, a, true, false)
	mustAccept(t, h.Target, b, false, true)

	// And the other way: what it has too much is taken away.
	h.Grant(t, b.Username)
	other := h.subject(t, "differ-more")
	c.Profile = h.preflight(t, other.User)[0].Profile
	mustChange(t, h.Target, c)
	require.Equal(t, c.Profile, h.preflight(t, b.User)[0].Profile)
}

func droppedIsCreatedAgain(t *testing.T, h Harness) {
	s, _ := h.pair(t, "dropped")
	if h.Grant != nil {
		h.Grant(t, s.Username)
	}
	profile := h.preflight(t, s.User)[0].Profile
	require.NotEmpty(t, profile)
	h.Drop(t, s.Username)
	found := h.preflight(t, s.User)[0]
	require.NotEmpty(t, found.Problems)
	require.Empty(t, found.Profile)
	answers := h.Target.Probe(within(t, kind.CallTimeout), []kind.Question{s.asks()})[0]
	for _, n := range answers.Nodes {
		require.Equal(t, []bool{false, false}, n.Accepts)
	}
	s.Profile = profile
	require.Empty(t, h.preflight(t, s.User)[0].Problems)
	mustChange(t, h.Target, s.only(s.new))
	mustAccept(t, h.Target, s, false, true)
	require.Equal(t, profile, h.preflight(t, s.User)[0].Profile)
}

// patience is how long a server may take to show sessions, and to end them.
const patience = 30 * time.Second

func sessionsAreClosed(t *testing.T, h Harness) {
	s := h.subject(t, "sessions")
	observer, ok := h.Target.(kind.Observer)
	require.True(t, ok, "a target that closes sessions says which there are")
	count := func(before time.Time) int {
		a := observer.Sessions(within(t, kind.CallTimeout), []kind.SessionsQuestion{{User: s.User, Before: before}})
		require.Len(t, a, 1)
		require.NoError(t, a[0].Err)
		for _, session := range a[0].Sessions {
			require.NotEmpty(t, session.Node)
			require.Equal(t, "127.0.0.1", session.Client)
			require.WithinDuration(t, time.Now(), session.Opened, time.Hour)
		}
		return len(a[0].Sessions)
	}
	later := func() time.Time { return time.Now().Add(time.Hour) }
	require.Zero(t, count(later()))
	alive := h.Hold(t, s.old)
	require.Eventually(t, func() bool { return count(later()) == 1 }, patience, 100*time.Millisecond)
	require.Zero(t, count(time.Now().Add(-time.Hour)))

	c := s.only(s.new)
	c.CloseBefore = time.Now().Add(-time.Hour)
	mustChange(t, h.Target, c)
	require.True(t, alive(), "it was opened after that")
	c.CloseBefore = later()
	mustChange(t, h.Target, c)
	require.Eventually(t, func() bool { return !alive() }, patience, 100*time.Millisecond)
	require.Eventually(t, func() bool { return count(later()) == 0 }, patience, 100*time.Millisecond)
	mustAccept(t, h.Target, s, false, true)
}

// The user that the engine logs in as is changed through its own login.
func adminChangesItself(t *testing.T, h Harness) {
	s := h.admin(t)
	target := h.AdminTarget(s.old, s.new)
	t.Cleanup(func() { h.restoreAdmin(t, s) })
	f := target.Preflight(within(t, kind.CallTimeout), []kind.User{s.User})[0]
	require.NoError(t, f.Err)
	require.Empty(t, f.Problems)
	for _, m := range []kind.Material{s.new, s.old, s.new} {
		for range 2 {
			mustChange(t, target, s.only(m))
			mustAccept(t, target, s, m.Same(s.old), m.Same(s.new))
		}
	}
}

func (h Harness) admin(t *testing.T) subject {
	t.Helper()
	return subject{
		User: kind.User{Role: "root", Username: h.Admin.Username, Admin: true},
		old:  h.Admin, new: kind.Material{Username: h.Admin.Username, Secret: "new-password-of-the-admin"},
	}
}

func (h Harness) restoreAdmin(t *testing.T, s subject) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), kind.CallTimeout) // that of the test has ended
	defer cancel()
	for _, n := range h.AdminTarget(s.new, s.old).Change(ctx, []kind.Change{s.only(s.old)})[0].Nodes {
		require.NoError(t, n.Err)
	}
}

// hashicorp/vault's root rotation stores nothing that a reply that was lost could
// be found out from. Here it is found by asking with both.
func adminLosesReply(t *testing.T, h Harness) {
	s := h.admin(t)
	t.Cleanup(func() { h.restoreAdmin(t, s) })
	h.Network.LoseReplyTo(h.ChangeRequest)
	out := h.AdminTarget(s.old, s.new).Change(within(t, 2*time.Second), []kind.Change{s.only(s.new)})[0]
	h.Network.Heal()
	mustBeUnavailable(t, out)
	answer := h.AdminTarget(s.old, s.new).Probe(within(t, kind.CallTimeout), []kind.Question{s.asks()})[0]
	require.NoError(t, answer.Err, "one of the two lets the engine in")
	for _, n := range answer.Nodes {
		require.NoError(t, n.Err)
		require.Contains(t, n.Accepts, true)
	}
	mustChange(t, h.AdminTarget(s.old, s.new), s.only(s.new))
	mustAccept(t, h.AdminTarget(s.old, s.new), s, false, true)
}
