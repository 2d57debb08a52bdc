package postgresql

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Change implements kind.Target. It changes passwords at the primary and then
// waits for the standbys.
func (t *target) Change(ctx context.Context, changes []kind.Change) []kind.Outcome {
	outcomes := make([]kind.Outcome, len(changes))
	fail := func(err error) []kind.Outcome {
		for i := range outcomes {
			outcomes[i].Err = err
		}
		return outcomes
	}
	f, err := t.open(ctx)
	if err != nil {
		return fail(err)
	}
	defer f.close(ctx)
	primary, err := f.primary()
	if err != nil {
		// A node that nobody reaches may be the primary; it is told apart from those
		// that answered.
		for i := range outcomes {
			for _, n := range f.nodes {
				outcomes[i].Nodes = append(outcomes[i].Nodes, kind.NodeError{Node: n.node, Err: orElse(n.err, err)})
			}
		}
		return outcomes
	}
	errs := primary.change(ctx, changes)
	f.standbysHave(ctx, primary)
	for i := range outcomes {
		for _, n := range f.nodes {
			outcomes[i].Nodes = append(outcomes[i].Nodes, kind.NodeError{Node: n.node, Err: orElse(n.err, errs[i])})
		}
	}
	return outcomes
}

func orElse(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// change does what is asked at the primary, one user after the other.
func (n *node) change(ctx context.Context, changes []kind.Change) []error {
	errs := make([]error, len(changes))
	fail := func(from int, err error) []error {
		for i := from; i < len(errs); i++ {
			errs[i] = err
		}
		return errs
	}
	users := make([]kind.User, len(changes))
	for i, c := range changes {
		users[i] = c.User
	}
	rows, err := n.read(ctx, users)
	if err != nil {
		return fail(0, err)
	}
	limit, err := n.limit(ctx)
	if err != nil {
		return fail(0, err)
	}
	changed := false
	for i, c := range changes {
		password, err := n.wanted(ctx, c, rows[c.Username])
		if err == nil && password != "" {
			err = n.alter(ctx, c.Username, password, limit)
			changed = true
		}
		if errs[i] = err; n.s.conn.IsClosed() {
			return fail(i+1, fmt.Errorf("node %s lost the connection before it was asked to change this user: wait", n.node))
		}
	}
	if changed && n.facts.synchronous {
		// A transaction that has written something waits for the standby at its end,
		// and so for everything before it.
		if _, err := n.s.ask(ctx, "SELECT pg_catalog.pg_logical_emit_message(true, 'harmonyflow', '')"); err != nil {
			err = fmt.Errorf("node %s got no confirmation of its synchronous standby in time: wait, or look at synchronous_standby_names", n.node)
			for i := range errs {
				errs[i] = orElse(errs[i], err)
			}
		}
	}
	return errs
}

// limit is the time, by the server's clock, at which nothing of this call may
// happen any more.
func (n *node) limit(ctx context.Context) (string, error) {
	row, err := n.s.one(ctx, 1, "SELECT extract(epoch from pg_catalog.clock_timestamp())::text")
	if err != nil {
		return "", n.later(ctx, err, "tell the time", "")
	}
	now, err := strconv.ParseFloat(row[0], 64)
	if err != nil {
		return "", fmt.Errorf("node %s tells a time that is no number: look at its log", n.node)
	}
	left := kind.CallTimeout
	if deadline, ok := ctx.Deadline(); ok {
		left = min(left, time.Until(deadline))
	}
	return strconv.FormatFloat(now+left.Seconds(), 'f', 6, 64), nil
}

// wanted is the expression that has to follow PASSWORD, "" where nothing has to
// change.
func (n *node) wanted(ctx context.Context, c kind.Change, r row) (string, error) {
	if !r.exists {
		return "", kind.Definitely("user %s does not exist at node %s: create it with CREATE ROLE … LOGIN", c.Username, n.node)
	}
	for _, m := range c.Accept {
		if m.Secret == "" {
			return "", kind.Definitely("a password of user %s is empty: nothing was changed", c.Username)
		}
		if m.Secret != c.Accept[0].Secret {
			return "", kind.Definitely("user %s of node %s can have one password, and two were to be accepted: nothing was changed", c.Username, n.node)
		}
	}
	if len(c.Accept) > 0 {
		verifier, err := verifierOf(c.Accept[0].Secret)
		if err != nil {
			return "", err
		}
		return "'" + verifier + "'", nil
	}
	// What is refused already is left as it is: the user may have another password.
	for _, m := range c.Refuse {
		v := n.try(ctx, kind.Material{Username: c.Username, Secret: m.Secret})
		if v.err != nil {
			return "", v.err
		}
		if v.accepted {
			return "NULL", nil
		}
	}
	if c.Exclusive {
		return "NULL", nil
	}
	return "", nil
}

// alter changes one password. All of it is one message, so that the server does
// it whole or not at all, and it looks at its own clock last of all: what comes
// late, out of a full network or after waiting for a lock, does nothing.
//
// The commit itself does not wait for synchronous standbys, because that wait
// has no end and what waits may be seen long after this call is forgotten.
// change asks for their confirmation afterwards.
func (n *node) alter(ctx context.Context, username, password, limit string) error {
	what := "change user " + username
	left := kind.CallTimeout
	if deadline, ok := ctx.Deadline(); ok {
		left = min(left, time.Until(deadline))
	}
	if ctx.Err() != nil || left < time.Millisecond {
		return fmt.Errorf("node %s had more users to change than there was time for: wait", n.node)
	}
	timeout := strconv.FormatInt(left.Milliseconds(), 10)
	err := n.s.send(ctx, strings.Join([]string{
		"BEGIN",
		"SET LOCAL statement_timeout = " + timeout,
		"SET LOCAL lock_timeout = " + timeout,
		"SET LOCAL synchronous_commit = local",
		"ALTER ROLE " + pgx.Identifier{username}.Sanitize() + " PASSWORD " + password,
		"SELECT 1 / (pg_catalog.clock_timestamp() < pg_catalog.to_timestamp(" + limit + "))::pg_catalog.int4",
		"COMMIT",
	}, "; "))
	if err == nil {
		return nil
	}
	if !n.s.conn.IsClosed() {
		if lost := n.s.send(ctx, "ROLLBACK"); lost != nil {
			return n.later(ctx, lost, what, username)
		}
	}
	return n.later(ctx, err, what, username)
}
