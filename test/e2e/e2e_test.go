// Package e2e runs the scripts in testdata: what a user types, against a real
// Vault with the plugin in it and real targets. README.md lists the commands.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestScripts runs every script with a mount of its own in one Vault, so that
// they also disturb each other as the tenants of one Vault do.
func TestScripts(t *testing.T) {
	shared := servers.NewVault(t, servers.VaultOptions{Race: raceEnabled})
	// A mount that stays: Vault ends the plugin's process with the last mount, and
	// a script that mounts at that moment would meet its end.
	_, err := shared.Client().Logical().Read(servers.DefaultMount + "/config")
	require.NoError(t, err)
	followerFolder = t.TempDir()
	run := &run{shared: shared}
	t.Cleanup(func() {
		if err := run.checkLogs(shared); err != nil {
			t.Error(err)
		}
	})

	testscript.Run(t, testscript.Params{
		Dir:                "testdata",
		RequireUniqueNames: true,
		Setup:              run.setUp,
		Cmds:               commands(),
		Condition:          condition,
	})
}

// fullVault names a Vault that has every secrets engine, which only `make e2e`
// builds.
const fullVault = "HARMONYFLOW_VAULT_FULL"

// condition is what a script may ask for: [full].
func condition(name string) (bool, error) {
	if name != "full" {
		return false, fmt.Errorf("unknown condition %q", name)
	}
	return os.Getenv(fullVault) != "", nil
}

// run is what the scripts of one test run have in common.
type run struct {
	shared *servers.Vault

	mu      sync.Mutex
	secrets []string
}

type scriptKey struct{}

// script is what belongs to one running script.
type script struct {
	run       *run
	vault     *servers.Vault // the shared one, or the script's own after own-vault
	mount     string
	redis     map[string]*servers.RedisSet
	brokers   map[string]*broker
	databases map[string]*database
	dir       string
	variables []string // of the environment that vault is run in
}

// setUp gives a script its mount and the environment of the vault CLI.
func (r *run) setUp(env *testscript.Env) error {
	s := &script{
		run: r, vault: r.shared, redis: map[string]*servers.RedisSet{}, brokers: map[string]*broker{}, databases: map[string]*database{}, dir: env.WorkDir,
		mount: "harmonyflow-" + strings.TrimPrefix(filepath.Base(env.WorkDir), "script-"),
	}
	env.Values[scriptKey{}] = s
	if err := r.shared.Mount(context.Background(), s.mount); err != nil {
		return err
	}
	env.Defer(func() {
		if err := s.stop(); err != nil {
			env.T().Fatal(err)
		}
	})
	env.Setenv("MOUNT", s.mount)
	env.Setenv("REDIS_ADMIN", servers.RedisAdmin)
	env.Setenv("REDIS_ADMIN_PASSWORD", servers.RedisAdminPassword)
	env.Setenv("RABBITMQ_ADMIN", servers.RabbitMQAdmin)
	env.Setenv("RABBITMQ_ADMIN_PASSWORD", servers.RabbitMQAdminPassword)
	env.Setenv("VAULT_CLI_NO_COLOR", "1")
	s.useVault(env.Setenv)
	for _, variable := range append(env.Vars, "VAULT_FORMAT=", "VAULT_WRAP_TTL=") {
		name, _, _ := strings.Cut(variable, "=")
		s.variables = append(s.variables, name)
	}
	return nil
}

// useVault points the script's environment at its Vault.
func (s *script) useVault(setenv func(key, value string)) {
	for _, variable := range s.vault.Env() {
		key, value, _ := strings.Cut(variable, "=")
		if key == "PATH" || strings.HasPrefix(key, "VAULT_") {
			setenv(key, value)
		}
	}
}

func (s *script) ownsVault() bool { return s.vault != s.run.shared }

// stop ends what the script started, and looks through the logs of its own
// Vault.
func (s *script) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	err := s.run.shared.Unmount(ctx, s.mount)
	if s.ownsVault() {
		err = errors.Join(err, s.run.checkLogs(s.vault), s.vault.Stop())
	}
	for _, set := range s.redis {
		err = errors.Join(err, set.Kill())
	}
	for _, b := range s.brokers {
		err = errors.Join(err, b.stop())
	}
	for _, d := range s.databases {
		err = errors.Join(err, d.stop())
	}
	return err
}

// remember adds values that no log may hold.
func (r *run) remember(secrets ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.secrets = append(r.secrets, secrets...)
}

// checkLogs reports when v, or a plugin of it, crashed, raced, or wrote down a
// secret.
func (r *run) checkLogs(v *servers.Vault) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var problems []error
	for _, path := range []string{v.LogPath, v.AuditPath} {
		content, err := os.ReadFile(path)
		problems = append(problems, err)
		log := string(content)
		for _, sign := range []string{"DATA RACE", "panic:", "fatal error:"} {
			if i := strings.Index(log, sign); i >= 0 {
				problems = append(problems, fmt.Errorf("%s: %s", path, log[i:min(len(log), i+2000)]))
			}
		}
		for _, secret := range r.secrets {
			if i := strings.Index(log, secret); i >= 0 {
				line := log[strings.LastIndexByte(log[:i], '\n')+1 : i]
				problems = append(problems, fmt.Errorf("%s holds a secret after: %s", path, line))
			}
		}
	}
	return errors.Join(problems...)
}
