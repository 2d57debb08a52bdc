package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// tofuProgram names the build of OpenTofu, which only `make e2e` makes. Beside it is
// a mirror with the provider of Vault.
const tofuProgram = "HARMONYFLOW_TOFU"

const declarations = example + "terraform/"

// tofu is a folder with the example's configuration, and a terminal with tofu in it.
type tofu struct {
	*platform
	folder string
	env    []string
	said   strings.Builder // all that was ever printed
}

// TestTofu declares the secrets of the runbook with OpenTofu: over what setup.sh has
// made, and over secrets that nothing manages yet. Settings that are changed by hand
// are shown and put right, and no secret is in a state or a plan.
func TestTofu(t *testing.T) {
	if os.Getenv(tofuProgram) == "" {
		t.Skip(tofuProgram + " is not set; make e2e builds OpenTofu and sets it")
	}
	began := time.Now()
	p := newPlatform(t)
	f := newTofu(p)
	old := map[string]map[string]any{
		"session-state-service": {
			"jwt-secret": "jwt-access-of-the-runbook-1234567", "jwt-refresh-secret": "jwt-refresh-of-the-runbook-12345",
			"encryption-key": "ZW5jcnlwdGlvbi1rZXktb2YtdGhlLXJ1bmJvb2stLS0=", "log-level": "info",
		},
		"postgresql": {"password": "postgresql-of-the-runbook", "host": "postgresql-primary.postgresql"},
		"redis":      {"password": "redis-of-the-runbook"},
		"rabbitmq":   {"password": "rabbitmq-of-the-runbook", "vhost": "/"},
		"admin":      {"token": "admin-token-of-the-runbook"},
	}
	for path, body := range old {
		_, err := p.client.KVv2("secret").Put(t.Context(), "harmonyflow/"+path, body)
		require.NoError(t, err)
	}
	out, err := p.setUp()
	require.NoError(t, err, out)
	f.run("fmt", "-check")
	f.run("init")

	// What setup.sh has made is taken over: no secret changes, and no password is needed.
	before := f.stands()
	f.run("apply", "-auto-approve")
	require.Equal(t, before, f.stands())
	f.planned(0)
	f.completeAndSeen()
	f.whileRotating()
	f.deletedByHand()

	// Taken away, everything goes on working.
	f.run("destroy", "-auto-approve")
	require.Empty(t, f.list("roles"))
	require.Empty(t, f.list("connections"))
	f.works(old)

	// From there the secrets are adopted again.
	require.ErrorContains(t, f.try("apply", "-auto-approve"), "set REDIS_ADMIN_PASSWORD")
	f.env = append(f.env, passwords(p.env)...)
	f.run("apply", "-auto-approve")
	f.planned(0)
	f.works(old)
	p.idle(map[string]any{}, "jwt-access", "jwt-refresh")
	for _, s := range sevenSecrets {
		s.standsWith(t, p.role(s.role))
	}

	// What is rotated beside them.
	p.write("sys/mounts/transit", map[string]any{"type": "transit"})
	p.write("transit/keys/session-state", nil)
	f.run("apply", "-auto-approve", "-var=api_key=true", "-var=transit_key=session-state")
	f.planned(0, "-var=api_key=true", "-var=transit_key=session-state")
	require.Len(t, p.now("session-state-service")["api-key"], 64)
	p.write("harmonyflow/rotate/transit/session-state", nil)
	f.planned(0, "-var=api_key=true", "-var=transit_key=session-state")

	f.holdsNoSecret(old)
	report.Figure(t, "SECRETS_FILE", "declared with OpenTofu: %d roles, %d connections, in %.0f s", len(f.list("roles")), len(f.list("connections")), time.Since(began).Seconds())
}

