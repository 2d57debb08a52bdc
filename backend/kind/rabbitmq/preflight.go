package rabbitmq

import (
	"context"
	"fmt"
	"net/url"
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
	candidates := make([]candidate, len(users))
	open := make([][]bool, len(users))
	for i := range users {
		findings[i].Nodes = make([]kind.NodeError, len(c.nodes))
		open[i] = make([]bool, len(c.nodes))
	}
	each(len(users), func(i int) { candidates[i] = c.survey(ctx, users[i]) })
	var all sync.WaitGroup
	for at, n := range c.nodes {
		free := make(limiter, maxLogins)
		for i := range users {
			free.run(&all, func() {
				found := kind.NodeError{Node: n.name, Err: n.err}
				if found.Err == nil {
					found.Err = candidates[i].err
				}
				if found.Err == nil {
					open[i][at], found.Err = c.acceptsAny(ctx, n, &candidates[i].subject)
				}
				findings[i].Nodes[at] = found
			})
		}
	}
	all.Wait()
	for i := range users {
		if candidates[i].err == nil { // otherwise the nodes say so
			c.inspect(&findings[i], &candidates[i], open[i])
		}
	}
	return findings
}

// candidate is a user that a rotation is to change.
type candidate struct {
	kind.User
	subject
	has, like rights
	likeThere bool
	// Of one that is to be created: what it is to be, and which of its vhosts do
	// not exist.
	plan    rights
	missing []string
	invalid error // of the profile that is remembered
}

// survey reads all that is to be known of a user, and of the one that it is like.
func (c *cluster) survey(ctx context.Context, u kind.User) candidate {
	s := candidate{User: u, subject: c.study(ctx, u)}
	if s.err == nil && s.there() {
		s.has = rights{tags: s.Tags, permissions: s.permissions, limits: s.Limits}
		s.has.topics, s.err = c.topics(ctx, u.Username)
	}
	if s.err == nil && u.Like != "" {
		var other user
		if other, s.err = c.user(ctx, u.Like); s.err == nil && other.there() {
			s.likeThere = true
			s.like, s.err = c.rightsOf(ctx, other)
		}
	}
	if s.err != nil || s.there() {
		return s
	}
	s.plan = s.like
	if len(u.Profile) > 0 {
		if s.plan, s.invalid = parseProfile(u.Profile); s.invalid == nil {
			s.missing, s.err = c.missing(ctx, s.plan.vhosts())
		}
	}
	return s
}

// missing are those of vhosts that do not exist.
func (c *cluster) missing(ctx context.Context, vhosts []string) ([]string, error) {
	var out []string
	for _, vhost := range vhosts {
		err := c.get(ctx, "vhosts/"+url.PathEscape(vhost)+"?columns=name", nil)
		switch {
		case notFound(err):
			out = append(out, vhost)
		case err != nil:
			return nil, c.explain(err, "show vhost "+vhost, c.login.Username)
		}
	}
	return out, nil
}

// inspect adds what the management API and the brokers said about one user.
func (c *cluster) inspect(f *kind.Finding, s *candidate, open []bool) {
	problem := func(format string, args ...any) {
		f.Problems = append(f.Problems, fmt.Sprintf(format, args...))
	}
	f.HasCredential = s.Hash != "" || slices.Contains(open, true)
	for at, any := range open {
		if any {
			problem("%s", acceptsAnything(s.Username, c.nodes[at].name))
		}
	}
	if len(c.split) > 0 {
		problem("the cluster has come apart, as %s sees it: bring it together again first, or one half would not hear of the change", strings.Join(c.split, ", "))
	}
	if s.Username == c.login.Username && !s.Admin {
		problem("%s", ownUser(s.Username))
	}
	if !s.there() {
		c.inspectAbsent(f, s)
		return
	}
	if s.next() == "" {
		problem("%s", s.strange())
	}
	f.Problems = append(f.Problems, c.useless(s.has, s.User)...)
	if s.algorithm() == hashMD5 {
		f.Notes = append(f.Notes, fmt.Sprintf("the password of user %s is hashed with MD5; the next one is with SHA-256", s.Username))
	}
	f.Profile = s.has.profile()
	if large(f.Profile) {
		f.Profile = nil
		f.Notes = append(f.Notes, fmt.Sprintf("user %s has more permissions than are remembered, so that it could not be created again", s.Username))
	}
	s.compare(f)
}

// inspectAbsent is inspect for a user that does not exist, or only halfway.
func (c *cluster) inspectAbsent(f *kind.Finding, s *candidate) {
	problem := func(text string) { f.Problems = append(f.Problems, text) }
	switch {
	case s.Exists():
		problem(s.absent(s.Username))
		return
	case s.invalid != nil:
		problem(s.invalid.Error())
		return
	case len(s.Profile) == 0 && !s.likeThere:
		problem(fmt.Sprintf("user %s does not exist, nor does %s, like which it is to be: create one of them with rabbitmqctl add_user", s.Username, s.Like))
		return
	case large(s.plan.profile()):
		problem(tooLarge(s.Like))
	}
	for _, vhost := range s.missing {
		problem(fmt.Sprintf("user %s is to be created with a permission in vhost %s, which does not exist: create the vhost, or the user with rabbitmqctl add_user", s.Username, vhost))
	}
	f.Problems = append(f.Problems, c.useless(s.plan, s.User)...)
	if s.Like != "" {
		f.Notes = append(f.Notes, fmt.Sprintf("user %s will be created like %s", s.Username, s.Like))
	} else {
		f.Notes = append(f.Notes, fmt.Sprintf("user %s will be created, with what is remembered of it", s.Username))
	}
}

// compare says how a user differs from the one whose place it is to take.
func (s *candidate) compare(f *kind.Finding) {
	switch {
	case s.Like == "":
	case !s.likeThere:
		f.Notes = append(f.Notes, fmt.Sprintf("user %s does not exist, so that %s was not compared with it", s.Like, s.Username))
	case large(s.has.profile()):
		f.Problems = append(f.Problems, tooLarge(s.Username))
	default:
		if d := kind.Differences(s.Username, s.has.profile(), s.Like, s.like.profile()); d != "" {
			f.Problems = append(f.Problems, d)
		}
	}
}

func tooLarge(username string) string {
	return fmt.Sprintf("the permissions of user %s are more than %d KiB, so that no other can be made like it: give it fewer, or rotate it with strategy swap", username, maxProfile>>10)
}

// useless says what keeps a user with rights r from being of use.
func (c *cluster) useless(r rights, u kind.User) (problems []string) {
	mayUse := r.vhosts()
	needed := c.vhostsOf(u, mayUse)
	for _, vhost := range needed {
		if !slices.Contains(mayUse, vhost) {
			problems = append(problems, fmt.Sprintf("user %s has no permission in vhost %s: grant it with rabbitmqctl set_permissions, or correct vhosts of the connection", u.Username, vhost))
		}
	}
	if len(needed) == 0 && !r.tags.manages() {
		problems = append(problems, fmt.Sprintf("user %s has no permission in any vhost and no tag for the management API, so nothing can log in as it: grant it one with rabbitmqctl set_permissions", u.Username))
	}
	return problems
}
