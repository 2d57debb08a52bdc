package consumer

import (
	"context"
	"fmt"
	"slices"
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"golang.org/x/sync/errgroup"
)

// right is one that a delivery needs.
type right struct {
	namespace, group, resource, sub, name, verb string
}

func (r right) full() string {
	if r.sub != "" {
		return r.resource + "/" + r.sub
	}
	return r.resource
}

// sentence says what is missing, and the rule that gives it.
func (r right) sentence(connection string) string {
	where := "to a Role of namespace " + r.namespace
	if r.namespace == "" {
		where = "to a ClusterRole"
	}
	names := ""
	if r.name != "" {
		names = fmt.Sprintf(", resourceNames: [%q]", r.name)
	}
	return fmt.Sprintf("connection %q may not %s %s; add %s: {apiGroups: [%q], resources: [%s]%s, verbs: [%s]}",
		connection, r.verb, strings.TrimSpace(r.full()+" "+r.name), where, r.group, r.full(), names, r.verb)
}

// rights are all that a delivery to the consumer needs.
func (s *step) rights() []right {
	ns := s.c.Namespace
	var out []right
	add := func(r right, verbs ...string) {
		for _, verb := range verbs {
			r.verb = verb
			out = append(out, r)
		}
	}
	for _, one := range s.c.ExternalSecrets {
		r := right{namespace: ns, group: externalGroup, resource: "externalsecrets"}
		if isSelector(one) {
			add(r, "list", "patch")
			continue
		}
		r.name = one
		add(r, "get", "patch")
	}
	for _, one := range s.c.Secrets {
		if isSelector(one) {
			add(right{namespace: ns, resource: "secrets"}, "list")
		} else {
			add(right{namespace: ns, resource: "secrets", name: one}, "get")
		}
	}
	out = append(out, s.workloadRights()...)
	for i := range s.c.Checks {
		out = append(out, checkRights(ns, &s.c.Checks[i])...)
	}
	return out
}

func (s *step) workloadRights() []right {
	var out []right
	for _, wave := range s.c.Workloads {
		for _, w := range wave {
			r := right{namespace: s.c.Namespace, group: "apps", resource: resources[w.Kind], name: w.Name, verb: "get"}
			if w.Selector != "" {
				r.verb = "list"
			}
			out = append(out, r)
			if s.c.Mode == Restart {
				r.verb = "patch"
				out = append(out, r)
			}
		}
	}
	if len(s.c.Workloads) > 0 {
		out = append(out, right{namespace: s.c.Namespace, resource: "pods", verb: "list"})
	}
	if ns, name, ok := strings.Cut(s.c.RestartOperator, "/"); ok {
		r := right{namespace: ns, group: "apps", resource: "deployments", name: name, verb: "get"}
		out = append(out, r)
		r.verb = "patch"
		out = append(out, r)
	}
	return out
}

func checkRights(ns string, c *Check) []right {
	var out []right
	if c.Service != "" {
		verb := map[string]string{"": "get", "GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[c.Method]
		out = append(out, right{namespace: ns, resource: "services", sub: "proxy", name: c.Service, verb: verb})
	}
	if c.Type == checkLogs {
		out = append(out, right{namespace: ns, resource: "pods", sub: "log", verb: "get"})
	}
	if c.Selector != "" {
		out = append(out, right{namespace: ns, resource: "pods", verb: "list"})
	}
	return out
}

// externalRights are those that are known once the ExternalSecrets are: to read
// what they write, and to force what they were made from.
func externalRights(ns string, externals []*external) []right {
	var out []right
	known := map[string]bool{}
	for _, e := range externals {
		if e.target() != "" {
			out = append(out, right{namespace: ns, resource: "secrets", name: e.target(), verb: "get"})
		}
		if e.parent == nil || known[e.parent.GetName()] {
			continue
		}
		known[e.parent.GetName()] = true
		out = append(out, right{group: externalGroup, resource: "clusterexternalsecrets", name: e.parent.GetName(), verb: "patch"})
	}
	return out
}

// reviewsAtOnce is how many questions are under way.
const reviewsAtOnce = 8

// missing are those of some rights that the connection has not. Asking needs none.
// Of a namespace in which many are needed all rules are asked for first, and then one
// by one for what they do not give, if they may not be all there are.
func (s *step) missing(ctx context.Context, rights []right) ([]right, error) {
	in := map[string][]right{}
	for _, r := range rights {
		in[r.namespace] = append(in[r.namespace], r)
	}
	allowed := map[right]bool{}
	asked := rights
	for ns, some := range in {
		if ns == "" || len(some) <= manyRights {
			continue
		}
		rules, err := s.rules(ctx, ns)
		if err != nil {
			return nil, err
		}
		for _, r := range some {
			allowed[r] = given(rules.ResourceRules, r)
		}
		asked = slices.DeleteFunc(slices.Clone(asked), func(r right) bool {
			return r.namespace == ns && (allowed[r] || !rules.Incomplete)
		})
	}
	answers, err := s.review(ctx, asked)
	if err != nil {
		return nil, err
	}
	for i, r := range asked {
		allowed[r] = answers[i]
	}
	return slices.DeleteFunc(slices.Clone(rights), func(r right) bool { return allowed[r] }), nil
}

// manyRights in a namespace are asked for at once.
const manyRights = 20

func (s *step) rules(ctx context.Context, ns string) (*authorizationv1.SubjectRulesReviewStatus, error) {
	review := &authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: ns}}
	answer, err := s.authz.SelfSubjectRulesReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	return &answer.Status, nil
}

// given reports whether rules give a right.
func given(rules []authorizationv1.ResourceRule, r right) bool {
	has := func(list []string, what string) bool {
		return slices.Contains(list, what) || slices.Contains(list, "*")
	}
	return slices.ContainsFunc(rules, func(rule authorizationv1.ResourceRule) bool {
		return has(rule.Verbs, r.verb) && has(rule.APIGroups, r.group) && (has(rule.Resources, r.full()) || r.sub != "" && slices.Contains(rule.Resources, "*/"+r.sub)) &&
			(len(rule.ResourceNames) == 0 || r.name != "" && slices.Contains(rule.ResourceNames, r.name))
	})
}

// review asks for rights one by one.
func (s *step) review(ctx context.Context, rights []right) ([]bool, error) {
	allowed := make([]bool, len(rights))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(reviewsAtOnce)
	for i, r := range rights {
		g.Go(func() (err error) {
			allowed[i], err = s.may(ctx, r)
			return err
		})
	}
	return allowed, g.Wait()
}

func (c *cluster) may(ctx context.Context, r right) (bool, error) {
	review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: r.namespace, Group: r.group, Resource: r.resource, Subresource: r.sub, Name: r.name, Verb: r.verb,
		},
	}}
	answer, err := c.authz.SelfSubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil {
		return false, err
	}
	return answer.Status.Allowed, nil
}
