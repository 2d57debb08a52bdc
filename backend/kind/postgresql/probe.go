package postgresql

import (
	"context"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Probe implements kind.Target. Every material is a login of its own, on a
// connection of its own: PostgreSQL authenticates once a connection.
func (t *target) Probe(ctx context.Context, questions []kind.Question) []kind.Answer {
	answers := make([]kind.Answer, len(questions))
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
	// Without a primary a standby's answer is the best there is.
	if primary, err := f.primary(); err == nil {
		soon, cancel := within(ctx, 3, connectTimeout)
		f.standbysHave(soon, primary)
		cancel()
	}
	found := make(map[*node][]kind.NodeAnswer, len(f.nodes))
	for _, n := range f.nodes {
		found[n] = make([]kind.NodeAnswer, len(questions))
	}
	f.each(func(n *node) { n.probe(ctx, users, questions, found[n]) })
	for i := range questions {
		for _, n := range f.nodes {
			a := found[n][i]
			a.Node = n.node
			if n.err != nil {
				a.Err = n.err
			}
			if a.Err != nil {
				a = kind.NodeAnswer{Node: a.Node, Err: a.Err}
			}
			answers[i].Nodes = append(answers[i].Nodes, a)
		}
	}
	return answers
}

func (n *node) probe(ctx context.Context, users []kind.User, questions []kind.Question, answers []kind.NodeAnswer) {
	rows, err := n.read(ctx, users)
	if err != nil {
		n.err = err
		return
	}
	var logins errgroup.Group
	logins.SetLimit(atOnce)
	for i, q := range questions {
		logins.Go(func() error {
			answers[i] = n.answer(ctx, q, rows[q.Username])
			return nil
		})
	}
	_ = logins.Wait()
}

// answer tries the materials of one question.
func (n *node) answer(ctx context.Context, q kind.Question, r row) kind.NodeAnswer {
	a := kind.NodeAnswer{Accepts: make([]bool, len(q.Materials)), Problem: r.trouble(n.node, q.User)}
	proven, secret := false, ""
	for i, m := range q.Materials {
		if !r.exists {
			continue // a login could only fail
		}
		if proven && a.Extra == 0 && q.Concludes(m) { // a node that takes any password is asked on
			a.Accepts[i] = m.Secret == secret
			continue
		}
		m.Username = q.Username
		v := n.inTime(ctx, func() verdict { return n.try(ctx, m) })
		switch {
		case v.err != nil:
			a.Err = v.err
			return a
		case v.open:
			a.Extra, a.Problem = -1, n.openly(q.Username)
		case v.problem != "" && a.Problem == "":
			a.Problem = v.problem
		}
		a.Accepts[i] = v.accepted
		if v.accepted && !proven {
			proven, secret = true, m.Secret
		}
	}
	if !proven && r.known && r.stored {
		a.Extra = 1
	}
	return a
}
