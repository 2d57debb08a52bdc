package vault

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestMain(m *testing.M) {
	// Started by the import of a library of the SDK, and never ended.
	leaks.Main(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

const patience = 20 * time.Second

const policy = `path "secret/data/app/*" { capabilities = ["create", "read", "update"] }`

// rig is the clients of connections that a test may change.
type rig struct {
	*Clients
	t   *testing.T
	log *strings.Builder

	mu      sync.Mutex
	entries map[string]*connection.Entry
	ahead   atomic.Int64 // of the clock
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, entries: map[string]*connection.Entry{}, log: &strings.Builder{}}
	r.Clients = New(func(_ context.Context, name string) (*connection.Entry, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.entries[name], nil
	}, hclog.New(&hclog.LoggerOptions{Output: r.log, Mutex: &sync.Mutex{}}))
	r.now = func() time.Time { return time.Now().Add(time.Duration(r.ahead.Load())) }
	t.Cleanup(func() { r.Close(context.Background()) })
	return r
}

func (r *rig) later(d time.Duration) { r.ahead.Add(int64(d)) }

func (r *rig) put(e *connection.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entries[e.Name] = e
}

func (r *rig) all(context.Context) ([]*connection.Entry, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*connection.Entry
	for _, e := range r.entries {
		out = append(out, e)
	}
	return out, nil
}

// write writes a secret through the connection.
func (r *rig) write(path string) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Second)
	defer cancel()
	return r.Do(ctx, "other", func(ctx context.Context, c *api.Client) error {
		_, err := c.Logical().WriteWithContext(ctx, path, map[string]any{"data": map[string]any{"k": "sent-value"}})
		return err
	})
}

func (r *rig) token() string {
	r.t.Helper()
	var token string
	require.NoError(r.t, r.Do(r.t.Context(), "other", func(_ context.Context, c *api.Client) error {
		token = c.Token()
		return nil
	}))
	return token
}

func entry(address, auth string, m kind.Material) *connection.Entry {
	e := &connection.Entry{
		Name: "other", Type: connection.TypeVault, Vault: &connection.Vault{Address: address, Auth: auth}, Admin: connection.NewAdmin(m),
	}
	if err := ValidateConfig(e.Vault, e.TLS); err != nil {
		panic(err)
	}
	return e
}

func class(t *testing.T, err error) kind.Class {
	t.Helper()
	var e *kind.Error
	require.ErrorAs(t, err, &e)
	return e.Class
}

func child(t *testing.T, v *servers.Vault, request api.TokenCreateRequest) *api.SecretAuth {
	t.Helper()
	require.NoError(t, v.Client().Sys().PutPolicyWithContext(t.Context(), "app", policy))
	request.Policies = []string{"app"}
	secret, err := v.Client().Auth().Token().CreateWithContext(t.Context(), &request)
	require.NoError(t, err)
	return secret.Auth
}

func ttl(t *testing.T, v *servers.Vault, token string) time.Duration {
	t.Helper()
	s, err := v.Client().Auth().Token().LookupWithContext(t.Context(), token)
	require.NoError(t, err)
	left, err := s.TokenTTL()
	require.NoError(t, err)
	return left
}

func revoke(t *testing.T, v *servers.Vault, token string) {
	t.Helper()
	require.NoError(t, v.Client().Auth().Token().RevokeOrphanWithContext(t.Context(), token))
}

