package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// The example puts the secrets of the runbook under rotation.
const (
	example     = "../../deploy/examples/harmonyflow/"
	setUpScript = example + "setup.sh"
)

// secret is a row of the runbook's table of secrets, and what publishes it.
type secret struct {
	role, kind  string
	path, field string
	beside      []string // other fields of the role
	cron        string
	// changes are what a rotation publishes, one after the other.
	changes []string
}

// keyChanges are those of both keys of tokens, which rotate together: the earlier
// of each leaves when its own tokens have run out.
var keyChanges = []string{"shown", "used", "access key retired", "refresh key retired"}

var sevenSecrets = []secret{
	{"jwt-access", "jwt", "session-state-service", "jwt-secret", []string{"jwt-secret-previous"}, "0 2 1 */3 *", keyChanges},
	{"jwt-refresh", "jwt", "session-state-service", "jwt-refresh-secret", []string{"jwt-refresh-previous"}, "0 2 1 */3 *", keyChanges},
	{"postgresql", "postgresql", "postgresql", "password", nil, "0 2 1 * *", []string{"used"}},
	{"redis", "redis", "redis", "password", nil, "0 2 1 * *", []string{"used"}},
	{"rabbitmq", "rabbitmq", "rabbitmq", "password", nil, "0 2 1 * *", []string{"used"}},
	{"admin-token", "api-key", "admin", "token", []string{"token-previous"}, "0 2 1 */3 *", []string{"used", "retired"}},
	{"encryption-key", "encryption-key", "session-state-service", "encryption-key", []string{"encryption-keys"}, "0 2 15 1 *", []string{"shown", "used", "retired"}},
}

// platform is what the runbook is about, and a terminal with vault in it.
type platform struct {
	t      *testing.T
	vault  *servers.Vault
	client *api.Client
	redis  *servers.RedisNode
	db     *servers.PostgresNode
	queue  *servers.RabbitMQNode
	dir    string
	env    []string
}

func newPlatform(t *testing.T) *platform {
	t.Helper()
	p := &platform{
		t: t, dir: t.TempDir(),
		vault: servers.NewVault(t, servers.VaultOptions{Race: raceEnabled}),
		redis: servers.Redis(t, servers.WithRequirePass("redis-of-the-runbook"), servers.WithUsers("fresh on >unknown ~* +@all")),
		db:    servers.Postgres(t),
		queue: servers.RabbitMQ(t),
	}
	p.client = p.vault.Client()
	require.NoError(t, p.db.Exec(t.Context(), "CREATE ROLE vault LOGIN CREATEROLE PASSWORD 'db-admin-password'",
		"CREATE ROLE harmonyflow LOGIN PASSWORD 'postgresql-of-the-runbook'", "CREATE ROLE fresh LOGIN PASSWORD 'unknown'"))
	require.NoError(t, p.db.Exec(t.Context(), "CREATE DATABASE harmonyflow"))
	require.NoError(t, p.queue.SetUser(t.Context(), "harmonyflow", "rabbitmq-of-the-runbook", ""))
	require.NoError(t, p.queue.SetUser(t.Context(), "fresh", "unknown", ""))

	// A vault that notes how it is called: what stands on a command line can be
	// read by everybody on the machine.
	bin := filepath.Join(p.dir, "bin")
	require.NoError(t, os.Mkdir(bin, 0o700))
	note := fmt.Sprintf("#!/bin/sh\nprintf '%%s\\n' \"$*\" >>'%s'\nexec '%s' \"$@\"\n", p.commandLines(), p.vault.Binary())
	require.NoError(t, os.WriteFile(filepath.Join(bin, "vault"), []byte(note), 0o700))
	for _, variable := range p.vault.Env() {
		if name, value, _ := strings.Cut(variable, "="); name == "PATH" {
			variable = "PATH=" + bin + string(os.PathListSeparator) + value
		}
		p.env = append(p.env, variable)
	}
	p.env = append(p.env, "VAULT_CLI_NO_COLOR=1",
		"POSTGRES_URL=postgresql://{{username}}:{{password}}@"+p.db.Addr+"/harmonyflow?sslmode=disable", "POSTGRES_ADMIN_PASSWORD=db-admin-password",
		"REDIS_ADDRESSES="+p.redis.Addr, "REDIS_ADMIN="+servers.RedisAdmin, "REDIS_ADMIN_PASSWORD="+servers.RedisAdminPassword,
		"RABBITMQ_URLS=http://"+p.queue.ManagementAddr, "RABBITMQ_AMQP_URLS=amqp://"+p.queue.Addr,
		"RABBITMQ_ADMIN="+servers.RabbitMQAdmin, "RABBITMQ_ADMIN_PASSWORD="+servers.RabbitMQAdminPassword,
		"PROPAGATION_DELAY=1s", "JWT_ACCESS_TTL=2s", "JWT_REFRESH_TTL=8s")
	return p
}

