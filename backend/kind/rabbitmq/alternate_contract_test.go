package rabbitmq

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

func material(u kind.User, secret string) []kind.Material {
	return []kind.Material{{Username: u.Username, Secret: secret}}
}

// model makes a user with something of everything, in "/" and in "a/b c".
func (r *rig) model(t *testing.T, name string) (kind.User, []string) {
	t.Helper()
	u := r.user(t, name, "password-of-the-model", "management,mine")
	r.do(t, http.MethodPut, "vhosts/a%2Fb%20c", map[string]string{}, nil)
	require.NoError(t, r.n.Permit(t.Context(), name, "a/b c"))
	escaped := url.PathEscape(name)
	r.do(t, http.MethodPut, "user-limits/"+escaped+"/max-connections", map[string]int{"value": 7}, nil)
	for _, exchange := range []string{"amq.topic", "x/y z"} {
		r.do(t, http.MethodPut, "topic-permissions/a%2Fb%20c/"+escaped, map[string]string{"exchange": exchange, "write": "^a", "read": "^b"}, nil)
	}
	profile := r.preflight(t, u).Profile
	require.Len(t, profile, 7)
	return u, profile
}

// After whichever request a creation is cut off, nobody gets in halfway, and
// whoever comes next finishes it.
func creationIsFinished(t *testing.T, r *rig) {
	a, profile := r.model(t, "cut-off-a")
	for i, at := range []string{
		`"tags":"` + tagIncomplete, "PUT /api/permissions/", "PUT /api/user-limits/", "PUT /api/topic-permissions/", `"tags":"management`,
	} {
		b := kind.User{Username: fmt.Sprintf("cut-off-%d", i), Like: a.Username, Profile: profile}
		ch := kind.Change{User: b, Accept: material(b, "fresh"), Exclusive: true}
		r.http.LoseReplyTo(at)
		ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
		out := r.target().Change(ctx, []kind.Change{ch})[0]
		cancel()
		r.http.Heal()
		require.NoError(t, out.Err, at)
		require.Error(t, out.Nodes[0].Err, at)
		require.False(t, kind.IsDefinite(out.Nodes[0].Err) || kind.IsUnreachable(out.Nodes[0].Err), "%v", out.Nodes[0].Err)

		answer := r.probe(t, b, "fresh")
		if i < 4 {
			require.Equal(t, []bool{false}, answer.Accepts, at)
			require.Contains(t, answer.Problem, "halfway")
			found := r.preflight(t, b)
			require.Empty(t, found.Problems)
			require.Empty(t, found.Profile)
			require.Contains(t, fmt.Sprint(found.Notes), "will be created like")
			refused := r.target().Change(limited(t), []kind.Change{{User: kind.User{Username: b.Username}, Accept: ch.Accept}})[0]
			require.True(t, kind.IsDefinite(refused.Nodes[0].Err), "nobody said what it is to be")
		} else {
			require.Equal(t, []bool{true}, answer.Accepts, "it was applied, and its answer lost")
			require.Empty(t, answer.Problem)
		}
		out = r.target().Change(limited(t), []kind.Change{ch})[0]
		require.NoError(t, out.Nodes[0].Err, at)
		require.Equal(t, i < 4, len(out.Notes) == 1, at)
		require.Equal(t, []bool{true}, r.probe(t, b, "fresh").Accepts)
		require.Equal(t, profile, r.preflight(t, b).Profile)
	}
}

