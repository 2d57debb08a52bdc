package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"
	"golang.org/x/sync/semaphore"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

const (
	// maxAnswer bounds what is read of an answer.
	maxAnswer = 4 << 20
	// A login that was refused is not tried again at once: Vault locks an account
	// after a few of them, and counts on.
	refusedFirst = 2 * time.Second
	refusedMost  = time.Minute
	// forbiddenAgain is how long a 403 is taken for what the policy says, after a
	// fresh token met one, too.
	forbiddenAgain = time.Minute
)

// tokenFile is where the engine finds its Kubernetes token when a connection
// holds none. It is a path of its own, and not the pod's own token: who may write
// connections could have that one sent to an address of his choice. Who runs the
// pod mounts a token there that is good for logging in to Vault alone.
const tokenFile = "/var/run/secrets/harmonyflow/vault/token" //nolint:gosec // a path

// session is the login of one connection.
type session struct {
	name, address string
	vault         connection.Vault
	tls           connection.TLS
	material      kind.Material
	transport     *http.Transport
	bare          *api.Client // without a token
	now           func() time.Time
	tokenFile     string

	// turn is held by whoever logs in or renews.
	turn *semaphore.Weighted

	mu sync.Mutex
	lease
	refusal      error
	refusedFor   time.Duration
	refusedUntil time.Time
	policyUntil  time.Time
}

// lease is a client that is logged in, and for how long.
type lease struct {
	client    *api.Client
	renewable bool
	life      time.Duration // 0: for ever
	expires   time.Time
}

// due reports whether less than a third of a token's life is left.
func (l lease) due(now time.Time) bool {
	return l.life > 0 && l.expires.Sub(now) < l.life/3
}

func (l lease) valid(now time.Time) bool {
	return l.client != nil && (l.life == 0 || now.Before(l.expires))
}

func current(e *connection.Entry) kind.Material {
	if v := e.Admin.With(version.Current); v != nil {
		return v.Material
	}
	return kind.Material{}
}

func newSession(e *connection.Entry, now func() time.Time) (*session, error) {
	s := &session{
		name: e.Name, address: e.Vault.Address, vault: *e.Vault, tls: e.TLS, material: current(e),
		now: now, turn: semaphore.NewWeighted(1), tokenFile: tokenFile,
	}
	config, err := e.TLS.Config("") // the name is that of the address
	if err != nil {
		return nil, kind.Definitely("connection %q: %w", e.Name, err)
	}
	u, err := parseAddress(e.Vault.Address, e.TLS)
	if err != nil {
		return nil, kind.Definitely("connection %q: %w", e.Name, err)
	}
	// HTTP/1.1 alone: a connection that a call has timed out on is closed, where
	// HTTP/2 would send the next call into the same hole. No proxy is taken from the
	// environment: a connection says all there is to say.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	s.transport = &http.Transport{
		DialContext:         dialer(u.Scheme == "http" && !e.TLS.SkipVerify).DialContext,
		TLSClientConfig:     config,
		TLSHandshakeTimeout: kind.CallTimeout,
		IdleConnTimeout:     90 * time.Second,
		MaxIdleConnsPerHost: 8,
		Protocols:           protocols,
	}
	if s.bare, err = s.newClient(""); err != nil {
		return nil, kind.Definitely("connection %q: no client can be made of it (%T); look for VAULT_ variables that Vault's client cannot read in the environment of the plugin", e.Name, err)
	}
	return s, nil
}

// isFor reports whether e still is what s logged in to.
func (s *session) isFor(e *connection.Entry) bool {
	return reflect.DeepEqual(connect(s.vault), connect(*e.Vault)) && s.tls == e.TLS && s.material == current(e)
}

// connect is v without what does not matter to a login.
func connect(v connection.Vault) connection.Vault {
	v.AllowedPublishPaths, v.Role = nil, ""
	return v
}

func (s *session) close() { s.transport.CloseIdleConnections() }