func (p *platform) commandLines() string { return filepath.Join(p.dir, "command-lines") }

// setUp runs the example's script.
func (p *platform) setUp(env ...string) (string, error) {
	cmd := exec.CommandContext(p.t.Context(), "sh", setUpScript)
	cmd.Env = append(slices.Clone(p.env), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// cli runs vault and decodes what it prints as JSON.
func (p *platform) cli(into any, args ...string) {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), p.vault.Binary(), args...)
	cmd.Env = append(slices.Clone(p.env), "VAULT_FORMAT=json")
	out, err := cmd.Output()
	require.NoError(p.t, err, "vault %s\n%s", strings.Join(args, " "), out)
	require.NoError(p.t, json.Unmarshal(out, into), "vault %s\n%s", strings.Join(args, " "), out)
}

// version is what `vault kv metadata get` says of a secret.
func (p *platform) version(path string) int {
	p.t.Helper()
	var got struct {
		Data struct {
			CurrentVersion int `json:"current_version"`
		} `json:"data"`
	}
	p.cli(&got, "kv", "metadata", "get", "-mount=secret", path)
	return got.Data.CurrentVersion
}

// body is what stands in a version of a secret.
func (p *platform) body(path string, version int) map[string]string {
	p.t.Helper()
	got, err := p.client.KVv2("secret").GetVersion(p.t.Context(), path, version)
	require.NoError(p.t, err, "%s version %d", path, version)
	body := map[string]string{}
	for name, value := range got.Data {
		body[name] = value.(string)
	}
	return body
}

// now is what `vault kv get` reads.
func (p *platform) now(path string) map[string]string {
	p.t.Helper()
	var got struct {
		Data struct {
			Data map[string]string `json:"data"`
		} `json:"data"`
	}
	p.cli(&got, "kv", "get", "-mount=secret", "harmonyflow/"+path)
	return got.Data.Data
}

func (p *platform) role(name string) map[string]any {
	p.t.Helper()
	s, err := p.client.Logical().ReadWithContext(p.t.Context(), "harmonyflow/roles/"+name)
	require.NoError(p.t, err)
	require.NotNil(p.t, s, name)
	return s.Data
}

func (p *platform) write(path string, data map[string]any) {
	p.t.Helper()
	_, err := p.client.Logical().WriteWithContext(p.t.Context(), path, data)
	require.NoError(p.t, err, path)
}

// idle waits until no rotation of roles is under way, and the one that was last
// has made another version.
func (p *platform) idle(before map[string]any, roles ...string) {
	p.t.Helper()
	for _, name := range roles {
		require.Eventually(p.t, func() bool {
			s, err := p.client.Logical().ReadWithContext(p.t.Context(), "harmonyflow/roles/"+name)
			return err == nil && s.Data["state"] == "idle" && fmt.Sprint(s.Data["version"]) != fmt.Sprint(before[name])
		}, time.Minute, 50*time.Millisecond, name)
	}
}

// everything is all that a run of the script could change.
func (p *platform) everything() map[string]any {
	p.t.Helper()
	all := map[string]any{}
	for _, path := range []string{"harmonyflow/roles", "harmonyflow/connections", "harmonyflow/rotations", "auth/token/accessors"} {
		s, err := p.client.Logical().ListWithContext(p.t.Context(), path)
		require.NoError(p.t, err)
		all[path] = s.Data["keys"]
	}
	for _, folder := range []string{"harmonyflow/roles", "harmonyflow/connections"} {
		for _, name := range all[folder].([]any) {
			s, err := p.client.Logical().ReadWithContext(p.t.Context(), folder+"/"+name.(string))
			require.NoError(p.t, err)
			all[folder+"/"+name.(string)] = s.Data
		}
	}
	for _, path := range []string{"session-state-service", "postgresql", "redis", "rabbitmq", "admin"} {
		all[path] = p.version("harmonyflow/" + path)
	}
	policy, err := p.client.Sys().GetPolicyWithContext(p.t.Context(), "harmonyflow-publish")
	require.NoError(p.t, err)
	all["policy"] = policy
	return all
}

