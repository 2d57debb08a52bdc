package approle

import (
	"context"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/kindtest"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestMain(m *testing.M) {
	// Started by the import of a library of the SDK, and never ended.
	leaks.Main(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// policy is that of docs/reference/vault-connections.md.
const policy = `path "auth/approle/role/harmonyflow" {
  capabilities = ["read"]
}

path "auth/approle/role/harmonyflow/role-id" {
  capabilities = ["read"]
}

path "auth/approle/role/harmonyflow/custom-secret-id" {
  capabilities = ["update"]
}

path "auth/approle/role/harmonyflow/secret-id/lookup" {
  capabilities = ["update"]
}

path "auth/approle/role/harmonyflow/secret-id/destroy" {
  capabilities = ["update"]
}
`

// rig is an AppRole behind a proxy, and a connection that logs in to it.
type rig struct {
	*servers.Vault
	proxy          *servers.Proxy
	clients        *vault.Clients
	target         kind.Target
	name, roleID   string
	first, foreign string // secret-ids that Vault has made

	mu    sync.Mutex
	entry *connection.Entry
}

// newRig makes an AppRole that the connection logs in to with first, and others
// with foreign.
func newRig(t *testing.T, v *servers.Vault, name string) *rig {
	t.Helper()
	r := &rig{Vault: v, name: name}
	var err error
	r.roleID, r.first, err = v.AppRole(t.Context(), name, strings.ReplaceAll(policy, "role/harmonyflow", "role/"+name), "1h")
	require.NoError(t, err)
	r.foreign = r.write(t, "secret-id", nil)["secret_id"].(string)
	r.proxy, err = servers.NewProxy(strings.TrimPrefix(v.Address, "http://"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.proxy.Close()) })
	r.entry = &connection.Entry{
		Name: "self", Type: connection.TypeVault, Admin: connection.NewAdmin(r.material(r.first)),
		Vault: &connection.Vault{Address: "http://" + r.proxy.Addr(), Auth: connection.AuthAppRole, Role: name},
	}
	require.NoError(t, vault.ValidateConfig(r.entry.Vault, r.entry.TLS))
	r.clients, r.target = r.open(t, r.get)
	return r
}

func (r *rig) open(t *testing.T, get func() *connection.Entry) (*vault.Clients, kind.Target) {
	t.Helper()
	clients := vault.New(func(context.Context, string) (*connection.Entry, error) { return get(), nil }, hclog.NewNullLogger())
	t.Cleanup(func() { clients.Close(context.Background()) })
	return clients, Open(clients, "self")
}

func (r *rig) get() *connection.Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := *r.entry
	return &e
}

// stages gives the connection its credentials.
func (r *rig) stages(current string, others map[version.Stage]string) {
	set := version.Set{Versions: []version.Version{{Number: 1, Stage: version.Current, Material: r.material(current)}}}
	for stage, secret := range others {
		set.Versions = append(set.Versions, version.Version{Number: len(set.Versions) + 1, Stage: stage, Material: r.material(secret)})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entry.Admin = connection.Admin{Set: set}
}

func (r *rig) material(secret string) kind.Material {
	return kind.Material{Username: r.roleID, Secret: secret}
}

func (r *rig) user() kind.User { return kind.User{Role: "root", Username: r.roleID, Admin: true} }

// write writes below the AppRole, as root.
func (r *rig) write(t testing.TB, path string, body map[string]any) map[string]any {
	t.Helper()
	s, err := r.Client().Logical().WriteWithContext(t.Context(), "auth/approle/role/"+r.name+"/"+path, body)
	require.NoError(t, err)
	if s == nil {
		return nil
	}
	return s.Data
}

func (r *rig) there(t testing.TB, secret string) bool {
	t.Helper()
	return r.write(t, "secret-id/lookup", map[string]any{"secret_id": secret}) != nil
}

// logsIn reports whether a stranger can log in with a secret-id.
func (r *rig) logsIn(t testing.TB, secret string) bool {
	t.Helper()
	client := r.Client()
	client.ClearToken()
	_, err := client.Logical().WriteWithContext(t.Context(), "auth/approle/login", map[string]any{"role_id": r.roleID, "secret_id": secret})
	return err == nil
}

// node is Vault as the cases handle it.
type node struct{ *servers.Vault }

func (n node) Start(ctx context.Context) error { return n.Restart(ctx) }
func (n node) Pause() error                    { return syscall.Kill(n.PID(), syscall.SIGSTOP) }
func (n node) Resume() error                   { return syscall.Kill(n.PID(), syscall.SIGCONT) }

func TestContract(t *testing.T) {
	r := newRig(t, servers.NewVault(t, servers.VaultOptions{Raft: true, NoMount: true}), "contract")
	wrong := r.get()
	wrong.Admin = connection.NewAdmin(r.material("not-the-secret-id"))
	_, wrongAdmin := r.open(t, func() *connection.Entry { return wrong })
	var ours []string
	kindtest.Run(t, kindtest.Harness{
		Target: r.target, WrongAdmin: wrongAdmin, Nodes: []kindtest.Node{node{r.Vault}}, Network: r.proxy,
		Username: r.roleID, Shared: true, ChangeRequest: register,
		NewUser: func(t testing.TB, _ string, accepted ...kind.Material) {
			for _, secret := range ours {
				r.write(t, destroy, map[string]any{"secret_id": secret})
			}
			ours = nil
			for _, m := range accepted {
				r.write(t, register, map[string]any{"secret_id": m.Secret})
				ours = append(ours, m.Secret, strings.Replace(m.Secret, "old-", "new-", 1))
			}
			r.stages(ours[0], map[version.Stage]string{version.Pending: ours[1]}) // as while it is rotated
		},
		Settle: func(t testing.TB) {
			require.Eventually(t, func() bool { return r.logsIn(t, r.foreign) }, patience, glance)
		},
	})
	require.True(t, r.logsIn(t, r.foreign), "the secret-id of somebody else was never touched")
}
