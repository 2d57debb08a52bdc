package vault

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// refusedAgain is how long a credential that was refused is not tried again. At
// five refusals in a row Vault locks an AppRole out, with every secret-id that it
// has, and it counts by role_id; it begins anew fifteen minutes after the last
// one (user_lockout: lockout_threshold, lockout_counter_reset). A connection that
// rotates has three credentials at most, so As never gets there.
const refusedAgain = 16 * time.Minute

// wrongLogin is what AppRole answers to a login that it refuses.
const wrongLogin = "invalid role or secret ID"

// Login is a client that has logged in anew, for one piece of work.
type Login struct {
	// Material is what it has logged in with.
	Material kind.Material
	s        *session
	client   *api.Client
}

// Do calls f with the client. Errors have a class (kind.Error), and hold nothing
// that was sent.
func (l *Login) Do(ctx context.Context, f func(ctx context.Context, client *api.Client) error) error {
	return l.s.explain(cause(ctx, f(ctx, l.client)))
}

// Refused reports whether err is the answer that role_id and secret_id are not
// accepted. A Vault that has locked an AppRole out does not say that.
func Refused(err error) bool {
	a := AnswerOf(err)
	return a != nil && a.Status == http.StatusBadRequest && a.Known == wrongLogin
}

// As logs in to the Vault of e with m, calls work, and revokes the token. What was
// refused lately is refused again without asking, see Forgive.
func (c *Clients) As(ctx context.Context, e *connection.Entry, m kind.Material, work func(context.Context, *Login)) error {
	return c.asFirst(ctx, e, []kind.Material{m}, work)
}

// AsAdmin is As with the first of e's own credentials that is accepted: there is
// more than one while they are rotated.
func (c *Clients) AsAdmin(ctx context.Context, e *connection.Entry, work func(context.Context, *Login)) error {
	return c.asFirst(ctx, e, e.Admin.Logins(), work)
}

func (c *Clients) asFirst(ctx context.Context, e *connection.Entry, candidates []kind.Material, work func(context.Context, *Login)) error {
	ctx, done, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	err = kind.Definitely("connection %q has no credential; write connections/%s with one", e.Name, e.Name)
	for _, m := range candidates {
		var l *Login
		if l, err = c.enter(ctx, e, m); err == nil {
			defer l.leave(ctx)
			work(ctx, l)
			return nil
		}
		if !Refused(err) {
			return err
		}
	}
	return err
}

func (c *Clients) enter(ctx context.Context, e *connection.Entry, m kind.Material) (*Login, error) {
	key := attemptOf(e, m)
	if err := c.refusedBefore(key); err != nil {
		return nil, err
	}
	s, err := newSession(e, c.now)
	if err != nil {
		return nil, err
	}
	s.material = m
	l, err := s.authenticate(ctx)
	if err == nil {
		c.Forgive(e, m)
		return &Login{Material: m, s: s, client: l.client}, nil
	}
	s.close()
	if err = s.explain(cause(ctx, err)); Refused(err) {
		c.remember(key, err)
	}
	return nil, err
}

// leave ends the token. One that cannot be revoked (a batch token, a policy
// without the default one, a call whose time is over) ends by itself.
func (l *Login) leave(ctx context.Context) {
	if l.s.logsIn() {
		_ = l.client.Auth().Token().RevokeSelfWithContext(ctx, "")
	}
	l.s.close()
}

// attempt is a login that may be refused.
type attempt struct {
	connection, address, namespace, mount string
	material                              kind.Material
}

func attemptOf(e *connection.Entry, m kind.Material) attempt {
	return attempt{connection: e.Name, address: e.Vault.Address, namespace: e.Vault.Namespace, mount: e.Vault.AuthMount, material: m}
}

type refusedLogin struct {
	err   error
	until time.Time
}

func (c *Clients) refusedBefore(key attempt) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.refused[key]
	if !ok || !c.now().Before(r.until) {
		return nil
	}
	return &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf(
		"%w (it is not tried again before %s, because Vault locks an AppRole out that fails often)", r.err, r.until.UTC().Format(time.RFC3339))}
}

func (c *Clients) remember(key attempt, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	maps.DeleteFunc(c.refused, func(_ attempt, r refusedLogin) bool { return !now.Before(r.until) })
	c.refused[key] = refusedLogin{err: err, until: now.Add(refusedAgain)}
}

// Forgive has m tried again, whatever was answered before: it is about to be
// accepted.
func (c *Clients) Forgive(e *connection.Entry, m kind.Material) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.refused, attemptOf(e, m))
}
