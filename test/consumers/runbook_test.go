package consumers_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestConsumersRunbook has one scenario for each section of the runbook that reaches into a
// cluster, start to end: what the section does by hand is one write to Vault. Half of
// them bring the secret through the engine's own data/, half through a KV version 2.
func TestConsumersRunbook(t *testing.T) {
	b := newBed(t)
	for name, section := range map[string]func(*scene){
		"jwt":        jwtKeys,
		"postgresql": postgresqlCredentials,
		"redis":      redisCredentials,
		"rabbitmq":   rabbitmqCredentials,
		"api-key":    apiKey,
		"cronjob":    automatedCronJob,
		"sealed":     vaultSealed,
		"indicators": failureIndicators,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			section(b.scene(t, name))
		})
	}
}

// jwtKeys, R4 to R11: the access and the refresh secret are two roles of one document,
// rotated together. Each new key is brought to every pod before one signs with it.
func jwtKeys(s *scene) {
	t := s.t
	h := newSessions(s)
	s.simulate(kube.WithClient("sessions", h.work))
	s.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	s.must("roles/admin", map[string]any{"kind": "api-key"})
	for role, field := range map[string]string{"access": accessField, "refresh": refreshField} {
		s.must("roles/"+role, map[string]any{
			"kind": "jwt", "document": sessionsApp, "field": field, "previous_field": previousOf[field],
			"max_token_ttl": "1m", "propagation_delay": "1s", "initial_value": "the-first-secret-of-32-bytes-for-" + role,
		})
	}
	s.synced(sessionsApp)
	s.deploy(s.cluster, "Deployment", sessionsApp, 3, map[string]string{
		"sim/secret": sessionsApp, "sim/target": "sessions", "sim/username": "none", "sim/password-key": accessField, "sim/every": "50ms",
	})
	s.consumer(map[string]any{"external_secrets": sessionsApp, "stabilization": "1s"}, []string{sessionsApp})
	s.must("roles/admin", map[string]any{"consumers": "web", "secret_hosts": address(h.Server)})
	s.must("consumers/web", checks(
		map[string]any{
			"type": "http", "url": h.URL + "/v1/auth/login", "method": "POST", "body": `{"username":"test","password":"test"}`,
			"headers": map[string]string{"Content-Type": "application/json"}, "ca_cert": certificate(h.Server), "times": 3, "timeout": "5s",
		},
		map[string]any{
			"type": "http", "url": h.URL + "/v1/admin/sessions/active", "ca_cert": certificate(h.Server), "timeout": "5s",
			"headers": map[string]string{"Authorization": "Bearer {{admin.value}}"},
		},
		map[string]any{"type": "logs", "forbid": "(?i)jwt", "timeout": "5s"},
	))
	for _, role := range []string{"access", "refresh"} {
		s.must("roles/"+role, map[string]any{"consumers": "web"})
	}
	began := time.Now()
	id := s.must("rotate/jwt", nil)["rotation_id"].(string)
	told := s.until(id, "grace")
	require.Len(t, told["units"], 1, "both go forward or back together")
	for role, field := range map[string]string{"access": accessField, "refresh": refreshField} {
		first := "the-first-secret-of-32-bytes-for-" + role
		creds := s.creds(role)
		require.NotEqual(t, first, creds["value"])
		s.holds(sessionsApp, map[string]string{field: creds["value"], previousOf[field]: first})
	}
	s.everyPod(s.creds("access")["value"], sessionsApp)
	require.Equal(t, 2, s.restartsOf(sessionsApp), "once for the key that is to come, once for the one that signs")
	s.more(sessionsApp, 30)

	// Rollback Procedure: the old secrets sign again, in every pod, and what the new
	// ones have signed meanwhile is still taken.
	s.must("rollback/jwt/access", nil)
	s.until(id, "rolled_back")
	for role, field := range map[string]string{"access": accessField, "refresh": refreshField} {
		first := "the-first-secret-of-32-bytes-for-" + role
		require.Equal(t, first, s.creds(role)["value"])
		s.holds(sessionsApp, map[string]string{field: first})
	}
	s.everyPod("the-first-secret-of-32-bytes-for-access", sessionsApp)
	s.more(sessionsApp, 30)
	s.shown("JWT secrets", s.restartsOf(sessionsApp), began)
}

