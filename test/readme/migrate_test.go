package readme

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const migrateGuide = "docs/howto/migrate.md"

// What the secret of the guide is read at: today, and after its step 6.
const (
	oldPath = "secret/data/harmonyflow/redis"
	newPath = "harmonyflow/data/harmonyflow/redis"
)

// chapter is a numbered heading of a guide: what it has people type, by what comes
// before the commands.
type chapter struct {
	title string
	on    []step // the way on
	aside []step // of a paragraph that begins with **If
	back  []step
}

var (
	numbered  = regexp.MustCompile(`(?m)^## \d+\. (.*)$`)
	paragraph = regexp.MustCompile(`(?m)^\*\*(If|Back)\b`)
)

// chapters reads a guide whose numbered headings each say how to go on, and how to
// go back.
func chapters(t *testing.T, file string) []chapter {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, file))
	require.NoError(t, err)
	heads := numbered.FindAllSubmatchIndex(text, -1)
	require.NotEmpty(t, heads, "%s has no numbered headings", file)
	out := make([]chapter, len(heads))
	for i, head := range heads {
		end := len(text)
		if i+1 < len(heads) {
			end = heads[i+1][0]
		}
		c := chapter{title: string(text[head[2]:head[3]])}
		body := string(text[head[1]:end])
		into := &c.on
		for {
			at := paragraph.FindStringSubmatchIndex(body)
			if at == nil {
				*into = append(*into, stepsOf(t, file, body)...)
				break
			}
			*into = append(*into, stepsOf(t, file, body[:at[0]])...)
			into = map[string]*[]step{"If": &c.aside, "Back": &c.back}[body[at[2]:at[3]]]
			body = body[at[1]:]
		}
		out[i] = c
	}
	return out
}

// crowd are clients that log in all the time with what Vault shows them at a path,
// which each of them reads again every now and then, as External Secrets do.
type crowd struct {
	vault  *api.Client
	node   *servers.RedisNode
	path   atomic.Value
	logins atomic.Int64
	rounds []atomic.Int64
	passed map[string]bool // every password that somebody got in with
	mu     sync.Mutex
	errs   []error
	stop   context.CancelFunc
	group  sync.WaitGroup
}

const (
	crowdSize  = 8
	crowdRead  = 200 * time.Millisecond // how long a client uses what it has read
	crowdPause = 10 * time.Millisecond  // between the logins of one client
)

// gather starts the clients. They end with the test, which fails if one of them
// was refused.
func gather(t *testing.T, vault *servers.Vault, node *servers.RedisNode) *crowd {
	t.Helper()
	token, err := vault.TokenFor(t.Context(), "consumer",
		`path "`+oldPath+`" { capabilities = ["read"] } path "`+newPath+`" { capabilities = ["read"] }`)
	require.NoError(t, err)
	c := &crowd{vault: vault.Client(), node: node, rounds: make([]atomic.Int64, crowdSize), passed: map[string]bool{}}
	c.vault.SetToken(token)
	c.path.Store(oldPath)
	var ctx context.Context
	ctx, c.stop = context.WithCancel(t.Context())
	for i := range crowdSize {
		c.group.Go(func() {
			if err := c.client(ctx, i); err != nil && ctx.Err() == nil {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.errs = append(c.errs, fmt.Errorf("client %d: %w", i, err))
			}
		})
	}
	t.Cleanup(func() { require.NoError(t, c.end()) })
	return c
}

// end stops the clients; the error says what one of them met.
func (c *crowd) end() error {
	c.stop()
	c.group.Wait()
	return errors.Join(c.errs...)
}

func (c *crowd) client(ctx context.Context, i int) error {
	for ctx.Err() == nil {
		password, err := c.read(ctx, c.path.Load().(string))
		if err != nil {
			return err
		}
		for until := time.Now().Add(crowdRead); time.Now().Before(until); {
			// A login that has begun is finished: the password it sent counts.
			if err := c.login(context.WithoutCancel(ctx), password); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(crowdPause):
			}
		}
		c.rounds[i].Add(1)
	}
	return nil
}

func (c *crowd) read(ctx context.Context, path string) (string, error) {
	s, err := c.vault.Logical().ReadWithContext(ctx, path)
	if err != nil {
		return "", err
	}
	if s == nil {
		return "", errors.New("nothing stands at " + path)
	}
	body, _ := s.Data["data"].(map[string]any)
	password, _ := body["password"].(string)
	return password, nil
}

func (c *crowd) login(ctx context.Context, password string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn := redis.NewClient(&redis.Options{
		Addr: c.node.Addr, Username: "default", Password: password, Protocol: 2, MaxRetries: -1, PoolSize: 1, DisableIdentity: true,
	})
	if err := errors.Join(conn.Ping(ctx).Err(), conn.Close()); err != nil {
		return err
	}
	c.logins.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.passed[password] = true
	return nil
}

