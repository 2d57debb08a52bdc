package approle

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	patience = 20 * time.Second
	glance   = 50 * time.Millisecond
)

// lockout is how many refused logins in a row lock an AppRole out.
const lockout = 5

func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), kind.CallTimeout)
	t.Cleanup(cancel)
	return ctx
}

func (r *rig) change(t *testing.T, c kind.Change) error {
	t.Helper()
	c.User = r.user()
	out := r.target.Change(limited(t), []kind.Change{c})
	require.Len(t, out, 1)
	if out[0].Err != nil {
		return out[0].Err
	}
	require.Len(t, out[0].Nodes, 1)
	return out[0].Nodes[0].Err
}

func (r *rig) probe(t *testing.T, secrets ...string) kind.NodeAnswer {
	t.Helper()
	q := kind.Question{User: r.user()}
	for _, s := range secrets {
		q.Materials = append(q.Materials, r.material(s))
	}
	a := r.target.Probe(limited(t), []kind.Question{q})
	require.Len(t, a, 1)
	require.NoError(t, a[0].Err)
	require.Len(t, a[0].Nodes, 1)
	return a[0].Nodes[0]
}

func (r *rig) accepts(t *testing.T, secrets ...string) []bool {
	t.Helper()
	a := r.probe(t, secrets...)
	require.NoError(t, a.Err)
	require.Zero(t, a.Extra)
	require.Empty(t, a.Problem)
	return a.Accepts
}

func (r *rig) preflight(t *testing.T) kind.Finding {
	t.Helper()
	f := r.target.Preflight(limited(t), []kind.User{r.user()})
	require.Len(t, f, 1)
	return f[0]
}

func TestAppRole(t *testing.T) {
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	for name, run := range map[string]func(*testing.T, *rig){
		"rotation":     rotation,
		"lost-reply":   lostReply,
		"late":         lateRegistration,
		"foreign":      foreignStays,
		"limits":       limitsAreKept,
		"lockout":      lockedOut,
		"stale-admin":  staleAdmin,
		"other":        otherAppRole,
		"preflight":    preflightNames,
		"policy":       policyIsEnough,
		"tokens":       tokensAreRevoked,
		"nothing-told": nothingIsTold,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t, newRig(t, v, name))
		})
	}
}

// A rotation as the engine goes through it: whichever stage the connection's
// credentials are at, one that is accepted is found.
func rotation(t *testing.T, r *rig) {
	const next = "the-next-secret-id-0123456789abcdef"
	r.stages(r.first, map[version.Stage]string{version.Pending: next})
	require.Empty(t, r.preflight(t).Problems)
	require.Equal(t, []bool{true, false}, r.accepts(t, r.first, next))
	both := kind.Change{Accept: []kind.Material{r.material(next), r.material(r.first)}}
	require.NoError(t, r.change(t, both))
	require.NoError(t, r.change(t, both))
	require.Equal(t, []bool{true, true}, r.accepts(t, r.first, next))

	r.stages(next, map[version.Stage]string{version.Previous: r.first}) // promoted
	require.Equal(t, []bool{true, true}, r.accepts(t, r.first, next))
	retire := kind.Change{Accept: []kind.Material{r.material(next)}, Refuse: []kind.Material{r.material(r.first)}}
	require.NoError(t, r.change(t, retire))
	require.NoError(t, r.change(t, retire))
	require.Equal(t, []bool{false, true}, r.accepts(t, r.first, next))
	require.False(t, r.logsIn(t, r.first))
	require.True(t, r.logsIn(t, next))
}

// A rotation that goes back refuses what it has made.
func lostReply(t *testing.T, r *rig) {
	const next = "the-next-secret-id-0123456789abcdef"
	r.stages(r.first, map[version.Stage]string{version.Pending: next})
	r.proxy.LoseReplyTo(register)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	out := r.target.Change(ctx, []kind.Change{{User: r.user(), Accept: []kind.Material{r.material(next)}}})
	r.proxy.Heal()
	require.NoError(t, out[0].Err)
	require.True(t, kind.IsUnreachable(out[0].Nodes[0].Err), "%v", out[0].Nodes[0].Err)
	require.True(t, r.there(t, next), "it was made, and nobody was told")
	require.NoError(t, r.change(t, kind.Change{Accept: []kind.Material{r.material(next)}}))
	require.Equal(t, []bool{true, true}, r.accepts(t, r.first, next))
	require.NoError(t, r.change(t, kind.Change{Accept: []kind.Material{r.material(r.first)}, Refuse: []kind.Material{r.material(next)}}))
	require.Equal(t, []bool{true, false}, r.accepts(t, r.first, next))
}

