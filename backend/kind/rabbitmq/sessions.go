package rabbitmq

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// A broker lists the connections of a user at once, and says only with its next
// statistics when one was opened. They are made every five seconds, unless
// collect_statistics_interval says otherwise; a connection cannot be closed by its
// name before, either.
const (
	statisticsPatience = 7 * time.Second
	statisticsInterval = 500 * time.Millisecond
)

var _ kind.Observer = (*target)(nil)

// session is an open connection.
type session struct {
	Name string
	Node string

	PeerHost         string `json:"peer_host"`
	ConnectedAt      int64  `json:"connected_at"` // in milliseconds, by the broker's clock
	UserProvidedName string `json:"user_provided_name"`
	ClientProperties struct {
		Product string
	} `json:"client_properties"`
}

func (s session) opened() time.Time { return time.UnixMilli(s.ConnectedAt) }

func (s session) shown() kind.Session {
	out := kind.Session{Node: s.Node, Client: s.PeerHost, Name: s.UserProvidedName, Opened: s.opened()}
	if out.Name == "" {
		out.Name = s.ClientProperties.Product
	}
	return out
}

// Sessions implements kind.Observer.
func (t *target) Sessions(ctx context.Context, questions []kind.SessionsQuestion) []kind.SessionsAnswer {
	answers := make([]kind.SessionsAnswer, len(questions))
	users := make([]kind.User, len(questions))
	names := make([]string, len(questions))
	for i, q := range questions {
		users[i], names[i] = q.User, q.Username
	}
	c, err := t.discover(ctx, users)
	if err != nil {
		for i := range answers {
			answers[i].Err = err
		}
		return answers
	}
	defer c.close()
	for i, o := range c.open(ctx, names) {
		answers[i].Err = o.reason(c.name, names[i])
		for _, s := range o.before(questions[i].Before) {
			answers[i].Sessions = append(answers[i].Sessions, s.shown())
		}
	}
	return answers
}

// openSessions are the connections of a user.
type openSessions struct {
	known  []session
	silent []session // of which it is not known yet when they were opened
	mute   int       // of which it never will be
	listed []session // at the end of the look
	partly error     // why there may be more, at other brokers
	err    error
}

func (o openSessions) before(t time.Time) []session {
	return slices.DeleteFunc(slices.Clone(o.known), func(s session) bool { return !s.opened().Before(t) })
}

// reason is why not everything is known of o, nil where it is.
func (o openSessions) reason(api, username string) error {
	switch {
	case o.err != nil:
		return o.err
	case o.partly != nil:
		return o.partly
	case o.mute > 0:
		return fmt.Errorf("management API %s keeps no statistics, so that it is not known when %d of the connections of user %s were opened: remove management_agent.disable_metrics_collector from its configuration", api, o.mute, username)
	case len(o.silent) > 0:
		return fmt.Errorf("management API %s does not say yet when %d of the connections of user %s were opened: wait, or make its collect_statistics_interval shorter", api, len(o.silent), username)
	}
	return nil
}

// open lists the connections of users, and waits until the broker says of each
// when it was opened.
func (c *cluster) open(ctx context.Context, names []string) []openSessions {
	out := make([]openSessions, len(names))
	each(len(names), func(i int) {
		out[i].partly = c.whole()
		out[i].silent, out[i].err = c.tracked(ctx, names[i])
		out[i].listed = slices.Clone(out[i].silent)
	})
	patience := time.Now().Add(statisticsPatience)
	if deadline, ok := ctx.Deadline(); ok && deadline.Add(-time.Second).Before(patience) {
		patience = deadline.Add(-time.Second) // for closing them
	}
	for {
		each(len(names), func(i int) { c.date(ctx, &out[i]) })
		missing := func(o openSessions) bool { return o.err == nil && len(o.silent) > 0 }
		if !slices.ContainsFunc(out, missing) || time.Now().After(patience) || !sleep(ctx, statisticsInterval) {
			break
		}
		each(len(names), func(i int) { c.drop(ctx, names[i], &out[i]) })
	}
	for i, name := range names {
		c.ghosts.forget(userOf{c.id, name}, &out[i], time.Now())
	}
	return out
}

