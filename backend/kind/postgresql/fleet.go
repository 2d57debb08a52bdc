package postgresql

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	connectTimeout = 3 * time.Second
	// atOnce bounds the logins that one node sees at a time.
	atOnce = 4
)

// node is one server of the target during one call.
type node struct {
	door
	aliases []string      // other hosts that lead to the same server
	s       *session      // of the admin
	admin   kind.Material // what it has logged in with
	facts   facts
	err     error // why it cannot be asked
	// others are pids of what else this call has opened and closed; the server may
	// still show it.
	others []string
}

// facts are what a node says about itself, and about the admin.
type facts struct {
	version  string
	number   int // 150018
	standby  bool
	readOnly bool
	started  string // when, by its own clock
	system   string // its identifier, "" where the admin may not see it

	admin                                        string
	super, createRole, replication, bypass, read bool
	// synchronous: a commit waits for a standby.
	synchronous bool
}

// fleet is every node of the target, with a session to each that answers.
type fleet struct {
	entry  *connection.Entry
	nodes  []*node
	cancel context.CancelFunc
}

// close ends every session.
func (f *fleet) close(ctx context.Context) {
	var sessions sync.WaitGroup
	for _, n := range f.nodes {
		if n.s != nil {
			sessions.Go(func() { n.s.close(ctx) })
		}
	}
	sessions.Wait()
	f.cancel()
}

