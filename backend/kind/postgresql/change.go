package postgresql

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	errs, notes := primary.change(ctx, changes)
	f.standbysHave(ctx, primary)
	f.closeSessions(ctx, changes, errs, notes)
	for i := range outcomes {
		outcomes[i].Notes = notes[i]
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
func (n *node) change(ctx context.Context, changes []kind.Change) ([]error, [][]string) {
	errs, notes := make([]error, len(changes)), make([][]string, len(changes))
	fail := func(from int, err error) ([]error, [][]string) {
		for i := from; i < len(errs); i++ {
			errs[i] = err
		}
		return errs, notes
	}
	rows, profiles, err := n.standing(ctx, changes)
	if err != nil {
		return fail(0, err)
	}
	limit, err := n.limit(ctx)
	if err != nil {
		return fail(0, err)
	}
	changed := false
	for i, c := range changes {
		r, err := n.request(ctx, c, rows[c.Username], profiles)
		if err == nil && len(r.statements) > 0 {
			err = n.carryOut(ctx, c, r, limit)
			changed = true
		}
		if err == nil && r.note != "" {
			notes[i] = append(notes[i], r.note)
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
	n.remaining(ctx, changes, errs, notes)
	return errs, notes
}

// standing reads users as they stand, and what they are where that may have to
// be changed.
func (n *node) standing(ctx context.Context, changes []kind.Change) (map[string]row, map[string]*profile, error) {
	users := make([]kind.User, len(changes))
	for i, c := range changes {
		users[i] = c.User
	}
	rows, err := n.read(ctx, users)
	if err != nil {
		return nil, nil, err
	}
	var made []kind.User
	for _, c := range changes {
		if len(c.Profile) > 0 && (c.Align || !rows[c.Username].exists) {
			made = append(made, c.User)
		}
	}
	if len(made) == 0 {
		return rows, nil, nil
	}
	profiles, err := n.profiles(ctx, withLikes(made))
	return rows, profiles, err
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

// serverTime is how a time is written to a server.
const serverTime = "2006-01-02 15:04:05.999999-07"

// request is what one message asks for.
type request struct {
	what       string // in words that follow "asked to"
	statements []string
	note       string // what is worth telling when it was done
	self       bool   // the user asks for it
}

// request is what has to be sent for a change, nothing where all is as it is to
// be.
func (n *node) request(ctx context.Context, c kind.Change, r row, profiles map[string]*profile) (request, error) {
	out := request{what: "change user " + c.Username, self: len(c.Self) > 0 && r.exists}
	if !r.exists && len(c.Accept) == 0 && !c.Exists() {
		return out, nil // nobody logs in as it
	}
	if !r.exists && len(c.Profile) == 0 {
		return out, kind.Definitely("user %s does not exist at node %s: create it with CREATE ROLE … LOGIN", c.Username, n.node)
	}
	password, err := n.wanted(ctx, c)
	if err != nil {
		return out, err
	}
	out.statements, out.note, err = n.making(c, r, profiles)
	if err != nil {
		return out, err
	}
	if !r.exists {
		out.what = "create user " + c.Username
	}
	if password == "" {
		return out, nil
	}
	until := ""
	if len(c.Accept) > 0 && !c.Accept[0].Expires.IsZero() {
		if out.self {
			return out, kind.Definitely("user %s is to change its own password and may not move its VALID UNTIL: leave out valid_until or allow_self_rotation", c.Username)
		}
		until = " VALID UNTIL '" + c.Accept[0].Expires.UTC().Format(serverTime) + "'"
	}
	out.statements = append(out.statements, "ALTER ROLE "+pgx.Identifier{c.Username}.Sanitize()+until+" PASSWORD "+password)
	return out, nil
}

// wanted is the expression that has to follow PASSWORD, "" where nothing has to
// change.
func (n *node) wanted(ctx context.Context, c kind.Change) (string, error) {
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

// carryOut sends a request in the session that it belongs to.
func (n *node) carryOut(ctx context.Context, c kind.Change, r request, limit string) error {
	if c.Admin {
		// A role that its settings switch to may not change it.
		r.statements = append([]string{"SET LOCAL ROLE NONE"}, r.statements...)
	}
	if !r.self {
		return n.alter(ctx, n.s, r, limit)
	}
	s, problem, err := n.logInAsSelf(ctx, c.User)
	if err != nil {
		return err
	}
	if problem != "" {
		return errors.New(problem)
	}
	defer s.close(ctx)
	n.others = append(n.others, strconv.FormatUint(uint64(s.conn.PID()), 10))
	r.statements = append([]string{"SET LOCAL TRANSACTION READ WRITE", "SET LOCAL ROLE NONE"}, r.statements...)
	return n.alter(ctx, s, r, limit)
}

// alter changes one user. All of it is one message, so that the server does it
// whole or not at all, and it looks at its own clock last of all: what comes
// late, out of a full network or after waiting for a lock, does nothing.
//
// The commit itself does not wait for synchronous standbys, because that wait
// has no end and what waits may be seen long after this call is forgotten.
// change asks for their confirmation afterwards.
func (n *node) alter(ctx context.Context, s *session, r request, limit string) error {
	timeout, err := n.timeLeft(ctx)
	if err != nil {
		return err
	}
	err = s.send(ctx, strings.Join(slices.Concat(
		[]string{"BEGIN"},
		timeouts(timeout),
		[]string{"SET LOCAL synchronous_commit = local"},
		r.statements,
		[]string{
			"SELECT 1 OPERATOR(pg_catalog./) (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.<) pg_catalog.to_timestamp(" + limit + "))::pg_catalog.int4",
			"COMMIT",
		},
	), "; "))
	if err == nil {
		return nil
	}
	if !s.conn.IsClosed() {
		if lost := s.send(ctx, "ROLLBACK"); lost != nil {
			return n.later(ctx, lost, r.what, n.facts.admin)
		}
	}
	return n.later(ctx, err, r.what, n.facts.admin)
}

// timeLeft is how many milliseconds a statement may take.
func (n *node) timeLeft(ctx context.Context) (string, error) {
	left := kind.CallTimeout
	if deadline, ok := ctx.Deadline(); ok {
		left = min(left, time.Until(deadline))
	}
	if ctx.Err() != nil || left < time.Millisecond {
		return "", fmt.Errorf("node %s had more users to change than there was time for: wait", n.node)
	}
	return strconv.FormatInt(left.Milliseconds(), 10), nil
}

func timeouts(milliseconds string) []string {
	return []string{"SET LOCAL statement_timeout = " + milliseconds, "SET LOCAL lock_timeout = " + milliseconds}
}