// newClient makes a client that owes nothing to the environment: NewClient takes
// token, namespace and headers from it, and each request how to be wrapped.
func (s *session) newClient(token string) (*api.Client, error) {
	c, err := api.NewClient(&api.Config{
		Address:          s.address,
		HttpClient:       &http.Client{Transport: guard{s.transport}, CheckRedirect: noRedirect},
		DisableRedirects: true,
		// Of an Enterprise cluster a standby may answer: not with what was before.
		ReadYourWrites: true,
	})
	if err != nil {
		return nil, err
	}
	c.SetMaxRetries(0)
	c.SetHeaders(http.Header{api.RequestHeaderName: []string{"true"}})
	if s.vault.Namespace != "" {
		c.SetNamespace(s.vault.Namespace)
	}
	c.SetWrappingLookupFunc(func(string, string) string { return "" })
	c.SetToken(token)
	return c, nil
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// guard refuses redirects, which Vault's client would take for success, and
// answers without end.
type guard struct{ inner http.RoundTripper }

func (g guard) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := g.inner.RoundTrip(r)
	if err != nil {
		return nil, &noAnswer{err}
	}
	if resp.StatusCode >= 300 && resp.StatusCode < 400 {
		host := "another node"
		if to, err := resp.Location(); err == nil {
			host = to.Host
		}
		resp.Body.Close()
		return nil, &redirected{host: host}
	}
	resp.Body = &bounded{ReadCloser: resp.Body, left: maxAnswer}
	return resp, nil
}

type bounded struct {
	io.ReadCloser
	left int
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, errTooLarge
	}
	return n, err
}

func (s *session) lent() lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lease
}

// client returns one that is logged in.
func (s *session) client(ctx context.Context) (*api.Client, error) {
	l := s.lent()
	switch now := s.now(); {
	case !l.valid(now):
		return s.login(ctx, l.client)
	case !l.due(now):
		return l.client, nil
	}
	if !s.turn.TryAcquire(1) {
		return l.client, nil // somebody does it
	}
	defer s.turn.Release(1)
	_ = s.prolong(ctx, s.lent()) // the token is good for a while yet, and Renew tells of it
	return s.lent().client, nil
}

// keep renews a token that nobody uses; it is looked up at the first time.
func (s *session) keep(ctx context.Context) error {
	l := s.lent()
	if l.valid(s.now()) && !l.due(s.now()) {
		return nil
	}
	if !l.valid(s.now()) {
		if _, err := s.login(ctx, l.client); err != nil {
			return err
		}
		l = s.lent()
	}
	if !l.due(s.now()) {
		return nil
	}
	if err := s.turn.Acquire(ctx, 1); err != nil {
		return err
	}
	defer s.turn.Release(1)
	return s.prolong(ctx, s.lent())
}

// prolong renews a token, or replaces it by a new login. The caller has the
// turn.
func (s *session) prolong(ctx context.Context, l lease) error {
	if !l.due(s.now()) {
		return nil // somebody did it
	}
	if s.logsIn() {
		return s.enter(ctx)
	}
	if !l.renewable {
		return &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf(
			"the token of connection %q ends at %s and cannot be renewed; write connections/%s with a periodic token", s.name, l.expires.UTC().Format(time.RFC3339), s.name)}
	}
	began := s.now()
	answer, err := l.client.Auth().Token().RenewSelfWithContext(ctx, int(l.life/time.Second))
	if err != nil {
		return s.lost(err)
	}
	if answer == nil || answer.Auth == nil {
		return errors.New("no token in the answer")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lease = leaseOf(l.client, answer.Auth, began)
	return nil
}

// logsIn reports whether a new token can be had.
func (s *session) logsIn() bool { return s.vault.Auth != connection.AuthToken }

// login gets a client in place of stale, one login at a time.
func (s *session) login(ctx context.Context, stale *api.Client) (*api.Client, error) {
	if err := s.turn.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	defer s.turn.Release(1)
	if l := s.lent(); l.valid(s.now()) && l.client != stale {
		return l.client, nil // somebody did it
	}
	if err := s.enter(ctx); err != nil {
		return nil, err
	}
	return s.lent().client, nil
}

// enter logs in. The caller has the turn.
func (s *session) enter(ctx context.Context) error {
	s.mu.Lock()
	refused, until := s.refusal, s.refusedUntil
	s.mu.Unlock()
	if refused != nil && s.now().Before(until) {
		return refused
	}
	l, err := s.authenticate(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.lease, s.refusal, s.refusedFor = l, nil, 0
		return nil
	}
	if a := AnswerOf(err); a != nil && a.Status >= 400 && a.Status < 500 && a.Status != http.StatusTooManyRequests {
		s.refusedFor = min(max(2*s.refusedFor, refusedFirst), refusedMost)
		s.refusal, s.refusedUntil = err, s.now().Add(s.refusedFor)
	}
	return err
}

