package proof_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestNothingLeaks leads a mount through what can happen to secrets, failures
// included, while everything that anybody can watch is recorded; then it looks
// for every secret that was given or made in all of it.
func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true, LogLevel: "trace", RawStorage: true})
	set := servers.RedisReplicated(t, 2,
		servers.WithConfig("slowlog-log-slower-than 0", "slowlog-max-len 1000000", "acllog-max-len 100000", "loglevel debug"),
		servers.WithReplicationUser("repl", "repl-before-the-first-rotation"))
	m := newMount(t, v, "leaks")
	r := &recording{mount: m, set: set, secrets: map[string]string{}}
	r.know("admin password", servers.RedisAdminPassword)
	r.know("replication password", "repl-before-the-first-rotation")
	defer r.unwatch()
	for _, n := range set.Nodes {
		r.watch(t, n)
	}
	r.play(t)
	r.unwatch()
	r.collect(t)

	bytesSearched, found := r.search()
	figure(t, "%d secrets searched in %d bytes: %d found", len(r.secrets), bytesSearched, len(found))
	require.Empty(t, found)
	// What was looked through is what was meant to be.
	require.Greater(t, len(r.secrets), 25)
	require.Positive(t, r.ended["completed"])
	require.Positive(t, r.ended["rolled_back"])
	require.Positive(t, r.ended["failed"])
	for _, where := range []string{"vault log", "audit log", "MONITOR", "SLOWLOG", "ACL LOG", "answers"} {
		require.Contains(t, r.texts, where)
		require.NotZero(t, r.texts[where].Len(), where)
	}
	require.Contains(t, r.texts["vault log"].String(), "rotation ended", "the plugin's own log is part of it")
	require.Contains(t, r.texts["MONITOR"].String(), `"(redacted)"`, "logins are shown without their passwords")
	require.Contains(t, r.texts["SLOWLOG"].String(), "(redacted)")
	require.NotContains(t, strings.ToUpper(r.texts["MONITOR"].String()), `"ACL" "SETUSER"`, "administration is not shown at all")
}

// recording is everything that can be watched while a mount works.
type recording struct {
	*mount
	set *servers.RedisSet

	watched  []net.Conn
	watchers sync.WaitGroup

	mu      sync.Mutex
	texts   map[string]*bytes.Buffer
	secrets map[string]string // by value: what it is
	ended   map[string]int    // rotations that people asked for, by state
}

func (r *recording) know(what, secret string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.secrets[secret] = what
}

func (r *recording) note(where, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.texts == nil {
		r.texts = map[string]*bytes.Buffer{}
	}
	if r.texts[where] == nil {
		r.texts[where] = &bytes.Buffer{}
	}
	fmt.Fprintln(r.texts[where], text)
}

// watch records MONITOR at a node, until unwatch or its end.
func (r *recording) watch(t *testing.T, n *servers.RedisNode) {
	t.Helper()
	conn, err := net.Dial("tcp", n.Addr)
	require.NoError(t, err)
	_, err = fmt.Fprintf(conn, "AUTH %s %s\r\nMONITOR\r\n", servers.RedisAdmin, servers.RedisAdminPassword)
	require.NoError(t, err)
	r.watched = append(r.watched, conn)
	r.watchers.Go(func() {
		buffer := make([]byte, 64<<10)
		for {
			got, err := conn.Read(buffer)
			if got > 0 {
				r.raw("MONITOR", buffer[:got])
			}
			if err != nil {
				return
			}
		}
	})
}

func (r *recording) unwatch() {
	for _, conn := range r.watched {
		conn.Close()
	}
	r.watchers.Wait()
}

func (r *recording) raw(where string, data []byte) {
	r.note(where, "")
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.texts[where]
	b.Truncate(b.Len() - 1) // no line break inside of what may be cut anywhere
	b.Write(data)
}

// do makes a request, keeps its answer unless it is one that serves secrets, and
// returns its data. Errors are answers too.
func (r *recording) do(t *testing.T, path string, data map[string]any) map[string]any {
	t.Helper()
	s, err := r.write(t.Context(), path, data)
	if err != nil {
		r.note("answers", err.Error())
	}
	return r.answer(s)
}

