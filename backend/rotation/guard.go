package rotation

import (
	"context"
	"fmt"
	"runtime/debug"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// guard stands between the engine and a driver. A driver that panics, or
// answers for fewer users than it was asked about, is one whose target gave no
// answer: that is retried and has a deadline, as every other failure, and ends
// neither the process nor the batch.
type guard struct {
	e      *Engine
	kind   string
	target func() kind.Target
}

var _ kind.Target = guard{}

func (e *Engine) guarded(r *Role) guard {
	return guard{e: e, kind: r.Kind, target: func() kind.Target { return e.o.Target(r.Kind, r.Connection) }}
}

// Preflight implements kind.Target.
func (g guard) Preflight(ctx context.Context, users []kind.User) []kind.Finding {
	return guardedCall(g.e, len(users),
		func() []kind.Finding { defer g.timed("preflight")(); return g.target().Preflight(ctx, users) },
		func(err error) kind.Finding { return kind.Finding{Err: err} })
}

// Probe implements kind.Target.
func (g guard) Probe(ctx context.Context, questions []kind.Question) []kind.Answer {
	answers := guardedCall(g.e, len(questions),
		func() []kind.Answer { defer g.timed("probe")(); return g.target().Probe(ctx, questions) },
		func(err error) kind.Answer { return kind.Answer{Err: err} })
	for i, a := range answers {
		for j, n := range a.Nodes {
			if n.Err == nil && len(n.Accepts) != len(questions[i].Materials) {
				answers[i].Nodes[j].Err = fmt.Errorf("the driver answered for %d credentials of %d", len(n.Accepts), len(questions[i].Materials))
			}
		}
	}
	return answers
}

// Change implements kind.Target.
func (g guard) Change(ctx context.Context, changes []kind.Change) []kind.Outcome {
	return guardedCall(g.e, len(changes),
		func() []kind.Outcome { defer g.timed("change")(); return g.target().Change(ctx, changes) },
		func(err error) kind.Outcome { return kind.Outcome{Err: err} })
}

// sessions is kind.Observer; ok is false where the target is none.
func (g guard) sessions(ctx context.Context, questions []kind.SessionsQuestion) (answers []kind.SessionsAnswer, ok bool) {
	ok = true
	answers = guardedCall(g.e, len(questions),
		func() []kind.SessionsAnswer {
			observer, is := g.target().(kind.Observer)
			if ok = is; !is {
				return make([]kind.SessionsAnswer, len(questions))
			}
			return observer.Sessions(ctx, questions)
		},
		func(err error) kind.SessionsAnswer { return kind.SessionsAnswer{Err: err} })
	return answers, ok
}

// guardedPublication is a call that publishes, or asks whether it could: one that
// panics has no known outcome.
func (e *Engine) guardedPublication(call func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			e.o.Logger.Error("publication panicked", "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			err = fmt.Errorf("publication met a defect of the engine (%T); the log has more", p)
		}
	}()
	return call()
}

func guardedCall[T any](e *Engine, n int, call func() []T, failed func(error) T) (out []T) {
	fill := func(err error) {
		out = make([]T, n)
		for i := range out {
			out[i] = failed(err)
		}
	}
	defer func() {
		if p := recover(); p != nil {
			// The value may hold a secret; its type and the stack do not.
			e.o.Logger.Error("a driver panicked", "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			fill(fmt.Errorf("the driver of this kind panicked (%T); the log has more", p))
		}
	}()
	if out = call(); len(out) != n {
		fill(fmt.Errorf("the driver answered for %d users of %d", len(out), n))
	}
	return out
}
