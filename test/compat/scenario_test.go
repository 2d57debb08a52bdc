package compat

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	user          = "app"
	firstPassword = "first-password-of-the-app"
	patience      = 2 * time.Minute
)

// scene is one Vault, one Redis, and what lies between them.
type scene struct {
	t      *testing.T
	cell   cell
	vault  *servers.Vault
	client *api.Client
	redis  *servers.RedisNode
	proxy  *servers.Proxy
	known  []string // passwords, which no log may hold
}

// play is the life of one secret in a cell. It returns how many rotations there were.
func play(t *testing.T, c cell, vault, plugin string) (rotations int) {
	t.Helper()
	s := &scene{t: t, cell: c, known: []string{firstPassword, servers.RedisAdminPassword}}
	s.startRedis()
	s.startVault(vault, plugin)
	s.describes()
	s.adopt()

	// A rotation: the new password works, and so does the old one until it is taken away.
	second, _ := s.rotate()
	s.write("retire/redis/"+user, nil)
	s.accepts(second)
	s.refuses(firstPassword)

	// One that is taken back.
	third, _ := s.rotate()
	s.write("rollback/redis/"+user, map[string]any{"reason": "the new one breaks the app"})
	require.Equal(t, second, s.served())
	s.accepts(second)
	s.refuses(third)

	fourth := s.sealedInTheMiddle(second)
	s.killedInGrace(second, fourth)
	s.write("retire/redis/"+user, nil)
	s.accepts(fourth)
	s.refuses(second)

	fifth := s.onSchedule(fourth)
	s.reloads(fourth, fifth)
	s.write("retire/redis/"+user, nil)
	s.accepts(fifth)
	s.refuses(fourth)
	require.Equal(t, true, s.read("verify/redis/" + user)["ok"])

	s.redisRestarts(fourth, fifth)
	rotations = len(s.list("rotations"))
	s.deletes(fifth)
	s.logsHoldNoSecret()
	return rotations
}

// startRedis starts a Redis with an admin and the user that is rotated, behind a proxy.
func (s *scene) startRedis() {
	s.t.Helper()
	app := user + " on >" + firstPassword + " ~* +@all"
	switch s.cell.mode {
	case aclFile:
		s.redis = servers.Redis(s.t, servers.WithACLFile(), servers.WithUsers(app))
	case configFile:
		s.redis = servers.Redis(s.t, servers.WithUsers(app))
	case neither:
		s.redis = servers.Redis(s.t, servers.WithoutConfigFile())
		for _, u := range []string{app, servers.RedisAdmin + " on >" + servers.RedisAdminPassword + " ~* &* +@all"} {
			words := []any{"ACL", "SETUSER"}
			for word := range strings.FieldsSeq(u) {
				words = append(words, word)
			}
			_, err := s.redis.Do(s.t.Context(), words...)
			require.NoError(s.t, err)
		}
	}
	var err error
	s.proxy, err = servers.NewProxy(s.redis.Addr)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, s.proxy.Close()) })
}

// startVault starts the host, registers the plugin as a release, and mounts it.
func (s *scene) startVault(vault, plugin string) {
	s.t.Helper()
	ctx := s.t.Context()
	s.vault = servers.NewVault(s.t, servers.VaultOptions{Raft: true, NoMount: true, Binary: vault, Plugin: plugin})
	s.client = s.vault.Client()
	require.NoError(s.t, s.vault.InstallBuilt(ctx, pluginVersion, plugin))
	require.NoError(s.t, s.client.Sys().MountWithContext(ctx, servers.DefaultMount, &api.MountInput{
		Type: servers.PluginName, Config: api.MountConfigInput{PluginVersion: pluginVersion},
	}))
}

// describes: the command line of that Vault shows which version runs, and its help and
// its OpenAPI document show what the engine has.
func (s *scene) describes() {
	s.t.Helper()
	require.Contains(s.t, s.cli("version"), "Vault v"+s.cell.vault)
	require.Contains(s.t, s.cli("plugin", "info", "-version="+pluginVersion, "secret", servers.PluginName), pluginVersion)
	require.Regexp(s.t, servers.PluginName+` +`+pluginVersion, s.cli("plugin", "list", "secret"))
	require.Regexp(s.t, servers.DefaultMount+"/ .* "+pluginVersion, s.cli("secrets", "list", "-detailed"))
	require.Contains(s.t, s.cli("path-help", servers.DefaultMount+"/roles/"+user), "initial_password")

	resp, err := s.client.Logical().ReadRawWithContext(s.t.Context(), "sys/internal/specs/openapi")
	require.NoError(s.t, err)
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	require.NoError(s.t, err)
	var document struct {
		Paths map[string]any `json:"paths"`
	}
	require.NoError(s.t, json.Unmarshal(raw, &document))
	for _, path := range []string{"creds/{name}", "roles/{name}", "rotate/{kind}/{name}", "rotations/{id}", "status"} {
		require.Contains(s.t, document.Paths, "/"+servers.DefaultMount+"/"+path)
	}
}

