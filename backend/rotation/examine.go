package rotation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Report is what a look at a role's target showed. Nothing was changed.
type Report struct {
	Role *Role
	Err  error // why a rotation could not succeed now
	// definite: waiting does not mend that.
	definite bool
	Notes    []string
	// Plan is what would be done at consumers, in order.
	Plan  []string
	Nodes []NodeReport
	// Sessions are those that use the previous version, as far as can be told: of
	// SessionsOf, and opened before SessionsBefore. Nil where nobody can tell.
	Sessions *kind.SessionsAnswer
	// SessionsOf is whose they are; Older: they are known by their age alone.
	SessionsOf string
	Older      bool
	// Consumers are how those of the role stand, of a look at it.
	Consumers []ConsumerReport
	// Sight is what the server showed that keeps the secret itself.
	Sight *kind.Sight
	place error // why it could not be published
}

// NodeReport is what one node showed.
type NodeReport struct {
	Node     string
	Err      error
	Accepted []int // version numbers
	Unknown  int   // credentials that the engine does not know; -1: it accepts any
	Problem  string
}

// Examine asks the targets of roles what a rotation would meet now.
func (e *Engine) Examine(ctx context.Context, names []string) ([]Report, error) {
	roles, err := e.st.Roles(ctx, names)
	if err != nil {
		return nil, err
	}
	for i, r := range roles {
		if r == nil {
			return nil, fmt.Errorf("role %q: %w", names[i], ErrNotFound)
		}
	}
	return e.examine(ctx, roles)
}

// ExamineNew is Examine for a role that is not stored.
func (e *Engine) ExamineNew(ctx context.Context, r *Role) ([]Report, error) {
	return e.examine(ctx, []*Role{r})
}

// examineSessions asks the target of a role alone, and tells who is logged in with the
// previous version of it.
func (e *Engine) examineSessions(ctx context.Context, r *Role) (Report, error) {
	alone := r.clone()
	alone.Consumers = nil // they are looked at as they are, not for what stands against a rotation
	reports, err := e.examine(ctx, []*Role{alone})
	if err != nil {
		return Report{}, err
	}
	rep, name := reports[0], r.Name
	rep.Role = r
	if username, before, ok := rep.Role.sessionsBefore(time.Now()); ok {
		call, cancel := context.WithTimeout(ctx, kind.CallTimeout)
		defer cancel()
		answers, known := e.guarded(rep.Role).sessions(call, []kind.SessionsQuestion{{User: kind.User{Role: name, Username: username}, Before: before}})
		if known {
			rep.Sessions, rep.SessionsOf, rep.Older = &answers[0], username, !rep.Role.alternates()
		}
	}
	return rep, nil
}

// examine is preflight for roles that need not be stored. Those of a lane share
// calls, and each has its own time for them.
func (e *Engine) examine(ctx context.Context, roles []*Role) ([]Report, error) {
	reports := make([]Report, len(roles))
	lanes := map[string][]int{}
	for i, r := range roles {
		reports[i].Role = r
		if !e.targetless(r) {
			lanes[r.targetLane()] = append(lanes[r.targetLane()], i)
		}
	}
	// All at once: what hangs costs the others nothing.
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, e.Config().Workers))
	for _, members := range lanes {
		for batch := range slices.Chunk(members, maxBatch) {
			g.Go(func() error { return e.examineLane(ctx, batch, reports) })
		}
	}
	for i := range reports {
		if r := reports[i].Role; !r.Place.Zero() {
			g.Go(func() error {
				call, cancel := context.WithTimeout(ctx, kind.CallTimeout)
				defer cancel()
				reports[i].place = e.reachPlace(call, r)
				return nil
			})
		}
	}
	found := make([]surveyed, len(reports))
	for i := range reports {
		if r := reports[i].Role; r.delivers() {
			g.Go(func() error { found[i] = e.surveyOf(ctx, r); return nil })
		}
	}
	err := g.Wait()
	for i := range reports {
		rep, s := &reports[i], found[i]
		rep.Plan, rep.Notes = s.plan, append(rep.Notes, s.notes...)
		for _, why := range []error{rep.place, s.err, s.definite()} {
			if rep.Err == nil {
				rep.Err = why
			}
		}
	}
	return reports, err
}

func (e *Engine) examineLane(ctx context.Context, members []int, reports []Report) error {
	first := reports[members[0]].Role
	if first.kept() {
		e.examineKept(ctx, members, reports)
		return nil
	}
	generation, err := e.o.Generation(ctx, first.Connection)
	if err != nil {
		return err
	}
	roles := make([]*Role, len(members))
	users := make([][]kind.User, len(members))
	questions, places := make([][]kind.Question, len(members)), make([][][]int, len(members))
	for n, i := range members {
		r := reports[i].Role
		roles[n], users[n] = r, r.forPreflight(generation)
		questions[n], places[n] = r.questions(r.All(), generation)
	}
	ctx, cancel := context.WithTimeout(ctx, kind.CallTimeout)
	defer cancel()
	target := e.guarded(first)
	findings, idle := make([]kind.Finding, len(members)), make([]bool, len(members))
	for n, found := range spread(users, func(all []kind.User) []kind.Finding { return target.Preflight(ctx, all) }) {
		findings[n], idle[n] = oneFinding(found), idleInUse(found)
	}
	e.forbid(ctx, roles, findings)
	answers := spread(questions, func(all []kind.Question) []kind.Answer { return target.Probe(ctx, all) })
	for n, i := range members {
		asked := roles[n].All()
		answer := roles[n].oneAnswer(asked, answers[n], places[n], goal{})
		reports[i].fill(e.Config(), facts{finding: &findings[n], idleInUse: idle[n], answer: &answer, asked: asked})
	}
	return nil
}

func (rep *Report) fill(c Config, seen facts) {
	run := rep.Role.Run
	role := rep.Role.clone()
	if run == nil {
		role.Run = &Run{Trigger: Manual, Phase: Preflight}
	}
	d := &decider{role: role, facts: &seen, now: time.Now(), config: c}
	if err := d.unavailable(); err != nil {
		rep.Err = err
	} else if p := d.problem(); p != "" {
		rep.Err, rep.definite = errors.New(p), true
	}
	rep.Notes = seen.finding.Notes
	for _, n := range seen.answer.Nodes {
		rep.Nodes = append(rep.Nodes, nodeReport(role, n, seen.asked))
	}
}

func nodeReport(r *Role, n kind.NodeAnswer, asked []kind.Material) NodeReport {
	out := NodeReport{Node: n.Node, Err: n.Err, Unknown: n.Extra, Problem: n.Problem}
	if n.Err != nil {
		return out
	}
	for i, m := range asked {
		if !n.Accepts[i] {
			continue
		}
		j := slices.IndexFunc(r.Versions, func(v version.Version) bool {
			return v.Material.Same(m) && (v.Stage == version.Current || !r.Served(m))
		})
		if j >= 0 {
			out.Accepted = append(out.Accepted, r.Versions[j].Number)
		}
	}
	slices.Sort(out.Accepted)
	return out
}