// caughtUp waits until every client uses what it has read from now on.
func (c *crowd) caughtUp(t *testing.T) {
	t.Helper()
	enough := make([]int64, crowdSize)
	for i := range enough {
		enough[i] = c.rounds[i].Load() + 2 // one read is under way, and has perhaps been answered
	}
	for i := range enough {
		require.Eventually(t, func() bool { return c.rounds[i].Load() >= enough[i] || c.failed() }, time.Minute, 5*time.Millisecond)
	}
}

func (c *crowd) failed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.errs) > 0
}

// journey is a secret that a CronJob changes today, on its way.
type journey struct {
	*crowd
	shell shell
	root  *api.Client
	put   *strings.Replacer
}

// moreRights are those that the guide has the admin user have beside the others.
func moreRights(t *testing.T) string {
	t.Helper()
	text := block(t, migrateGuide, "text")
	rights, ok := strings.CutPrefix(text, "ACL SETUSER vault ")
	require.True(t, ok, text)
	return strings.TrimSpace(rights)
}

// setOff makes what the guide begins with, in the Vault of all journeys.
func setOff(t *testing.T, vault *servers.Vault) *journey {
	t.Helper()
	require.NoError(t, vault.Mount(t.Context(), servers.DefaultMount))
	t.Cleanup(func() { require.NoError(t, vault.Unmount(context.Background(), servers.DefaultMount)) })
	node := servers.Redis(t, servers.WithConfig("requirepass password-of-the-job"), servers.WithUsers("vault "+adminRights(t)+" "+moreRights(t)))
	j := &journey{shell: newShell(t, vault), root: vault.Client()}
	t.Cleanup(func() {
		require.NoError(t, j.root.KVv2("secret").DeleteMetadata(context.Background(), "harmonyflow/redis"))
	})
	require.Eventually(t, func() bool { // a new KV mount is being upgraded for a moment
		_, err := j.root.KVv2("secret").Put(t.Context(), "harmonyflow/redis", map[string]any{"password": "an-earlier-password", "host": "redis"})
		return err == nil
	}, time.Minute, 50*time.Millisecond)
	j.kv(t, "password-of-the-job")
	j.put = strings.NewReplacer(redisInDocs, node.Addr, "https://vault.example.com:8200", vault.Address)
	j.shell.file(t, "admin.password", "admin")
	j.shell.file(t, "publish.hcl", block(t, migrateGuide, "hcl"))
	j.crowd = gather(t, vault, node)
	return j
}

// kv is what the CronJob did.
func (j *journey) kv(t *testing.T, password string) {
	t.Helper()
	_, err := j.root.KVv2("secret").Patch(t.Context(), "harmonyflow/redis", map[string]any{"password": password})
	require.NoError(t, err)
}

func (j *journey) kvVersion(t *testing.T) int {
	t.Helper()
	s, err := j.root.KVv2("secret").GetMetadata(t.Context(), "harmonyflow/redis")
	require.NoError(t, err)
	return s.CurrentVersion
}

// reads has the clients read at a path from now on.
func (j *journey) reads(t *testing.T, path string) {
	t.Helper()
	j.path.Store(path)
	j.caughtUp(t)
}

// shown is the password at a path.
func (j *journey) shown(t *testing.T, path string) string {
	t.Helper()
	password, err := j.read(t.Context(), path)
	require.NoError(t, err)
	return password
}

// role is nil where there is none.
func (j *journey) role(t *testing.T) *api.Secret {
	t.Helper()
	s, err := j.root.Logical().ReadWithContext(t.Context(), "harmonyflow/roles/redis")
	require.NoError(t, err)
	return s
}

// types types commands of the guide, after clients have caught up where the guide has
// people wait for that.
func (j *journey) types(t *testing.T, all []step) {
	t.Helper()
	for _, st := range all {
		if strings.Contains(st.command, "/retire/") || strings.Contains(st.command, "kv metadata delete") {
			j.caughtUp(t)
		}
		j.shell.playWith(t, j.put, []step{st})
	}
}

// cronJob changes the password as the CronJob does: clients have to be away.
func (j *journey) cronJob(t *testing.T, password string) {
	t.Helper()
	require.NoError(t, j.end())
	j.kv(t, password)
	for _, command := range [][]any{{"CONFIG", "SET", "requirepass", password}, {"CONFIG", "REWRITE"}} {
		_, err := j.node.Do(t.Context(), command...)
		require.NoError(t, err)
	}
}