// refusedLogin says that the Vault does not take the credentials. Waiting may
// help: somebody may write the connection again, or enable what was disabled.
func (s *session) refusedLogin(err error) error {
	a := AnswerOf(err)
	if a == nil || a.Status < 400 || a.Status >= 500 || a.Status == http.StatusTooManyRequests {
		return err
	}
	return &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf(
		"the Vault of connection %q refuses the login by %s; check its %s and write connections/%s again: %w",
		s.name, s.vault.Auth, map[string]string{
			connection.AuthAppRole: "role_id, secret_id and auth_mount", connection.AuthKubernetes: "role, token and auth_mount",
		}[s.vault.Auth], s.name, a)}
}

// lost says that a token that was given is not accepted.
func (s *session) lost(err error) error {
	if !forbidden(err) {
		return err
	}
	return &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf(
		"the token of connection %q is not accepted any more: it has ended, was revoked, or its policies lack auth/token/lookup-self and renew-self; write connections/%s with a new one: %w",
		s.name, s.name, AnswerOf(err))}
}

func (s *session) authenticate(ctx context.Context) (lease, error) {
	began := s.now()
	body := map[string]any{}
	switch s.vault.Auth {
	case connection.AuthToken:
		return s.lookUp(ctx, began)
	case connection.AuthAppRole:
		body["role_id"], body["secret_id"] = s.material.Username, s.material.Secret
	case connection.AuthKubernetes:
		jwt, err := s.jwt()
		if err != nil {
			return lease{}, err
		}
		body["role"], body["jwt"] = s.material.Username, jwt
	}
	answer, err := s.bare.Logical().WriteWithContext(ctx, "auth/"+s.vault.AuthMount+"/login", body)
	if err != nil {
		return lease{}, s.refusedLogin(err)
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return lease{}, &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf(
			"the Vault of connection %q gives no token at a login by %s; check auth_mount, and that no second factor is asked for", s.name, s.vault.Auth)}
	}
	client, err := s.newClient(answer.Auth.ClientToken)
	if err != nil {
		return lease{}, err
	}
	return leaseOf(client, answer.Auth, began), nil
}

// leaseOf is what Vault granted. Its time counts from when it was asked: what the
// answer took is not lived twice.
func leaseOf(client *api.Client, auth *api.SecretAuth, began time.Time) lease {
	life := time.Duration(auth.LeaseDuration) * time.Second
	return lease{client: client, renewable: auth.Renewable, life: life, expires: began.Add(life)}
}

// lookUp learns how long a given token lives.
func (s *session) lookUp(ctx context.Context, began time.Time) (lease, error) {
	client, err := s.newClient(s.material.Secret)
	if err != nil {
		return lease{}, err
	}
	answer, err := client.Auth().Token().LookupSelfWithContext(ctx)
	if err != nil {
		return lease{}, s.lost(err)
	}
	left, err := answer.TokenTTL()
	if err != nil {
		return lease{}, errors.New("a token without a ttl")
	}
	l := lease{client: client, life: left, expires: began.Add(left)}
	if l.renewable, err = answer.TokenIsRenewable(); err != nil {
		l.renewable = false
	}
	for _, field := range []string{"creation_ttl", "period"} {
		if full := secondsOf(answer.Data[field]); left > 0 && full > 0 {
			l.life = full
		}
	}
	return l, nil
}

// jwt reads the Kubernetes token anew at each login: the kubelet replaces it.
func (s *session) jwt() (string, error) {
	if s.material.Secret != "" {
		return s.material.Secret, nil
	}
	raw, err := os.ReadFile(s.tokenFile)
	if err != nil {
		return "", &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf(
			"connection %q has no token, and there is none at %s; mount a projected service account token there, or write the connection with token", s.name, tokenFile)}
	}
	return strings.TrimSpace(string(raw)), nil
}

// afterForbidden decides what a 403 was about. It returns a client with a new
// token if the one of stale had been lost, nil if the answer stands.
func (s *session) afterForbidden(ctx context.Context, stale *api.Client) (*api.Client, error) {
	s.mu.Lock()
	policy := s.now().Before(s.policyUntil)
	s.mu.Unlock()
	if policy {
		return nil, nil
	}
	_, err := stale.Auth().Token().LookupSelfWithContext(ctx)
	switch {
	case err == nil:
		return nil, nil // the token is good: its policies forbid it
	case !forbidden(err):
		return nil, err
	case s.logsIn():
		return s.login(ctx, stale)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease.client == stale {
		s.lease = lease{}
	}
	return nil, s.lost(err)
}

// policyForbids: a fresh token was forbidden the same. A policy that denies
// looking a token up must not cost a login a call.
func (s *session) policyForbids() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policyUntil = s.now().Add(forbiddenAgain)
}
