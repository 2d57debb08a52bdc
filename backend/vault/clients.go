// Package vault speaks to a Vault as its client: to the one that the engine runs
// in, or to another. It logs in, keeps its token alive, and says of each error
// what it means for a rotation.
//
//	address.go   what a connection may lead to
//	clients.go   Do: one call with a client that is logged in
//	session.go   the login behind it
//	login.go     As: a login of its own for one piece of work
//	verify.go    what a connection is checked for when it is written
//	errors.go    what an error means, in words that hold no secret
package vault

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Clients are the clients of all connections of one backend instance.
type Clients struct {
	entry  func(ctx context.Context, name string) (*connection.Entry, error)
	logger hclog.Logger
	now    func() time.Time

	stop context.Context //nolint:containedctx // ends every call when the owner closes
	end  context.CancelCauseFunc

	mu       sync.Mutex
	closed   bool
	sessions map[string]*session
	work     sync.WaitGroup
	renewing bool
	// calm: when connections had changed calmAt times there was no token to renew.
	calm    bool
	calmAt  uint64
	said    map[string]string // the last warning about a connection
	refused map[attempt]refusedLogin
}

var errClosed = errors.New("closed")

// New returns clients that read a connection at each call, so that a change of
// it counts at once.
func New(entry func(ctx context.Context, name string) (*connection.Entry, error), logger hclog.Logger) *Clients {
	c := &Clients{
		entry: entry, logger: logger, now: time.Now,
		sessions: map[string]*session{}, said: map[string]string{}, refused: map[attempt]refusedLogin{},
	}
	c.stop, c.end = context.WithCancelCause(context.Background())
	return c
}

// Entry reads a connection, which has to be one of type vault.
func (c *Clients) Entry(ctx context.Context, name string) (*connection.Entry, error) {
	e, err := c.entry(ctx, name)
	if err != nil {
		return nil, err
	}
	if e.Type != connection.TypeVault || e.Vault == nil {
		return nil, kind.Definitely("connection %q is of type %s; give one of type %s", name, e.Type, connection.TypeVault)
	}
	return e, nil
}

// Do calls with a client that is logged in, which repeats nothing by itself and
// gives up when ctx ends (at the latest after kind.CallTimeout). Where Vault
// answers 403 it may have forgotten the token, and has done nothing: Do then logs
// in again and calls once more. So call makes one change at most, as the last
// thing that it does, or none where it finds it done. Errors have a class
// (kind.Error), and hold nothing that was sent.
func (c *Clients) Do(ctx context.Context, name string, call func(ctx context.Context, client *api.Client) error) error {
	ctx, done, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	e, err := c.Entry(ctx, name)
	if err != nil {
		return err
	}
	s, err := c.session(e)
	if err != nil {
		return err
	}
	client, err := s.client(ctx)
	if err != nil {
		return s.explain(cause(ctx, err))
	}
	err = call(ctx, client)
	if forbidden(err) {
		again, loginErr := s.afterForbidden(ctx, client)
		if loginErr != nil {
			return s.explain(cause(ctx, loginErr))
		}
		if again != nil {
			if err = call(ctx, again); forbidden(err) {
				s.policyForbids()
			}
		}
	}
	return s.explain(cause(ctx, err))
}

// cause prefers why ctx ended to how a call met it.
func cause(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errClosed) {
		return errClosed
	}
	return err
}

// begin counts a piece of work that Close ends and waits for.
func (c *Clients) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, nil, &kind.Error{Class: kind.Unavailable, Err: errors.New("the engine is being stopped; no Vault is asked any more")}
	}
	c.work.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	release := context.AfterFunc(c.stop, func() { cancel(context.Cause(c.stop)) })
	ctx, expire := context.WithTimeout(ctx, kind.CallTimeout)
	return ctx, func() { expire(); release(); cancel(nil); c.work.Done() }, nil
}

// session is the login of a connection as it is now.
func (c *Clients) session(e *connection.Entry) (*session, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.sessions[e.Name]
	if known != nil && known.isFor(e) {
		return known, nil
	}
	s, err := newSession(e, c.now)
	if err != nil {
		return nil, err
	}
	if known != nil {
		known.close()
	}
	c.sessions[e.Name] = s
	return s, nil
}

// renewParallel bounds how many Vaults are asked at once to renew a token.
const renewParallel = 8

// Renew looks after tokens that were given to connections, which end when
// nobody renews them, whether they are used or not. It returns at once; what it
// starts belongs to c, and there is one at a time.
//
// Where all showed that there is no such token it is not asked again before changes
// tells another number; with false, what it tells is not relied on.
func (c *Clients) Renew(all func(context.Context) ([]*connection.Entry, error), changes func() (uint64, bool)) {
	at, sure := changes() // before anything is read
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.renewing || c.calm && sure && c.calmAt == at {
		return
	}
	c.renewing = true
	c.work.Go(func() {
		defer func() {
			if p := recover(); p != nil {
				c.logger.Error("renewing tokens met a defect", "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			}
			c.mu.Lock()
			c.renewing = false
			c.mu.Unlock()
		}()
		calm := c.renewAll(c.stop, all)
		c.mu.Lock()
		c.calm, c.calmAt = calm, at
		c.mu.Unlock()
	})
}

// renewAll reports whether there was nothing to renew, and nothing that will have to be.
func (c *Clients) renewAll(ctx context.Context, all func(context.Context) ([]*connection.Entry, error)) (calm bool) {
	entries, err := all(ctx)
	if err != nil {
		return false // the next tick reads them again
	}
	c.forgetAllBut(entries)
	g := errgroup.Group{}
	g.SetLimit(renewParallel)
	calm = true
	for _, e := range entries {
		if e.Type != connection.TypeVault || e.Vault == nil || e.Vault.Auth != connection.AuthToken {
			continue
		}
		calm = false
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, kind.CallTimeout)
			defer cancel()
			s, err := c.session(e)
			if err == nil {
				if err = s.keep(ctx); err != nil {
					err = s.explain(err)
				}
			}
			c.warn(ctx, e.Name, err)
			return nil
		})
	}
	_ = g.Wait()
	return calm
}

// warn logs what is wrong with a connection once, and not each minute.
func (c *Clients) warn(ctx context.Context, name string, err error) {
	if ctx.Err() != nil && c.stop.Err() != nil {
		return
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	c.mu.Lock()
	before := c.said[name]
	c.said[name] = text
	c.mu.Unlock()
	if text != "" && text != before {
		c.logger.Warn("the token of a connection cannot be kept alive", "connection", name, "error", text)
	}
}

// forgetAllBut drops what belongs to connections that are gone.
func (c *Clients) forgetAllBut(entries []*connection.Entry) {
	there := map[string]bool{}
	for _, e := range entries {
		there[e.Name] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, s := range c.sessions {
		if !there[name] {
			s.close()
			delete(c.sessions, name)
		}
	}
	for name := range c.said {
		if !there[name] {
			delete(c.said, name)
		}
	}
	maps.DeleteFunc(c.refused, func(a attempt, _ refusedLogin) bool { return !there[a.connection] })
}

// Close ends all calls, and waits for them until ctx ends. Closing twice is
// fine. Tokens from logins end by themselves: Vault waits for Close while it
// seals, and is not asked then.
func (c *Clients) Close(ctx context.Context) {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.end(errClosed)
	idle := make(chan struct{})
	go func() { c.work.Wait(); close(idle) }()
	select {
	case <-idle:
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.sessions {
		s.close()
	}
	clear(c.sessions)
}