// TestMigration goes the way of the guide on a real Vault and Redis, with clients
// that log in all the time with what is shown where they read; then again to each
// step and from there back.
func TestMigration(t *testing.T) {
	vault := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	require.NoError(t, vault.Mount(t.Context(), "stays")) // see TestRedisReference
	_, err := vault.Client().Logical().ReadWithContext(t.Context(), "stays/config")
	require.NoError(t, err)
	guide := chapters(t, migrateGuide)
	require.Len(t, guide, 7)
	const connect, adopt, suspend, rotate, schedule, read, leave = 0, 1, 2, 3, 4, 5, 6
	var logins int64

	t.Run("there", func(t *testing.T) {
		j := setOff(t, vault)
		versions := map[int]int{adopt: 0, rotate: 1, leave: -1}
		for i, c := range guide {
			from := j.kvVersion(t)
			if i == leave {
				j.reads(t, newPath)
			}
			j.types(t, c.on)
			j.caughtUp(t)
			if i == leave {
				break
			}
			require.Equal(t, versions[i], j.kvVersion(t)-from, "versions of the KV secret that step %s makes", c.title)
			s, err := j.root.KVv2("secret").Get(t.Context(), "harmonyflow/redis")
			require.NoError(t, err)
			require.Equal(t, "redis", s.Data["host"], "a field of others")
		}
		_, err := j.root.KVv2("secret").Get(t.Context(), "harmonyflow/redis")
		require.ErrorIs(t, err, api.ErrSecretNotFound)
		require.NoError(t, j.end())
		require.Len(t, j.passed, 3, "clients have followed each rotation")
		logins += j.logins.Load()
	})

	// Where the CronJob ran after the secret was adopted, nothing is rotated.
	t.Run("job ran all the same", func(t *testing.T) {
		j := setOff(t, vault)
		j.types(t, guide[connect].on)
		j.types(t, guide[adopt].on)
		const newest = "password-of-a-job-that-went-on"
		j.cronJob(t, newest)
		before := j.kvVersion(t)
		_, err := j.root.Logical().WriteWithContext(t.Context(), "harmonyflow/rotate/redis/redis", nil)
		require.ErrorContains(t, err, "refuses the current version (1)")
		require.Equal(t, before, j.kvVersion(t))
		_, err = j.node.Do(t.Context(), "AUTH", "default", newest)
		require.NoError(t, err, "what the job has set goes on working")
		j.crowd = gather(t, vault, j.node)
		j.types(t, guide[suspend].aside)
		require.Equal(t, newest, j.shown(t, newPath))
		j.types(t, commands(guide[rotate].on[:1]))
		j.caughtUp(t)
		require.NoError(t, j.end())
		require.Len(t, j.passed, 2, "clients have followed the rotation")
		logins += j.logins.Load()
	})

	for last, c := range guide {
		t.Run("back from "+strconv.Itoa(last+1), func(t *testing.T) {
			j := setOff(t, vault)
			for i := connect; i <= min(last, read); i++ {
				j.types(t, guide[i].on)
			}
			switch last {
			case suspend: // the rest is kubectl's
				j.types(t, guide[adopt].back)
			case rotate:
				j.types(t, c.back)
				require.Equal(t, "password-of-the-job", j.shown(t, oldPath))
			case schedule:
				j.types(t, c.back)
				require.Equal(t, true, j.role(t).Data["disable_automated_rotation"])
				j.types(t, guide[adopt].back)
			case read:
				j.reads(t, newPath)
				j.reads(t, oldPath)
			case leave:
				j.reads(t, newPath)
				j.types(t, c.on[:3]) // delete, write, rotate
				j.types(t, []step{{command: "vault write -f harmonyflow/retire/redis/redis"}})
				j.types(t, c.back)
				j.types(t, commands(guide[adopt].on[:1]))
				require.Equal(t, "secret", j.role(t).Data["publish_mount"])
				j.reads(t, oldPath)
			default:
				j.types(t, c.back)
			}
			j.caughtUp(t)
			if last <= suspend || last == schedule { // the job may go on
				require.Nil(t, j.role(t))
				j.cronJob(t, "password-of-a-job-that-was-resumed")
				j.crowd = gather(t, vault, j.node)
				j.caughtUp(t)
			}
			require.NoError(t, j.end())
			logins += j.logins.Load()
		})
	}
	if t.Failed() {
		return
	}
	report.Figure(t, "PROOF_FILE", "migration of a KV secret, %d steps and the way back from each: %d logins, 0 refused", len(guide), logins)
}

// commands are steps without what they are shown to print: the versions there are
// those of who goes straight on.
func commands(all []step) (out []step) {
	for _, st := range all {
		out = append(out, step{command: st.command})
	}
	return out
}
