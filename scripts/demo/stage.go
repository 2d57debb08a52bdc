package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/hashicorp/vault/api"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// stage is the servers of one performance, and the shell that a user types in.
type stage struct {
	*screen
	dir     string // where the user types, with the files he has there
	vault   *servers.Vault
	redis   *cluster // nil where Redis is not installed
	target  target
	clients *api.Client // may read creds/app and nothing else

	vaultVersion string
}

const (
	role      = "app"
	adminFile = "admin.password"
	appFile   = "app.password"
	keyFile   = "app.key"
)

// setUp starts everything at once. What it started is stopped by close, also
// after an error.
func setUp(ctx context.Context, s *screen) (*stage, error) {
	dir, err := os.MkdirTemp("", "harmonyflow-demo-")
	if err != nil {
		return nil, err
	}
	st := &stage{screen: s, dir: dir}
	for _, name := range []string{"vault", "redis", "here"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			return nil, errors.Join(err, st.close())
		}
	}
	password := rand.Text()
	for name, text := range map[string]string{adminFile: servers.RedisAdminPassword, appFile: password, keyFile: rand.Text()} {
		if err := os.WriteFile(st.here(name), []byte(text), 0o600); err != nil {
			return nil, errors.Join(err, st.close())
		}
	}
	var g errgroup.Group // without a context: each has to be there to be stopped
	g.Go(func() (err error) {
		st.vault, err = servers.StartVault(servers.VaultOptions{Dir: filepath.Join(dir, "vault")})
		return err
	})
	if haveRedis() {
		g.Go(func() (err error) {
			st.redis, err = startCluster(ctx, filepath.Join(dir, "redis"), password)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, errors.Join(err, st.close())
	}
	if err := st.admit(ctx); err != nil {
		return nil, errors.Join(err, st.close())
	}
	return st, nil
}

// admit gives the clients a token of their own, and finds what they log in to.
func (st *stage) admit(ctx context.Context) error {
	token, err := st.vault.TokenFor(ctx, "clients", `path "harmonyflow/creds/`+role+`" { capabilities = ["read"] }`)
	if err != nil {
		return err
	}
	st.clients = st.vault.Client()
	st.clients.SetToken(token)
	health, err := st.clients.Sys().HealthWithContext(ctx)
	if err != nil {
		return err
	}
	st.vaultVersion = health.Version
	st.target = st.redis
	if st.redis == nil {
		st.target = &service{read: st.creds}
	}
	return nil
}

func (st *stage) here(name string) string { return filepath.Join(st.dir, "here", name) }

// close stops what was started and removes what was written.
func (st *stage) close() error {
	var err error
	if st.vault != nil {
		err = st.vault.Stop()
	}
	if st.redis != nil {
		err = errors.Join(err, st.redis.stop())
	}
	if err = errors.Join(err, os.RemoveAll(st.dir)); err != nil {
		return fmt.Errorf("%w: %w", errLeft, err)
	}
	return nil
}

// errLeft is said when stopping did not work, so that nobody is told that
// nothing is left running.
var errLeft = errors.New("something may be left running")

// kind is the kind of the role that is rotated.
func (st *stage) kind() string {
	if st.redis == nil {
		return "api-key"
	}
	return "redis"
}

// creds reads what is served, as a client.
func (st *stage) creds(ctx context.Context) (credential, error) {
	secret, err := st.clients.Logical().ReadWithContext(ctx, "harmonyflow/creds/"+role)
	if err != nil {
		return credential{}, err
	}
	if secret == nil {
		return credential{}, fmt.Errorf("creds/%s is not there", role)
	}
	text := func(name string) string { t, _ := secret.Data[name].(string); return t }
	c := credential{
		Username: text("username"),
		Secret:   text("password") + text("value"),
		Previous: text("previous_password") + text("previous_value"),
	}
	_, err = fmt.Sscan(fmt.Sprint(secret.Data["version"]), &c.Version)
	return c, err
}

// running is a command that has not ended yet.
type running struct {
	command *exec.Cmd
	out     *bytes.Buffer
}

// begin shows and starts a vault command.
func (st *stage) begin(ctx context.Context, args ...string) (*running, error) {
	st.command(append([]string{"vault"}, args...)...)
	r := &running{command: exec.CommandContext(ctx, st.vault.Binary(), args...), out: &bytes.Buffer{}}
	r.command.Dir, r.command.Env = st.here(""), append(st.vault.Env(), "VAULT_CLI_NO_COLOR=1")
	r.command.Stdout, r.command.Stderr = r.out, r.out
	return r, r.command.Start()
}

// end waits for the command and returns what it printed.
func (r *running) end() (string, error) {
	err := r.command.Wait()
	if err != nil {
		err = fmt.Errorf("vault %s: %w\n%s", strings.Join(r.command.Args[1:], " "), err, r.out)
	}
	return r.out.String(), err
}

// run shows and runs a vault command and shows those lines of its answer that
// begin with keys.
func (st *stage) run(ctx context.Context, keys []string, args ...string) (string, error) {
	r, err := st.begin(ctx, args...)
	if err != nil {
		return "", err
	}
	out, err := r.end()
	if err == nil && len(keys) > 0 {
		st.output(hide(pick(out, keys...)))
	}
	return out, err
}

// introduce tells the engine about the target and the role.
func (st *stage) introduce(ctx context.Context) error {
	if st.redis == nil {
		_, err := st.run(ctx, []string{"api-key/" + role, "summary"}, "write", "harmonyflow/roles/"+role,
			"kind=api-key", "previous_field=API_KEY_PREVIOUS", "initial_value=@"+keyFile)
		return err
	}
	_, err := st.run(ctx, []string{"summary"}, "write", "harmonyflow/connections/cache",
		"type=redis", "addresses="+st.redis.proxy.Addr(), "username="+servers.RedisAdmin, "password=@"+adminFile, "allowed_roles="+role)
	if err != nil {
		return err
	}
	_, err = st.run(ctx, []string{"redis/" + role}, "write", "harmonyflow/roles/"+role,
		"kind=redis", "connection=cache", "username=app", "initial_password=@"+appFile)
	return err
}
