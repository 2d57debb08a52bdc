package rotation

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// saved is what each node accepts for user after a restart.
func (w *world) saved(user string) (out [][]kind.Material) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.nodes {
		out = append(out, n.saved[user])
	}
	return out
}

// What a node accepts and could not save is neither served nor counted as
// refused: it would be undone by the node's next restart.
func TestSaveThatFails(t *testing.T) {
	for name, s := range map[string]shape{"overlap": overlap(2), "swap": swap(2), "partial": partial(2)} {
		for _, what := range []fault{unsavedOne, unsavedLost} {
			t.Run(name+"/"+string(what), func(t *testing.T) {
				inWorld(t, s, nil, func(t *testing.T, w *world) {
					w.nextCall(3, what) // preflight, probe, change
					w.rotate("a")
					w.pass(time.Minute) // past the attempt, before the nodes restart
					r := w.role("a")
					served := r.With(version.Current).Material
					for _, saved := range w.saved("u-a") {
						require.True(t, slices.ContainsFunc(saved, served.Same), "what is served is saved")
					}
					w.finish()
				})
			})
		}
	}
}

// A refusal that was not saved is asked for again until it is.
func TestSaveFailsWhileRetiring(t *testing.T) {
	inWorld(t, overlap(2), nil, func(t *testing.T, w *world) {
		w.rotate("a")
		w.phase("a", Grace)
		w.nextCall(1, unsavedOne)
		w.retire("a")
		w.idle("a")
		for _, saved := range w.saved("u-a") {
			require.Equal(t, []kind.Material{*material("a", "m1")}, saved)
		}
		w.finish()
	})
}

func answering(n string, accepts ...bool) kind.NodeAnswer {
	return kind.NodeAnswer{Node: n, Accepts: accepts}
}

// decide is one decision in the apply phase, with every goal met by the probe.
func decideApply(r *Role, f *facts) step {
	pending, current := r.With(version.Pending).Material, r.With(version.Current).Material
	f.asked = []kind.Material{pending, current}
	d := &decider{role: r, facts: f, now: time.Now(), pause: pause}
	return d.decide()
}

func applying(partial bool, a *version.Attempt) *Role {
	r := &Role{Name: "a", Kind: "fake", AllowPartial: partial, Spec: kind.Spec{Strategy: kind.Overlap, Username: "u"}}
	r.Add(kind.Material{Username: "u", Secret: "old"}, "", time.Now())
	r.Promote(time.Now())
	r.Run = &Run{Rotation: "r", Trigger: Manual, Phase: Apply, Attempt: a, Deadline: time.Now().Add(time.Minute)}
	r.Run.To = r.Add(kind.Material{Username: "u", Secret: "new"}, "r", time.Now())
	return r
}

func TestProofNeedsAGoodAnswer(t *testing.T) {
	lost, full := errors.New("reply lost"), kind.Definitely("the disk is full")
	down := kind.CannotReach(errors.New("down"))
	both := &kind.Answer{Nodes: []kind.NodeAnswer{answering("n1", true, true), answering("n2", true, true)}}
	one := &kind.Answer{Nodes: []kind.NodeAnswer{answering("n1", true, true), {Node: "n2", Err: down}}}
	past := &version.Attempt{Call: "apply", Deadline: time.Now().Add(-time.Minute)}
	outcome := func(n1, n2 error) *kind.Outcome {
		return &kind.Outcome{Nodes: []kind.NodeError{{Node: "n1", Err: n1}, {Node: "n2", Err: n2}}}
	}
	for name, c := range map[string]struct {
		partial         bool
		attempt         *version.Attempt
		answer          *kind.Answer
		outcome, before *kind.Outcome
		promoted, again bool
		back            bool
	}{
		"a good answer":                              {attempt: past, answer: both, outcome: outcome(nil, nil), promoted: true},
		"no attempt, no call":                        {answer: both, promoted: true},
		"it could not be saved":                      {attempt: past, answer: both, outcome: outcome(nil, full), back: true},
		"the call failed":                            {attempt: past, answer: both, outcome: &kind.Outcome{Err: full}, back: true},
		"a worker that resumes":                      {attempt: past, answer: both, again: true},
		"this engine waited, and lost the reply":     {attempt: past, answer: both, before: outcome(nil, lost), again: true},
		"this engine waited for a node that is up":   {attempt: past, answer: both, before: outcome(nil, down), partial: true, again: true},
		"this engine waited for one passed over":     {attempt: past, answer: one, before: outcome(nil, down), partial: true, promoted: true},
		"another waited for one that is passed over": {attempt: past, answer: one, partial: true, again: true},
		"an attempt that landed":                     {attempt: &version.Attempt{Call: "apply", Deadline: time.Now().Add(time.Hour), Landed: true}, answer: both, again: true},
	} {
		r := applying(c.partial, c.attempt)
		s := decideApply(r, &facts{answer: c.answer, outcome: c.outcome, earlier: c.before})
		require.Equal(t, store, s.act, name)
		require.Equal(t, c.promoted, secret(s.next, version.Current) == "new", name)
		require.Equal(t, c.again, s.permit && s.next.Run.Phase == Apply && !s.next.Run.Back, name)
		require.Equal(t, c.back, s.next.Run.Back, name)
	}
}

// A definite error in a phase that is retried for ever keeps asking for the call.
func TestLandedAttemptIsKept(t *testing.T) {
	r := applying(false, &version.Attempt{Call: "apply", Deadline: time.Now().Add(time.Minute)})
	r.Promote(time.Now())
	r.Run.Phase = Retire
	f := &facts{
		answer:  &kind.Answer{Nodes: []kind.NodeAnswer{answering("n1", true, false)}},
		asked:   []kind.Material{r.With(version.Current).Material, r.With(version.Previous).Material},
		outcome: &kind.Outcome{Nodes: []kind.NodeError{{Node: "n1", Err: kind.Definitely("cannot save")}}},
	}
	s := (&decider{role: r, facts: f, now: time.Now(), pause: pause}).decide()
	require.Equal(t, store, s.act)
	require.True(t, s.next.Run.Attempt.Landed)
	require.Equal(t, "cannot save", s.next.Run.Error)
	f.outcome = nil
	s = (&decider{role: s.next, facts: f, now: time.Now().Add(time.Hour), pause: pause}).decide()
	require.True(t, s.permit, "it is called for again, although the probe is satisfied")
}

// allow_partial passes over a node that nobody reaches, and no other.
func TestPartialNeedsSilence(t *testing.T) {
	g := goal{accept: []kind.Material{{Secret: "x"}}}
	answer := func(err error) kind.Answer {
		return kind.Answer{Nodes: []kind.NodeAnswer{answering("n1", true), {Node: "n2", Err: err}}}
	}
	require.True(t, judge(answer(kind.CannotReach(errors.New("down"))), g.accept, g, true).met)
	for _, err := range []error{errors.New("refuses the login of admin"), kind.Definitely("outside allowed_cidrs")} {
		v := judge(answer(err), g.accept, g, true)
		require.False(t, v.met)
		require.ErrorContains(t, v.unavailable, err.Error())
		a := answer(err)
		d := &decider{role: &Role{AllowPartial: true}, facts: &facts{finding: &kind.Finding{}, answer: &a}}
		require.ErrorContains(t, d.unavailable(), err.Error())
	}
}