// adopt puts the user under rotation. A Redis that would forget a change is refused
// first, with the way out.
func (s *scene) adopt() {
	s.t.Helper()
	connection := map[string]any{
		"type": "redis", "addresses": s.proxy.Addr(), "username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": user,
	}
	role := map[string]any{
		"kind": "redis", "connection": "cache", "username": user, "initial_password": firstPassword, "grace_period": "1h", "rotation_period": "720h",
	}
	s.write("connections/cache", connection)
	if s.cell.mode == neither {
		_, err := s.client.Logical().WriteWithContext(s.t.Context(), servers.DefaultMount+"/roles/"+user, role)
		require.ErrorContains(s.t, err, "set persistence=none")
		connection["persistence"] = "none"
		s.write("connections/cache", connection)
	}
	s.write("roles/"+user, role)
	require.Equal(s.t, firstPassword, s.served())
	require.Equal(s.t, []any{user}, s.list("roles"))
	require.Equal(s.t, []any{"cache"}, s.list("connections"))
}

// rotate returns the password that is served now, and the rotation.
func (s *scene) rotate() (password, id string) {
	s.t.Helper()
	before := s.served()
	id, _ = s.write("rotate/redis/"+user, nil)["rotation_id"].(string)
	require.Equal(s.t, "grace", s.read("rotations/" + id)["state"])
	password = s.served()
	require.NotEqual(s.t, before, password)
	s.accepts(password)
	s.accepts(before)
	return password, id
}

// sealedInTheMiddle: Vault is sealed after Redis has taken a new password, and before
// the engine knows. Unsealed, it ends the rotation by itself.
func (s *scene) sealedInTheMiddle(before string) (password string) {
	s.t.Helper()
	ctx := s.t.Context()
	s.proxy.LoseReplyTo("SETUSER")
	request, leave := context.WithCancel(ctx)
	left := make(chan struct{})
	go func() {
		defer close(left)
		_, _ = s.client.Logical().WriteWithContext(request, servers.DefaultMount+"/rotate/redis/"+user, nil)
	}()
	s.eventually("redis has two passwords", func() bool { return s.passwords() == 2 })
	require.Equal(s.t, before, s.served())
	require.Equal(s.t, "rotating", s.read("roles/" + user)["state"])
	leave() // sealing waits for who is being answered
	<-left
	require.NoError(s.t, s.client.Sys().SealWithContext(ctx))
	status, err := s.client.Sys().SealStatusWithContext(ctx)
	require.NoError(s.t, err)
	require.True(s.t, status.Sealed)
	_, err = s.client.Logical().ReadWithContext(ctx, servers.DefaultMount+"/creds/"+user)
	require.Error(s.t, err)
	s.accepts(before)

	s.proxy.Cut(true)
	s.proxy.Heal()
	require.NoError(s.t, s.vault.Unseal(ctx))
	s.eventually("the rotation has served its password", func() bool { return s.state() == "grace" })
	password = s.served()
	require.NotEqual(s.t, before, password)
	s.accepts(password)
	s.accepts(before)
	return password
}

// killedInGrace: Vault is killed and starts again.
func (s *scene) killedInGrace(before, now string) {
	s.t.Helper()
	require.NoError(s.t, s.vault.Kill())
	require.NoError(s.t, s.vault.Restart(s.t.Context()))
	s.eventually("the engine is back in grace", func() bool { return s.state() == "grace" })
	require.Equal(s.t, now, s.served())
	s.accepts(now)
	s.accepts(before)
}

// onSchedule: a rotation begins by itself.
func (s *scene) onSchedule(before string) (password string) {
	s.t.Helper()
	s.write("roles/"+user, map[string]any{"next_rotation": "2s"})
	s.eventually("the scheduled rotation has served its password", func() bool { return s.state() == "grace" })
	password = s.served()
	require.NotEqual(s.t, before, password)
	return password
}

// reloads: another process of the plugin goes on with the rotation.
func (s *scene) reloads(before, now string) {
	s.t.Helper()
	was, err := s.vault.PluginPIDs()
	require.NoError(s.t, err)
	s.cli("plugin", "reload", "-plugin="+servers.PluginName)
	s.eventually("the plugin answers again", func() bool { return s.state() == "grace" })
	is, err := s.vault.PluginPIDs()
	require.NoError(s.t, err)
	for _, pid := range was {
		require.NotContains(s.t, is, pid)
	}
	require.Equal(s.t, now, s.served())
	s.accepts(now)
	s.accepts(before)
}

