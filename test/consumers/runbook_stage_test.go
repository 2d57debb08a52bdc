package consumers_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// simulate lets the pods of the scene do more than log in. There must be none yet.
func (s *scene) simulate(options ...kube.SimulatorOption) {
	s.sim.Stop()
	s.sim = s.cluster.Simulate(append(options, kube.InNamespace(s.ns))...)
	s.t.Cleanup(s.sim.Stop)
}

// kv mounts a KV version 2 beside the engine, lets roles publish to it below
// harmonyflow/, and has a SecretStore kv read it. It returns the mount.
func (s *scene) kv() string {
	s.t.Helper()
	mount := "kv-" + s.ns
	require.NoError(s.t, s.c.Sys().MountWithContext(s.ctx, mount, &api.MountInput{Type: "kv", Options: map[string]string{"version": "2"}}))
	s.t.Cleanup(func() { _ = s.c.Sys().UnmountWithContext(context.WithoutCancel(s.ctx), mount) })
	token, err := s.vault.TokenFor(s.ctx, "publish-"+s.ns, fmt.Sprintf(`
path "%s/data/harmonyflow/*" { capabilities = ["create", "read", "update"] }
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }`, mount))
	require.NoError(s.t, err)
	s.must("connections/self", map[string]any{
		"type": "vault", "address": s.vault.Address, "token": token, "allowed_roles": "*", "allowed_publish_paths": mount + "/harmonyflow/*",
	})
	reader, err := s.vault.TokenFor(s.ctx, "read-"+s.ns, fmt.Sprintf(`
path "%s/data/harmonyflow/*" { capabilities = ["read"] }
path "auth/token/lookup-self" { capabilities = ["read"] }`, mount))
	require.NoError(s.t, err)
	require.NoError(s.t, kube.Until(s.ctx, func(ctx context.Context) error { // a new KV mount is being upgraded for a moment
		_, err := s.c.KVv2(mount).Put(ctx, "harmonyflow/"+s.ns, map[string]any{"host": "primary." + s.ns})
		return err
	}))
	require.NoError(s.t, s.cluster.ApplyVaultStore(s.ctx, kube.VaultStore{
		Namespace: s.ns, Name: "kv", Address: s.vault.Address, Mount: mount, Token: reader,
	}))
	return mount
}

// published makes role fill fields of a secret of the KV mount.
func (s *scene) published(mount string, role map[string]any) map[string]any {
	role["publish_connection"], role["publish_mount"], role["publish_path"] = "self", mount, "harmonyflow/"+s.ns
	role["field"], role["username_field"] = "password", "username"
	return role
}

// external makes ExternalSecret and Secret app of what the KV mount holds.
func (s *scene) external() {
	s.t.Helper()
	require.NoError(s.t, s.cluster.ApplyExternalSecret(s.ctx, kube.ExternalSecret{Namespace: s.ns, Name: "app", Store: "kv", Document: "harmonyflow/" + s.ns}))
	require.NoError(s.t, s.cluster.WaitExternalSecret(s.ctx, s.ns, "app"))
}

// holds requires that ExternalSecret name is well, that its Secret holds what the
// roles serve.
func (s *scene) holds(name string, want map[string]string) {
	s.t.Helper()
	require.NoError(s.t, s.cluster.WaitExternalSecret(s.ctx, s.ns, name))
	secret, err := s.cluster.Secret(s.ctx, s.ns, name)
	require.NoError(s.t, err)
	for k, v := range want {
		require.True(s.t, v == secret[k], "field %s of the Secret is another one", k) // shows neither
	}
}

// creds are what a role serves.
func (s *scene) creds(role string) map[string]string {
	s.t.Helper()
	data, err := s.read("creds/" + role)
	require.NoError(s.t, err)
	out := map[string]string{}
	for k, v := range data {
		out[k] = fmt.Sprint(v)
	}
	return out
}

