package redis

import (
	"context"
	"fmt"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Replicas log in to their primary with masteruser and masterauth, which Redis
// keeps in plaintext and does not replicate. A stale masterauth goes unnoticed
// as long as the link lives and breaks it for good at the next reconnect. So
// where a user is that user, the order is: every node accepts the new
// password, every node uses it, and only then is the old one refused.

// linksAs reports whether the node logs in to its primary (now, or after a
// failover) as user.
func (f *facts) linksAs(user string) bool {
	if f.masterUser != "" {
		return f.masterUser == user
	}
	return user == "default" && f.masterAuth != ""
}

// linkless reports whether the node has no login for a primary at all, as a
// server that always was the primary may.
func (f *facts) linkless() bool { return f.masterUser == "" && f.masterAuth == "" }

// isLinkUser reports whether any node logs in to another as user.
func (f *fleet) isLinkUser(user string) bool {
	for _, n := range f.nodes {
		if n.err == nil && n.facts.linksAs(user) {
			return true
		}
	}
	return false
}

// linkProblem says why the login of n to its primary as user number i of works
// would fail, or "".
func (f *fleet) linkProblem(n *node, works map[*node]*work, i int, username string) string {
	if !n.facts.linksAs(username) || n.facts.masterAuth == "" {
		return ""
	}
	hash := hashOf(n.facts.masterAuth)
	for _, m := range f.nodes {
		w := works[m]
		if !w.part[i] || w.errs[i] != nil || w.users[i].nopass || w.users[i].has(hash) {
			continue
		}
		return fmt.Sprintf("the masterauth of node %s is no password of %s at node %s: replication breaks when they reconnect, so set masterauth there", n.name, username, m.name)
	}
	return ""
}

func refuses(c kind.Change) bool { return c.Exclusive || len(c.Refuse) > 0 }

// switchLinks sets masterauth to the lead of every change whose user nodes log
// in to each other with.
func (j *job) switchLinks(ctx context.Context) {
	for i, c := range j.changes {
		if j.steps[i] != acceptOnly || c.Lead.Secret == "" || !j.isLinkUser(c.Username) {
			continue
		}
		blocked := map[*node]error{}
		for _, n := range j.nodes {
			if n.err == nil {
				blocked[n] = j.mayLink(n, i)
			}
		}
		stepCtx, cancel := within(ctx, 2, kind.CallTimeout)
		j.each(func(n *node) {
			w := j.works[n]
			if !w.part[i] || w.errs[i] != nil {
				return
			}
			if w.errs[i] = blocked[n]; w.errs[i] == nil {
				w.errs[i] = n.link(stepCtx, c, j.entry.Redis.Persistence)
			}
		})
		cancel()
	}
}

// mayLink refuses to switch n to a password that its primary did not accept
// in this call.
func (j *job) mayLink(n *node, i int) error {
	if n.facts.upstream == "" {
		return nil
	}
	primary := j.find(n.facts.upstream)
	if primary != nil && primary.err == nil && j.works[primary].errs[i] == nil {
		return nil
	}
	return fmt.Errorf("masterauth of node %s was left as it is, because its primary %s has not accepted the new password of %s: wait until the primary answers", n.name, n.facts.upstream, j.changes[i].Username)
}

// link makes n log in to its primary with the change's lead, now and after a
// restart. masterauth is configuration and not an ACL: CONFIG REWRITE saves it,
// with an aclfile too.
func (n *node) link(ctx context.Context, c kind.Change, persistence string) error {
	uses := n.facts.linksAs(c.Username)
	if !uses && !n.facts.linkless() {
		return nil // it logs in as somebody else
	}
	var commands []command
	if n.facts.masterAuth != c.Lead.Secret {
		commands = append(commands, command{"CONFIG", "SET", "masterauth", c.Lead.Secret})
	}
	if !uses && c.Username != "default" {
		commands = append(commands, command{"CONFIG", "SET", "masteruser", c.Username})
	}
	if persistence != PersistNone {
		if n.facts.configFile == "" {
			return kind.Definitely("node %s runs without a configuration file and would forget masterauth at its restart: give it one, or set persistence=none", n.name)
		}
		commands = append(commands, configRewrite)
	}
	replies := n.s.run(ctx, commands)
	for at, r := range replies {
		if r.err == nil {
			continue
		}
		if commands[at][1] == configRewrite[1] {
			return n.s.explainPersist(r.err, configRewrite)
		}
		return n.s.explain(r.err, "set masterauth for "+c.Username+" with CONFIG SET", c.Username)
	}
	return nil
}

// refuseAfterLinks does the second half of the changes of link users, where no
// node that answers is left with the password that is refused.
func (j *job) refuseAfterLinks(ctx context.Context) {
	for i, c := range j.changes {
		if j.steps[i] != acceptOnly || !refuses(c) {
			continue
		}
		j.steps[i] = refuseToo
		err := j.stillUsed(i)
		if err == nil && c.Lead.Secret == "" && j.isUsed(c.Username) {
			err = kind.Definitely("nodes or sentinels log in to nodes as %s, and no password was given that they should use: nothing was refused", c.Username)
		}
		if err == nil {
			continue
		}
		for _, w := range j.works {
			if w.errs[i] == nil {
				w.errs[i] = err
			}
		}
	}
	j.round(ctx, func(s step) bool { return s == refuseToo })
}

// isUsed reports whether something logs in to nodes as user that is switched
// when its password changes.
func (f *fleet) isUsed(user string) bool { return f.isLinkUser(user) || f.isWatchUser(user) }

// stillUsed says why the old password of change i still has to be accepted.
func (j *job) stillUsed(i int) error {
	if j.isUsed(j.changes[i].Username) {
		if err := j.unlinked(i); err != nil {
			return err
		}
	}
	return j.unwatched(i)
}

// unlinked says which node that answers could not be switched for change i.
func (j *job) unlinked(i int) error {
	c := j.changes[i]
	undone := "masterauth could not be set"
	if !j.isLinkUser(c.Username) {
		undone = "the new one could not be"
	}
	for _, n := range j.nodes {
		if w := j.works[n]; n.err == nil && w.part[i] && w.errs[i] != nil {
			return fmt.Errorf("the old password of %s is still accepted, because %s at node %s: %s", c.Username, undone, n.name, w.errs[i]) //nolint:errorlint // how that node failed is not how the others did
		}
	}
	return nil
}