func TestRealVault(t *testing.T) {
	ctx := t.Context()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})

	t.Run("a token is renewed at use when a third of its life is left", func(t *testing.T) {
		r := newRig(t)
		auth := child(t, v, api.TokenCreateRequest{Period: "100h"})
		r.put(entry(v.Address, connection.AuthToken, kind.Material{Secret: auth.ClientToken}))
		require.NoError(t, r.write("secret/data/app/a"))
		lent := func() time.Time { return r.sessions["other"].lent().expires }
		before := lent()
		r.later(60 * time.Hour)
		require.NoError(t, r.write("secret/data/app/a"))
		require.Equal(t, before, lent(), "40 hours are left")
		r.later(10 * time.Hour)
		require.NoError(t, r.write("secret/data/app/a"))
		require.WithinDuration(t, r.now().Add(100*time.Hour), lent(), time.Minute)
	})

	t.Run("a token that nobody uses is renewed, too", func(t *testing.T) {
		r := newRig(t)
		auth := child(t, v, api.TokenCreateRequest{Period: "30s"})
		r.put(entry(v.Address, connection.AuthToken, kind.Material{Secret: auth.ClientToken}))
		idle := func() bool {
			r.Clients.mu.Lock()
			defer r.Clients.mu.Unlock()
			return !r.renewing
		}
		tick := func() {
			r.Renew(r.all, func() (uint64, bool) { return 0, true })
			require.Eventually(t, idle, patience, time.Millisecond)
		}
		tick()
		require.NotNil(t, r.sessions["other"])
		// Two seconds of its life are gone for Vault before it is renewed.
		require.Eventually(t, func() bool { return ttl(t, v, auth.ClientToken) <= 28*time.Second }, patience, 100*time.Millisecond)
		r.later(25 * time.Second)
		tick()
		require.Greater(t, ttl(t, v, auth.ClientToken), 28*time.Second)
		require.Empty(t, r.log.String())

		revoke(t, v, auth.ClientToken)
		r.later(25 * time.Second)
		tick()
		tick()
		require.Equal(t, 1, strings.Count(r.log.String(), "write connections/other with a new one"), "told once: %s", r.log)
		require.NotContains(t, r.log.String(), auth.ClientToken)
	})

	t.Run("a revoked token is told", func(t *testing.T) {
		r := newRig(t)
		auth := child(t, v, api.TokenCreateRequest{TTL: "1h"})
		r.put(entry(v.Address, connection.AuthToken, kind.Material{Secret: auth.ClientToken}))
		require.NoError(t, r.write("secret/data/app/a"))
		revoke(t, v, auth.ClientToken)
		for range 2 {
			err := r.write("secret/data/app/a")
			require.ErrorContains(t, err, `the token of connection "other" is not accepted any more`)
			require.ErrorContains(t, err, "write connections/other with a new one")
			require.NotContains(t, err.Error(), auth.ClientToken)
			require.Equal(t, kind.Unavailable, class(t, err))
		}
		// A new one counts at once.
		fresh := child(t, v, api.TokenCreateRequest{TTL: "1h"})
		r.put(entry(v.Address, connection.AuthToken, kind.Material{Secret: fresh.ClientToken}))
		require.NoError(t, r.write("secret/data/app/a"))
	})

	t.Run("what the policy forbids costs no login", func(t *testing.T) {
		r := newRig(t)
		id, secret, err := v.AppRole(ctx, "forbidden", policy, "1h")
		require.NoError(t, err)
		r.put(entry(v.Address, connection.AuthAppRole, kind.Material{Username: id, Secret: secret}))
		before := r.token()
		err = r.write("secret/data/elsewhere")
		require.Equal(t, kind.Unavailable, class(t, err))
		require.ErrorContains(t, err, "PUT secret/data/elsewhere was answered with 403: permission denied")
		require.NotContains(t, err.Error(), "sent-value")
		require.Equal(t, before, r.token())
	})

	t.Run("approle logs in again", func(t *testing.T) {
		r := newRig(t)
		id, secret, err := v.AppRole(ctx, "again", policy, "1h")
		require.NoError(t, err)
		r.put(entry(v.Address, connection.AuthAppRole, kind.Material{Username: id, Secret: secret}))
		var wg sync.WaitGroup
		tokens := make([]string, 20)
		for i := range tokens {
			wg.Go(func() { tokens[i] = r.token() })
		}
		wg.Wait()
		for _, token := range tokens {
			require.Equal(t, tokens[0], token, "callers share one login")
		}
		revoke(t, v, tokens[0])
		require.NoError(t, r.write("secret/data/app/a"), "the call is made again with a new token")
		second := r.token()
		require.NotEqual(t, tokens[0], second)
		r.later(45 * time.Minute)
		require.NoError(t, r.write("secret/data/app/a"))
		require.NotEqual(t, second, r.token(), "in time before the token ends")
	})

	t.Run("a revoked secret_id is told, and not tried again at once", func(t *testing.T) {
		r := newRig(t)
		p, err := servers.NewProxy(strings.TrimPrefix(v.Address, "http://"))
		require.NoError(t, err)
		defer func() { _ = p.Close() }()
		id, secret, err := v.AppRole(ctx, "gone", policy, "1h")
		require.NoError(t, err)
		r.put(entry("http://"+p.Addr(), connection.AuthAppRole, kind.Material{Username: id, Secret: secret}))
		token := r.token()
		_, err = v.Client().Logical().WriteWithContext(ctx, "auth/approle/role/gone/secret-id/destroy", map[string]any{"secret_id": secret})
		require.NoError(t, err)
		require.NoError(t, r.write("secret/data/app/a"), "the token lives on")
		revoke(t, v, token)
		sent := p.Capture()
		for range 10 {
			err = r.write("secret/data/app/a")
			require.Equal(t, kind.Unavailable, class(t, err), "waiting may help")
			require.ErrorContains(t, err, `the Vault of connection "other" refuses the login by approle; check its role_id, secret_id and auth_mount`)
			require.NotContains(t, err.Error(), secret)
		}
		require.Equal(t, 1, strings.Count(string(sent()), "auth/approle/login"), "or Vault locks the role")
	})

	t.Run("a batch token is used until it ends", func(t *testing.T) {
		r := newRig(t)
		auth := child(t, v, api.TokenCreateRequest{Type: "batch", TTL: "1h"})
		r.put(entry(v.Address, connection.AuthToken, kind.Material{Secret: auth.ClientToken}))
		require.NoError(t, r.write("secret/data/app/a"))
		r.later(50 * time.Minute)
		require.NoError(t, r.write("secret/data/app/a"))
		s, err := r.Clients.session(r.entries["other"])
		require.NoError(t, err)
		require.ErrorContains(t, s.keep(ctx), "cannot be renewed; write connections/other with a periodic token")
	})

	t.Run("verify", func(t *testing.T) {
		id, secret, err := v.AppRole(ctx, "verified", policy, "1h")
		require.NoError(t, err)
		e := entry(v.Address, connection.AuthAppRole, kind.Material{Username: id, Secret: secret})
		info, err := Verify(ctx, e)
		require.NoError(t, err)
		require.Empty(t, info.Warnings)
		require.Contains(t, info.Nodes[0].Note, "Vault 1.")
		list, err := v.Client().Logical().ListWithContext(ctx, "auth/token/accessors")
		require.NoError(t, err)
		for _, accessor := range list.Data["keys"].([]any) {
			s, err := v.Client().Auth().Token().LookupAccessorWithContext(ctx, accessor.(string))
			if err == nil {
				require.NotContains(t, s.Data["policies"], any("verified"), "the trial's token is revoked")
			}
		}
		other := strings.Replace(v.Address, "127.0.0.1", "localhost", 1)
		again, err := Verify(ctx, entry(other, connection.AuthToken, kind.Material{Secret: v.Token}))
		require.NoError(t, err)
		require.Equal(t, info.Identity, again.Identity, "one cluster behind two addresses")
		require.Len(t, again.Warnings, 1)
		require.Contains(t, again.Warnings[0], "root token")

		_, err = Verify(ctx, entry(v.Address, connection.AuthToken, kind.Material{Secret: "hvs.a-token-of-nobody"}))
		require.ErrorContains(t, err, "is not accepted")
		require.NotContains(t, err.Error(), "a-token-of-nobody")
		max := child(t, v, api.TokenCreateRequest{TTL: "1h", ExplicitMaxTTL: "2h", NumUses: 5})
		info, err = Verify(ctx, entry(v.Address, connection.AuthToken, kind.Material{Secret: max.ClientToken}))
		require.NoError(t, err)
		require.Len(t, info.Warnings, 2, "%v", info.Warnings)
	})

	t.Run("nothing comes from the environment", func(t *testing.T) {
		auth := child(t, v, api.TokenCreateRequest{TTL: "1h"})
		for name, value := range map[string]string{
			"VAULT_ADDR": "http://127.0.0.1:1", "VAULT_AGENT_ADDR": "http://127.0.0.1:1", "VAULT_TOKEN": "environment", "VAULT_NAMESPACE": "environment",
			"VAULT_HEADERS": `{"X-Environment":"environment"}`, "VAULT_WRAP_TTL": "60s", "VAULT_PROXY_ADDR": "http://127.0.0.1:1",
			"VAULT_HTTP_PROXY": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1", "VAULT_SKIP_VERIFY": "true", "VAULT_RATE_LIMIT": "0.001",
			"VAULT_MAX_RETRIES": "50", "VAULT_TLS_SERVER_NAME": "environment", "VAULT_SRV_LOOKUP": "true", "VAULT_CLIENT_TIMEOUT": "1ns",
		} {
			t.Setenv(name, value)
		}
		p, err := servers.NewProxy(strings.TrimPrefix(v.Address, "http://"))
		require.NoError(t, err)
		defer func() { _ = p.Close() }()
		sent := p.Capture()
		r := newRig(t)
		r.put(entry("http://"+p.Addr(), connection.AuthToken, kind.Material{Secret: auth.ClientToken}))
		require.NoError(t, r.write("secret/data/app/a"))
		require.NotContains(t, strings.ToLower(string(sent())), "environment")
	})
}

