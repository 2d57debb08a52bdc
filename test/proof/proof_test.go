// Package proof_test measures what the engine promises, on a real Vault and
// real Redis, under load and with processes killed in the middle. Each test
// ends with a line that holds the figure:
//
//	100 rotations, 12040 logins, 0 refused
//	plugin killed 50 times, 612 rotations, 0 lost
//	vault killed 50 times, 540 rotations, 0 lost
//	230 secrets searched in 1843200 bytes: 0 found
//
// The tests share servers. Those that measure time run one after another.
package proof_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

var (
	seed  = flag.Int64("proof.seed", time.Now().UnixNano(), "where the random moments of kills come from")
	kills = flag.Int("proof.kills", 50, "how often the plugin, and Vault, are killed")
)

// shared is what the tests have in common. A server is started by the first
// test that needs it, and stopped when the last has ended.
var shared struct {
	dir     string
	vault   func() (*servers.Vault, error)
	cluster func() (*servers.RedisSet, error)
	mu      sync.Mutex
	stops   []func() error
}

func TestMain(m *testing.M) {
	if description := os.Getenv(partyVariable); description != "" {
		os.Exit(runParty(description))
	}
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	flag.Parse()
	// Tests that call Parallel mostly wait, also where there are few cores.
	if err := flag.Set("test.parallel", "5"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "proof-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	shared.dir = dir
	shared.vault = sync.OnceValues(func() (*servers.Vault, error) {
		return startVault(servers.VaultOptions{NoMount: true, RawStorage: true, Dir: filepath.Join(dir, "vault")})
	})
	shared.cluster = sync.OnceValues(func() (*servers.RedisSet, error) {
		set, err := servers.StartCluster(context.Background(), filepath.Join(dir, "cluster"))
		if err == nil {
			stopAtEnd(set.Kill)
		}
		return set, err
	})
	defer func() {
		var err error
		for _, stop := range shared.stops {
			err = errors.Join(err, stop())
		}
		if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}()
	return m.Run()
}

func stopAtEnd(stop func() error) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	shared.stops = append(shared.stops, stop)
}

func startVault(options servers.VaultOptions) (*servers.Vault, error) {
	if err := os.MkdirAll(options.Dir, 0o700); err != nil {
		return nil, err
	}
	v, err := servers.StartVault(options)
	if err == nil {
		stopAtEnd(v.Stop)
	}
	return v, err
}

func sharedVault(t *testing.T) *servers.Vault {
	t.Helper()
	v, err := shared.vault()
	require.NoError(t, err)
	return v
}

func sharedCluster(t *testing.T) *servers.RedisSet {
	t.Helper()
	set, err := shared.cluster()
	require.NoError(t, err)
	return set
}

func figure(t *testing.T, format string, args ...any) {
	t.Helper()
	report.Figure(t, "PROOF_FILE", format, args...)
}

// mount is a mount of the engine, as root sees it.
type mount struct {
	vault *servers.Vault
	path  string
	uuid  string // of its part of Vault's storage
	c     *api.Client
}

func newMount(t *testing.T, v *servers.Vault, path string) *mount {
	t.Helper()
	ctx := t.Context()
	require.NoError(t, v.Mount(ctx, path))
	t.Cleanup(func() { _ = v.Unmount(context.WithoutCancel(ctx), path) }) // or the test could not be repeated
	m := &mount{vault: v, path: path, c: v.Client()}
	mounts, err := m.c.Sys().ListMountsWithContext(ctx)
	require.NoError(t, err)
	m.uuid = mounts[path+"/"].UUID
	return m
}

func (m *mount) write(ctx context.Context, path string, data map[string]any) (*api.Secret, error) {
	return m.c.Logical().WriteWithContext(ctx, m.path+"/"+path, data)
}

func (m *mount) read(ctx context.Context, path string) (map[string]any, error) {
	return dataOf(m.c.Logical().ReadWithContext(ctx, m.path+"/"+path))
}

func dataOf(s *api.Secret, err error) (map[string]any, error) {
	switch {
	case err != nil:
		return nil, err
	case s == nil:
		return nil, errors.New("not found")
	}
	return s.Data, nil
}

func (m *mount) mustWrite(t *testing.T, path string, data map[string]any) map[string]any {
	t.Helper()
	s, err := m.write(t.Context(), path, data)
	require.NoError(t, err)
	if s == nil {
		return nil
	}
	return s.Data
}

// connect writes a connection that every role may use.
func (m *mount) connect(t *testing.T, name string, set *servers.RedisSet) {
	t.Helper()
	m.mustWrite(t, "connections/"+name, map[string]any{
		"type": "redis", "addresses": set.Addrs(), "allowed_roles": "*",
		"username": servers.RedisAdmin, "password": servers.RedisAdminPassword,
	})
}

// adopt makes a user on every node, and a role that owns it.
func (m *mount) adopt(t *testing.T, connection string, set *servers.RedisSet, role string, more map[string]any) {
	t.Helper()
	password := role + "-before"
	addUser(t, set, role, password)
	data := map[string]any{"kind": "redis", "connection": connection, "username": role, "initial_password": password}
	for k, v := range more {
		data[k] = v
	}
	m.mustWrite(t, "roles/"+role, data)
}

func addUser(t *testing.T, set *servers.RedisSet, user, password string) {
	t.Helper()
	for _, n := range set.Nodes {
		_, err := n.Do(t.Context(), "ACL", "SETUSER", user, "on", ">"+password, "~*", "+@all")
		require.NoError(t, err)
	}
}

// stored reads a role as it is in Vault's storage.
func (m *mount) stored(ctx context.Context, role string) (*rotation.Role, error) {
	data, err := dataOf(m.c.Logical().ReadWithContext(ctx, "sys/raw/logical/"+m.uuid+"/role/"+role))
	if err != nil {
		return nil, err
	}
	r := &rotation.Role{}
	return r, json.Unmarshal([]byte(data["value"].(string)), r)
}

// rotations counts the mount's rotations by state.
func (m *mount) rotations(ctx context.Context, trigger string) (map[string]int, error) {
	counts := map[string]int{}
	after := ""
	for {
		s, err := m.c.Logical().ReadWithDataWithContext(ctx, m.path+"/rotations", map[string][]string{"after": {after}, "limit": {"200"}})
		data, err := dataOf(s, err)
		if err != nil {
			return nil, err
		}
		keys, _ := data["keys"].([]any)
		for _, key := range keys {
			info := data["key_info"].(map[string]any)[key.(string)].(map[string]any)
			if info["trigger"] == trigger {
				counts[info["state"].(string)]++
			}
			after = key.(string)
		}
		if len(keys) < 200 {
			return counts, nil
		}
	}
}

// until repeats try, and returns its last error when it does not succeed in
// time.
func until(ctx context.Context, within time.Duration, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var said error // before time was up: a call that it has cut short says nothing
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if said == nil || ctx.Err() == nil {
			said = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", within, said)
		case <-tick.C:
		}
	}
}

// wait is a pause that ctx can end.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// errRefused is the server's answer to a password that it does not accept.
var errRefused = errors.New("refused")

// login opens a connection of its own and logs in, with nothing in between that
// could hide a refusal. ready is called when only the password is missing.
func login(ctx context.Context, addr string, ready func() (user, password string, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	user, password, err := ready()
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "*3\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(user), user, len(password), password); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	switch {
	case err != nil:
		return err
	case !strings.HasPrefix(answer, "+OK"):
		return fmt.Errorf("%w by %s: %s", errRefused, addr, strings.TrimSpace(answer))
	}
	return nil
}

func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}
