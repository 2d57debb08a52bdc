package postgresql

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Who may not see what a session is sees that there is one, and whose: the rest
// is NULL.
const (
	readingSessions = `SELECT a.usename::text, coalesce(pg_catalog.host(a.client_addr), ''), coalesce(a.application_name, ''),
 coalesce(extract(epoch from a.backend_start)::text, '')
 FROM pg_catalog.pg_stat_activity a
 WHERE coalesce(a.backend_type, 'client backend') = 'client backend' AND a.pid <> pg_catalog.pg_backend_pid()
 AND a.usename::text IN (SELECT v FROM pg_catalog.json_array_elements_text($1::json) v)`

	// Row by row, so that a process that has another session by now is left alone.
	closing = `SELECT count(*) FILTER (WHERE c.hidden)::text, count(*) FILTER (WHERE c.closed)::text FROM (
  SELECT a.backend_start IS NULL AS hidden,
  CASE WHEN a.backend_start < $2::pg_catalog.timestamptz THEN pg_catalog.pg_terminate_backend(a.pid) END AS closed
  FROM pg_catalog.pg_stat_activity a
  WHERE coalesce(a.backend_type, 'client backend') = 'client backend' AND a.pid <> pg_catalog.pg_backend_pid()
  AND a.pid <> ALL ($3::pg_catalog.int4[]) AND a.usename::text = $1 OFFSET 0) c`
)

var _ kind.Observer = (*target)(nil)

// Sessions implements kind.Observer.
func (t *target) Sessions(ctx context.Context, questions []kind.SessionsQuestion) []kind.SessionsAnswer {
	answers := make([]kind.SessionsAnswer, len(questions))
	users := make([]kind.User, len(questions))
	for i, q := range questions {
		users[i] = q.User
	}
	f, err := t.open(ctx)
	if err != nil {
		for i := range answers {
			answers[i].Err = err
		}
		return answers
	}
	defer f.close(ctx)
	var mu sync.Mutex
	f.each(func(n *node) {
		found, err := n.sessions(ctx, users)
		mu.Lock()
		defer mu.Unlock()
		if n.err = err; err != nil {
			return
		}
		for i, q := range questions {
			n.report(&answers[i], q, found[q.Username])
		}
	})
	for _, n := range f.nodes {
		for i := range answers {
			if n.err != nil {
				answers[i].Err = also(answers[i].Err, n.err)
			}
		}
	}
	return answers
}

// also tells two errors in one, which has the class of neither.
func also(err, other error) error {
	if err == nil {
		return other
	}
	return errors.New(err.Error() + "; " + other.Error())
}

// sessions are those of users, by name.
func (n *node) sessions(ctx context.Context, users []kind.User) (map[string][]kind.Session, error) {
	names, err := namesOf(users)
	if err != nil {
		return nil, err
	}
	found, err := n.s.ask(ctx, readingSessions, names)
	if err != nil {
		return nil, n.later(ctx, err, "say who is logged in", n.facts.admin)
	}
	out := map[string][]kind.Session{}
	for _, f := range found {
		s := kind.Session{Node: n.node, Client: f[1], Name: f[2]}
		if epoch, err := strconv.ParseFloat(f[3], 64); err == nil {
			s.Opened = time.UnixMicro(int64(epoch * 1e6))
		}
		out[f[0]] = append(out[f[0]], s)
	}
	return out, nil
}

// report answers a question with what a node has shown.
func (n *node) report(a *kind.SessionsAnswer, q kind.SessionsQuestion, found []kind.Session) {
	hidden := 0
	for _, s := range found {
		switch {
		case s.Opened.IsZero():
			hidden++
		case s.Opened.Before(q.Before):
			a.Sessions = append(a.Sessions, s)
		}
	}
	if hidden > 0 {
		a.Err = also(a.Err, fmt.Errorf("node %s has %s of user %s and does not tell since when: GRANT pg_read_all_stats TO %s",
			n.node, plural(hidden), q.Username, n.facts.admin))
	}
}

func plural(sessions int) string {
	if sessions == 1 {
		return "1 session"
	}
	return fmt.Sprintf("%d sessions", sessions)
}

// closeSessions ends what is open of users who were changed, where the change
// has arrived.
func (f *fleet) closeSessions(ctx context.Context, changes []kind.Change, errs []error, notes [][]string) {
	var mu sync.Mutex
	f.each(func(n *node) {
		for i, c := range changes {
			if c.CloseBefore.IsZero() || errs[i] != nil {
				continue
			}
			note := n.closeSessions(ctx, c)
			mu.Lock()
			if note != "" {
				notes[i] = append(notes[i], note)
			}
			mu.Unlock()
		}
	})
}

// closeSessions returns what is worth telling about it.
func (n *node) closeSessions(ctx context.Context, c kind.Change) string {
	before := c.CloseBefore.UTC().Format(serverTime)
	row, err := n.s.one(ctx, 2, closing, c.Username, before, "{"+strings.Join(n.others, ",")+"}")
	switch {
	case codeOf(err) == "42501":
		return fmt.Sprintf("sessions of user %s at node %s stay open, because the admin user may not end them: "+
			"GRANT pg_signal_backend TO %s, and let a superuser end those of superusers", c.Username, n.node, n.facts.admin)
	case err != nil:
		return fmt.Sprintf("sessions of user %s at node %s may be open still: %s", c.Username, n.node, n.later(ctx, err, "end them", n.facts.admin))
	case row[0] != "0":
		return fmt.Sprintf("sessions of user %s at node %s stay open, because the admin user may not see since when they are: "+
			"GRANT pg_read_all_stats, pg_signal_backend TO %s", c.Username, n.node, n.facts.admin)
	case row[1] == "0":
		return ""
	}
	closed, _ := strconv.Atoi(row[1])
	return fmt.Sprintf("%s of user %s closed at node %s", plural(closed), c.Username, n.node)
}
