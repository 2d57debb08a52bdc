package redis

import (
	"context"
	"fmt"
	"slices"

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

	works := f.share(users)
	f.each(func(n *node) {
		w := works[n]
		w.read(ctx, users, w.todo())
	})
	for i, u := range users {
		finding := &findings[i]
		finding.Nodes = f.results(works, i)
		for _, n := range f.nodes {
			if w := works[n]; w.part[i] && w.errs[i] == nil {
				f.inspect(finding, n, works, i, u.Username)
			}
		}
	}
	return findings
}

// inspect adds to finding what one node has to say about user number i.
func (f *fleet) inspect(finding *kind.Finding, n *node, works map[*node]*work, i int, username string) {
	problem := func(text string) {
		if text != "" && !slices.Contains(finding.Problems, text) {
			finding.Problems = append(finding.Problems, text)
		}
	}
	u := works[n].users[i]
	problem(u.trouble(n.name, username))
	finding.HasCredential = finding.HasCredential || u.nopass || len(u.hashes) > 0
	link := f.isLinkUser(username)
	for _, p := range n.cannot(f.entry.Redis.Persistence, link) {
		problem(p)
	}
	problem(f.linkProblem(n, works, i, username))
	if n.facts.replica && !n.facts.linkUp {
		text := fmt.Sprintf("replica %s has no link to its primary %s: look at its log", n.name, n.facts.upstream)
		if link {
			problem(text)
		} else {
			finding.Notes = append(finding.Notes, text)
		}
	}
	if username == "default" && n.facts.requirePass && n.facts.aclFile == "" {
		finding.Notes = append(finding.Notes, fmt.Sprintf("requirepass of node %s keeps showing the old password after a rotation: the line \"user default\" of its configuration file is what counts", n.name))
	}
	finding.Notes = append(finding.Notes, n.warnings()...)
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
