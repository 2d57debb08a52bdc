package readme

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const firstGuide = "docs/howto/put-under-rotation.md"

// notPlayed are those whose commands other tests play, or that show none with answers.
var notPlayed = []string{"emergency.md", "image.md", "migrate.md", "pods.md"}

// place is what the guides are about: servers as they were before, and a terminal.
type place struct {
	shell shell
	redis *servers.RedisNode
	db    *servers.PostgresNode
	root  *api.Client
	told  *receiver
	put   *strings.Replacer
}

// newPlace has a Vault of its own: guides change what is of all its mounts.
func newPlace(t *testing.T, raft bool) *place {
	t.Helper()
	vault := servers.NewVault(t, servers.VaultOptions{Raft: raft})
	ca, err := servers.NewAuthority()
	require.NoError(t, err)
	cert, key, err := ca.Issue("127.0.0.1")
	require.NoError(t, err)
	p := &place{
		shell: newShell(t, vault), root: vault.Client(), told: newReceiver(t),
		redis: servers.Redis(t, servers.WithUsers(
			"vault "+adminRights(t)+" +client|list", "root on >root ~* &* +@all", "app on >first ~* +@all",
		)),
		db: servers.Postgres(t, servers.WithPostgresTLS(cert, key, ca.PEM)),
	}
	require.NoError(t, p.db.Exec(t.Context(), "CREATE ROLE vault LOGIN CREATEROLE PASSWORD 'admin'", "CREATE ROLE shop_a LOGIN PASSWORD 'first'"))
	for name, content := range map[string]string{
		"admin.password": "admin", "app.password": "first", "shop.password": "first", "root.password": "root", "ca.pem": ca.PEM,
	} {
		p.shell.file(t, name, content)
	}
	host, port, err := net.SplitHostPort(p.redis.Addr)
	require.NoError(t, err)
	p.put = strings.NewReplacer(
		redisInDocs, p.redis.Addr, "redis.example.com -p 6379", host+" -p "+port, "db.example.com:5432", p.db.Addr,
		"https://hooks.example.com/", p.told.url+"/", "hooks.example.com", p.told.host,
	)
	return p
}

// underRotation does what the first guide does for Redis and PostgreSQL.
func (p *place) underRotation(t *testing.T) {
	t.Helper()
	first := steps(t, firstGuide)
	end := slices.IndexFunc(first, func(st step) bool { return strings.Contains(st.command, "roles/partner") })
	require.Positive(t, end)
	p.shell.playWith(t, p.put, first[:end])
}

func (p *place) read(t *testing.T, path string) map[string]any {
	t.Helper()
	s, err := p.root.Logical().ReadWithContext(t.Context(), "harmonyflow/"+path)
	require.NoError(t, err)
	require.NotNil(t, s, path)
	return s.Data
}

// backAgain waits until Vault works with what it was restored to.
func (p *place) backAgain(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool {
		s, err := p.root.Logical().ReadWithContext(t.Context(), "harmonyflow/roles/app")
		return err == nil && s != nil
	}, time.Minute, 50*time.Millisecond)
}

// TestHowTo types what each guide of docs/howto shows.
func TestHowTo(t *testing.T) {
	files, err := filepath.Glob(root + "docs/howto/*.md")
	require.NoError(t, err)
	more := map[string]func(*testing.T, *place){
		"get-told.md": func(t *testing.T, p *place) {
			t.Helper()
			require.Eventually(t, func() bool { return p.told.has("notification.test", "rotation.started", "rotation.promoted") }, time.Minute, 20*time.Millisecond)
		},
		"put-under-rotation.md": func(t *testing.T, p *place) {
			t.Helper()
			served := p.read(t, "creds/shop")
			conn, err := p.db.Login(t.Context(), served["username"].(string), served["password"].(string))
			require.NoError(t, err)
			require.NoError(t, conn.Close(t.Context()))
		},
		"roll-back.md": func(t *testing.T, p *place) {
			t.Helper()
			require.Equal(t, "first", p.read(t, "creds/app")["password"])
		},
		"rotate-an-admin-credential.md": func(t *testing.T, p *place) {
			t.Helper()
			_, err := p.redis.Do(t.Context(), "AUTH", "vault", "admin")
			require.ErrorContains(t, err, "WRONGPASS")
			conn, err := p.db.Login(t.Context(), "vault", "admin")
			if err == nil {
				_ = conn.Close(t.Context())
			}
			require.Error(t, err)
		},
	}
	for _, file := range files {
		name := filepath.Base(file)
		if slices.Contains(notPlayed, name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, name == "after-a-restore.md")
			file := "docs/howto/" + name
			if file != firstGuide {
				p.underRotation(t)
			}
			for _, st := range steps(t, file) {
				p.shell.playWith(t, p.put, []step{st})
				if strings.Contains(st.command, "snapshot restore") {
					p.backAgain(t)
				}
			}
			_, err := p.redis.Do(t.Context(), "AUTH", "app", p.read(t, "creds/app")["password"])
			require.NoError(t, err, "what is served at the end works")
			if more[name] != nil {
				more[name](t, p)
			}
		})
	}
}

// TestHowToPods writes the role and the consumer that the guide writes. What becomes of
// them in a cluster is shown by test/consumers and the demo.
func TestHowToPods(t *testing.T) {
	p := newPlace(t, false)
	p.shell.playWith(t, p.put, steps(t, firstGuide)[:1])
	p.shell.run(t, "vault write harmonyflow/connections/prod type=kubernetes host=https://10.0.0.1:6443 token=none verify_connection=false")
	blocks := blocks(t, "docs/howto/pods.md", "sh")
	require.Len(t, blocks, 4, "cluster, role, consumer, rotation")
	for _, block := range blocks[1:3] {
		p.shell.run(t, "set -e\n"+block)
	}
	require.Equal(t, []any{"web"}, p.read(t, "roles/app")["consumers"])
	require.Len(t, p.read(t, "consumers/web")["workloads"], 2)
}

// receiver takes events.
type receiver struct {
	url, host string
	mu        sync.Mutex
	types     []string
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{}
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		var event struct {
			Type string `json:"type"`
		}
		if err != nil || json.Unmarshal(body, &event) != nil || req.Header.Get("webhook-signature") == "" {
			event.Type = "unreadable or unsigned: " + string(body)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.types = append(r.types, event.Type)
	}))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	require.NoError(t, err)
	r.url, r.host = server.URL, u.Hostname()
	return r
}

// has reports whether events of all types have come, and nothing that is none.
func (r *receiver) has(types ...string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, want := range types {
		if !slices.Contains(r.types, want) {
			return false
		}
	}
	return true
}