func (r *recording) answer(s *api.Secret) map[string]any {
	if s == nil {
		return nil
	}
	r.note("answers", answerText(s.Data)+strings.Join(s.Warnings, "\n"))
	return s.Data
}

func answerText(data map[string]any) string {
	text, err := json.Marshal(data)
	if err != nil {
		return fmt.Sprint(data)
	}
	return string(text)
}

// look reads paths that show no secrets.
func (r *recording) look(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		s, err := r.c.Logical().ReadWithContext(t.Context(), r.path+"/"+path)
		if err != nil {
			r.note("answers", err.Error())
		}
		r.answer(s)
	}
}

func (r *recording) settle(t *testing.T) {
	t.Helper()
	require.NoError(t, until(t.Context(), 3*time.Minute, func(ctx context.Context) error {
		data, err := r.read(ctx, "status")
		if err == nil && len(data["running"].([]any)) > 0 {
			err = fmt.Errorf("still running: %v", data["running"])
		}
		return err
	}))
}

// play does what people do, right and wrong.
func (r *recording) play(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	const awkward = `p@ss w/ord+&"quoted"\%41=é`
	wrongs := []string{"a-wrong-admin-password-1", "a-wrong-initial-password-2", "a-third-wrong-password-3"}
	for _, w := range wrongs {
		r.know("wrong password", w)
	}
	connection := map[string]any{
		"type": "redis", "addresses": r.set.Addrs(), "allowed_roles": "*", "allowed_usernames": "*", "username": servers.RedisAdmin, "password": wrongs[0],
	}
	r.do(t, "connections/main", connection) // refused: it is tried
	connection["password"] = servers.RedisAdminPassword
	r.do(t, "connections/main", connection)

	for _, user := range []string{"app", "made"} {
		addUser(t, r.set, user, awkward+user)
		r.know("password before", awkward+user)
	}
	role := map[string]any{"kind": "redis", "connection": "main", "username": "app", "initial_password": wrongs[1], "keep_versions": 50, "grace_period": "1h"}
	r.do(t, "roles/app", role) // refused: it does not work
	role["initial_password"] = awkward + "app"
	r.do(t, "roles/app", role)
	r.do(t, "roles/made", map[string]any{"kind": "redis", "connection": "main", "username": "made", "overwrite_existing": true, "keep_versions": 50, "grace_period": 0})
	r.do(t, "roles/repl", map[string]any{"kind": "redis", "connection": "main", "username": "repl", "initial_password": "repl-before-the-first-rotation", "keep_versions": 50, "grace_period": 0})
	r.know("given key", "sk_live_given_by_hand_0123456789")
	r.do(t, "roles/key", map[string]any{"kind": "api-key", "initial_value": "sk_live_given_by_hand_0123456789", "previous_field": "old_key", "keep_versions": 50, "grace_period": "1h"})
	r.do(t, "roles/swapped", map[string]any{"kind": "api-key", "prefix": "tok_", "encoding": "base64url", "keep_versions": 50})

	// Rotations, and the ways back.
	for range 3 {
		r.do(t, "rotate/redis", nil)
		r.do(t, "rotate/api-key", map[string]any{"reason": "because"})
		r.do(t, "retire/redis/app", nil)
		r.do(t, "retire/api-key/key", nil)
	}
	r.settle(t)
	r.do(t, "rotate/redis/app", nil)
	r.do(t, "rollback/redis/app", nil) // before retire
	r.do(t, "rotate/redis/app", nil)
	r.do(t, "reconcile/redis/app", nil) // during grace
	r.do(t, "retire/redis/app", nil)
	r.do(t, "rollback/redis/app", nil) // after it
	r.do(t, "retire/redis/app", nil)
	r.do(t, "rotate/redis/app", map[string]any{"dry_run": true})
	r.do(t, "reconcile/redis/made", nil)
	r.settle(t)
	r.do(t, "rotate/api-key/key", nil)
	r.do(t, "rollback/api-key/key", nil)

	// Failures: somebody else's password, an admin user that lost a right, a
	// password that the connection no longer has right, a node that is down.
	node := r.set.Nodes[0]
	r.know("somebody else's password", "set-by-somebody-else-at-one-node")
	_, err := node.Do(ctx, "ACL", "SETUSER", "app", ">set-by-somebody-else-at-one-node")
	require.NoError(t, err)
	r.do(t, "rotate/redis/app", nil)
	r.look(t, "verify/redis/app")
	r.do(t, "reconcile/redis/app", nil)
	r.do(t, "connections/main", map[string]any{"password": wrongs[2], "verify_connection": false})
	r.do(t, "rotate/redis/made", nil)
	r.do(t, "connections/main", map[string]any{"password": servers.RedisAdminPassword})
	require.NoError(t, r.set.Nodes[2].Kill())
	r.do(t, "roles/app", map[string]any{"allow_partial": true})
	r.do(t, "rotate/redis/app", nil)
	r.do(t, "retire/redis/app", nil)
	require.NoError(t, r.set.Nodes[2].Start(ctx))
	r.watch(t, r.set.Nodes[2])
	r.do(t, "reconcile/redis/app", nil)
	r.settle(t)

	// Mistakes of callers, with secrets where they do not belong.
	r.do(t, "rotate/redis/app", map[string]any{"password": wrongs[0]})
	r.do(t, "roles/app", map[string]any{"initial_password": wrongs[1]})
	r.do(t, "roles/key", map[string]any{"initial_password": wrongs[1]})

	// Clients log in while MONITOR watches, and with passwords that are wrong.
	data, err := r.read(ctx, "creds/app")
	require.NoError(t, err)
	client := redis.NewClient(&redis.Options{Addr: node.Addr, Username: "app", Password: data["password"].(string), MaxRetries: -1})
	require.NoError(t, client.Set(ctx, "some", "data", 0).Err())
	require.NoError(t, client.Close())
	require.ErrorIs(t, login(ctx, node.Addr, func() (string, string, error) { return "app", wrongs[2], nil }), errRefused)

	names := []string{"app", "made", "repl"}
	for _, name := range names {
		r.look(t, "roles/"+name, "verify/redis/"+name)
	}
	r.look(t, "status", "config", "connections/main", "roles/key", "verify/api-key/key", "rotations")
	list, err := r.read(ctx, "rotations")
	require.NoError(t, err)
	for _, id := range list["keys"].([]any) {
		r.look(t, "rotations/"+id.(string))
	}
	r.ended, err = r.rotations(ctx, "manual")
	require.NoError(t, err)
	r.keep(t, "app", "made", "repl", "key", "swapped")
	_, err = r.c.Logical().DeleteWithContext(ctx, r.path+"/roles/made")
	require.NoError(t, err)
	r.look(t, "roles/made")
}

