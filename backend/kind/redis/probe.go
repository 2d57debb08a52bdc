package redis

import (
	"context"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Probe implements kind.Target.
//
// A login alone proves nothing: a user with nopass accepts every password. So
// each is compared with the user as the admin reads it, and the other way
// round: a hash in the list alone proves nothing about a user that is off.
func (t *target) Probe(ctx context.Context, questions []kind.Question) []kind.Answer {
	answers := make([]kind.Answer, len(questions))
	users := make([]kind.User, len(questions))
	for i, q := range questions {
		users[i] = q.User
	}
	f, err := t.discover(ctx, users)
	if err != nil {
		for i := range answers {
			answers[i].Err = err
		}
		return answers
	}
	defer f.close()

	works := f.share(users)
	accepts := make(map[*node][][]bool, len(f.nodes))
	for _, n := range f.nodes {
		accepts[n] = make([][]bool, len(questions))
	}
	f.each(func(n *node) {
		w := works[n]
		w.read(ctx, users, w.todo())
		w.logins(ctx, questions, accepts[n])
	})
	for i, q := range questions {
		for _, n := range f.nodes {
			if w := works[n]; w.part[i] {
				a := w.answer(q, i, accepts[n][i])
				if a.Err == nil && a.Problem == "" {
					a.Problem = f.linkProblem(n, works, i, q.Username)
				}
				answers[i].Nodes = append(answers[i].Nodes, a)
			}
		}
	}
	return answers
}

// logins tries every material of every question by an AUTH of its own, all of
// them over one fresh connection: each AUTH is a new authentication, whatever
// came before it on the connection.
func (w *work) logins(ctx context.Context, questions []kind.Question, accepts [][]bool) {
	which := w.todo()
	fail := func(err error) {
		for _, i := range which {
			w.errs[i] = err
		}
	}
	var commands []command
	for _, i := range which {
		for _, m := range questions[i].Materials {
			commands = append(commands, command{"AUTH", questions[i].Username, m.Secret})
		}
	}
	if len(commands) == 0 {
		return
	}
	s, err := w.s.again(ctx)
	if err != nil {
		fail(err)
		return
	}
	defer s.close()
	replies := s.run(ctx, commands)
	for _, i := range which {
		for range questions[i].Materials {
			err := replies[0].err
			replies = replies[1:]
			if err != nil && replyCode(err) != "WRONGPASS" {
				w.errs[i] = s.explain(err, "test a login", questions[i].Username)
			}
			accepts[i] = append(accepts[i], err == nil)
		}
	}
}

func (w *work) answer(q kind.Question, i int, accepts []bool) kind.NodeAnswer {
	a := kind.NodeAnswer{Node: w.name, Err: w.errs[i], Accepts: accepts}
	if a.Err != nil {
		a.Accepts = nil
		return a
	}
	u := w.users[i]
	a.Extra = len(u.hashes)
	counted := map[string]bool{}
	for at, m := range q.Materials {
		hash := hashOf(m.Secret)
		if u.has(hash) && !counted[hash] {
			counted[hash] = true
			a.Extra--
		}
		if a.Accepts[at] && !u.has(hash) {
			a.Problem = "node " + w.name + " accepts a password for " + q.Username +
				" that is not in its list: something else than its ACL decides there"
		}
	}
	// That a user which may be created is not there is no fault of what is accepted.
	if state := u.trouble(w.name, q.Username); state != "" && (u.exists || q.User.Exists()) {
		a.Problem = state
	}
	if u.nopass {
		a.Extra = -1
	}
	return a
}

// trouble says why no password of u can be rotated, or "".
func (u user) trouble(node, name string) string {
	switch {
	case !u.exists:
		return "user " + name + " does not exist at node " + node + ": create it there with ACL SETUSER and its rules"
	case u.nopass:
		// Adding a password would clear nopass and lock out every client that
		// sends none, or a wrong one.
		return "user " + name + " needs no password at node " + node + " (nopass): give it one with ACL SETUSER first"
	case !u.on:
		return "user " + name + " is off at node " + node + ": switch it on with ACL SETUSER"
	}
	return ""
}