func TestSealedHangingAndGone(t *testing.T) {
	ctx := t.Context()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true, Raft: true})
	require.NoError(t, v.Client().Sys().MountWithContext(ctx, "secret", &api.MountInput{Type: "kv-v2"}))
	p, err := servers.NewProxy(strings.TrimPrefix(v.Address, "http://"))
	require.NoError(t, err)
	defer func() { _ = p.Close() }()
	r := newRig(t)
	id, secret, err := v.AppRole(ctx, "app", policy, "1h")
	require.NoError(t, err)
	r.put(entry("http://"+p.Addr(), connection.AuthAppRole, kind.Material{Username: id, Secret: secret}))
	require.Eventually(t, func() bool { return r.write("secret/data/app/a") == nil }, patience, 50*time.Millisecond, "kv upgrades itself")

	require.NoError(t, v.Client().Sys().SealWithContext(ctx))
	err = r.write("secret/data/app/a")
	require.Equal(t, kind.Unavailable, class(t, err))
	require.ErrorContains(t, err, "503: Vault is sealed")
	_, err = Verify(ctx, r.entries["other"])
	require.ErrorContains(t, err, "Vault is sealed")
	require.NoError(t, v.Unseal(ctx))
	require.Eventually(t, func() bool { return r.write("secret/data/app/a") == nil }, patience, 50*time.Millisecond)

	p.Blackhole(true)
	err = r.write("secret/data/app/a")
	require.Equal(t, kind.Unreachable, class(t, err))
	require.ErrorContains(t, err, "did not answer in time")
	// Close ends what hangs.
	hangs := make(chan error)
	go func() {
		hangs <- r.Do(ctx, "other", func(ctx context.Context, c *api.Client) error {
			hangs <- nil
			_, err := c.Logical().ReadWithContext(ctx, "secret/data/app/a")
			return err
		})
	}()
	<-hangs
	go r.Close(ctx)
	err = <-hangs
	require.ErrorContains(t, err, "the engine is being stopped")
	require.ErrorContains(t, r.write("secret/data/app/a"), "the engine is being stopped")

	r = newRig(t)
	r.put(entry("http://"+p.Addr(), connection.AuthAppRole, kind.Material{Username: id, Secret: secret}))
	p.Cut(true)
	require.Equal(t, kind.Unreachable, class(t, r.write("secret/data/app/a")))
	p.Heal()
	require.NoError(t, r.write("secret/data/app/a"), "a connection that was lost is not used again")
	require.NoError(t, p.Close())
	require.Eventually(t, func() bool {
		err := r.write("secret/data/app/a")
		require.Equal(t, kind.Unreachable, class(t, err))
		return strings.Contains(err.Error(), "cannot be reached: connection refused")
	}, patience, time.Millisecond, "after an idle connection was found closed")
}