// keep learns every secret of roles from storage, which nothing has pruned.
func (r *recording) keep(t *testing.T, roles ...string) {
	t.Helper()
	for _, name := range roles {
		role, err := r.stored(t.Context(), name)
		require.NoError(t, err)
		require.Len(t, role.Versions, role.Set.Last, "a version of %s was pruned, and could not be looked for", name)
		for _, v := range role.Versions {
			r.know(fmt.Sprintf("version %d of %s", v.Number, name), v.Material.Secret)
		}
	}
}

// collect adds the logs to what was recorded.
func (r *recording) collect(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	for _, n := range r.set.Nodes {
		for what, command := range map[string][]any{"SLOWLOG": {"SLOWLOG", "GET", "-1"}, "ACL LOG": {"ACL", "LOG", "100000"}} {
			reply, err := n.Do(ctx, command...)
			require.NoError(t, err)
			r.note(what, fmt.Sprint(reply))
		}
		log, err := os.ReadFile(filepath.Join(n.Dir, "output.log"))
		require.NoError(t, err)
		r.raw("redis log", log)
	}
	for what, path := range map[string]string{"vault log": r.vault.LogPath, "audit log": r.vault.AuditPath} {
		log, err := os.ReadFile(path)
		require.NoError(t, err)
		r.raw(what, log)
	}
}

// search returns how much was looked through, and which secret is where. It
// names secrets by what they are.
func (r *recording) search() (size int, found []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for where, text := range r.texts {
		size += text.Len()
		for secret, what := range r.secrets {
			for form, shape := range leaks.Shapes(secret) {
				if bytes.Contains(text.Bytes(), []byte(shape)) {
					found = append(found, fmt.Sprintf("%s holds %s (%s)", where, what, form))
				}
			}
		}
	}
	return size, found
}
