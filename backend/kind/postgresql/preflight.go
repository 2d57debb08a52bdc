package postgresql

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Preflight implements kind.Target. With strategy swap the served password may
// be refused for a moment after the change, so everything that could fail is
// tried here first: rights over each user, and that a wrong password is refused.
func (t *target) Preflight(ctx context.Context, users []kind.User) []kind.Finding {
	findings := make([]kind.Finding, len(users))
	fail := func(err error) []kind.Finding {
		for i := range findings {
			findings[i].Err = err
		}
		return findings
	}
	f, err := t.open(ctx)
	if err != nil {
		return fail(err)
	}
	defer f.close(ctx)
	primary, err := f.primary()
	if err != nil {
		return fail(err)
	}
	rows, err := primary.read(ctx, users)
	if err != nil {
		return fail(err)
	}
	profiles, err := primary.profiles(ctx, withLikes(users))
	if err != nil && !(kind.IsDefinite(err) && everyOneExists(users)) {
		return fail(err)
	}
	verdicts := make(map[*node][]verdict, len(f.nodes))
	for _, n := range f.nodes {
		verdicts[n] = make([]verdict, len(users))
	}
	f.each(func(n *node) { n.tryWrong(ctx, users, rows, verdicts[n]) })
	themselves := primary.trySelf(ctx, users, rows)
	for i, u := range users {
		findings[i] = primary.judge(u, rows[u.Username])
		primary.compare(ctx, &findings[i], u, profiles)
		primary.doubt(&findings[i], u.Username, themselves[i])
		findings[i].Err = orElse(findings[i].Err, themselves[i].err)
		for _, n := range f.nodes {
			err := n.err
			if err == nil {
				err = verdicts[n][i].err
			}
			findings[i].Nodes = append(findings[i].Nodes, kind.NodeError{Node: n.node, Err: err})
			n.doubt(&findings[i], u.Username, verdicts[n][i])
		}
	}
	return findings
}

// everyOneExists: what users are beside their passwords is of no account then.
func everyOneExists(users []kind.User) bool {
	return !slices.ContainsFunc(users, func(u kind.User) bool { return !u.Exists() })
}

// tryWrong logs in as every user that could, with a password that must be
// refused.
func (n *node) tryWrong(ctx context.Context, users []kind.User, rows map[string]row, verdicts []verdict) {
	var logins errgroup.Group
	logins.SetLimit(atOnce)
	for i, u := range users {
		if !rows[u.Username].canLogin {
			continue
		}
		logins.Go(func() error {
			verdicts[i] = n.inTime(ctx, func() verdict { return n.tryAny(ctx, u.Username) })
			return nil
		})
	}
	_ = logins.Wait()
}

// inTime does not begin what there is no time for.
func (d door) inTime(ctx context.Context, do func() verdict) verdict {
	if ctx.Err() != nil {
		return verdict{err: fmt.Errorf("node %s had more logins to answer than there was time for: wait", d.node)}
	}
	return do()
}

// judge says what the primary's catalog has for or against a rotation.
func (n *node) judge(u kind.User, r row) kind.Finding {
	var out kind.Finding
	if !r.exists && !u.Exists() {
		return out // whether it can be created is tried
	}
	problem := func(text string) {
		if text != "" {
			out.Problems = append(out.Problems, text)
		}
	}
	problem(r.trouble(n.node, u))
	if !r.exists {
		return out
	}
	problem(n.forbids(u, r))
	out.HasCredential = r.canLogin && (r.stored || !r.known)
	if r.until != "" && r.until != "infinity" && !r.expired && !u.Dated {
		out.Notes = append(out.Notes, fmt.Sprintf("passwords of user %s are valid until %s, which a rotation does not move: set it with ALTER ROLE … VALID UNTIL, or set valid_until on the role", u.Username, r.until))
	}
	return out
}

// forbids says why the admin may not change the password of a user, or "". The
// rules are those of ALTER ROLE before and from version 16 on; its own password
// everybody may change.
func (n *node) forbids(u kind.User, r row) string {
	a, username := n.facts, u.Username
	may := func(text string) string {
		return fmt.Sprintf("the admin user %s may not change user %s at node %s, %s", a.admin, username, n.node, text)
	}
	switch {
	case u.Admin && username == n.admin.Username:
		return ""
	case username == a.admin || username == n.admin.Username:
		return fmt.Sprintf("user %s is the admin user of the connection: give the connection a user of its own", username)
	case a.super || len(u.Self) > 0:
		return ""
	case r.super:
		return may("which is a superuser: take that from the user, or let a superuser be the admin")
	case !a.createRole:
		return may("because it has no CREATEROLE: grant it with ALTER ROLE, or set allow_self_rotation on the role")
	case a.number < 160000 && r.replication:
		return may("which has REPLICATION: only a superuser may, so let one be the admin")
	case a.number < 160000:
		return ""
	case !r.adminOption:
		return may(`because it has no ADMIN OPTION on it: GRANT the user to it WITH ADMIN OPTION`)
	case r.replication && !a.replication:
		return may("which has REPLICATION: give that to the admin user, too")
	case r.bypass && !a.bypass:
		return may("which has BYPASSRLS: give that to the admin user, too")
	}
	return ""
}

// doubt adds what a login that had to be refused showed.
func (n *node) doubt(finding *kind.Finding, username string, v verdict) {
	problem := v.problem
	if v.open {
		problem = n.openly(username)
	}
	if problem != "" && !slices.Contains(finding.Problems, problem) {
		finding.Problems = append(finding.Problems, problem)
	}
}