// postgresqlCredentials, R12 and R13: two users take turns, through a KV version 2
// whose other fields stay. StatefulSet and Deployments follow in waves.
func postgresqlCredentials(s *scene) {
	t := s.t
	n := servers.Postgres(t)
	require.NoError(t, n.Exec(s.ctx, "CREATE ROLE owner NOLOGIN", "CREATE ROLE app_a LOGIN IN ROLE owner PASSWORD 'the-first-password'"))
	mount := s.kv()
	s.must("connections/db", map[string]any{
		"type": "postgresql", "connection_url": "postgresql://{{username}}:{{password}}@" + n.Addr + "/postgres?sslmode=disable",
		"username": servers.PostgresAdmin, "password": servers.PostgresAdminPassword, "allowed_roles": "*",
	})
	s.must("roles/app", s.published(mount, map[string]any{
		"kind": "postgresql", "connection": "db", "usernames": "app_a,app_b", "initial_password": "the-first-password", "grace_period": "1h",
	}))
	s.external()
	to := map[string]string{"sim/secret": "app", "sim/target": "postgresql", "sim/addr": n.Addr, "sim/every": "50ms"}
	s.deploy(s.cluster, "StatefulSet", "pgbouncer", 2, to)
	s.deploy(s.cluster, "Deployment", "web", 3, to)
	s.deploy(s.cluster, "Deployment", "reports", 1, to)
	s.consumer(map[string]any{"stabilization": "1s"}, []string{"StatefulSet/pgbouncer"}, []string{"web", "reports"})
	s.must("roles/app", map[string]any{"consumers": "web"})
	began := time.Now()
	id := s.must("rotate/postgresql/app", nil)["rotation_id"].(string)
	s.until(id, "grace")
	require.False(t, s.made("pgbouncer")[1].After(s.made("web", "reports")[0]), "a wave begins when the one before is proven")
	creds := s.creds("app")
	require.Equal(t, "app_b", creds["username"])
	s.holds("app", map[string]string{"username": "app_b", "password": creds["password"], "host": "primary." + s.ns})
	s.everyPod(creds["password"], "pgbouncer", "web", "reports")
	for user, password := range map[string]string{"app_a": "the-first-password", "app_b": creds["password"]} {
		c, err := n.Login(s.ctx, user, password)
		require.NoError(t, err, "both are accepted until the grace ends")
		require.NoError(t, c.Close(s.ctx))
	}
	s.must("retire/postgresql/app", nil)
	s.until(id, "completed")
	_, err := n.Login(s.ctx, "app_a", "the-first-password")
	require.ErrorContains(t, err, "28P01")
	s.more("web", 60)
	s.shown("PostgreSQL credentials", s.restartsOf("statefulset/pgbouncer", "web", "reports"), began)
}

// redisCredentials, R15 and R16: every node takes the new password and keeps it, and
// a program in the cluster says through its Service that each of them does.
func redisCredentials(s *scene) {
	t := s.t
	set := servers.RedisReplicated(t, 2, servers.WithUsers("app on >the-first-password ~* +@all -@admin"))
	everyNode := func(ctx context.Context, username, password string) error {
		for _, addr := range set.Addrs() {
			if err := kube.LoginTo("redis")(ctx, addr, username, password); err != nil {
				return err
			}
		}
		return nil
	}
	s.simulate(kube.WithLogin("redis-nodes", func(ctx context.Context, _, username, password string) error {
		return everyNode(ctx, username, password)
	}))
	s.must("connections/cache", map[string]any{
		"type": "redis", "addresses": set.Addrs(), "username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "*",
	})
	s.must("roles/app", map[string]any{
		"kind": "redis", "connection": "cache", "username": "app", "initial_password": "the-first-password",
		"document": "app", "field": "password", "username_field": "username", "grace_period": "1h",
	})
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 3, map[string]string{"sim/secret": "app", "sim/target": "redis-nodes", "sim/every": "20ms"})
	pinged := atomic.Int64{}
	s.service("web", http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		p, ok := s.runningAs(r)
		if !ok || r.URL.Path != "/ready/redis" || everyNode(r.Context(), p.Username, p.Password) != nil {
			rw.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		pinged.Add(1)
	}))
	s.consumer(map[string]any{"stabilization": "1s"}, []string{"web"})
	s.must("consumers/web", checks(map[string]any{"type": "http", "service": "http:web:80", "path": "/ready/redis", "times": 3, "timeout": "5s"}))
	s.must("roles/app", map[string]any{"consumers": "web"})
	began := time.Now()
	id := s.must("rotate/redis/app", nil)["rotation_id"].(string)
	s.until(id, "grace")
	require.GreaterOrEqual(t, pinged.Load(), int64(3))
	served := s.served()
	s.holds("app", map[string]string{"username": "app", "password": served})
	s.everyPod(served, "web")
	require.NoError(t, everyNode(s.ctx, "app", "the-first-password"))
	s.must("retire/redis/app", nil)
	s.until(id, "completed")
	for i, node := range set.Nodes {
		require.NoError(t, node.Restart(s.ctx))
		require.ErrorIs(t, kube.LoginTo("redis")(s.ctx, node.Addr, "app", "the-first-password"), kube.ErrRefused, "node %d", i)
		require.NoError(t, kube.LoginTo("redis")(s.ctx, node.Addr, "app", served), "node %d has kept it", i)
	}
	s.more("web", 100)
	s.shown("Redis credentials", s.restartsOf("web"), began)
}