// front is a TLS server before a real Vault, or in place of one.
func front(t *testing.T, h http.Handler) (*httptest.Server, string) {
	t.Helper()
	s := httptest.NewTLSServer(h)
	t.Cleanup(s.Close)
	return s, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

func TestTLS(t *testing.T) {
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	to, err := url.Parse(v.Address)
	require.NoError(t, err)
	var namespaces sync.Map
	proxy := httputil.NewSingleHostReverseProxy(to)
	s, ca := front(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		namespaces.Store(req.URL.Path, req.Header.Get("X-Vault-Namespace"))
		req.Header.Del("X-Vault-Namespace") // which only Vault Enterprise knows
		proxy.ServeHTTP(w, req)
	}))
	e := entry(s.URL, connection.AuthToken, kind.Material{Secret: v.Token})
	r := newRig(t)
	r.put(e)
	err = r.write("secret/data/app/a")
	require.Equal(t, kind.Unavailable, class(t, err))
	require.ErrorContains(t, err, "its certificate is not trusted")

	trusting := *e
	trusting.TLS = connection.TLS{CA: ca}
	trusting.Vault = &connection.Vault{Address: s.URL, Auth: connection.AuthToken, Namespace: "team/blue"}
	r.put(&trusting)
	require.NoError(t, r.write("secret/data/app/a"))
	sent, _ := namespaces.Load("/v1/secret/data/app/a")
	require.Equal(t, "team/blue", sent)
	info, err := Verify(t.Context(), &trusting)
	require.NoError(t, err)
	require.True(t, strings.HasSuffix(info.Identity, "/team/blue"), info.Identity)
	sent, _ = namespaces.Load("/v1/sys/health")
	require.Empty(t, sent)

	misnamed := trusting
	misnamed.TLS.ServerName = "vault.invalid"
	r.put(&misnamed)
	require.ErrorContains(t, r.write("secret/data/app/a"), "tls_server_name")
	blind := trusting
	blind.TLS = connection.TLS{SkipVerify: true}
	info, err = Verify(t.Context(), &blind)
	require.NoError(t, err)
	require.Contains(t, strings.Join(info.Warnings, " "), "tls_skip_verify is on")

	plain := *e
	plain.Vault = &connection.Vault{Address: strings.Replace(v.Address, "http:", "https:", 1), Auth: connection.AuthToken}
	r.put(&plain)
	require.ErrorContains(t, r.write("secret/data/app/a"), "does not speak TLS")
}

