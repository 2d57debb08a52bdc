package consumers_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestConsumersEmergency is a drill: everything is known to a thief, who uses it.
func TestConsumersEmergency(t *testing.T) {
	b := newBed(t)
	t.Run("emergency", func(t *testing.T) { compromised(b.scene(t, "emergency")) })
}

// theft is one stolen credential at one place, tried again and again.
type theft struct {
	what string
	try  func(ctx context.Context) error // nil: it was taken
	pods bool                            // who takes it are pods, until they run with what is new
	mu   sync.Mutex
	took time.Time // the last time that it was
	used int
}

// use tries it until ctx ends.
func (th *theft) use(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		if th.try(ctx) == nil {
			th.mu.Lock()
			th.took, th.used = began, th.used+1
			th.mu.Unlock()
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (th *theft) last() (time.Time, int) {
	th.mu.Lock()
	defer th.mu.Unlock()
	return th.took, th.used
}

// compromised, R26: one write replaces what the runbook's emergency section does by hand.
// Every old credential is refused at every node, sessions end, the API ends its own by a
// hook that shows the new admin token, every workload of the namespace is restarted, and
// one that cannot be stops nothing.
func compromised(s *scene) {
	t := s.t
	h := newSessions(s)
	var revoked atomic.Int64
	gate := s.revocations(h, &revoked)
	drill := atomic.Bool{}
	s.simulate(kube.WithClient("sessions", func(ctx context.Context, p kube.SimulatedPod) error {
		err := h.work(ctx, p)
		if err != nil && drill.Load() { // whoever was logged in is logged out, and pods differ for a moment
			return nil
		}
		return err
	}))
	cache := servers.RedisReplicated(t, 2, servers.WithUsers("app on >the-first-password ~* +@all -@admin"))
	db := servers.Postgres(t)
	require.NoError(t, db.Exec(s.ctx, "CREATE ROLE owner NOLOGIN", "CREATE ROLE app_a LOGIN IN ROLE owner PASSWORD 'the-first-password'"))
	queue := servers.RabbitMQ(t)
	require.NoError(t, queue.SetUser(s.ctx, "app_a", "the-first-password", "monitoring"))
	require.NoError(t, queue.Permit(s.ctx, "app_a", "/"))
	s.sevenSecrets(cache, db, queue)
	s.synced("app")
	s.synced(sessionsApp)
	to := map[string]string{"sim/secret": "app", "sim/target": "redis", "sim/addr": cache.Nodes[0].Addr, "sim/username-key": "redis-username", "sim/password-key": "redis-password", "sim/every": "20ms"}
	s.deploy(s.cluster, "Deployment", "web", 3, to)
	s.deploy(s.cluster, "StatefulSet", "worker", 2, to)
	s.deploy(s.cluster, "Deployment", "unnamed", 1, to)
	s.deploy(s.cluster, "Deployment", "batch", 1, to)
	s.deploy(s.cluster, "Deployment", sessionsApp, 2, map[string]string{
		"sim/secret": sessionsApp, "sim/target": "sessions", "sim/username": "none", "sim/password-key": accessField, "sim/every": "50ms",
	})
	hooks, err := json.Marshal([]map[string]any{{
		"name": "revoke-sessions", "url": gate.URL + "/v1/admin/sessions/revoke-all", "ca_cert": certificate(gate),
		"headers": map[string]string{"Authorization": "Bearer {{admin.value}}"},
	}})
	require.NoError(t, err)
	s.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	s.consumerAt("web", map[string]any{"external_secrets": "app", "stabilization": "1s", "rollout_timeout": "30s"}, []string{"web"}, []string{"StatefulSet/worker"})
	s.consumerAt("sessions", map[string]any{"external_secrets": sessionsApp, "stabilization": "1s", "rollout_timeout": "30s"}, []string{sessionsApp})
	s.must("roles/admin", map[string]any{"consumers": "web", "secret_hosts": address(gate)})
	s.must("consumers/web", map[string]any{"hooks": string(hooks)})
	s.must("consumers/web", checks(map[string]any{"type": "logs", "forbid": "(?i)panic", "timeout": "5s"}))
	for _, role := range []string{"cache", "db", "queue", "key", "cipher"} {
		s.must("roles/"+role, map[string]any{"consumers": "web"})
	}
	for _, role := range []string{"access", "refresh"} {
		s.must("roles/"+role, map[string]any{"consumers": "sessions"})
	}

	// What the thief has, and uses.
	old := map[string]map[string]string{}
	for _, role := range []string{"access", "refresh", "admin", "key", "cipher"} {
		old[role] = s.creds(role)
	}
	thefts := s.thefts(cache, db, queue, h, old)
	ctx, stop := context.WithCancel(s.ctx)
	var wg sync.WaitGroup
	for _, th := range thefts {
		wg.Go(func() { th.use(ctx) })
	}
	defer func() { stop(); wg.Wait() }()
	for _, th := range thefts {
		require.NoError(t, kube.Until(s.ctx, func(context.Context) error {
			if _, n := th.last(); n == 0 {
				return fmt.Errorf("%s is not taken: %w", th.what, th.try(s.ctx))
			}
			return nil
		}))
	}
	open := s.sessions(cache, db, queue)
	require.NoError(t, kube.Until(s.ctx, func(context.Context) error {
		if h.active() == 0 {
			return errors.New("nobody is logged in")
		}
		return nil
	}))

	// The night is not made easier: a freeze, and a rotation that is in its grace.
	running := s.must("rotate/api-key/key", nil)["rotation_id"].(string)
	s.until(running, "grace")
	s.must("config", map[string]any{"freeze": true, "freeze_reason": "quarter end"})
	_, err = s.cluster.Kubectl(s.ctx, "rollout", "pause", "deployment/batch", "-n", s.ns)
	require.NoError(t, err)
	plan := s.must("emergency/rotate/all", map[string]any{"dry_run": true, "restart_namespaces": s.ns})
	require.Contains(t, plan["summary"], "8 secrets at 5 nodes, and 2 consumers, would be reached")
	require.Contains(t, fmt.Sprint(plan["consumer web"]), "is paused", "the plan says what will not come up")
	require.Contains(t, fmt.Sprint(plan["consumer web"]), "call hook revoke-sessions")

	drill.Store(true)
	began := time.Now()
	data := s.must("emergency/rotate/all", map[string]any{"reason": "a laptop was stolen", "restart_namespaces": s.ns})
	answered := time.Since(began)
	id := data["rotation_id"].(string)
	told := s.until(id, "completed", "partial")
	took := time.Since(began)
	require.Equal(t, "partial", told["state"], "the paused one was not restarted: %v", told["roles"])
	stop()
	wg.Wait()

	var last, byPods time.Duration
	uses, where := 0, ""
	for _, th := range thefts {
		at, n := th.last()
		uses += n
		switch after := at.Sub(began); {
		case th.pods:
			byPods = max(byPods, after)
		case after > last:
			last, where = after, th.what
		}
		require.Error(t, th.try(s.ctx), th.what)
	}
	cut := 0
	for what, alive := range open {
		require.Error(t, alive(), "the session at %s goes on", what)
		cut++
	}
	require.EqualValues(t, 1, revoked.Load(), "the hook was called once, with the new admin token")
	require.Empty(t, h.live(old), "no earlier session is taken")
	s.report(told, running)
	figure(t, "compromise drill: 8 secrets, 5 nodes; answered after %.1f s; stolen credentials refused at every server after %.2f s, tokens made with a stolen key by every pod after %.2f s (used %d times before); %d sessions cut; sessions revoked by a hook; %d pods restarted and flagged; all over after %.0f s, one paused workload told",
		answered.Seconds(), last.Seconds(), byPods.Seconds(), uses, cut, s.flagged(id), took.Seconds())
	require.Less(t, last, answered+time.Second, "when it answers they are refused, also by %s", where)
	require.Positive(t, byPods, "pods have taken it")
	require.Less(t, byPods, took, "when it is over no pod takes it")

	// And who has a right to goes on.
	drill.Store(false)
	s.more(sessionsApp, 30)
	s.everyPod(s.creds("cache")["password"], "web", "worker", "unnamed")
}

// sevenSecrets are those of the runbook's table, the JWT secrets as two roles.
func (s *scene) sevenSecrets(cache *servers.RedisSet, db *servers.PostgresNode, queue *servers.RabbitMQNode) {
	s.t.Helper()
	s.must("connections/cache", map[string]any{
		"type": "redis", "addresses": cache.Addrs(), "username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "*",
	})
	s.must("connections/db", map[string]any{
		"type": "postgresql", "connection_url": "postgresql://{{username}}:{{password}}@" + db.Addr + "/postgres?sslmode=disable",
		"username": servers.PostgresAdmin, "password": servers.PostgresAdminPassword, "allowed_roles": "*",
	})
	s.must("connections/queue", map[string]any{
		"type": "rabbitmq", "management_urls": "http://" + queue.ManagementAddr, "amqp_urls": "amqp://" + queue.Addr,
		"username": servers.RabbitMQAdmin, "password": servers.RabbitMQAdminPassword, "allowed_roles": "*",
	})
	for role, data := range map[string]map[string]any{
		"cache":  {"kind": "redis", "connection": "cache", "username": "app", "initial_password": "the-first-password", "document": "app", "field": "redis-password", "username_field": "redis-username"},
		"db":     {"kind": "postgresql", "connection": "db", "usernames": "app_a,app_b", "initial_password": "the-first-password", "document": "app", "field": "db-password", "username_field": "db-username"},
		"queue":  {"kind": "rabbitmq", "connection": "queue", "usernames": "app_a,app_b", "initial_password": "the-first-password", "document": "app", "field": "queue-password", "username_field": "queue-username"},
		"key":    {"kind": "api-key", "document": "app", "field": "api-key", "previous_field": "api-key-previous", "grace_period": "1h"},
		"admin":  {"kind": "api-key", "document": "app", "field": "admin-token"},
		"cipher": {"kind": "encryption-key", "document": "app", "field": "encryption-key", "keys_field": "encryption-keys"},
	} {
		s.must("roles/"+role, data)
	}
	for role, field := range map[string]string{"access": accessField, "refresh": refreshField} {
		s.must("roles/"+role, map[string]any{
			"kind": "jwt", "document": sessionsApp, "field": field, "previous_field": previousOf[field], "max_token_ttl": "1m", "propagation_delay": "1s",
		})
	}
}

// thefts are the ways in which somebody who has copied everything gets in.
func (s *scene) thefts(cache *servers.RedisSet, db *servers.PostgresNode, queue *servers.RabbitMQNode, h *sessions, old map[string]map[string]string) []*theft {
	var out []*theft
	for _, n := range cache.Nodes {
		out = append(out, &theft{what: "Redis " + n.Addr, try: func(ctx context.Context) error {
			return kube.LoginTo("redis")(ctx, n.Addr, "app", "the-first-password")
		}})
	}
	keys := newKeyServer(s, "key")
	forge := func(ctx context.Context) error {
		text, err := token(accessField, old["access"]["value"])
		if err != nil {
			return err
		}
		if err := callAPI(ctx, h.Server, http.MethodGet, "/v1/verify", http.Header{"Authorization": {"Bearer " + text}}); err != nil {
			return err
		}
		if !h.serving() {
			return errors.New("there is no pod that could take it")
		}
		return nil
	}
	return append(out,
		&theft{what: "PostgreSQL", try: func(ctx context.Context) error {
			return kube.LoginTo("postgresql")(ctx, db.Addr, "app_a", "the-first-password")
		}},
		&theft{what: "RabbitMQ", try: func(ctx context.Context) error {
			return kube.LoginTo("rabbitmq")(ctx, queue.Addr, "app_a", "the-first-password")
		}},
		&theft{what: "the API, by its key", try: func(ctx context.Context) error { return keys.login(ctx, "", "", old["key"]["value"]) }},
		&theft{what: "the API, as its admin", try: func(ctx context.Context) error {
			return callAPI(ctx, h.Server, http.MethodGet, "/v1/admin/sessions/active", http.Header{"Authorization": {"Bearer " + old["admin"]["value"]}})
		}},
		&theft{what: "the API, by a token that he signs himself", try: forge, pods: true},
	)
}

// sessions that are open before say whether they still are.
func (s *scene) sessions(cache *servers.RedisSet, db *servers.PostgresNode, queue *servers.RabbitMQNode) map[string]func() error {
	s.t.Helper()
	out := map[string]func() error{}
	for i, n := range cache.Nodes {
		c := n.Client()
		s.t.Cleanup(func() { _ = c.Close() })
		conn := c.Conn()
		require.NoError(s.t, conn.AuthACL(s.ctx, "app", "the-first-password").Err())
		out[fmt.Sprintf("Redis %d", i)] = func() error { return conn.Ping(s.ctx).Err() }
	}
	pg, err := db.Login(s.ctx, "app_a", "the-first-password")
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = pg.Close(context.WithoutCancel(s.ctx)) })
	out["PostgreSQL"] = func() error {
		_, err := pg.Exec(s.ctx, "SELECT 1")
		var ended *pgconn.PgError
		if err != nil && !errors.As(err, &ended) && !strings.Contains(err.Error(), "conn closed") {
			s.t.Log(err)
		}
		return err
	}
	mq, err := amqp.Dial("amqp://app_a:the-first-password@" + queue.Addr)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = mq.Close() })
	out["RabbitMQ"] = func() error {
		if mq.IsClosed() {
			return errors.New("closed")
		}
		_, err := mq.Channel()
		return err
	}
	return out
}