// everyPod requires that living pods of workloads run with password alone, and that
// each of them has logged in with it.
func (s *scene) everyPod(password string, workloads ...string) {
	s.t.Helper()
	for _, name := range workloads {
		for running := range s.running(name) {
			require.True(s.t, running == password, "a pod of %s runs with another password", name)
		}
		require.NoError(s.t, s.sim.Wait(s.ctx, s.ns, name, func(pods []kube.SimulatedPod) bool {
			for _, p := range pods {
				if !p.Gone && p.Logins == 0 {
					return false
				}
			}
			return true
		}), name)
	}
}

// made is when the first and the last of the pods of workloads were made.
func (s *scene) made(workloads ...string) (span [2]time.Time) {
	s.t.Helper()
	for _, name := range workloads {
		pods, err := s.cluster.PodsOf(s.ctx, s.ns, name)
		require.NoError(s.t, err)
		require.NotEmpty(s.t, pods, name)
		for _, p := range pods {
			at := p.CreationTimestamp.Time
			if span[0].IsZero() || at.Before(span[0]) {
				span[0] = at
			}
			if at.After(span[1]) {
				span[1] = at
			}
		}
	}
	return span
}

// more waits until there were n more logins of all pods.
func (s *scene) more(workload string, n int) {
	s.t.Helper()
	before := s.sim.Total().Logins
	require.NoError(s.t, s.sim.Wait(s.ctx, s.ns, workload, func([]kube.SimulatedPod) bool { return s.sim.Total().Logins >= before+n }))
}

// restartsOf is how often workloads were restarted, in all.
func (s *scene) restartsOf(workloads ...string) int {
	s.t.Helper()
	sum := 0
	for _, w := range workloads {
		kindOf, name, ok := strings.Cut(w, "/")
		if !ok {
			kindOf, name = "deployment", w
		}
		var generation int
		_, err := fmt.Sscan(s.revision(kindOf, name), &generation)
		require.NoError(s.t, err)
		sum += generation - 1
	}
	return sum
}

// shown prints the figures of a section of the runbook; no client was ever refused.
func (s *scene) shown(section string, restarts int, since time.Time) {
	s.t.Helper()
	total := s.sim.Total()
	figure(s.t, "runbook, %s: %d logins, %d refused, %d restarts, %.0f s", section, total.Logins, total.Refused, restarts, time.Since(since).Seconds())
	require.Zero(s.t, total.Refused)
	require.Positive(s.t, total.Logins)
}

func (s *scene) timeline(told map[string]any) string {
	return strings.Join(texts(told["timeline"]), "\n")
}

