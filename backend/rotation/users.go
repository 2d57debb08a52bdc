package rotation

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Targets are asked about users, and the machine is about roles. Most roles have
// one user. One of strategy alternate has two, which take turns: its questions and
// changes are those about each of them, and the answers become one. No driver and
// no decision knows of more than that.

func (r *Role) alternates() bool { return r.Spec.Strategy == kind.Alternate }

// usernames are the users that calls about the role are about: the one in use
// first.
func (r *Role) usernames() []string {
	if !r.alternates() {
		return []string{r.Spec.Username}
	}
	first := r.inUse()
	return []string{first, r.Spec.Turn(kind.Material{Username: first})}
}

// inUse is the user that is served, or is to be the first.
func (r *Role) inUse() string {
	switch current, pending := r.With(version.Current), r.With(version.Pending); {
	case current != nil:
		return current.Material.Username
	case pending != nil:
		return pending.Material.Username
	}
	return r.Spec.Turn(kind.Material{})
}

// user names one of the role's users to its target. Nodes that the role remembers
// count only as long as its connection was not written anew.
func (r *Role) user(username string, generation int) kind.User {
	u := kind.User{Role: r.Name, Username: username, Admin: r.Root(), Dated: r.Spec.ValidFor > 0}
	if r.NodesGeneration == generation {
		u.Known = r.Nodes
	}
	if r.Spec.SelfRotation {
		u.Self = r.Accepted()
	}
	return u
}

// forPreflight names the role's users. The idle one has to be like the one in use,
// or not to exist yet; a reconcile creates and aligns both as they were found last.
func (r *Role) forPreflight(generation int) []kind.User {
	var out []kind.User
	for i, name := range r.usernames() {
		u := r.user(name, generation)
		switch {
		case r.Run != nil && r.Run.Trigger == Reconcile:
			u.Profile = r.Profile
		case i > 0:
			u.Like = out[0].Username
		}
		out = append(out, u)
	}
	return out
}

// questions ask about materials, each with the user that it is for. places say
// where in materials those of each question stand.
func (r *Role) questions(materials []kind.Material, generation int) (out []kind.Question, places [][]int) {
	for _, name := range r.usernames() {
		q, at := kind.Question{User: r.user(name, generation)}, []int{}
		for i, m := range materials {
			if !r.alternates() || m.Username == name {
				q.Materials, at = append(q.Materials, m), append(at, i)
			}
		}
		out, places = append(out, q), append(places, at)
	}
	return out, places
}

// changes are what g wants of each user that it is about.
func (r *Role) changes(g goal, generation int) []kind.Change {
	var out []kind.Change
	for _, name := range r.usernames() {
		if len(g.users) > 0 && !slices.Contains(g.users, name) {
			continue
		}
		of := func(list []kind.Material) []kind.Material {
			if !r.alternates() {
				return list
			}
			return slices.DeleteFunc(slices.Clone(list), func(m kind.Material) bool { return m.Username != name })
		}
		c := kind.Change{
			User: r.user(name, generation), Accept: of(g.accept), Refuse: of(g.refuse), Exclusive: g.exclusive,
			Lead: g.lead, CloseBefore: g.closeBefore,
		}
		reconciles := r.Run.Trigger == Reconcile
		idle := r.alternates() && name != r.inUse()
		switch {
		case idle:
			c.Like = r.inUse()
		case r.alternates(): // it may be changed as well, and its sessions are those that consumers have moved to
			c.CloseBefore = time.Time{}
		}
		if idle || reconciles || r.Run.Reapply {
			c.Profile, c.Align = r.Profile, idle && reconciles
		}
		out = append(out, c)
	}
	return out
}

// oneFinding is what was found about the users of one role.
func oneFinding(found []kind.Finding) kind.Finding {
	out := found[0]
	for _, f := range found[1:] {
		out.Err = worse(out.Err, f.Err)
		out.Problems = union(out.Problems, f.Problems)
		out.Notes = union(out.Notes, f.Notes)
		out.Nodes = mergeErrors(out.Nodes, f.Nodes)
	}
	return out
}

// idleInUse reports whether the idle one of two users has a password.
func idleInUse(found []kind.Finding) bool { return len(found) > 1 && found[1].HasCredential }

// idleProblem is that the idle user of a new role has a password that the role
// does not know, and that somebody may use; or "".
func (d *decider) idleProblem() string {
	r := d.role
	if !d.facts.idleInUse || r.Run.Trigger != Create || r.Run.Overwrite {
		return ""
	}
	idle := r.usernames()[1]
	known := func(n kind.NodeAnswer) bool {
		return n.Err == nil && slices.ContainsFunc(d.facts.asked, func(m kind.Material) bool {
			return m.Username == idle && n.Accepts[slices.IndexFunc(d.facts.asked, m.Same)]
		})
	}
	if slices.ContainsFunc(d.facts.answer.Nodes, known) {
		return "" // an earlier role of the name has left it
	}
	return fmt.Sprintf("user %q has a password already, and is to take turns with %q: "+
		"take it away if nobody uses it, or set overwrite_existing=true, which does that", idle, r.usernames()[0])
}