func newTofu(p *platform) *tofu {
	p.t.Helper()
	program := os.Getenv(tofuProgram)
	f := &tofu{platform: p, folder: filepath.Join(p.dir, "terraform")}
	require.NoError(p.t, os.CopyFS(f.folder, os.DirFS(declarations)))
	config := filepath.Join(p.dir, "tofu.rc")
	mirror := fmt.Sprintf("provider_installation {\n  filesystem_mirror {\n    path = %q\n  }\n}\n", filepath.Join(filepath.Dir(program), "providers"))
	require.NoError(p.t, os.WriteFile(config, []byte(mirror), 0o600))
	variables, err := json.Marshal(map[string]any{
		"engine_vault_addr": p.vault.Address, "postgres_url": "postgresql://{{username}}:{{password}}@" + p.db.Addr + "/harmonyflow?sslmode=disable",
		"redis_addresses": []string{p.redis.Addr}, "redis_admin": servers.RedisAdmin,
		"rabbitmq_urls": []string{"http://" + p.queue.ManagementAddr}, "rabbitmq_amqp_urls": []string{"amqp://" + p.queue.Addr},
		"rabbitmq_admin": servers.RabbitMQAdmin, "propagation_delay": 1, "jwt_access_ttl": 2, "jwt_refresh_ttl": 8,
	})
	require.NoError(p.t, err)
	require.NoError(p.t, os.WriteFile(filepath.Join(f.folder, "terraform.tfvars.json"), variables, 0o600))
	secret := passwords(p.env)
	for _, variable := range p.env {
		if !slices.Contains(secret, variable) {
			f.env = append(f.env, variable)
		}
	}
	f.env = append(f.env, "TF_CLI_CONFIG_FILE="+config, "TF_IN_AUTOMATION=1", "TF_INPUT=0", "CHECKPOINT_DISABLE=1")
	return f
}

// passwords are those variables that hold one.
func passwords(env []string) (out []string) {
	for _, variable := range env {
		if name, _, _ := strings.Cut(variable, "="); strings.HasSuffix(name, "_ADMIN_PASSWORD") {
			out = append(out, variable)
		}
	}
	return out
}