// figures count what was published and what KV made of it.
type figures struct{ changes, versions int }

// publishes does something that publishes changes to a secret, and counts its
// versions: as many, each different from the one before, and only in fields that
// are the engine's.
func (p *platform) publishes(f *figures, path string, changes int, do func()) {
	p.t.Helper()
	path = "harmonyflow/" + path
	from := p.version(path)
	do()
	to := p.version(path)
	require.Equal(p.t, changes, to-from, "versions of %s for %d published changes: %v", path, changes, p.changed(path, from, to))
	f.changes, f.versions = f.changes+changes, f.versions+to-from
	var own []string
	for _, s := range sevenSecrets {
		if "harmonyflow/"+s.path == path {
			own = append(append(own, s.field), s.beside...)
		}
	}
	before := p.body(path, from)
	for n := from + 1; n <= to; n++ {
		after := p.body(path, n)
		require.NotEqual(p.t, before, after, "version %d of %s changes nothing", n, path)
		maps.DeleteFunc(before, func(name, _ string) bool { return slices.Contains(own, name) })
		foreign := maps.Clone(after)
		maps.DeleteFunc(foreign, func(name, _ string) bool { return slices.Contains(own, name) })
		require.Equal(p.t, before, foreign, "fields of others in version %d of %s", n, path)
		before = after
	}
}