// live are earlier tokens that some pod still takes.
func (h *sessions) live(old map[string]map[string]string) (out []string) {
	for _, field := range []string{accessField, refreshField} {
		role := map[string]string{accessField: "access", refreshField: "refresh"}[field]
		text, err := token(field, old[role]["value"])
		if err == nil && h.verified(text) == nil {
			out = append(out, field)
		}
	}
	return out
}

// flagged counts the pods that run, all of which an emergency has flagged.
func (s *scene) flagged(id string) int {
	s.t.Helper()
	n := 0
	for _, name := range []string{"web", "worker", "unnamed", sessionsApp} {
		pods, err := s.cluster.PodsOf(s.ctx, s.ns, name)
		require.NoError(s.t, err)
		for _, p := range pods {
			if p.DeletionTimestamp == nil {
				require.Equal(s.t, id, p.Annotations["security-alert"], p.Name)
				n++
			}
		}
	}
	require.Equal(s.t, 8, n)
	return n
}

// report is what an officer reads afterwards: every secret, pod and check by name.
func (s *scene) report(told map[string]any, before string) {
	t := s.t
	require.Equal(t, "a laptop was stolen", told["reason"])
	require.Contains(t, told["earlier_versions_refused"], "8 of 8 secrets, the last ")
	overrides := fmt.Sprint(told["overrides"])
	require.Contains(t, overrides, "quarter end")
	require.Contains(t, overrides, "api-key/key (manual, in grace)")
	roles := told["roles"].(map[string]any)
	require.Len(t, roles, 8)
	for _, role := range []string{"cache", "db", "queue", "key", "admin", "cipher", "access", "refresh"} {
		require.Contains(t, roles, role)
	}
	text, err := json.Marshal(told["consumers"])
	require.NoError(t, err)
	for _, name := range []string{"web", "worker", "unnamed", sessionsApp} {
		pods, err := s.cluster.PodsOf(s.ctx, s.ns, name)
		require.NoError(t, err)
		for _, p := range pods {
			if p.DeletionTimestamp == nil {
				require.Contains(t, string(text), p.Name, "every pod is named")
			}
		}
	}
	require.Contains(t, string(text), `"hook":"revoke-sessions"`)
	require.Contains(t, string(text), `"check":1`)
	require.Contains(t, string(text), "batch is paused")
	for _, role := range []string{"cache", "db", "queue", "key", "admin"} {
		creds := s.creds(role)
		for _, field := range []string{"password", "value"} {
			if creds[field] != "" {
				require.NotContains(t, string(text), creds[field])
			}
		}
	}
	require.Equal(t, "superseded", s.rotation(before)["state"])
}

// revocations is the API that ends all sessions, for its admin.
func (s *scene) revocations(h *sessions, revoked *atomic.Int64) *httptest.Server {
	s.t.Helper()
	gate := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost || r.URL.Path != "/v1/admin/sessions/revoke-all" || r.Header.Get("Authorization") != "Bearer "+s.creds("admin")["value"] {
			http.Error(rw, "who are you", http.StatusUnauthorized)
			return
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.issued = nil
		revoked.Add(1)
	}))
	s.t.Cleanup(gate.Close)
	return gate
}