// rabbitmqCredentials, R17 and R18: the new password is proven at the management API,
// by a check that shows it there and nowhere else.
func rabbitmqCredentials(s *scene) {
	t := s.t
	n, https, ca := managedRabbitMQ(t)
	require.NoError(t, n.SetUser(s.ctx, "app_a", "the-first-password", "monitoring"))
	require.NoError(t, n.Permit(s.ctx, "app_a", "/"))
	mount := s.kv()
	s.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	s.must("connections/queue", map[string]any{
		"type": "rabbitmq", "management_urls": "http://" + n.ManagementAddr, "amqp_urls": "amqp://" + n.Addr,
		"username": servers.RabbitMQAdmin, "password": servers.RabbitMQAdminPassword, "allowed_roles": "*",
	})
	s.must("roles/app", s.published(mount, map[string]any{
		"kind": "rabbitmq", "connection": "queue", "usernames": "app_a,app_b", "initial_password": "the-first-password",
		"grace_period": "1h", "secret_hosts": https,
	}))
	s.external()
	s.deploy(s.cluster, "Deployment", "web", 3, map[string]string{"sim/secret": "app", "sim/target": "rabbitmq", "sim/addr": n.Addr, "sim/every": "200ms"})
	s.consumer(map[string]any{"stabilization": "1s"}, []string{"web"})
	s.must("roles/app", map[string]any{"consumers": "web"})
	s.must("consumers/web", checks(map[string]any{
		"type": "http", "url": "https://" + https + "/api/overview", "basic_auth": "app", "ca_cert": ca, "timeout": "10s",
	}))
	began := time.Now()
	id := s.must("rotate/rabbitmq/app", nil)["rotation_id"].(string)
	told := s.until(id, "grace")
	require.Contains(t, s.timeline(told), "check 1 (http): passed")
	creds := s.creds("app")
	require.Equal(t, "app_b", creds["username"])
	s.holds("app", map[string]string{"username": "app_b", "password": creds["password"], "host": "primary." + s.ns})
	s.everyPod(creds["password"], "web")
	s.must("retire/rabbitmq/app", nil)
	s.until(id, "completed")
	require.ErrorIs(t, kube.LoginTo("rabbitmq")(s.ctx, n.Addr, "app_a", "the-first-password"), kube.ErrRefused)
	s.more("web", 20)
	require.NotContains(t, fmt.Sprint(told), creds["password"])
	s.shown("RabbitMQ credentials", s.restartsOf("web"), began)
}