// whole says why a management API may not know of all connections now. A broker
// that others take for dead may be on the other side of a network that has parted.
func (c *cluster) whole() error {
	switch {
	case len(c.split) > 0:
		return fmt.Errorf("the cluster of %s has come apart, so that connections to the other half are not known: bring it together again", c.name)
	case len(c.down) > 0:
		return kind.CannotReach(fmt.Errorf("broker %s does not run, as %s sees it, so that connections to it are not known: start it, or remove it from the cluster with rabbitmqctl forget_cluster_node", c.down[0], c.name))
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// tracked are the connections of a user as the brokers count them.
func (c *cluster) tracked(ctx context.Context, name string) ([]session, error) {
	if c.hanging {
		return nil, fmt.Errorf("a broker of the cluster of %s hangs, so that connections cannot be listed: start it again, or stop it", c.name)
	}
	var out []session
	err := c.get(ctx, "connections/username/"+url.PathEscape(name), &out)
	if notFound(err) {
		return nil, fmt.Errorf("management API %s cannot list the connections of one user: update RabbitMQ", c.name)
	}
	if err != nil {
		return nil, c.explain(err, "list the connections of user "+name, c.login.Username)
	}
	return out, nil
}

// date asks when the silent ones were opened.
func (c *cluster) date(ctx context.Context, o *openSessions) {
	if o.err != nil {
		return
	}
	asked := slices.Clone(o.silent)
	errs := make([]error, len(asked))
	each(len(asked), func(i int) {
		var full session
		errs[i] = c.get(ctx, connectionPath(asked[i]), &full)
		if errs[i] == nil && full.Name == asked[i].Name {
			asked[i] = full
		}
	})
	o.silent = nil
	for i, s := range asked {
		switch {
		case errs[i] != nil && !notFound(errs[i]):
			o.err = c.explain(errs[i], "show a connection", c.login.Username)
		case errs[i] != nil:
			o.silent = append(o.silent, s)
		case s.ConnectedAt == 0:
			o.mute++
		default:
			o.known = append(o.known, s)
		}
	}
}

func connectionPath(s session) string { return "connections/" + url.PathEscape(s.Name) }

// drop forgets those that have ended.
func (c *cluster) drop(ctx context.Context, name string, o *openSessions) {
	if o.err != nil || len(o.silent) == 0 {
		return
	}
	var now []session
	if now, o.err = c.tracked(ctx, name); o.err == nil {
		o.listed = now
		o.silent = slices.DeleteFunc(o.silent, func(s session) bool {
			return !slices.ContainsFunc(now, func(n session) bool { return n.Name == s.Name })
		})
	}
}

// closeReason is what a client is told whose connection is closed.
const closeReason = "the password of this user was changed: log in again with the new one"

// closeSessions ends connections that were opened before a change that succeeded.
func (c *cluster) closeSessions(ctx context.Context, changes []kind.Change, outcomes []kind.Outcome, errs []error) {
	var which []int
	var names []string
	for i, ch := range changes {
		if errs[i] == nil && !ch.CloseBefore.IsZero() {
			which, names = append(which, i), append(names, ch.Username)
		}
	}
	if len(which) == 0 {
		return
	}
	for at, o := range c.open(ctx, names) {
		i := which[at]
		closed, err := c.end(ctx, o.before(changes[i].CloseBefore))
		note := func(format string, args ...any) {
			outcomes[i].Notes = append(outcomes[i].Notes, fmt.Sprintf(format, args...))
		}
		if closed > 0 {
			note("connections of user %s that were closed: %d", names[at], closed)
		}
		for _, err := range []error{o.reason(c.name, names[at]), err} {
			if err != nil {
				note("not every connection of user %s that was opened with its last password was closed: %s", names[at], err)
			}
		}
	}
}

// end closes connections. One that is gone already is none.
func (c *cluster) end(ctx context.Context, sessions []session) (closed int, err error) {
	var mu sync.Mutex
	each(len(sessions), func(i int) {
		e := haveTime(ctx)
		if e == nil {
			e = c.do(ctx, c.login, http.MethodDelete, connectionPath(sessions[i]), nil, nil)
		}
		mu.Lock()
		defer mu.Unlock()
		switch {
		case e == nil:
			closed++
		case !notFound(e):
			err = c.explain(e, "close a connection", c.login.Username)
		}
	})
	return closed, err
}
