package kindtest

import (
	"context"
	"fmt"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
)

// Watch is target, of which every answer is looked at for every secret that it was ever
// asked about. What stands in one is found when the tests of the package are over
// (leaks.Main).
func Watch(target kind.Target) kind.Target {
	w := watched{target}
	if o, ok := target.(kind.Observer); ok {
		return observed{w, o}
	}
	return w
}

type watched struct{ kind.Target }

type observed struct {
	watched
	kind.Observer
}

func (w watched) Preflight(ctx context.Context, users []kind.User) []kind.Finding {
	out := w.Target.Preflight(ctx, users)
	look("a finding", out)
	return out
}

func (w watched) Probe(ctx context.Context, questions []kind.Question) []kind.Answer {
	for _, q := range questions {
		plant(q.Username, q.Materials...)
	}
	out := w.Target.Probe(ctx, questions)
	look("the answer of a probe", out)
	return out
}

func (w watched) Change(ctx context.Context, changes []kind.Change) []kind.Outcome {
	for _, c := range changes {
		plant(c.Username, c.Lead)
		plant(c.Username, c.Accept...)
		plant(c.Username, c.Refuse...)
	}
	out := w.Target.Change(ctx, changes)
	look("the outcome of a change", out)
	return out
}

func (o observed) Sessions(ctx context.Context, questions []kind.SessionsQuestion) []kind.SessionsAnswer {
	out := o.Observer.Sessions(ctx, questions)
	look("what is said of sessions", out)
	return out
}

func plant(username string, materials ...kind.Material) {
	for _, m := range materials {
		leaks.Plant("a password of "+username, m.Secret)
	}
}

// look keeps answers as a log would show them.
func look[T any](where string, answers []T) {
	for _, a := range answers {
		leaks.Look(where, fmt.Sprintf("%+v", a))
	}
}