// open logs in to every host of the connection. It fails where no node could be
// asked, and where the hosts do not belong together.
func open(ctx context.Context, entry *connection.Entry) (*fleet, error) {
	if entry == nil || entry.PostgreSQL == nil {
		return nil, kind.Definitely("the connection has no connection_url: write it")
	}
	s, err := parse(entry.PostgreSQL.URL)
	if err != nil {
		return nil, kind.Definitely("%w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &fleet{entry: entry, cancel: cancel}
	connectCtx, stop := within(ctx, 2, connectTimeout)
	defer stop()
	var visits sync.WaitGroup
	for _, host := range s.hosts {
		n := &node{door: door{node: host, dial: entry.Reach(host), settings: s}}
		f.nodes = append(f.nodes, n)
		if s.tls {
			if n.tls, err = entry.TLS.Config(hostOf(host)); err != nil {
				n.err = kind.Definitely("%w", err)
				continue
			}
		}
		visits.Go(func() { n.visit(ctx, connectCtx, entry.Admin.Logins()) })
	}
	visits.Wait()
	f.merge(ctx)
	err = f.answered()
	if err == nil {
		err = f.related()
	}
	if err != nil {
		f.close(ctx)
		return nil, err
	}
	return f, nil
}

func hostOf(address string) string {
	return strings.Trim(address[:strings.LastIndexByte(address, ':')], "[]")
}

// visit logs in as admin. More than one credential exists only while the admin
// credential itself is being rotated.
func (n *node) visit(ctx, connectCtx context.Context, logins []kind.Material) {
	n.err = kind.Definitely("the connection has no admin credential: write its username and password")
	for _, m := range logins {
		s, heard, err := n.login(ctx, connectCtx, m)
		if err != nil && heard.asked != askedNothing && heard.asked != askedSASL && heard.asked != askedMD5 {
			n.err = fmt.Errorf("node %s asks the admin user for something else than the proof of its password (%s): give pg_hba.conf a rule with scram-sha-256 for it",
				n.node, methodName(heard.asked))
			return
		}
		if err != nil && heard.accepted && heard.asked == askedNothing {
			n.err = fmt.Errorf("%s, the admin user", n.openly(m.Username))
			return
		}
		if err == nil {
			n.s, n.admin = s, m
			n.err = n.learn(connectCtx)
			return
		}
		n.err = n.explain(err, "log in as admin", m.Username)
		if codeOf(err) != "28P01" {
			return
		}
	}
}

const learning = `SELECT current_setting('server_version'), current_setting('server_version_num'),
 pg_catalog.pg_is_in_recovery()::text, current_setting('transaction_read_only'),
 extract(epoch from pg_catalog.pg_postmaster_start_time())::text, current_user::text,
 r.rolsuper::text, r.rolcreaterole::text, r.rolreplication::text, r.rolbypassrls::text,
 (pg_catalog.has_column_privilege('pg_catalog.pg_authid', 'rolname', 'SELECT')
  AND pg_catalog.has_column_privilege('pg_catalog.pg_authid', 'rolpassword', 'SELECT'))::text,
 (current_setting('synchronous_standby_names') <> '')::text
 FROM pg_catalog.pg_roles r WHERE r.rolname = current_user`

// learn asks a node what it is.
func (n *node) learn(ctx context.Context) error {
	row, err := n.s.one(ctx, 12, learning)
	if err != nil {
		return n.explain(err, "say what it is", "")
	}
	is := func(i int) bool { return row[i] == "true" || row[i] == "on" }
	number, _ := strconv.Atoi(row[1])
	version, _, _ := strings.Cut(row[0], " ")
	n.facts = facts{
		version: version, number: number, standby: is(2), readOnly: is(3), started: row[4], admin: row[5],
		super: is(6), createRole: is(7), replication: is(8), bypass: is(9), read: is(10), synchronous: is(11),
	}
	if number < 100000 {
		return kind.Definitely("node %s is PostgreSQL %s: roles need 10 or later, which knows SCRAM, so upgrade it", n.node, version)
	}
	row, err = n.s.one(ctx, 1, "SELECT system_identifier::text FROM pg_catalog.pg_control_system()")
	switch {
	case err == nil:
		n.facts.system = row[0]
	case codeOf(err) == "":
		return n.explain(err, "say what it is", "")
	}
	return nil
}

// merge makes one node of several hosts that lead to one server.
func (f *fleet) merge(ctx context.Context) {
	var kept []*node
	for _, n := range f.nodes {
		i := slices.IndexFunc(kept, func(k *node) bool {
			return n.err == nil && k.err == nil && k.facts.started == n.facts.started && k.facts.system == n.facts.system
		})
		if i < 0 {
			kept = append(kept, n)
			continue
		}
		kept[i].aliases = append(kept[i].aliases, n.node)
		n.s.close(ctx)
	}
	f.nodes = kept
}

// answered is nil when at least one node could be asked.
func (f *fleet) answered() error {
	var errs []error
	definite, silent := true, true
	for _, n := range f.nodes {
		if n.err == nil {
			return nil
		}
		errs = append(errs, n.err)
		definite = definite && kind.IsDefinite(n.err)
		silent = silent && kind.IsUnreachable(n.err)
	}
	err := fmt.Errorf("no postgresql node of connection %q could be asked: %w", f.entry.Name, errs[0])
	switch {
	case definite:
		return kind.Definitely("%w", err)
	case silent:
		return kind.CannotReach(err)
	}
	// One error among others must not lend its class to the whole.
	return errors.New(err.Error())
}

// related refuses hosts that do not replicate from each other.
func (f *fleet) related() error {
	var first *node
	for _, n := range f.nodes {
		if n.err != nil || n.facts.system == "" {
			continue
		}
		if first == nil {
			first = n
		}
		if n.facts.system != first.facts.system {
			return kind.Definitely("hosts %s and %s of connection_url are different servers: name one primary and its standbys, and write a connection for each other server",
				first.node, n.node)
		}
	}
	return nil
}

// primary is the node where passwords are changed.
func (f *fleet) primary() (*node, error) {
	var found []*node
	var names []string
	for _, n := range f.nodes {
		if n.err == nil && !n.facts.standby {
			found, names = append(found, n), append(names, n.node)
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("no host of connection %q that answers is a primary: wait for one, or name it in connection_url", f.entry.Name)
	case len(found) > 1:
		return nil, fmt.Errorf("hosts %s of connection %q all take writes: end all but one, or name only that one in connection_url",
			strings.Join(names, " and "), f.entry.Name)
	case found[0].facts.readOnly:
		return nil, fmt.Errorf("node %s is read only: check default_transaction_read_only there", found[0].node)
	}
	return found[0], nil
}

// each runs do for every node that answers, all at once.
func (f *fleet) each(do func(*node)) {
	var all sync.WaitGroup
	for _, n := range f.nodes {
		if n.err == nil {
			all.Go(func() { do(n) })
		}
	}
	all.Wait()
}

// standbysHave makes every standby that answers wait until it has what the
// primary had at the time of the call. One that is not that far by the end of
// ctx cannot be asked: its answers would be about the past.
func (f *fleet) standbysHave(ctx context.Context, primary *node) {
	if !slices.ContainsFunc(f.nodes, func(n *node) bool { return n.err == nil && n.facts.standby }) {
		return
	}
	row, err := primary.s.one(ctx, 1, "SELECT pg_catalog.pg_current_wal_flush_lsn()::text")
	if err != nil {
		primary.err = primary.later(ctx, err, "say how far its log is", "")
		return
	}
	f.each(func(n *node) {
		if n.facts.standby {
			n.err = n.have(ctx, row[0])
		}
	})
}

// have waits until a standby has replayed its primary's log up to position.
func (n *node) have(ctx context.Context, position string) error {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		row, err := n.s.one(ctx, 1, "SELECT coalesce(pg_catalog.pg_last_wal_replay_lsn() >= $1::pg_catalog.pg_lsn, false)::text", position)
		if err == nil && row[0] == "true" {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			return n.later(ctx, err, "say how far its log is", "")
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("standby %s is behind its primary: wait, or look at its replication; leave a standby that is delayed on purpose out of connection_url", n.node)
		case <-time.After(pause):
		}
	}
}

// row is a user as the catalog has it.
type row struct {
	exists, canLogin, super, replication, bypass, expired, adminOption bool
	until                                                              string
	// stored: it has a password. Known only where the admin may read that.
	stored, known bool
}

const reading = `SELECT r.rolname::text, r.rolcanlogin::text, r.rolsuper::text, r.rolreplication::text, r.rolbypassrls::text,
 coalesce(r.rolvaliduntil < pg_catalog.now(), false)::text,
 pg_catalog.pg_has_role(current_user, r.oid, 'MEMBER WITH ADMIN OPTION')::text,
 coalesce(pg_catalog.to_char(r.rolvaliduntil AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'), '')
 FROM pg_catalog.pg_roles r
 WHERE r.rolname::text IN (SELECT v FROM pg_catalog.json_array_elements_text($1::json) v)`

const readingStored = `SELECT a.rolname::text, (coalesce(a.rolpassword, '') <> '')::text FROM pg_catalog.pg_authid a
 WHERE a.rolname::text IN (SELECT v FROM pg_catalog.json_array_elements_text($1::json) v)`

// read asks a node for users as they stand.
func (n *node) read(ctx context.Context, users []kind.User) (map[string]row, error) {
	names, err := namesOf(users)
	if err != nil {
		return nil, err
	}
	found, err := n.s.ask(ctx, reading, names)
	if err != nil {
		return nil, n.later(ctx, err, "read its users", n.facts.admin)
	}
	rows := make(map[string]row, len(found))
	for _, f := range found {
		is := func(i int) bool { return f[i] == "true" }
		rows[f[0]] = row{
			exists: true, canLogin: is(1), super: is(2), replication: is(3), bypass: is(4), expired: is(5), adminOption: is(6),
			until: f[7],
		}
	}
	if !n.facts.read {
		return rows, nil
	}
	if found, err = n.s.ask(ctx, readingStored, names); err != nil {
		return nil, n.later(ctx, err, "read its users", n.facts.admin)
	}
	for _, f := range found {
		if r, ok := rows[f[0]]; ok {
			r.known, r.stored = true, f[1] == "true"
			rows[f[0]] = r
		}
	}
	return rows, nil
}

// trouble says why no password of a user can be rotated, or "".
func (r row) trouble(node string, u kind.User) string {
	name := u.Username
	switch {
	case !r.exists:
		return fmt.Sprintf("user %s does not exist at node %s: create it with CREATE ROLE … LOGIN", name, node)
	case !r.canLogin:
		return fmt.Sprintf("user %s may not log in at node %s: allow it with ALTER ROLE … LOGIN", name, node)
	case r.expired && !u.Dated:
		return fmt.Sprintf("the password of user %s expired at %s, and so would every new one: move the date with ALTER ROLE … VALID UNTIL 'infinity', or set valid_until on the role", name, r.until)
	}
	return ""
}