// managedRabbitMQ is a broker whose management API speaks TLS, too.
func managedRabbitMQ(t *testing.T) (n *servers.RabbitMQNode, https, ca string) {
	t.Helper()
	a, err := servers.NewAuthority()
	require.NoError(t, err)
	cert, key, err := a.Issue("127.0.0.1")
	require.NoError(t, err)
	dir := t.TempDir()
	for name, text := range map[string]string{"cert.pem": cert, "key.pem": key} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o400))
	}
	port, err := servers.FreePort()
	require.NoError(t, err)
	n = servers.RabbitMQ(t, servers.WithRabbitMQConfig(
		"management.ssl.ip = 127.0.0.1", fmt.Sprintf("management.ssl.port = %d", port),
		"management.ssl.certfile = "+filepath.Join(dir, "cert.pem"), "management.ssl.keyfile = "+filepath.Join(dir, "key.pem"),
	))
	return n, net.JoinHostPort("127.0.0.1", fmt.Sprint(port)), a.PEM
}

// apiKey, R19: the health endpoint at the edge is asked with the new key in its header.
// Where it does not take it, everything goes back to the old one.
func apiKey(s *scene) {
	t := s.t
	inner, edge := newKeyServer(s, "key"), newKeyServer(s, "key")
	s.simulate(kube.WithLogin("api", inner.login))
	s.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	s.must("roles/key", map[string]any{
		"kind": "api-key", "document": "app", "field": "api-key", "previous_field": "api-key-previous", "grace_period": "1h",
		"secret_hosts": address(edge.Server),
	})
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 2, map[string]string{
		"sim/secret": "app", "sim/target": "api", "sim/username": "none", "sim/password-key": "api-key", "sim/every": "50ms",
	})
	s.consumer(map[string]any{"stabilization": "1s"}, []string{"web"})
	s.must("roles/key", map[string]any{"consumers": "web"})
	check := func(at *keyServer) map[string]any {
		return checks(map[string]any{
			"type": "http", "url": at.URL + "/v1/health", "headers": map[string]string{"X-API-Key": "{{key.value}}"},
			"ca_cert": certificate(at.Server), "times": 2, "timeout": "2s",
		})
	}
	_, err := s.write("consumers/web", check(inner))
	require.ErrorContains(t, err, "does not let its secret be sent to "+address(inner.Server))
	s.must("consumers/web", check(edge))

	began := time.Now()
	first := s.creds("key")["value"]
	id := s.must("rotate/api-key/key", nil)["rotation_id"].(string)
	s.until(id, "grace")
	second := s.creds("key")["value"]
	require.NotEqual(t, first, second)
	require.GreaterOrEqual(t, edge.checked.Load(), int64(2))
	s.holds("app", map[string]string{"api-key": second, "api-key-previous": first})
	s.everyPod(second, "web")
	s.must("retire/api-key/key", nil)
	told := s.until(id, "completed")
	require.NoError(t, kube.Until(s.ctx, func(ctx context.Context) error {
		if err := inner.login(ctx, "", "", first); !errors.Is(err, kube.ErrRefused) {
			return fmt.Errorf("the old key is still taken: %w", err)
		}
		return nil
	}))
	s.holds("app", map[string]string{"api-key": second, "api-key-previous": ""})
	require.NotContains(t, fmt.Sprint(told), second)

	// The pods are well with the next key, and the edge does not learn it.
	edge.stick()
	id = s.must("rotate/api-key/key", nil)["rotation_id"].(string)
	told = s.until(id, "rolled_back")
	require.Contains(t, s.timeline(told), "answered with 401, and 2xx is expected")
	require.Equal(t, second, s.creds("key")["value"])
	s.holds("app", map[string]string{"api-key": second})
	s.everyPod(second, "web")
	s.more("web", 20)
	s.shown("API key", s.restartsOf("web"), began)
}