// changed are the names of the fields that each version changed.
func (p *platform) changed(path string, from, to int) (fields [][]string) {
	p.t.Helper()
	before := p.body(path, from)
	for n := from + 1; n <= to; n++ {
		after := p.body(path, n)
		var names []string
		for name, value := range after {
			if was, ok := before[name]; !ok || was != value {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		fields, before = append(fields, names), after
	}
	return fields
}

// TestSevenSecrets runs the example where the secrets of the runbook's table
// stand today, and rotates each.
func TestSevenSecrets(t *testing.T) {
	p := newPlatform(t)
	const earlierKey = "jwt-access-of-the-runbook-before"
	old := map[string]map[string]any{
		"session-state-service": {
			"jwt-secret": "jwt-access-of-the-runbook-1234567", "jwt-refresh-secret": "jwt-refresh-of-the-runbook-12345",
			"jwt-secret-previous": earlierKey,
			"encryption-key":      "ZW5jcnlwdGlvbi1rZXktb2YtdGhlLXJ1bmJvb2stLS0=", "log-level": "info", "session-timeout": "3600",
		},
		"postgresql": {"password": "postgresql-of-the-runbook", "username": "harmonyflow", "host": "postgresql-primary.postgresql"},
		"redis":      {"password": "redis-of-the-runbook", "host": "redis-cluster.redis"},
		"rabbitmq":   {"password": "rabbitmq-of-the-runbook", "vhost": "/"},
		"admin":      {"token": "admin-token-of-the-runbook", "owner": "platform team"},
	}
	for path, body := range old {
		for range 2 { // they were there for a while
			_, err := p.client.KVv2("secret").Put(t.Context(), "harmonyflow/"+path, body)
			require.NoError(t, err)
		}
	}
	f := &figures{}

	// A mistake stops the script where it is made, and the next run goes on there.
	out, err := p.setUp("RABBITMQ_ADMIN_PASSWORD=")
	require.Error(t, err)
	require.Contains(t, out, "the password of rabbitmq's admin user is missing")
	out, err = p.setUp("RABBITMQ_ADMIN_PASSWORD=wrong")
	require.Error(t, err, out)

	// Adopting them writes the fields that are new, and changes none. An earlier key
	// of tokens is taken over where it stands, and leaves when no token needs it.
	p.publishes(f, "session-state-service", 3, func() {
		p.publishes(f, "admin", 1, func() {
			out, err = p.setUp()
			require.NoError(t, err, out)
		})
		require.Eventually(t, func() bool {
			first := p.role("jwt-access")["versions"].(map[string]any)["1"].(map[string]any)
			return first["stage"] == "retired" && p.role("jwt-access")["state"] == "idle"
		}, time.Minute, 50*time.Millisecond)
	})
	old["session-state-service"]["jwt-secret-previous"] = ""
	for path, body := range old {
		now := p.now(path)
		for name, value := range body {
			require.Equal(t, value, now[name], "%s of %s", name, path)
		}
	}
	for _, s := range sevenSecrets {
		s.standsWith(t, p.role(s.role))
	}
	require.Equal(t, "2", fmt.Sprint(p.role("jwt-access")["max_token_ttl"]))

	// Once more changes nothing.
	before := p.everything()
	out, err = p.setUp()
	require.NoError(t, err, out)
	require.Equal(t, before, p.everything())

	p.rotateAll(f, old)

	p.publishes(f, "session-state-service", len(keyChanges), func() { p.rotateOnTime() })

	p.takeAway()

	lines, err := os.ReadFile(p.commandLines())
	require.NoError(t, err)
	for _, s := range sevenSecrets {
		require.NotContains(t, string(lines), old[s.path][s.field])
	}
	for _, password := range []string{earlierKey, "db-admin-password", servers.RedisAdminPassword, servers.RabbitMQAdminPassword} {
		require.NotContains(t, string(lines), password)
	}
	require.Contains(t, string(lines), "initial_value=-")

	report.Figure(t, "SECRETS_FILE", "%d secrets at their old paths: %d published changes, %d versions", len(sevenSecrets), f.changes, f.versions)
}

// standsWith reads back what the runbook's table says of a secret.
func (s secret) standsWith(t *testing.T, role map[string]any) {
	t.Helper()
	require.Equal(t, s.kind, role["kind"], s.role)
	require.Equal(t, []any{"vault", "secret", "harmonyflow/" + s.path, s.field},
		[]any{role["publish_connection"], role["publish_mount"], role["publish_path"], role["field"]}, s.role)
	require.Equal(t, "idle", role["state"], s.role)
	require.Equal(t, s.cron, role["rotation_schedule"], s.role)
	require.Equal(t, "UTC", role["rotation_timezone"], s.role)
	next, _ := role["next_rotations"].([]any)
	require.Len(t, next, 3, s.role)
	apart := map[string][2]int{"0 2 1 * *": {28, 31}, "0 2 1 */3 *": {90, 92}, "0 2 15 1 *": {365, 366}}[s.cron] // in days
	var last time.Time
	for _, text := range next {
		at, err := time.Parse(time.RFC3339, text.(string))
		require.NoError(t, err)
		require.Equal(t, "02:00:00", at.Format(time.TimeOnly), s.role)
		if days := int(at.Sub(last).Hours() / 24); !last.IsZero() {
			require.True(t, apart[0] <= days && days <= apart[1], "%s rotates again after %d days", s.role, days)
		}
		last = at
	}
}

// rotateAll rotates every secret once, through to its end.
func (p *platform) rotateAll(f *figures, old map[string]map[string]any) {
	p.t.Helper()
	rotate := func(kind string) func() {
		return func() {
			before, roles := map[string]any{}, []string{}
			for _, s := range sevenSecrets {
				if s.kind == kind {
					roles = append(roles, s.role)
					before[s.role] = p.role(s.role)["version"]
				}
			}
			p.write("harmonyflow/rotate/"+kind, nil)
			for _, name := range roles {
				switch kind {
				case "redis", "api-key":
					p.write("harmonyflow/retire/"+kind+"/"+name, nil)
				case "encryption-key":
					p.idle(before, name)
					p.write("harmonyflow/ack/encryption-key/"+name, map[string]any{"version": 1})
					p.write("harmonyflow/retire/encryption-key/"+name, map[string]any{"version": 1})
				}
			}
			p.idle(before, roles...)
		}
	}
	done := map[string]bool{}
	for _, s := range sevenSecrets {
		if done[s.kind] {
			continue // both keys of tokens rotate together, in the same versions
		}
		done[s.kind] = true
		p.publishes(f, s.path, len(s.changes), rotate(s.kind))
	}
	for _, s := range sevenSecrets {
		now := p.now(s.path)
		require.NotEmpty(p.t, now[s.field], s.role)
		require.NotEqual(p.t, old[s.path][s.field], now[s.field], s.role)
	}
	// What stands there is what the servers take.
	ctx := p.t.Context()
	at := func(path string) string {
		return p.now(path)["password"]
	}
	_, err := p.redis.Do(ctx, "AUTH", "default", at("redis"))
	require.NoError(p.t, err)
	_, err = p.redis.Do(ctx, "AUTH", "default", "redis-of-the-runbook")
	require.ErrorContains(p.t, err, "WRONGPASS")
	conn, err := p.db.Login(ctx, "harmonyflow", at("postgresql"))
	require.NoError(p.t, err)
	require.NoError(p.t, conn.Close(ctx))
	b := &broker{RabbitMQNode: p.queue}
	require.NoError(p.t, b.login(ctx, "harmonyflow", at("rabbitmq")))
}

// rotateOnTime has both keys of tokens come due at one moment, as they do each
// quarter: they rotate together.
func (p *platform) rotateOnTime() {
	p.t.Helper()
	before := map[string]any{"jwt-access": p.role("jwt-access")["version"], "jwt-refresh": p.role("jwt-refresh")["version"]}
	at := time.Now().Add(4 * time.Second).UTC().Format(time.RFC3339)
	for name := range before {
		p.write("harmonyflow/roles/"+name, map[string]any{"next_rotation": at})
	}
	p.idle(before, "jwt-access", "jwt-refresh")
	require.Equal(p.t, p.role("jwt-access")["last_run"], p.role("jwt-refresh")["last_run"])
}

// takeAway types what the example's README says to look at, and then how it says
// to undo everything.
func (p *platform) takeAway() {
	p.t.Helper()
	before := map[string]any{}
	for _, s := range sevenSecrets {
		before[s.path] = p.now(s.path)
	}
	text, err := os.ReadFile(example + "README.md")
	require.NoError(p.t, err)
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	require.Len(p.t, blocks, 3, "to set up, to look, to take away")
	for _, block := range blocks[1:] {
		cmd := exec.CommandContext(p.t.Context(), "sh", "-euc", block[1])
		cmd.Env = p.env
		out, err := cmd.CombinedOutput()
		require.NoError(p.t, err, string(out))
	}
	for _, folder := range []string{"roles", "connections"} {
		s, err := p.client.Logical().ListWithContext(p.t.Context(), "harmonyflow/"+folder)
		require.NoError(p.t, err)
		require.Nil(p.t, s, folder)
	}
	for _, s := range sevenSecrets {
		require.Equal(p.t, before[s.path], p.now(s.path), "secrets stay as they are")
	}
}

// TestSevenSecretsFromNothing runs the example where nothing stands yet.
func TestSevenSecretsFromNothing(t *testing.T) {
	p := newPlatform(t)
	p.write("sys/mounts/transit", map[string]any{"type": "transit"})
	p.write("transit/keys/session-state", nil)
	env := []string{
		"REDIS_USER=fresh", "POSTGRES_USER=fresh", "RABBITMQ_USER=fresh", "TRANSIT_KEY=session-state", "API_KEY=yes",
	}
	// The users have passwords that nobody gave.
	out, err := p.setUp(env...)
	require.Error(t, err)
	require.Contains(t, out, "overwrite_existing=true")
	env = append(env, "OVERWRITE=postgresql redis rabbitmq")
	out, err = p.setUp(env...)
	require.NoError(t, err, out)
	for _, s := range sevenSecrets {
		s.standsWith(t, p.role(s.role))
		now := p.now(s.path)
		require.NotEmpty(t, now[s.field], s.role)
		for _, name := range s.beside {
			require.Contains(t, now, name, s.role)
		}
	}
	require.Len(t, p.now("admin")["token"], 64)
	require.Len(t, p.now("session-state-service")["api-key"], 64)
	require.Equal(t, "2764800", fmt.Sprint(p.role("session-state")["rotation_period"])) // 768h
	p.write("harmonyflow/rotate/transit/session-state", nil)
	s, err := p.client.Logical().ReadWithContext(t.Context(), "transit/keys/session-state")
	require.NoError(t, err)
	require.Equal(t, "2", fmt.Sprint(s.Data["latest_version"]))

	before := p.everything()
	out, err = p.setUp(env...)
	require.NoError(t, err, out)
	require.Equal(t, before, p.everything())
}