// fake answers in place of a Vault.
func fake(t *testing.T, h http.HandlerFunc) (*rig, *connection.Entry) {
	t.Helper()
	s, ca := front(t, h)
	r := newRig(t)
	e := entry(s.URL, connection.AuthToken, kind.Material{Secret: "token-of-the-test"})
	e.TLS.CA = ca
	r.put(e)
	return r, e
}

const lookedUp = `{"data":{"ttl":0,"renewable":false,"policies":["app"]}}`

func TestAnswersAndTheirClass(t *testing.T) {
	for status, want := range map[int]kind.Class{
		400: kind.Definite, 404: kind.Definite, 405: kind.Definite, 413: kind.Definite,
		403: kind.Unavailable, 412: kind.Unavailable, 429: kind.Unavailable, 472: kind.Unavailable, 473: kind.Unavailable,
		500: kind.Unavailable, 502: kind.Unavailable, 503: kind.Unavailable,
	} {
		var calls atomic.Int64
		r, _ := fake(t, func(w http.ResponseWriter, req *http.Request) {
			if strings.HasSuffix(req.URL.Path, "lookup-self") {
				_, _ = w.Write([]byte(lookedUp))
				return
			}
			calls.Add(1)
			w.WriteHeader(status)
			_, _ = w.Write([]byte(`{"errors":["sent-value is wrong, token-of-the-test too; permission denied"]}`))
		})
		err := r.write("secret/data/app/a")
		require.Equal(t, want, class(t, err), status)
		require.NotContains(t, err.Error(), "sent-value")
		require.NotContains(t, err.Error(), "token-of-the-test")
		require.ErrorContains(t, err, "permission denied")
		require.Equal(t, status, AnswerOf(err).Status)
		require.EqualValues(t, 1, calls.Load(), "nothing is repeated")
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	var stranger atomic.Int64
	other, _ := front(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { stranger.Add(1) }))
	for _, code := range []int{301, 302, 303, 307, 308} {
		r, _ := fake(t, func(w http.ResponseWriter, req *http.Request) {
			if strings.HasSuffix(req.URL.Path, "lookup-self") {
				_, _ = w.Write([]byte(lookedUp))
				return
			}
			http.Redirect(w, req, other.URL+req.URL.Path, code)
		})
		err := r.write("secret/data/app/a")
		require.Equal(t, kind.Unavailable, class(t, err))
		require.ErrorContains(t, err, "standby that sends its clients to \"127.0.0.1")
	}
	require.Zero(t, stranger.Load())
}