// A request whose answer was lost may land between the look and the repetition.
func lateRegistration(t *testing.T, r *rig) {
	const next = "the-next-secret-id-0123456789abcdef"
	r.stages(r.first, map[version.Stage]string{version.Pending: next})
	r.write(t, register, map[string]any{"secret_id": next})
	require.NoError(t, r.clients.AsAdmin(limited(t), r.get(), func(ctx context.Context, l *vault.Login) {
		v := visit{clients: r.clients, e: r.get(), login: l}
		_, err := v.post(ctx, register, map[string]any{"secret_id": next})
		require.Equal(t, vault.Registered, vault.AnswerOf(err).Known)
		require.NoError(t, v.register(ctx, r.material(next), map[string]any{}))
	}))
}

// Exclusive refuses what the connection itself may log in with, and no more.
func foreignStays(t *testing.T, r *rig) {
	const next = "the-next-secret-id-0123456789abcdef"
	r.stages(r.first, map[version.Stage]string{version.Pending: next})
	require.Equal(t, []bool{true}, r.accepts(t, r.first), "and foreign is not extra")
	for range 2 {
		require.NoError(t, r.change(t, kind.Change{Accept: []kind.Material{r.material(next)}, Exclusive: true}))
	}
	require.False(t, r.logsIn(t, r.first))
	require.True(t, r.logsIn(t, next))
	require.True(t, r.logsIn(t, r.foreign))
}

// What a secret-id has of its own passes to the one after it.
func limitsAreKept(t *testing.T, r *rig) {
	const old, next = "a-limited-secret-id", "the-next-secret-id-0123456789abcdef"
	r.write(t, register, map[string]any{
		"secret_id": old, "cidr_list": "127.0.0.0/8", "token_bound_cidrs": "127.0.0.1/32", "metadata": `{"team": "a, b=c"}`,
	})
	r.stages(old, map[version.Stage]string{version.Pending: next})
	require.NoError(t, r.change(t, kind.Change{Accept: []kind.Material{r.material(next), r.material(old)}}))
	require.Equal(t, []bool{true, true}, r.accepts(t, old, next))
	want := r.write(t, lookup, map[string]any{"secret_id": old})
	got := r.write(t, lookup, map[string]any{"secret_id": next})
	for _, field := range []string{"cidr_list", "token_bound_cidrs", "metadata"} {
		require.NotEmpty(t, got[field])
		require.Equal(t, want[field], got[field])
	}
}

// Refused logins count against the AppRole as a whole, so a refusal is asked for
// in another way, however often.
func lockedOut(t *testing.T, r *rig) {
	var refused []string
	for i := range 2 * lockout {
		refused = append(refused, fmt.Sprintf("refused-secret-id-%d", i))
	}
	// In one call, because a login that succeeds has Vault begin anew.
	require.NotContains(t, r.accepts(t, refused...), true)
	require.True(t, r.logsIn(t, r.foreign))
	require.Equal(t, []bool{false, true}, r.accepts(t, refused[0], r.first))

	// The trap: it is there, for every secret-id of the AppRole.
	for range lockout {
		require.False(t, r.logsIn(t, refused[0]))
	}
	require.False(t, r.logsIn(t, r.foreign), "Vault does not count refused logins any more; lookups would not be needed")
	a := r.target.Probe(limited(t), []kind.Question{{User: r.user(), Materials: []kind.Material{r.material(r.first)}}})
	require.Error(t, a[0].Err, "that is no refusal")
	require.False(t, kind.IsDefinite(a[0].Err))
	require.False(t, vault.Refused(a[0].Err))
}