// redisRestarts: what was saved is there again. Of a Redis that saves nothing the
// user is gone, as persistence=none says.
func (s *scene) redisRestarts(retired, now string) {
	s.t.Helper()
	require.NoError(s.t, s.redis.Restart(s.t.Context()))
	if s.cell.mode == neither {
		s.refuses(now)
		return
	}
	s.accepts(now)
	s.refuses(retired)
	require.Equal(s.t, true, s.read("verify/redis/" + user)["ok"])
}

// deletes: what is gone is no longer listed, and takes nothing away from the server.
func (s *scene) deletes(password string) {
	s.t.Helper()
	s.delete("roles/" + user)
	s.delete("connections/cache")
	require.Empty(s.t, s.list("roles"))
	require.Empty(s.t, s.list("connections"))
	require.Equal(s.t, []any{user}, s.list("deleted"))
	if s.cell.mode != neither {
		s.accepts(password)
	}
	require.NoError(s.t, s.vault.Unmount(s.t.Context(), servers.DefaultMount))
}

func (s *scene) logsHoldNoSecret() {
	s.t.Helper()
	for _, path := range []string{s.vault.LogPath, s.vault.AuditPath} {
		log, err := os.ReadFile(path)
		require.NoError(s.t, err)
		for _, word := range append(s.known, "panic:", "fatal error:") {
			require.False(s.t, strings.Contains(string(log), word), "%s holds a secret, or a defect", path)
		}
	}
}

func (s *scene) write(path string, data map[string]any) map[string]any {
	s.t.Helper()
	secret, err := s.client.Logical().WriteWithContext(s.t.Context(), servers.DefaultMount+"/"+path, data)
	require.NoError(s.t, err, path)
	require.NotNil(s.t, secret, path)
	return secret.Data
}

func (s *scene) read(path string) map[string]any {
	s.t.Helper()
	secret, err := s.client.Logical().ReadWithContext(s.t.Context(), servers.DefaultMount+"/"+path)
	require.NoError(s.t, err, path)
	require.NotNil(s.t, secret, path)
	return secret.Data
}

func (s *scene) list(path string) []any {
	s.t.Helper()
	secret, err := s.client.Logical().ListWithContext(s.t.Context(), servers.DefaultMount+"/"+path)
	require.NoError(s.t, err, path)
	if secret == nil {
		return nil
	}
	return secret.Data["keys"].([]any)
}

func (s *scene) delete(path string) {
	s.t.Helper()
	_, err := s.client.Logical().DeleteWithContext(s.t.Context(), servers.DefaultMount+"/"+path)
	require.NoError(s.t, err, path)
}

func (s *scene) cli(args ...string) string {
	s.t.Helper()
	out, err := s.vault.CLI(s.t.Context(), args...)
	require.NoError(s.t, err)
	return out
}

// state is that of the role; "" while nobody can say.
func (s *scene) state() string {
	secret, err := s.client.Logical().ReadWithContext(s.t.Context(), servers.DefaultMount+"/roles/"+user)
	if err != nil || secret == nil {
		return ""
	}
	return fmt.Sprint(secret.Data["state"])
}

// served is what creds/ serves.
func (s *scene) served() string {
	s.t.Helper()
	password, _ := s.read("creds/" + user)["password"].(string)
	require.NotEmpty(s.t, password)
	s.known = append(s.known, password)
	return password
}

// accepts logs in to the server itself.
func (s *scene) accepts(password string) {
	s.t.Helper()
	_, err := s.redis.Do(s.t.Context(), "AUTH", user, password)
	require.NoError(s.t, err)
}

func (s *scene) refuses(password string) {
	s.t.Helper()
	_, err := s.redis.Do(s.t.Context(), "AUTH", user, password)
	require.ErrorContains(s.t, err, "WRONGPASS")
}

// passwords is how many the user has.
func (s *scene) passwords() int {
	answer, err := s.redis.Do(s.t.Context(), "ACL", "GETUSER", user)
	fields, _ := answer.([]any)
	if err != nil {
		return 0
	}
	for i := 0; i+1 < len(fields); i += 2 {
		if list, ok := fields[i+1].([]any); ok && fields[i] == "passwords" {
			return len(list)
		}
	}
	return 0
}

func (s *scene) eventually(what string, met func() bool) {
	s.t.Helper()
	require.Eventually(s.t, met, patience, 50*time.Millisecond, what)
}
