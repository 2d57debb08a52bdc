package rabbitmq

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"sync"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// maxLogins bounds the logins under way at one broker.
const maxLogins = 16

// Probe implements kind.Target.
//
// A login alone proves nothing: a broker may ask LDAP or a web service as well,
// and that may accept every password. So a random one is tried, too, and the
// answers are compared with the user's record.
func (t *target) Probe(ctx context.Context, questions []kind.Question) []kind.Answer {
	answers := make([]kind.Answer, len(questions))
	users := make([]kind.User, len(questions))
	for i, q := range questions {
		users[i] = q.User
	}
	c, err := t.discover(ctx, users)
	if err != nil {
		for i := range answers {
			answers[i].Err = err
		}
		return answers
	}
	defer c.close()
	subjects := make([]subject, len(questions))
	each(len(questions), func(i int) { subjects[i] = c.study(ctx, questions[i].User) })

	var all sync.WaitGroup
	for i := range questions {
		answers[i].Nodes = make([]kind.NodeAnswer, len(c.nodes))
	}
	for at, n := range c.nodes {
		free := make(limiter, maxLogins)
		for i, q := range questions {
			free.run(&all, func() { answers[i].Nodes[at] = c.ask(ctx, n, &subjects[i], q) })
		}
	}
	all.Wait()
	each(len(questions), func(i int) { c.askManagement(ctx, &subjects[i], questions[i], answers[i].Nodes) })
	return answers
}

// subject is a user as the management API shows it, and where it has to be able
// to log in.
type subject struct {
	user
	permissions []permission
	vhosts      []string
	err         error
}

func (c *cluster) study(ctx context.Context, u kind.User) subject {
	var s subject
	if s.user, s.err = c.user(ctx, u.Username); s.err != nil || !s.exists {
		s.Name = u.Username
		return s
	}
	s.permissions, s.err = c.management.permissions(ctx, u.Username)
	s.vhosts = c.vhostsOf(u, rights{permissions: s.permissions}.vhosts())
	return s
}

// vhostsOf are those that u has to get into: those of the connection, or else those
// that it may use. The engine's own user needs none.
func (c *cluster) vhostsOf(u kind.User, mayUse []string) []string {
	if len(c.entry.RabbitMQ.VHosts) > 0 && !u.Admin {
		return c.entry.RabbitMQ.VHosts
	}
	return mayUse
}

// somewhere is the vhost to try a password with where none has to be opened:
// that it is not opened shows that the password was accepted.
const somewhere = "/"

func (s *subject) first() string {
	if len(s.vhosts) > 0 {
		return s.vhosts[0]
	}
	return somewhere
}

// ask tries every material of a question at one broker, each on a connection of
// its own, and a random one that has to be refused.
func (c *cluster) ask(ctx context.Context, n *node, s *subject, q kind.Question) kind.NodeAnswer {
	a := kind.NodeAnswer{Node: n.name, Err: n.err}
	if a.Err == nil {
		a.Err = s.err
	}
	if a.Err != nil {
		return a
	}
	open, err := c.acceptsAny(ctx, n, s)
	if err != nil {
		a.Err = err
		return a
	}
	a.Accepts = make([]bool, len(q.Materials))
	for i, m := range q.Materials {
		accepted, problem, err := c.tryEverywhere(ctx, n, s, m)
		if err != nil {
			return kind.NodeAnswer{Node: n.name, Err: err}
		}
		a.Accepts[i] = accepted
		if accepted && a.Problem == "" {
			a.Problem = problem
		}
	}
	s.count(&a, q.Materials)
	switch {
	case open:
		a.Extra, a.Problem = -1, acceptsAnything(s.Name, n.name)
	case !s.there():
		a.Problem = s.absent(s.Name)
	case s.next() == "":
		a.Problem = s.strange()
	}
	return a
}

// tryEverywhere logs in with m to each vhost that the user has to get into.
func (c *cluster) tryEverywhere(ctx context.Context, n *node, s *subject, m kind.Material) (accepted bool, problem string, err error) {
	m.Username = s.Name
	v, err := logIn(ctx, n.name, n.endpoint, c.entry.TLS, m, s.first())
	if err != nil || !v.accepted {
		return false, "", err
	}
	if len(s.vhosts) > 0 {
		problem = v.barred
	}
	for _, vhost := range s.vhosts[min(1, len(s.vhosts)):] {
		v, err := logIn(ctx, n.name, n.endpoint, c.entry.TLS, m, vhost)
		if err != nil {
			return false, "", err
		}
		if !v.accepted {
			return false, "", fmt.Errorf("broker %s accepts a password of user %s for one vhost and refuses it for the next: wait until nobody changes it", n.name, s.Name)
		}
		if problem == "" {
			problem = v.barred
		}
	}
	return true, problem, nil
}

// count compares what was accepted with the record.
func (s *subject) count(a *kind.NodeAnswer, materials []kind.Material) {
	if s.Hash != "" {
		a.Extra = 1
	}
	for i, m := range materials {
		switch {
		case s.has(m.Secret):
			a.Extra = 0
		case a.Accepts[i] && s.next() == "":
			a.Extra = 0 // nothing else can be known of such a hash
		case a.Accepts[i] && a.Problem == "":
			a.Problem = fmt.Sprintf("broker %s accepts a password for user %s that is not the one in its database: something else decides there, or the brokers disagree", a.Node, s.Name)
		}
	}
}

// acceptsAny tries a password that nobody has.
func (c *cluster) acceptsAny(ctx context.Context, n *node, s *subject) (bool, error) {
	v, err := logIn(ctx, n.name, n.endpoint, c.entry.TLS, kind.Material{Username: s.Name, Secret: rand.Text()}, s.first())
	return v.accepted, err
}

func acceptsAnything(user, node string) string {
	return fmt.Sprintf("broker %s accepts any password for user %s, so a login proves nothing: look at its auth_backends", node, user)
}

// askManagement tries what the brokers accept at the management API, too, where
// the user's tags let it in. That shares their database, and clients of it have
// to get in as well.
func (c *cluster) askManagement(ctx context.Context, s *subject, q kind.Question, nodes []kind.NodeAnswer) {
	if s.err != nil || !s.Tags.manages() {
		return
	}
	for i, m := range q.Materials {
		for at := range nodes {
			a := &nodes[at]
			if a.Err != nil || !a.Accepts[i] {
				continue
			}
			m.Username = s.Name
			err := c.do(ctx, m, http.MethodGet, "whoami", nil, nil)
			switch _, refused := unauthorized(err); {
			case err == nil:
			case refused && a.Problem == "":
				a.Problem = fmt.Sprintf("management API %s refuses a password of user %s that broker %s accepts: the brokers disagree, look at their logs", c.name, s.Name, a.Node)
			case !refused:
				a.Err = c.explain(err, "test a login", s.Name)
			}
			break // once for each password
		}
	}
}