func TestAnswersWithoutSenseOrEnd(t *testing.T) {
	for name, c := range map[string]struct {
		body  string
		class kind.Class
	}{
		"no JSON": {"<html>sent-value</html>", kind.Unavailable},
		"no end":  {`{"data":{"x":"` + strings.Repeat("x", maxAnswer) + `"}}`, kind.Definite},
	} {
		r, _ := fake(t, func(w http.ResponseWriter, req *http.Request) {
			if strings.HasSuffix(req.URL.Path, "lookup-self") {
				_, _ = w.Write([]byte(lookedUp))
				return
			}
			_, _ = w.Write([]byte(c.body))
		})
		err := r.write("secret/data/app/a")
		require.Equal(t, c.class, class(t, err), name)
		require.NotContains(t, err.Error(), "sent-value")
	}
}

// A policy may forbid a token to look itself up: then a 403 cannot be told from
// a lost token, and must not cost a login each time.
func TestForbiddenLookupCostsOneLoginAMinute(t *testing.T) {
	var logins atomic.Int64
	r, e := fake(t, func(w http.ResponseWriter, req *http.Request) {
		if strings.HasSuffix(req.URL.Path, "/login") {
			logins.Add(1)
			_, _ = w.Write([]byte(`{"auth":{"client_token":"t","lease_duration":3600}}`))
			return
		}
		w.WriteHeader(http.StatusForbidden)
	})
	e.Vault.Auth, e.Vault.AuthMount = connection.AuthAppRole, "approle"
	for range 10 {
		require.Equal(t, kind.Unavailable, class(t, r.write("secret/data/app/a")))
	}
	require.EqualValues(t, 2, logins.Load())
	r.later(2 * time.Minute)
	require.Error(t, r.write("secret/data/app/a"))
	require.EqualValues(t, 3, logins.Load())
}