// service makes a Service of a workload, whose pods answer with h.
func (s *scene) service(name string, h http.Handler) {
	s.t.Helper()
	s.cluster.Serve(s.ns, name, h)
	require.NoError(s.t, s.cluster.Apply(s.ctx, fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: %[2]s}
spec: {selector: {app: %[1]s}, ports: [{name: http, port: 80, targetPort: 8080}]}
`, name, s.ns)))
}

// runningAs is the pod that a request came to, as the simulator knows it.
func (s *scene) runningAs(r *http.Request) (pod kube.SimulatedPod, ok bool) {
	to := kube.PodOf(r)
	if to == nil {
		return pod, false
	}
	for _, p := range s.sim.Pods(s.ns, "web") {
		if p.Name == to.Name && !p.Gone {
			return p, true
		}
	}
	return pod, false
}

func checks(list ...map[string]any) map[string]any {
	text, err := json.Marshal(list)
	if err != nil {
		panic(err) // they are made of texts
	}
	return map[string]any{"checks": string(text)}
}

func certificate(s *httptest.Server) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

func address(s *httptest.Server) string { return s.Listener.Addr().String() }

// keyServer is an API that takes the key which a role serves, and the one before it
// while it is accepted. As such servers do, it looks a key up that it does not know.
type keyServer struct {
	*httptest.Server
	s       *scene
	role    string
	mu      sync.Mutex
	known   []string
	read    time.Time
	stuck   bool // it looks nothing up any more
	checked atomic.Int64
}

// keyTTL is how long the server goes by what it knows.
const keyTTL = 200 * time.Millisecond

func newKeyServer(s *scene, role string) *keyServer {
	k := &keyServer{s: s, role: role}
	k.Server = httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if !k.takes(r.Context(), r.Header.Get("X-API-Key")) {
			http.Error(rw, "no such key", http.StatusUnauthorized)
			return
		}
		if strings.HasPrefix(r.UserAgent(), "vault-plugin-secrets-harmonyflow/") {
			k.checked.Add(1)
		}
		_, _ = io.WriteString(rw, "well")
	}))
	s.t.Cleanup(k.Close)
	return k
}

func (k *keyServer) takes(ctx context.Context, key string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.stuck && (time.Since(k.read) > keyTTL || !contains(k.known, key)) {
		answer, err := k.s.c.Logical().ReadWithContext(ctx, k.s.ns+"/creds/"+k.role)
		if err == nil && answer != nil {
			k.known, k.read = nil, time.Now()
			for _, field := range []string{"value", "previous_value"} {
				if v, _ := answer.Data[field].(string); v != "" {
					k.known = append(k.known, v)
				}
			}
		}
	}
	return key != "" && contains(k.known, key)
}

func contains(list []string, text string) bool {
	for _, e := range list {
		if e == text {
			return true
		}
	}
	return false
}

func (k *keyServer) stick() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.stuck = true
}

// login calls the API as a program does that has read its key.
func (k *keyServer) login(ctx context.Context, _, _, key string) error {
	return callAPI(ctx, k.Server, http.MethodGet, "/v1/health", http.Header{"X-Api-Key": {key}})
}

// callAPI makes one request, on a connection of its own.
func callAPI(ctx context.Context, to *httptest.Server, method, path string, header http.Header) error {
	r, err := http.NewRequestWithContext(ctx, method, to.URL+path, nil)
	if err != nil {
		return err
	}
	r.Header = header
	resp, err := to.Client().Do(r)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	_, _ = io.Copy(io.Discard, resp.Body)
	switch resp.StatusCode {
	case http.StatusOK:
		return nil
	case http.StatusUnauthorized:
		return fmt.Errorf("%w: %s", kube.ErrRefused, path)
	}
	return fmt.Errorf("%s answered with %d", path, resp.StatusCode)
}

// sessions is what the pods of session-state-service do: each of them signs tokens
// with the key that it started with, and each has to verify those of all others.
type sessions struct {
	*httptest.Server
	s *scene

	mu     sync.Mutex
	issued []string // tokens that have not run out
}

const (
	tokenLife    = 20 * time.Second
	sessionsApp  = "session-state-service"
	accessField  = "jwt-secret"
	refreshField = "jwt-refresh-secret"
	// maxSessions bounds what is verified again.
	maxSessions = 200
)

// previousOf names the fields of the runbook.
var previousOf = map[string]string{accessField: "jwt-secret-previous", refreshField: "jwt-refresh-previous"}

func newSessions(s *scene) *sessions {
	h := &sessions{s: s}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/auth/login", h.serveLogin)
	mux.HandleFunc("GET /v1/verify", func(rw http.ResponseWriter, r *http.Request) {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if err := h.verified(token); err != nil {
			http.Error(rw, "no such session", http.StatusUnauthorized)
		}
	})
	mux.HandleFunc("GET /v1/admin/sessions/active", func(rw http.ResponseWriter, r *http.Request) {
		admin, err := s.c.Logical().ReadWithContext(r.Context(), s.ns+"/creds/admin")
		if err != nil || admin == nil || r.Header.Get("Authorization") != "Bearer "+fmt.Sprint(admin.Data["value"]) {
			http.Error(rw, "who are you", http.StatusUnauthorized)
			return
		}
		_, _ = fmt.Fprint(rw, h.active())
	})
	h.Server = httptest.NewTLSServer(mux)
	s.t.Cleanup(h.Close)
	return h
}

// token signs as every library does: with the bytes of the text.
func token(field, key string) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: []byte(key)}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", err
	}
	now := time.Now()
	return jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: field, Subject: "test", ID: rand.Text(), IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(tokenLife)),
	}).Serialize()
}

var errExpired = errors.New("it has run out")

// verify is what one pod does with a token.
func verify(text string, has map[string]string) error {
	parsed, err := jwt.ParseSigned(text, []jose.SignatureAlgorithm{jose.HS256})
	if err != nil {
		return err
	}
	var claims jwt.Claims
	if err := parsed.UnsafeClaimsWithoutVerification(&claims); err != nil {
		return err
	}
	if claims.Expiry == nil || time.Now().After(claims.Expiry.Time()) {
		return errExpired
	}
	for _, field := range []string{claims.Issuer, previousOf[claims.Issuer]} {
		if key := has[field]; key != "" && parsed.Claims([]byte(key), &claims) == nil {
			return nil
		}
	}
	return errors.New("no key of this pod has signed it")
}

// serving reports whether any pod is.
func (h *sessions) serving() bool {
	return slices.ContainsFunc(h.s.sim.Pods(h.s.ns, sessionsApp), func(p kube.SimulatedPod) bool { return p.Ready && !p.Gone })
}

// verified asks every pod that serves; the first that starts has nobody to ask.
func (h *sessions) verified(text string) error {
	for _, p := range h.s.sim.Pods(h.s.ns, sessionsApp) {
		if !p.Ready || p.Gone {
			continue
		}
		if err := verify(text, p.Values); errors.Is(err, errExpired) {
			return err
		} else if err != nil {
			h.s.cluster.Log(h.s.ns, p.Name, "ERROR jwt validation failed: "+err.Error())
			return err
		}
	}
	return nil
}

// serveLogin is the login of a user at one of the pods.
func (h *sessions) serveLogin(rw http.ResponseWriter, r *http.Request) {
	var user struct{ Username, Password string }
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<10)).Decode(&user); err != nil || user.Username != "test" || user.Password != "test" {
		http.Error(rw, "no such user", http.StatusUnauthorized)
		return
	}
	for _, p := range h.s.sim.Pods(h.s.ns, sessionsApp) {
		if !p.Ready || p.Gone {
			continue
		}
		text, err := token(accessField, p.Values[accessField])
		if err == nil {
			err = h.verified(text)
		}
		if err != nil {
			http.Error(rw, "the session is not known everywhere", http.StatusInternalServerError)
		}
		return
	}
	http.Error(rw, "there is no pod", http.StatusServiceUnavailable)
}

// active counts the sessions that are known.
func (h *sessions) active() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.issued)
}

// work is what a pod does: new sessions of both kinds are taken everywhere, and an
// earlier one still is, until it runs out.
func (h *sessions) work(ctx context.Context, p kube.SimulatedPod) error {
	var texts []string
	for _, field := range []string{accessField, refreshField} {
		text, err := token(field, p.Values[field])
		if err != nil {
			return err
		}
		texts = append(texts, text)
	}
	h.mu.Lock()
	earlier := ""
	if len(h.issued) > 0 {
		earlier = h.issued[0]
		h.issued = append(h.issued[1:], earlier)
	}
	h.mu.Unlock()
	for _, text := range append(texts, earlier) {
		if text == "" {
			continue
		}
		err := callAPI(ctx, h.Server, http.MethodGet, "/v1/verify", http.Header{"Authorization": {"Bearer " + text}})
		if err != nil && text == earlier && h.expired(text) {
			continue
		}
		if err != nil {
			return err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.issued) < maxSessions {
		h.issued = append(h.issued, texts...)
	}
	return nil
}

// expired forgets a token that has run out.
func (h *sessions) expired(text string) bool {
	if !errors.Is(verify(text, nil), errExpired) {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, t := range h.issued {
		if t == text {
			h.issued = append(h.issued[:i:i], h.issued[i+1:]...)
			break
		}
	}
	return true
}