// A connection whose credentials are all refused locks nobody out, however often it
// is asked.
func staleAdmin(t *testing.T, r *rig) {
	r.stages("stale-1", map[version.Stage]string{version.Pending: "stale-2", version.Previous: "stale-3"})
	for range 3 * lockout {
		require.ErrorContains(t, r.change(t, kind.Change{Accept: []kind.Material{r.material("stale-2")}}), "refuses the login by approle")
		require.Error(t, r.preflight(t).Err)
	}
	require.True(t, r.logsIn(t, r.foreign), "three refusals are fewer than five")
	r.stages("stale-1", map[version.Stage]string{version.Pending: "stale-2", version.Previous: r.first})
	require.NoError(t, r.change(t, kind.Change{Accept: []kind.Material{r.material("stale-2")}}), "the one that is accepted is found")
	require.Equal(t, []bool{false, true, true}, r.accepts(t, "stale-1", "stale-2", r.first), "what has been made is tried again")
}

// role names another AppRole than role_id: nothing is made there.
func otherAppRole(t *testing.T, r *rig) {
	const next = "the-next-secret-id-0123456789abcdef"
	other := newRig(t, r.Vault, "stranger")
	r.stages(r.first, map[version.Stage]string{version.Pending: next})
	r.entry.Vault.Role = "stranger"
	require.NoError(t, r.Client().Sys().PutPolicyWithContext(t.Context(), r.name, strings.ReplaceAll(policy, "role/harmonyflow", "role/stranger")))
	f := r.preflight(t)
	require.NoError(t, f.Err)
	require.Len(t, f.Problems, 1)
	require.Contains(t, f.Problems[0], "auth/approle/role/stranger is not the AppRole that the role_id")
	err := r.change(t, kind.Change{Accept: []kind.Material{r.material(next)}})
	require.True(t, kind.IsDefinite(err), "%v", err)
	require.False(t, other.there(t, next))
	other.write(t, register, map[string]any{"secret_id": next}) // somebody else did
	for range 2 * lockout {
		a := r.probe(t, next)
		require.ErrorContains(t, a.Err, "a login with it is refused", "neither accepted nor known to be refused")
		require.False(t, kind.IsDefinite(a.Err))
	}
	require.True(t, r.logsIn(t, r.foreign), "one refused login, not ten")
}

func preflightNames(t *testing.T, r *rig) {
	f := r.preflight(t)
	require.NoError(t, f.Err)
	require.Empty(t, f.Problems)
	require.Empty(t, f.Notes)
	require.True(t, f.HasCredential)
	require.Equal(t, []kind.NodeError{{Node: r.proxy.Addr()}}, f.Nodes)

	r.write(t, "", map[string]any{"secret_id_ttl": "24h"})
	f = r.preflight(t)
	require.Empty(t, f.Problems)
	require.Contains(t, f.Notes[0], "secret_id_ttl=24h0m0s")
	r.write(t, "", map[string]any{"secret_id_ttl": 0})
	for field, c := range map[string]struct{ set, back any }{
		"secret_id_num_uses": {7, 0}, "token_num_uses": {100, 0},
	} {
		r.write(t, "", map[string]any{field: c.set})
		f = r.preflight(t)
		require.NoError(t, f.Err)
		require.Len(t, f.Problems, 1)
		require.Contains(t, f.Problems[0], field+"=")
		r.write(t, "", map[string]any{field: c.back})
	}
	r.write(t, "", map[string]any{"bind_secret_id": false, "secret_id_bound_cidrs": "", "token_bound_cidrs": "127.0.0.1/32"})
	require.Contains(t, r.preflight(t).Problems[0], "bind_secret_id=false")
	r.write(t, "", map[string]any{"bind_secret_id": true})

	r.entry.Vault.Role = ""
	f = r.preflight(t)
	require.True(t, f.HasCredential)
	require.Contains(t, f.Problems[0], "role=<name of the AppRole>, which rotate-root needs")
	err := r.change(t, kind.Change{Accept: []kind.Material{r.material("another")}})
	require.True(t, kind.IsDefinite(err), "%v", err)

	r.entry.Vault.Role = "nobody"
	require.Contains(t, r.preflight(t).Problems[0], `path "auth/approle/role/nobody/custom-secret-id" { capabilities = ["update"] }`)
	require.NoError(t, r.Client().Sys().PutPolicyWithContext(t.Context(), r.name, strings.ReplaceAll(policy, "role/harmonyflow", "role/nobody")))
	require.Contains(t, r.preflight(t).Problems[0], "there is no AppRole at auth/approle/role/nobody")
	answer := r.target.Probe(limited(t), []kind.Question{{User: r.user(), Materials: []kind.Material{r.material(r.first)}}})[0]
	require.True(t, kind.IsDefinite(answer.Err), "%v", answer.Err)

	r.entry.Vault.Auth = connection.AuthToken
	f = r.preflight(t)
	require.True(t, kind.IsDefinite(f.Err))
	require.ErrorContains(t, f.Err, "only auth=approle can be rotated")

	r.write(t, "", map[string]any{"secret_id_bound_cidrs": "127.0.0.1/32"}) // leave it as one that can be used
}