func twoUsers(t *testing.T, r *rig) {
	a, profile := r.model(t, "team/a=1+x")
	b := kind.User{Username: "team/b=1+x", Like: a.Username, Profile: profile}
	stop := r.capture(t)
	take := kind.Change{User: b, Exclusive: true}
	out := r.target().Change(limited(t), []kind.Change{take})[0]
	require.NoError(t, out.Nodes[0].Err, "who is not there is refused")
	nobody := r.target().(kind.Observer).Sessions(limited(t), []kind.SessionsQuestion{{User: b, Before: time.Now()}})[0]
	require.NoError(t, nobody.Err)
	require.Empty(t, nobody.Sessions)
	ch := kind.Change{User: b, Accept: material(b, "fresh-password"), Exclusive: true, Align: true}
	out = r.target().Change(limited(t), []kind.Change{ch})[0]
	require.NoError(t, out.Nodes[0].Err)
	require.Equal(t, []string{"user team/b=1+x was created like team/a=1+x"}, out.Notes)

	r.do(t, http.MethodPut, "vhosts/too%20much", map[string]string{}, nil)
	require.NoError(t, r.n.Permit(t.Context(), b.Username, "too much"))
	r.do(t, http.MethodDelete, "topic-permissions/a%2Fb%20c/team%2Fb=1+x", nil, nil)
	require.Contains(t, fmt.Sprint(r.preflight(t, b).Problems), `lacks topic permission in vhost "a/b c"`)
	again := ch
	again.Accept = material(b, "password-that-comes-next")
	out = r.target().Change(limited(t), []kind.Change{again})[0]
	require.NoError(t, out.Nodes[0].Err)
	require.Len(t, out.Notes, 1)
	require.Contains(t, out.Notes[0], `got topic permission in vhost "a/b c"`)
	require.Contains(t, out.Notes[0], `lost permission in vhost "too much"`)
	require.Empty(t, r.preflight(t, b).Problems)

	alive := r.hold(t, again.Accept[0])
	again.Align, again.CloseBefore = false, time.Now().Add(time.Hour)
	out = r.target().Change(limited(t), []kind.Change{again})[0]
	require.NoError(t, out.Nodes[0].Err)
	require.Equal(t, []string{"connections of user team/b=1+x that were closed: 1"}, out.Notes, "it was opened a moment ago, and is waited for")
	require.Eventually(t, func() bool { return !alive() }, 10*time.Second, 10*time.Millisecond)
	sent := string(stop())
	require.Contains(t, sent, "DELETE /api/connections/")
	require.Contains(t, sent, "PUT /api/users/team%2Fb=1+x")
	for _, secret := range []string{"fresh-password", again.Accept[0].Secret} {
		require.NotContains(t, sent, secret)
	}

	// With the password that it has, nothing but its rights is sent.
	r.do(t, http.MethodDelete, "user-limits/team%2Fb=1+x/max-connections", nil, nil)
	again.Align, again.CloseBefore = true, time.Time{}
	stop = r.http.Capture()
	out = r.target().Change(limited(t), []kind.Change{again})[0]
	require.NoError(t, out.Nodes[0].Err)
	require.Equal(t, []string{`user team/b=1+x got limit max-connections 7`}, out.Notes)
	require.NotContains(t, string(stop()), "PUT /api/users/")
	require.Equal(t, []bool{true}, r.probe(t, b, again.Accept[0].Secret).Accepts)
}

// What others are changed with is the login that the change of an admin ends.
func adminIsChangedLast(t *testing.T, r *rig) {
	root := r.user(t, "root-of-batch", "old-root-password", tagAdmin)
	root.Admin = true
	a, b := r.user(t, "batch-a", "old", ""), r.user(t, "batch-b", "old", "")
	old, fresh := material(root, "old-root-password")[0], material(root, "new-root-password")[0]
	batch := []kind.Change{{User: root, Accept: []kind.Material{fresh}, Exclusive: true, CloseBefore: time.Now()}}
	for _, u := range []kind.User{a, b} {
		batch = append(batch, kind.Change{User: u, Accept: material(u, "new"), Exclusive: true})
	}
	stop := r.capture(t)
	for _, out := range r.adminTarget(old, fresh).Change(limited(t), batch) {
		require.NoError(t, out.Nodes[0].Err)
		require.Empty(t, out.Notes)
	}
	require.NotContains(t, string(stop()), fresh.Secret)
	require.Equal(t, []bool{true}, r.probe(t, root, fresh.Secret).Accepts)
	require.Equal(t, []bool{true}, r.probe(t, b, "new").Accepts)
	require.Empty(t, r.preflight(t, root).Problems)

	for says, c := range map[string]kind.Change{
		"is not stored":           {User: root, Accept: material(root, "stored-nowhere"), Exclusive: true},
		"is not stored with":      {User: root, Exclusive: true},
		"that the connection log": {User: kind.User{Username: root.Username}, Accept: []kind.Material{old}, Exclusive: true},
	} {
		out := r.adminTarget(fresh, old).Change(limited(t), []kind.Change{c})[0]
		require.True(t, kind.IsDefinite(out.Nodes[0].Err))
		require.ErrorContains(t, out.Nodes[0].Err, says)
	}
	found := r.adminTarget(fresh).Preflight(limited(t), []kind.User{{Username: root.Username}})[0]
	require.Contains(t, fmt.Sprint(found.Problems), "a user of its own")

	r.entry.RabbitMQ.VHosts = []string{"a/b c"}
	require.Empty(t, r.preflight(t, root).Problems, "it needs no vhost")
	require.Empty(t, r.probe(t, root, fresh.Secret).Problem)
}
