package postgresql

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// withLikes are users and those that some of them have to be like.
func withLikes(users []kind.User) []kind.User {
	out := slices.Clone(users)
	for _, u := range users {
		if u.Like != "" {
			out = append(out, kind.User{Role: u.Role, Username: u.Like})
		}
	}
	return out
}

// compare adds what the profiles have for or against a rotation of u.
func (n *node) compare(ctx context.Context, out *kind.Finding, u kind.User, profiles map[string]*profile) {
	own, like := profiles[u.Username], profiles[u.Like]
	problem := func(text string) {
		if text != "" {
			out.Problems = append(out.Problems, text)
		}
	}
	if own != nil {
		if big := own.tooBig(u.Username); big == "" {
			out.Profile = own.lines
		} else if !u.Exists() {
			problem(big)
			return
		}
	}
	switch {
	case u.Exists():
		return
	case u.Like != "" && like == nil && len(u.Profile) == 0:
		problem(fmt.Sprintf("user %s, which user %s is to be like, does not exist at node %s: create it with CREATE ROLE … LOGIN", u.Like, u.Username, n.node))
	case own == nil:
		n.tryCreation(ctx, out, u, like)
	case like != nil && like.tooBig(u.Like) != "":
		problem(like.tooBig(u.Like))
	case like != nil:
		problem(kind.Differences(u.Username, own.lines, u.Like, like.lines))
		if missing := slices.DeleteFunc(bound(like.lines), func(l string) bool { return slices.Contains(own.lines, l) }); len(missing) > 0 {
			problem(fmt.Sprintf("what user %s alone has to do with objects cannot be copied to user %s: %s", u.Like, u.Username, sharing))
		}
		if len(like.coarse) > 0 {
			out.Notes = append(out.Notes, fmt.Sprintf("in database %s users %s and %s are compared by which objects they have rights to, and not by which rights: "+
				"let the admin user connect to it, or give both their rights by way of a role", strings.Join(like.coarse, ", "), u.Username, u.Like))
		}
	}
}

// tryCreation says whether u, which does not exist, could be created.
func (n *node) tryCreation(ctx context.Context, out *kind.Finding, u kind.User, like *profile) {
	lines, hidden := u.Profile, map[string]string{}
	whom := "as it was"
	if like != nil {
		hidden, whom = like.hidden, "like "+u.Like
		if big := like.tooBig(u.Like); len(lines) == 0 && big != "" {
			out.Problems = append(out.Problems, big)
			return
		}
	}
	if len(lines) == 0 {
		lines = like.lines
	}
	statements, err := creation(u.Username, lines, hidden, n.facts.number)
	if err == nil {
		err = n.rehearse(ctx, statements)
	}
	switch {
	case kind.IsDefinite(err):
		out.Problems = append(out.Problems, err.Error())
	case err != nil:
		out.Err = err
	default:
		out.Notes = append(out.Notes, fmt.Sprintf("user %s does not exist at node %s and will be created %s", u.Username, n.node, whom))
	}
}

// rehearse tries statements and takes them back. Who may create what with which
// options differs from version to version, and with what was granted; the server
// knows.
func (n *node) rehearse(ctx context.Context, statements []statement) error {
	timeout, err := n.timeLeft(ctx)
	if err != nil {
		return err
	}
	err = n.s.send(ctx, "BEGIN; "+strings.Join(timeouts(timeout), "; "))
	what := "begin a transaction"
	for _, s := range statements {
		if err == nil {
			what = s.what
			err = n.s.send(ctx, s.sql)
		}
	}
	if n.s.conn.IsClosed() {
		return n.later(ctx, err, what, n.facts.admin)
	}
	if lost := n.s.send(ctx, "ROLLBACK"); lost != nil {
		return n.later(ctx, lost, "take back what was tried", n.facts.admin)
	}
	switch codeOf(err) {
	case "42501":
		return kind.Definitely("the admin user %s may not %s at node %s: give it the right to, or let a superuser be the admin", n.facts.admin, what, n.node)
	case "42704", "3D000":
		return kind.Definitely("node %s cannot %s, because it does not know what that names: create that first, or create the user by hand", n.node, what)
	case "":
		if err == nil {
			return nil
		}
	}
	return n.later(ctx, err, what, n.facts.admin)
}

// making are the statements that make the user of c what its profile says.
func (n *node) making(c kind.Change, r row, profiles map[string]*profile) (statements []string, note string, err error) {
	if len(c.Profile) == 0 || r.exists && (!c.Align || len(c.Self) > 0) {
		return nil, "", nil
	}
	hidden := map[string]string{}
	if like := profiles[c.Like]; like != nil {
		hidden = like.hidden
	}
	var made []statement
	if r.exists {
		made, err = alignment(c.Username, profiles[c.Username].lines, c.Profile, hidden, n.facts.number)
		note = fmt.Sprintf("user %s was made what it is to be at node %s", c.Username, n.node)
	} else {
		made, err = creation(c.Username, c.Profile, hidden, n.facts.number)
		note = fmt.Sprintf("user %s was created at node %s", c.Username, n.node)
	}
	for _, s := range made {
		statements = append(statements, s.sql)
	}
	if len(statements) == 0 {
		note = ""
	}
	return statements, note, err
}

// remaining says what still tells users from their profiles after they were
// aligned: objects, and memberships that somebody else has granted.
func (n *node) remaining(ctx context.Context, changes []kind.Change, errs []error, notes [][]string) {
	var users []kind.User
	for i, c := range changes {
		if c.Align && len(c.Profile) > 0 && errs[i] == nil {
			users = append(users, c.User)
		}
	}
	if len(users) == 0 {
		return
	}
	profiles, err := n.profiles(ctx, users)
	for i, c := range changes {
		if !c.Align || len(c.Profile) == 0 || errs[i] != nil {
			continue
		}
		if err != nil {
			notes[i] = append(notes[i], fmt.Sprintf("whether user %s is now what it is to be is not known: %s", c.Username, err))
			continue
		}
		p := profiles[c.Username]
		if p == nil {
			continue
		}
		whose := "what it is to be"
		if c.Like != "" {
			whose = c.Like
		}
		if text := kind.Differences(c.Username, p.lines, whose, c.Profile); text != "" {
			notes[i] = append(notes[i], text+": the engine cannot change that, so change it by hand, or "+sharing)
		}
	}
}