// The documentation gives this policy, and a rotation needs no more of it.
func policyIsEnough(t *testing.T, r *rig) {
	text, err := os.ReadFile("../../../docs/reference/vault-connections.md")
	require.NoError(t, err)
	require.Contains(t, string(text), "```hcl\n"+policy+"```")

	// Without the two that read the AppRole it works, too, and says what was not seen.
	_, needed, _ := strings.Cut(policy, "role-id\" {\n  capabilities = [\"read\"]\n}\n")
	require.NoError(t, r.Client().Sys().PutPolicyWithContext(t.Context(), r.name, strings.ReplaceAll(needed, "role/harmonyflow", "role/"+r.name)))
	f := r.preflight(t)
	require.NoError(t, f.Err)
	require.Empty(t, f.Problems)
	require.Len(t, f.Notes, 1)
	require.Contains(t, f.Notes[0], "secret_id_num_uses and secret_id_ttl")
	const next = "the-next-secret-id-0123456789abcdef"
	r.stages(r.first, map[version.Stage]string{version.Pending: next})
	require.NoError(t, r.change(t, kind.Change{Accept: []kind.Material{r.material(next)}, Refuse: []kind.Material{r.material(r.first)}}))
	require.Equal(t, []bool{false, true}, r.accepts(t, r.first, next))

	// What is forbidden waits: the policy can be mended.
	require.NoError(t, r.Client().Sys().PutPolicyWithContext(t.Context(), r.name, `path "secret/*" { capabilities = ["read"] }`))
	require.Contains(t, r.preflight(t).Problems[0], "may not write")
	err = r.change(t, kind.Change{Accept: []kind.Material{r.material("another")}})
	require.ErrorContains(t, err, "permission denied")
	require.False(t, kind.IsDefinite(err))
}

// A rotation leaves no tokens behind.
func tokensAreRevoked(t *testing.T, r *rig) {
	const next = "the-next-secret-id-0123456789abcdef"
	held := func() (out int) {
		s, err := r.Client().Logical().ListWithContext(t.Context(), "auth/token/accessors")
		require.NoError(t, err)
		for _, accessor := range s.Data["keys"].([]any) {
			token, err := r.Client().Auth().Token().LookupAccessorWithContext(t.Context(), accessor.(string))
			if err != nil {
				continue // revoked since
			}
			if meta, _ := token.Data["meta"].(map[string]any); meta["role_name"] == r.name {
				out++
			}
		}
		return out
	}
	r.stages(r.first, map[version.Stage]string{version.Pending: next})
	require.NoError(t, r.change(t, kind.Change{Accept: []kind.Material{r.material(next), r.material(r.first)}}))
	require.Equal(t, []bool{true, true}, r.accepts(t, r.first, next))
	require.Empty(t, r.preflight(t).Problems)
	require.Zero(t, held())
	require.True(t, r.logsIn(t, next))
	require.Equal(t, 1, held(), "it would have been seen")
}

// Errors hold no secret-id, whatever Vault answers.
func nothingIsTold(t *testing.T, r *rig) {
	const secret = "a-secret-id-that-nobody-may-read"
	r.stages(secret, nil)
	err := r.change(t, kind.Change{Accept: []kind.Material{r.material(secret)}})
	require.Error(t, err)
	require.NotContains(t, err.Error(), secret)
	r.stages(r.first, nil)
	r.entry.Vault.AuthMount = "nowhere"
	err = r.change(t, kind.Change{Accept: []kind.Material{r.material(secret)}})
	require.Error(t, err)
	require.NotContains(t, err.Error(), secret)
	require.NotContains(t, err.Error(), r.first)
	require.NotEqual(t, http.StatusOK, vault.AnswerOf(err).Status)
}
