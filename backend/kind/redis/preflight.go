package redis

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Preflight implements kind.Target.
func (t *target) Preflight(ctx context.Context, users []kind.User) []kind.Finding {
	findings := make([]kind.Finding, len(users))
	f, err := t.discover(ctx, users)
	if err != nil {
		for i := range findings {
			findings[i].Err = err
		}
		return findings
	}
	defer f.close()

	in := newInspection(f, users)
	f.each(func(n *node) {
		w := in.works[n]
		w.read(ctx, in.users, w.todo())
	})
	for i, u := range users {
		findings[i] = in.finding(i)
		f.inspectSentinels(&findings[i], in.works, i, u.Username)
	}
	return findings
}

// inspection is one call of Preflight. The users that others are to be like follow
// those that were asked about.
type inspection struct {
	*fleet
	users []kind.User
	like  []int // where the user stands that each is to be like; -1: there is none
	works map[*node]*work
}

func newInspection(f *fleet, users []kind.User) *inspection {
	in := &inspection{fleet: f, users: slices.Clone(users), like: make([]int, len(users))}
	for i, u := range users {
		in.like[i] = -1
		if u.Like != "" {
			in.like[i] = len(in.users)
			in.users = append(in.users, kind.User{Username: u.Like, Known: u.Known})
		}
	}
	in.works = f.share(in.users)
	return in
}

func (in *inspection) finding(i int) kind.Finding {
	finding := kind.Finding{Nodes: in.results(in.works, i), Profile: in.profile(i)}
	for _, n := range in.asked(i) {
		in.inspect(&finding, n, i)
	}
	in.compareNodes(&finding, i)
	in.compareUsers(&finding, i)
	in.missing(&finding, i)
	return finding
}

// asked are the nodes that said what they know of user number i.
func (in *inspection) asked(i int) []*node {
	return slices.DeleteFunc(slices.Clone(in.nodes), func(n *node) bool {
		return !in.works[n].part[i] || in.works[n].errs[i] != nil
	})
}

// profile is what user number i is at a primary; a replica may have been made anew.
func (in *inspection) profile(i int) []string {
	var found []string
	for _, n := range in.asked(i) {
		u := in.works[n].users[i]
		if u.exists && !n.facts.replica {
			return u.profile()
		}
		if found == nil {
			found = u.profile()
		}
	}
	return found
}

// inspect adds to finding what one node has to say about user number i.
func (in *inspection) inspect(finding *kind.Finding, n *node, i int) {
	problem := func(text string) { addTo(&finding.Problems, text) }
	u, username := in.works[n].users[i], in.users[i].Username
	if u.exists {
		problem(u.trouble(n.name, username))
	}
	finding.HasCredential = finding.HasCredential || u.nopass || len(u.hashes) > 0
	link := in.isLinkUser(username)
	for _, p := range n.cannot(in.entry.Redis.Persistence, link) {
		problem(p)
	}
	problem(in.linkProblem(n, in.works, i, username))
	if n.facts.replica && !n.facts.linkUp {
		text := fmt.Sprintf("replica %s has no link to its primary %s: look at its log", n.name, n.facts.upstream)
		if link {
			problem(text)
		} else {
			addTo(&finding.Notes, text)
		}
	}
	if username == "default" && n.facts.requirePass && n.facts.aclFile == "" {
		addTo(&finding.Notes, fmt.Sprintf("requirepass of node %s keeps showing the old password after a rotation: the line \"user default\" of its configuration file is what counts", n.name))
	}
	finding.Notes = append(finding.Notes, n.warnings()...)
}

func addTo(list *[]string, text string) {
	if text != "" && !slices.Contains(*list, text) {
		*list = append(*list, text)
	}
}

// compareNodes says where user number i may do something else than at a primary.
func (in *inspection) compareNodes(finding *kind.Finding, i int) {
	var names []string
	for _, n := range in.asked(i) {
		if u := in.works[n].users[i]; u.exists && !slices.Equal(u.profile(), finding.Profile) {
			names = append(names, n.name)
		}
	}
	if len(names) == 0 {
		return
	}
	text := fmt.Sprintf("user %s has other rules at %s than at the other nodes: give it the same everywhere with ACL SETUSER", in.users[i].Username, strings.Join(names, ", "))
	if in.like[i] >= 0 {
		addTo(&finding.Problems, text)
	} else {
		addTo(&finding.Notes, text)
	}
}