// automatedCronJob, R24 and R25: what the CronJob did by its schedule. The role's own
// starts the same phases; while they run nobody starts another one.
func automatedCronJob(s *scene) {
	t := s.t
	n := servers.Redis(t, servers.WithUsers("app on >the-first-password ~* +@all -@admin"))
	mount := s.kv()
	s.must("connections/cache", map[string]any{
		"type": "redis", "addresses": n.Addr, "username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "*",
	})
	s.must("roles/app", s.published(mount, map[string]any{
		"kind": "redis", "connection": "cache", "username": "app", "initial_password": "the-first-password", "grace_period": "1h",
		"rotation_schedule": "0 2 1 * *",
	}))
	s.external()
	s.deploy(s.cluster, "Deployment", "web", 2, toRedis(n))
	s.consumer(map[string]any{"stabilization": "1s"}, []string{"web"})
	role, err := s.read("roles/app")
	require.NoError(t, err)
	monthly, err := time.Parse(time.RFC3339, role["next_rotation"].(string))
	require.NoError(t, err)
	require.Equal(t, [3]int{1, 2, 0}, [3]int{monthly.UTC().Day(), monthly.UTC().Hour(), monthly.UTC().Minute()})
	s.must("roles/app", map[string]any{"consumers": "web", "next_rotation": "1s"})
	began := time.Now()
	var id string
	require.NoError(t, kube.Until(s.ctx, func(context.Context) error {
		role, err := s.read("roles/app")
		if err != nil {
			return err
		}
		if id, _ = role["rotation_id"].(string); id == "" {
			return errors.New("its time has not come")
		}
		return nil
	}))
	_, err = s.write("rotate/redis/app", nil)
	require.ErrorContains(t, err, id, "one at a time")
	told := s.until(id, "grace")
	require.Equal(t, "schedule", told["trigger"])
	timeline := s.timeline(told)
	require.Less(t, strings.Index(timeline, "sync"), strings.Index(timeline, "restart"))
	require.Less(t, strings.Index(timeline, "restart"), strings.Index(timeline, "check"))
	creds := s.creds("app")
	s.holds("app", map[string]string{"username": "app", "password": creds["password"], "host": "primary." + s.ns})
	s.everyPod(creds["password"], "web")
	s.must("retire/redis/app", nil)
	s.until(id, "completed")
	require.False(t, accepts(t, n, "the-first-password"))
	role, err = s.read("roles/app")
	require.NoError(t, err)
	next, err := time.Parse(time.RFC3339, role["next_rotation"].(string))
	require.NoError(t, err)
	require.Equal(t, 1, next.UTC().Day())
	require.True(t, next.After(time.Now()))
	s.more("web", 50)
	s.shown("automated rotation", s.restartsOf("web"), began)
}

// vaultSealed, R27: in a Vault of its own, which is sealed while External Secrets is
// to read the new password from it.
func vaultSealed(shared *scene) {
	t := shared.t
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true, Raft: true})
	s := (&bed{vault: v, cluster: shared.cluster}).scene(t, "sealed-vault")
	proxy, err := servers.NewProxy(strings.TrimPrefix(v.Address, "http://"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = proxy.Close() })
	require.NoError(t, s.cluster.ApplyVaultStore(s.ctx, kube.VaultStore{
		Namespace: s.ns, Name: "harmonyflow", Address: "http://" + proxy.Addr(), Mount: s.ns, Token: v.Token,
	}))
	n := s.redis(nil)
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 2, toRedis(n))
	s.consumer(map[string]any{"stabilization": "1s"}, []string{"web"})
	s.must("roles/app", map[string]any{"consumers": "web"})
	began := time.Now()
	proxy.Cut(true) // the rotation waits in sync
	id := s.must("rotate/redis/app", nil)["rotation_id"].(string)
	require.NoError(t, kube.Until(s.ctx, func(context.Context) error {
		if told := s.rotation(id); told["phase"] != "sync" {
			return fmt.Errorf("it is in %v", told["phase"])
		}
		return nil
	}))
	second := s.served()
	require.NoError(t, s.c.Sys().SealWithContext(s.ctx))
	sealed := time.Now()
	proxy.Heal()
	require.NoError(t, s.cluster.WaitUnsynced(s.ctx, s.ns, "app", "sealed"))
	for _, password := range []string{"the-first-password", second} {
		require.True(t, accepts(t, n, password), "both are accepted while Vault is sealed")
	}
	s.more("web", 50)
	require.Equal(t, map[string]int{"the-first-password": 2}, s.running("web"))
	down := time.Since(sealed)

	require.NoError(t, v.Unseal(s.ctx))
	require.NoError(t, kube.Until(s.ctx, func(context.Context) error { _, err := s.read("rotations/" + id); return err }))
	s.until(id, "grace")
	s.holds("app", map[string]string{"password": second})
	s.everyPod(second, "web")
	require.Equal(t, 1, s.restartsOf("web"))
	s.must("retire/redis/app", nil)
	s.until(id, "completed")
	require.False(t, accepts(t, n, "the-first-password"))
	s.more("web", 50)
	s.shown(fmt.Sprintf("Vault sealed for %.0f s in the middle", down.Seconds()), s.restartsOf("web"), began)
}