// oneAnswer is what was answered about the users of one role; asked and places are
// those of questions. What only the users of a goal are to lose counts for them
// alone.
func (r *Role) oneAnswer(asked []kind.Material, answers []kind.Answer, places [][]int, g goal) kind.Answer {
	if len(answers) == 1 {
		return answers[0]
	}
	out := kind.Answer{}
	at := map[string]int{}
	for i, a := range answers {
		counts := len(g.users) == 0 || slices.Contains(g.users, r.usernames()[i])
		out.Err = worse(out.Err, a.Err)
		for _, n := range a.Nodes {
			k, known := at[n.Node]
			if !known {
				k = len(out.Nodes)
				at[n.Node] = k
				out.Nodes = append(out.Nodes, kind.NodeAnswer{Node: n.Node, Accepts: make([]bool, len(asked))})
			}
			if !counts && n.Extra > 0 {
				n.Extra = 0
			}
			if idle := i > 0; idle && n.Extra >= 0 && !slices.Contains(n.Accepts, true) {
				n.Problem = "" // it lets nobody in, and need not
			}
			addAnswer(&out.Nodes[k], n, places[i])
		}
	}
	return out
}

// addAnswer adds to a node's answer what it said about one of the users.
func addAnswer(to *kind.NodeAnswer, n kind.NodeAnswer, places []int) {
	to.Err = worse(to.Err, n.Err)
	if to.Err != nil {
		return
	}
	for i, at := range places {
		to.Accepts[at] = n.Accepts[i]
	}
	switch {
	case to.Extra < 0:
	case n.Extra < 0:
		to.Extra = n.Extra
	default:
		to.Extra += n.Extra
	}
	if to.Problem == "" {
		to.Problem = n.Problem
	}
}

// worse is the error that says less about what is so: one that may mend hides one
// that does not.
func worse(a, b error) error {
	if a == nil || b != nil && kind.IsDefinite(a) && !kind.IsDefinite(b) {
		return b
	}
	return a
}

func union(a, b []string) []string {
	out := slices.Clone(a)
	for _, s := range b {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// oneOutcome is what became of the changes of one role.
func oneOutcome(outcomes []kind.Outcome) kind.Outcome {
	out := kind.Outcome{Err: outcomes[0].Err, Nodes: outcomes[0].Nodes, Notes: outcomes[0].Notes}
	for _, o := range outcomes[1:] {
		out.Err = worse(out.Err, o.Err)
		out.Nodes = mergeErrors(out.Nodes, o.Nodes)
		out.Notes = union(out.Notes, o.Notes)
	}
	return out
}

// mergeErrors lists nodes once, each with what is wrong with it for any user.
func mergeErrors(a, b []kind.NodeError) []kind.NodeError {
	out := slices.Clone(a)
	for _, n := range b {
		i := slices.IndexFunc(out, func(o kind.NodeError) bool { return o.Node == n.Node })
		if i < 0 {
			out = append(out, n)
			continue
		}
		out[i].Err = worse(out[i].Err, n.Err)
	}
	return out
}

// spread calls f once for all parts of all roles, and gives each role its own
// results.
func spread[Q, A any](parts [][]Q, f func([]Q) []A) [][]A {
	all := f(slices.Concat(parts...))
	out := make([][]A, len(parts))
	for i, p := range parts {
		out[i], all = all[:len(p):len(p)], all[len(p):]
	}
	return out
}

// allSessions is later than any session is opened.
const allSessions = 365 * 24 * time.Hour

// closes reports whether sessions of the previous version are ended with it.
func (r *Role) closes() bool {
	return (r.Spec.CloseConnections || r.Run.urgent()) && r.Run.Trigger != Create
}

// closeBefore is until when sessions were opened that end with the previous
// version, where they do. Of a user that has been replaced all do. Those of
// one that stays cannot be told apart: with swap the ones from before promotion
// are the previous credential's, with overlap all that are there when it goes.
func (r *Role) closeBefore(now time.Time) time.Time {
	switch {
	case r.alternates():
		return now.Add(allSessions)
	case r.Spec.Strategy == kind.Swap:
		return r.With(version.Current).Promoted
	}
	return r.Run.CloseBefore
}

// sessionsBefore is which sessions of which user use the previous version, as
// far as can be told; ok is false where nothing is to be told about them.
func (r *Role) sessionsBefore(now time.Time) (username string, before time.Time, ok bool) {
	current := r.With(version.Current)
	switch {
	case current == nil || r.Connection == "" || r.kept():
		return "", time.Time{}, false
	case r.alternates():
		return r.Spec.Turn(current.Material), now.Add(allSessions), true
	}
	return r.Spec.Username, current.Promoted, !current.Promoted.IsZero()
}

// renewed is m as it is accepted anew, where the server ends passwords by itself.
func (r *Role) renewed(m kind.Material, now time.Time) kind.Material {
	if r.Spec.ValidFor > 0 {
		m.Expires = now.Add(r.Spec.ValidFor).UTC()
	}
	return m
}

// turnsTo reports whether material can be served next: where two users take turns,
// that of the idle one.
func (r *Role) turnsTo(m kind.Material) bool {
	return !r.alternates() || m.Username != r.inUse()
}

func userNames(users []string) string {
	quoted := make([]string, len(users))
	for i, u := range users {
		quoted[i] = fmt.Sprintf("%q", u)
	}
	return strings.Join(quoted, " or ")
}