// try runs tofu; what it says is in the error.
func (f *tofu) try(args ...string) error {
	f.t.Helper()
	args = append(slices.Clone(args[:1]), append([]string{"-no-color"}, args[1:]...)...)
	cmd := exec.CommandContext(f.t.Context(), os.Getenv(tofuProgram), args...)
	cmd.Dir, cmd.Env = f.folder, f.env
	out, err := cmd.CombinedOutput()
	f.said.Write(out)
	if err != nil {
		return fmt.Errorf("tofu %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (f *tofu) run(args ...string) {
	f.t.Helper()
	require.NoError(f.t, f.try(args...))
}

// planned asks for a plan, and returns what it would change: data_json by resource,
// before and after. The exit code is 0 where that is nothing, and 2 where it is something.
func (f *tofu) planned(code int, variables ...string) map[string][2]map[string]any {
	f.t.Helper()
	err := f.try(append([]string{"plan", "-detailed-exitcode", "-out=plan"}, variables...)...)
	var exit *exec.ExitError
	switch {
	case code == 0:
		require.NoError(f.t, err)
	case errors.As(err, &exit):
		require.Equal(f.t, code, exit.ExitCode(), err.Error())
	default:
		f.t.Fatalf("nothing is planned")
	}
	cmd := exec.CommandContext(f.t.Context(), os.Getenv(tofuProgram), "show", "-json", "plan")
	cmd.Dir, cmd.Env = f.folder, f.env
	text, err := cmd.Output()
	require.NoError(f.t, err)
	f.said.Write(text)
	var plan struct {
		Changes []struct {
			Address string
			Change  struct {
				Actions       []string
				Before, After struct {
					Data string `json:"data_json"`
				}
			}
		} `json:"resource_changes"`
	}
	require.NoError(f.t, json.Unmarshal(text, &plan))
	changes := map[string][2]map[string]any{}
	for _, c := range plan.Changes {
		if slices.Equal(c.Change.Actions, []string{"no-op"}) {
			continue
		}
		var both [2]map[string]any
		for i, data := range []string{c.Change.Before.Data, c.Change.After.Data} {
			if data != "" {
				require.NoError(f.t, json.Unmarshal([]byte(data), &both[i]))
			}
		}
		changes[c.Address] = both
	}
	return changes
}

func (f *tofu) list(folder string) (names []string) {
	f.t.Helper()
	s, err := f.client.Logical().ListWithContext(f.t.Context(), "harmonyflow/"+folder)
	require.NoError(f.t, err)
	if s != nil {
		for _, name := range s.Data["keys"].([]any) {
			names = append(names, name.(string))
		}
	}
	return names
}

// stands is what services would notice a change of.
func (f *tofu) stands() map[string]any {
	f.t.Helper()
	all := map[string]any{}
	for _, s := range sevenSecrets {
		r := f.role(s.role)
		all[s.role] = []any{fmt.Sprint(r["version"]), r["state"], r["rotation_schedule"]}
		all[s.path] = f.version("harmonyflow/" + s.path)
	}
	return all
}

// works logs in with what stands at the paths.
func (f *tofu) works(old map[string]map[string]any) {
	f.t.Helper()
	ctx := f.t.Context()
	for path, body := range old {
		now := f.now(path)
		for name, value := range body {
			require.NotEmpty(f.t, now[name])
			if path != "admin" { // which was rotated
				require.Equal(f.t, value, now[name], "%s of %s", name, path)
			}
		}
	}
	_, err := f.redis.Do(ctx, "AUTH", "default", f.now("redis")["password"])
	require.NoError(f.t, err)
	conn, err := f.db.Login(ctx, "harmonyflow", f.now("postgresql")["password"])
	require.NoError(f.t, err)
	require.NoError(f.t, conn.Close(ctx))
	b := &broker{RabbitMQNode: f.queue}
	require.NoError(f.t, b.login(ctx, "harmonyflow", f.now("rabbitmq")["password"]))
}

// declared is what the configuration says of a role.
func (f *tofu) declared(role string) map[string]any {
	f.t.Helper()
	text, err := os.ReadFile(filepath.Join(f.folder, "terraform.tfstate"))
	require.NoError(f.t, err)
	var state struct {
		Resources []struct {
			Type, Name string
			Instances  []struct {
				Key        string `json:"index_key"`
				Attributes struct {
					Data string `json:"data_json"`
				}
			}
		}
	}
	require.NoError(f.t, json.Unmarshal(text, &state))
	for _, r := range state.Resources {
		for _, i := range r.Instances {
			if r.Type == "vault_generic_endpoint" && r.Name == "role" && i.Key == role {
				fields := map[string]any{}
				require.NoError(f.t, json.Unmarshal([]byte(i.Attributes.Data), &fields))
				return fields
			}
		}
	}
	f.t.Fatalf("role %s is not in the state", role)
	return nil
}

// writable are the fields that a write of a role takes.
func (f *tofu) writable() map[string]any {
	f.t.Helper()
	help, err := f.client.HelpWithContext(f.t.Context(), "harmonyflow/roles/redis")
	require.NoError(f.t, err)
	at := func(v any, names ...string) map[string]any {
		for _, name := range names {
			v = v.(map[string]any)[name]
		}
		m, ok := v.(map[string]any)
		require.True(f.t, ok, names)
		return m
	}
	for _, path := range at(help.OpenAPI, "paths") {
		fields := at(path, "post", "requestBody", "content", "application/json", "schema", "properties")
		require.Contains(f.t, fields, "initial_password")
		return fields
	}
	f.t.Fatal("no path is described")
	return nil
}

// otherwise are values that nobody has declared.
var otherwise = map[string]any{
	"description": "changed by hand", "on_failure": "hold", "missed_policy": "", "rotation_timezone": "Europe/Berlin", "prefix": "by-hand-",
	"encoding": "base64url", "rotation_schedule": "0 3 1 * *", "secret_hosts": []string{"by-hand.example.com"}, "apart_from": "somebody",
}

// completeAndSeen changes by hand whatever may be changed of any role, is shown all of
// it, and has it put right.
func (f *tofu) completeAndSeen() {
	f.t.Helper()
	ctx := f.t.Context()
	writable := f.writable()
	want := map[string][]string{}
	for _, s := range sevenSecrets {
		path, declared := "harmonyflow/roles/"+s.role, f.declared(s.role)
		for field, value := range f.role(s.role) {
			_, writes := writable[field]
			if _, ok := declared[field]; ok || !writes || field == "next_rotation" {
				continue
			}
			// What could be changed is declared, so that it would be seen.
			_, err := f.client.Logical().WriteWithContext(ctx, path, map[string]any{field: value})
			require.ErrorContains(f.t, err, "not for kind", "%s of role %s is declared nowhere", field, s.role)
		}
		change := map[string]any{"apart_by": 3600}
		for field, value := range declared {
			switch value := value.(type) {
			case bool:
				change[field] = !value
			case float64:
				change[field] = value + 2
			default:
				change[field] = otherwise[field]
			}
		}
		change["missed_policy"] = map[any]string{"next": "at_once", "at_once": "next"}[declared["missed_policy"]]
		for field, value := range change {
			if value == nil || field == "apart_from" || field == "apart_by" {
				continue
			}
			if _, err := f.client.Logical().WriteWithContext(ctx, path, map[string]any{field: value}); err == nil {
				want["vault_generic_endpoint.role[\""+s.role+"\"]"] = append(want["vault_generic_endpoint.role[\""+s.role+"\"]"], field)
			}
		}
		_, err := f.client.Logical().WriteWithContext(ctx, path, map[string]any{"apart_from": "somebody", "apart_by": 3600})
		require.NoError(f.t, err)
		want["vault_generic_endpoint.role[\""+s.role+"\"]"] = append(want["vault_generic_endpoint.role[\""+s.role+"\"]"], "apart_from", "apart_by")
	}
	got := map[string][]string{}
	for address, both := range f.planned(2) {
		for field := range both[1] {
			if fmt.Sprint(both[0][field]) != fmt.Sprint(both[1][field]) {
				got[address] = append(got[address], field)
			}
		}
	}
	changed := 0
	for _, fields := range []map[string][]string{want, got} {
		for address := range fields {
			slices.Sort(fields[address])
			changed += len(fields[address])
		}
	}
	require.Equal(f.t, want, got)
	require.Greater(f.t, changed, 2*60, "of seven roles")
	f.run("apply", "-auto-approve")
	f.planned(0)
}

// whileRotating puts a setting right while an earlier token is still accepted.
func (f *tofu) whileRotating() {
	f.t.Helper()
	before := map[string]any{"admin-token": f.role("admin-token")["version"]}
	f.write("harmonyflow/rotate/api-key/admin-token", nil)
	require.Equal(f.t, "grace", f.role("admin-token")["state"])
	f.planned(0) // a rotation is no difference
	f.write("harmonyflow/roles/admin-token", map[string]any{"description": "changed by hand"})
	f.planned(2)
	f.run("apply", "-auto-approve")
	f.planned(0)
	require.Empty(f.t, f.role("admin-token")["description"])
	require.Equal(f.t, "grace", f.role("admin-token")["state"])
	f.write("harmonyflow/retire/api-key/admin-token", nil)
	f.idle(before, "admin-token")
}

// deletedByHand: a role that is gone is missed, and goes on with what it had.
func (f *tofu) deletedByHand() {
	f.t.Helper()
	before, password := f.role("redis")["version"], f.now("redis")["password"]
	_, err := f.client.Logical().DeleteWithContext(f.t.Context(), "harmonyflow/roles/redis")
	require.NoError(f.t, err)
	changes := f.planned(2)
	require.Equal(f.t, []string{`vault_generic_endpoint.role["redis"]`}, slices.Collect(maps.Keys(changes)))
	f.run("apply", "-auto-approve")
	f.planned(0)
	f.idle(map[string]any{"redis": before}, "redis")
	require.Equal(f.t, password, f.now("redis")["password"])
	_, err = f.redis.Do(f.t.Context(), "AUTH", "default", password)
	require.NoError(f.t, err)

	// The same by restore, before it is missed.
	_, err = f.client.Logical().DeleteWithContext(f.t.Context(), "harmonyflow/roles/redis")
	require.NoError(f.t, err)
	f.write("harmonyflow/restore/redis", nil)
	f.planned(0)
	require.Equal(f.t, password, f.now("redis")["password"])
}

// holdsNoSecret looks through everything that tofu has written and said.
func (f *tofu) holdsNoSecret(old map[string]map[string]any) {
	f.t.Helper()
	secrets := []string{"hvs.", "db-admin-password", servers.RedisAdminPassword, servers.RabbitMQAdminPassword}
	for _, s := range sevenSecrets {
		secrets = append(secrets, old[s.path][s.field].(string))
		for _, name := range append([]string{s.field}, s.beside...) {
			if value := f.now(s.path)[name]; value != "" {
				secrets = append(secrets, value)
			}
		}
	}
	found := map[string]string{"what it said": f.said.String(), "command lines of vault": f.lines()}
	err := filepath.WalkDir(f.folder, func(file string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.Contains(file, string(filepath.Separator)+"providers"+string(filepath.Separator)) {
			return err
		}
		text, err := os.ReadFile(file)
		found[file] = string(text)
		return err
	})
	require.NoError(f.t, err)
	require.Contains(f.t, found, filepath.Join(f.folder, "terraform.tfstate"))
	require.Contains(f.t, found, filepath.Join(f.folder, "terraform.tfstate.backup"))
	for where, text := range found {
		for _, secret := range secrets {
			require.NotContains(f.t, text, secret, where)
		}
	}
}

func (f *tofu) lines() string {
	f.t.Helper()
	text, err := os.ReadFile(f.commandLines())
	require.NoError(f.t, err)
	return string(text)
}