// failureIndicators, R28 to R30 and R34: a good rotation passes every verification
// step; then each indicator in turn makes everything go back.
func failureIndicators(s *scene) {
	t := s.t
	n := s.redis(nil)
	s.synced("app")
	fault := atomic.Value{}
	fault.Store("")
	good := atomic.Value{} // the password that is meant to stay
	good.Store("")
	bad := func(name, password string) bool { return fault.Load() == name && password != good.Load() }
	s.deploy(s.cluster, "Deployment", "web", 2, toRedis(n))
	s.service("web", http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if p, ok := s.runningAs(r); !ok || bad("health", p.Password) {
			rw.WriteHeader(http.StatusInternalServerError)
		}
	}))
	prometheus := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		firing := 0
		for password := range s.running("web") {
			if bad("alerts", password) {
				firing = 1
			}
		}
		_, _ = fmt.Fprintf(rw, `{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"%d"]}]}}`, firing)
	}))
	t.Cleanup(prometheus.Close)
	s.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	s.consumer(map[string]any{"stabilization": "1s"}, []string{"web"})
	s.must("consumers/web", checks(
		map[string]any{"type": "http", "service": "http:web:80", "path": "/v1/health", "timeout": "2s"},
		map[string]any{"type": "logs", "forbid": "(?i)error", "timeout": "2s"},
		map[string]any{"type": "prometheus", "url": prometheus.URL, "query": `sum(ALERTS{alertstate="firing"})`, "expect": "== 0", "timeout": "2s"},
		map[string]any{"type": "pods", "selector": "app=web", "timeout": "2s"},
	))
	s.must("roles/app", map[string]any{"consumers": "web"})
	s.sim.CrashWhen(func(p kube.SimulatedPod) bool {
		if p.Logins == 1 && bad("logs", p.Password) {
			s.cluster.Log(s.ns, p.Name, "ERROR database connection failed")
		}
		return bad("crash", p.Password)
	})

	began := time.Now()
	before := s.creds("app")
	id := s.must("rotate/redis/app", nil)["rotation_id"].(string)
	told := s.until(id, "grace")
	creds := s.creds("app")
	require.NotEqual(t, before["version"], creds["version"], "1. Vault: the version increased")
	document, err := s.c.KVv2(s.ns).Get(s.ctx, "app")
	require.NoError(t, err)
	require.Equal(t, 2, document.VersionMetadata.Version)
	require.True(t, document.Data["password"] == creds["password"], "the content is right")
	s.holds("app", map[string]string{"username": "app", "password": creds["password"]}) // 2. Kubernetes Secret, ExternalSecret
	for i, check := range []string{"http", "logs", "prometheus", "pods"} {              // 3. application
		require.Contains(t, s.timeline(told), fmt.Sprintf("check %d (%s): passed", i+1, check))
	}
	verified, err := s.read("verify/redis/app") // 4. connectivity
	require.NoError(t, err)
	require.Equal(t, true, verified["ok"], "%v", verified["summary"])
	s.must("retire/redis/app", nil)
	s.until(id, "completed")

	good.Store(creds["password"])
	indicators := map[string]string{
		"crash":  "CrashLoopBackOff",
		"health": "answered with 500",
		"logs":   "lines with what is forbidden",
		"alerts": "the query gives 1",
	}
	for name, says := range indicators {
		fault.Store(name)
		id := s.must("rotate/redis/app", nil)["rotation_id"].(string)
		told := s.until(id, "rolled_back")
		require.Contains(t, s.timeline(told), says, name)
		require.True(t, good.Load() == s.creds("app")["password"], name)
		s.holds("app", map[string]string{"password": creds["password"]})
		s.everyPod(creds["password"], "web")
		require.True(t, accepts(t, n, creds["password"]), name)
	}
	fault.Store("")
	s.more("web", 50)
	s.shown(fmt.Sprintf("verification, and %d failure indicators that each went back", len(indicators)), s.restartsOf("web"), began)
}