// compareUsers says how user number i differs from the one that it is to be like, at
// each node that has both. A difference that is the same everywhere is told once.
func (in *inspection) compareUsers(finding *kind.Finding, i int) {
	like := in.like[i]
	if like < 0 {
		return
	}
	u := in.users[i]
	if in.isLinkUser(u.Username) || in.isLinkUser(u.Like) {
		addTo(&finding.Problems, fmt.Sprintf("nodes log in to each other as %s or as %s, and would not follow to the other user: rotate the one that they use with overlap", u.Username, u.Like))
	}
	both := 0
	where := map[string][]string{}
	for _, n := range in.asked(i) {
		w := in.works[n]
		if mine, other := w.users[i], w.users[like]; w.errs[like] == nil && mine.exists && other.exists {
			both++
			text := kind.Differences(u.Username, mine.profile(), u.Like, other.profile())
			where[text] = append(where[text], n.name)
		}
	}
	for _, text := range slices.Sorted(maps.Keys(where)) {
		if text != "" && len(where[text]) < both {
			addTo(&finding.Problems, text+" (at "+strings.Join(where[text], ", ")+")")
		} else {
			addTo(&finding.Problems, text)
		}
	}
}

// missing says where user number i does not exist, and what becomes of that.
func (in *inspection) missing(finding *kind.Finding, i int) {
	u, profile := in.users[i], in.users[i].Profile
	if len(profile) == 0 && in.like[i] >= 0 {
		if profile = in.profile(in.like[i]); profile == nil {
			profile = finding.Profile // where it is, it is what it was made like
		}
	}
	var names []string
	for _, n := range in.asked(i) {
		found := in.works[n].users[i]
		if found.exists {
			continue
		}
		names = append(names, n.name)
		if u.Exists() || len(profile) == 0 {
			addTo(&finding.Problems, found.trouble(n.name, u.Username))
		} else if rule := n.facts.foreign(profile); rule != "" {
			addTo(&finding.Problems, fmt.Sprintf("user %s cannot be created at node %s, which is too old for its rule %s: upgrade it", u.Username, n.name, rule))
		}
	}
	if len(names) == 0 || u.Exists() || len(profile) == 0 {
		return
	}
	text := fmt.Sprintf("user %s will be created", u.Username)
	if u.Like != "" {
		text += " like " + u.Like
	}
	if finding.Profile != nil { // it is at other nodes
		text += " at " + strings.Join(names, ", ")
	}
	addTo(&finding.Notes, text)
}

// cannot lists what the admin user, or the node, is unable to do and a rotation
// needs. link says that masterauth has to be set, too.
func (n *node) cannot(persistence string, link bool) []string {
	var out []string
	need := func(name, shown string) {
		if !n.facts.may(name) {
			out = append(out, fmt.Sprintf("the admin user %s may not run %s at node %s: grant it with ACL SETUSER %s +%s", n.facts.admin, shown, n.name, n.facts.admin, name))
		}
	}
	need("acl|setuser", "ACL SETUSER")
	save, err := n.persistence(persistence)
	switch {
	case err != nil:
		out = append(out, err.Error())
	case save == nil:
	case save[0] == aclSave[0]:
		need("acl|save", "ACL SAVE")
	default:
		need("config|rewrite", "CONFIG REWRITE")
	}
	if link {
		need("config|set", "CONFIG SET")
	}
	if link && persistence != PersistNone && n.facts.configFile == "" {
		out = append(out, fmt.Sprintf("node %s runs without a configuration file and would forget masterauth at its restart: give it one, or set persistence=none", n.name))
	}
	if !n.facts.configKnown && (n.facts.replica || len(n.facts.replicas) > 0 || n.facts.cluster) {
		out = append(out, fmt.Sprintf("node %s does not say which user its replicas log in with: grant CONFIG GET to the admin user %s", n.name, n.facts.admin))
	}
	return out
}

// warnings are dangers of the node that no rotation causes or mends.
func (n *node) warnings() []string {
	if n.facts.defaultOpen && n.facts.aclFile != "" {
		// redis#7873: requirepass is ignored beside an aclfile.
		return []string{fmt.Sprintf("anybody may log in to node %s as default, because its aclfile has no password for that user: add a line for \"user default\" to it", n.name)}
	}
	if n.facts.defaultOpen {
		return []string{fmt.Sprintf("anybody may log in to node %s as default without a password: switch that user off, or give it one", n.name)}
	}
	return nil
}
