package rabbitmq

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Preflight implements kind.Target.
func (t *target) Preflight(ctx context.Context, users []kind.User) []kind.Finding {
	findings := make([]kind.Finding, len(users))
	c, err := t.discover(ctx, users)
	if err != nil {
		for i := range findings {
			findings[i].Err = err
		}
		return findings
	}
	defer c.close()
	subjects := make([]subject, len(users))
	open := make([][]bool, len(users))
	for i := range users {
		findings[i].Nodes = make([]kind.NodeError, len(c.nodes))
		open[i] = make([]bool, len(c.nodes))
	}
	each(len(users), func(i int) { subjects[i] = c.study(ctx, users[i]) })
	var all sync.WaitGroup
	for at, n := range c.nodes {
		free := make(limiter, maxLogins)
		for i := range users {
			free.run(&all, func() {
				found := kind.NodeError{Node: n.name, Err: n.err}
				if found.Err == nil {
					found.Err = subjects[i].err
				}
				if found.Err == nil {
					open[i][at], found.Err = c.acceptsAny(ctx, n, &subjects[i])
				}
				findings[i].Nodes[at] = found
			})
		}
	}
	all.Wait()
	for i := range users {
		c.inspect(&findings[i], &subjects[i], open[i])
	}
	return findings
}

// inspect adds what the management API and the brokers said about one user.
func (c *cluster) inspect(f *kind.Finding, s *subject, open []bool) {
	if s.err != nil {
		return // the nodes say so
	}
	problem := func(format string, args ...any) {
		f.Problems = append(f.Problems, fmt.Sprintf(format, args...))
	}
	f.HasCredential = s.Hash != "" || slices.Contains(open, true)
	for at, any := range open {
		if any {
			problem("%s", acceptsAnything(s.Name, c.nodes[at].name))
		}
	}
	if len(c.split) > 0 {
		problem("the cluster has come apart, as %s sees it: bring it together again first, or one half would not hear of the change", strings.Join(c.split, ", "))
	}
	if !s.exists {
		problem("%s", errNobody(s.Name))
		return
	}
	if s.next() == "" {
		problem("%s", s.strange())
	}
	for _, vhost := range c.entry.RabbitMQ.VHosts {
		if !slices.Contains(s.mayUse, vhost) {
			problem("user %s has no permission in vhost %s: grant it with rabbitmqctl set_permissions, or correct vhosts of the connection", s.Name, vhost)
		}
	}
	if len(s.vhosts) == 0 && !s.Tags.manages() {
		problem("user %s has no permission in any vhost and no tag for the management API, so nothing can log in as it: grant it one with rabbitmqctl set_permissions", s.Name)
	}
	if s.algorithm() == hashMD5 {
		f.Notes = append(f.Notes, fmt.Sprintf("the password of user %s is hashed with MD5; the next one is with SHA-256", s.Name))
	}
}