// The minimal Vault has no Kubernetes auth, so a server here takes its place:
// what it is sent is what
// https://developer.hashicorp.com/vault/api-docs/auth/kubernetes#login says.
func TestKubernetes(t *testing.T) {
	var logins []map[string]string
	r, e := fake(t, func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/v1/auth/k8s/blue/login" {
			var body map[string]string
			_ = json.NewDecoder(req.Body).Decode(&body)
			logins = append(logins, body)
			_, _ = w.Write([]byte(`{"auth":{"client_token":"t` + body["jwt"] + `","lease_duration":60,"renewable":true}}`))
			return
		}
		_, _ = w.Write([]byte(`{"data":{}}`))
	})
	e.Vault.Auth, e.Vault.AuthMount = connection.AuthKubernetes, "k8s/blue"
	e.Admin = connection.NewAdmin(kind.Material{Username: "engine", Secret: "given"})
	require.Equal(t, "tgiven", r.token())

	without := *e
	without.Admin = connection.NewAdmin(kind.Material{Username: "engine"})
	r.put(&without)
	err := r.write("secret/data/app/a")
	require.ErrorContains(t, err, "there is none at "+tokenFile)
	require.Equal(t, kind.Unavailable, class(t, err))
	file := filepath.Join(t.TempDir(), "token")
	r.sessions["other"].tokenFile = file
	require.NoError(t, os.WriteFile(file, []byte("first\n"), 0o600))
	require.Equal(t, "tfirst", r.token())
	require.NoError(t, os.WriteFile(file, []byte("second"), 0o600))
	require.Equal(t, "tfirst", r.token())
	r.later(45 * time.Second)
	require.Equal(t, "tsecond", r.token(), "the file is read at each login")
	require.Equal(t, []map[string]string{
		{"role": "engine", "jwt": "given"}, {"role": "engine", "jwt": "first"}, {"role": "engine", "jwt": "second"},
	}, logins)
}

func TestAddresses(t *testing.T) {
	for address, says := range map[string]string{
		"":                                 "address is missing",
		"vault.example.com:8200":           "address",
		"ftp://vault.example.com":          "allowed are https://",
		"unix:///run/vault.sock":           "no URL of a Vault",
		"https://u:p@vault.example.com":    "no URL of a Vault",
		"https://vault.example.com/v1":     "scheme, host and port alone",
		"https://vault.example.com?x=y":    "no URL of a Vault",
		"http://vault.example.com:8200":    "use https://",
		"http://10.1.2.3:8200":             "use https://",
		"https://169.254.169.254":          "metadata",
		"https://[fe80::1%25eth0]:8200":    "metadata",
		"https://[fd00:ec2::254]":          "metadata",
		"https://0.0.0.0:8200":             "no Vault is asked there",
		"https://[::ffff:169.254.169.254]": "metadata",
		"https://vault.example.com:8200/":  "",
		"http://127.0.0.1:8200":            "",
		"http://localhost:8200":            "",
		"http://[::1]:8200":                "",
		"https://10.1.2.3":                 "",
	} {
		err := ValidateConfig(&connection.Vault{Address: address, Auth: connection.AuthToken}, connection.TLS{})
		if says == "" {
			require.NoError(t, err, address)
			continue
		}
		require.ErrorContains(t, err, says, address)
		require.NotContains(t, err.Error(), "u:p@")
	}
	require.NoError(t, ValidateConfig(&connection.Vault{Address: "http://vault.mesh", Auth: "token"}, connection.TLS{SkipVerify: true}))
	for _, bad := range []connection.Vault{
		{Auth: "ldap"},
		{Auth: "token", Namespace: "a b"},
		{Auth: "approle", AuthMount: "../sys"},
		{Auth: "token", AllowedPublishPaths: []string{"secret"}},
		{Auth: "token", AllowedPublishPaths: []string{"/secret/x"}},
		{Auth: "token", AllowedPublishPaths: []string{"secret/[a"}},
	} {
		bad.Address = "https://vault.example.com"
		require.Error(t, ValidateConfig(&bad, connection.TLS{}))
	}
	// What a name leads to is looked at when it is dialled.
	_, err := dialer(false).Dial("tcp", "169.254.169.254:80")
	require.ErrorContains(t, err, "metadata service")
	_, err = dialer(true).Dial("tcp", "192.0.2.1:80")
	require.ErrorContains(t, err, "is not this machine")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	c, err := dialer(true).Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	require.NoError(t, c.Close())
}
