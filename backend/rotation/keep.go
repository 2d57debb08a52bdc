package rotation

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// A secret that another server keeps has no material here, so there is nothing
// to serve, to prove by a login, or to go back to: its server is asked for a new
// version, once, and shows by its number that it made one. What was asked for
// cannot be taken back.
//
//	preflight → generate → apply → test → promote
//
// Preflight looks at the version. The intent and that version are stored before
// the server hears of it. An outcome that nobody learnt is settled by looking
// again once nothing of the call can still happen: a higher number is the proof,
// the same one that it did not land, and it is sent again. A server that shows no
// number is never asked twice for one request: the rotation fails, says so, and
// the role's schedule stops until somebody has looked.

// unknownOutcome begins the error of a call that may or may not have been done.
const unknownOutcome = "the outcome of a call is unknown: "

// keptTransitions are the machine of such roles. There is no way back: what
// fails after the server was asked fails where it stands.
var keptTransitions = []leg{
	{From: Preflight, On: done, To: Generate},
	{From: Preflight, On: bad, End: Failed},
	{From: Preflight, On: recall, End: Cancelled},
	{From: Generate, On: done, To: Apply},
	{From: Apply, On: done, To: Test},
	{From: Apply, On: bad, End: Failed},
	{From: Apply, On: recall, End: Cancelled},
	{From: Test, On: done, To: Promote},
	{From: Test, On: bad, End: Failed},
	{From: Promote, On: done, End: Completed},
}

// limitCall names the attempt that ends the use of old versions.
const limitCall = "min_decryption_version"

// kept reports whether another server keeps the role's secret.
func (r *Role) kept() bool { return r.Spec.Strategy == kind.Kept }

// asked reports whether the server that keeps the secret may have been asked for
// a new version, by the run of r.
func (r *Role) asked() bool { return r.kept() && (r.Run.Attempt != nil || r.Run.Phase == Test) }

// noWayBack and nothingToApply refuse what needs material.
func noWayBack(r *Role) *Conflict {
	return &Conflict{Text: fmt.Sprintf("role %q is of kind %s, whose secret another server keeps: no earlier version of it can be put back; "+
		"rotate/%s/%s asks for a new one", r.Name, r.Kind, r.Kind, r.Name)}
}

func nothingToApply(r *Role) *Conflict {
	return &Conflict{Text: fmt.Sprintf("role %q is of kind %s, whose secret another server keeps: there is nothing to apply again; "+
		"read verify/%s/%s", r.Name, r.Kind, r.Kind, r.Name)}
}

// keep is decide for a secret that another server keeps.
func (d *decider) keep() step {
	run, f := d.role.Run, d.facts
	switch {
	case f.turned != nil:
		return d.answeredTurn()
	case f.limited != nil && f.limited.Err != nil:
		return d.failedLimit()
	}
	if a := run.Attempt; a != nil && !f.permit && f.limited == nil {
		if t := a.Deadline.Add(Skew); d.now.Before(t) {
			return step{act: wait, until: t}
		}
	}
	if d.now.Before(run.RetryAt) {
		return step{act: wait, until: run.RetryAt}
	}
	switch run.Phase {
	case Preflight:
		return d.survey()
	case Apply:
		return d.askTurn()
	case Test:
		return d.proveTurn()
	default: // generate and promote are never stored
		return step{}
	}
}

// survey is preflight. A create takes what is there for its first version; all
// others store what is there, and that a new version is about to be asked for.
func (d *decider) survey() step {
	run, sight := d.role.Run, d.facts.sight
	switch {
	case run.Recall != "":
		return d.event(recall, run.Recall)
	case sight == nil:
		return step{act: look}
	case sight.Err != nil:
		return d.tryAgain(sight.Err, d.fails)
	case len(sight.Problems) > 0:
		return d.fails(strings.Join(sight.Problems, "; "))
	}
	next := d.role.clone()
	run = next.Run
	run.Before, run.Shown = sight.Version, sight.Version
	run.From = numberOf(next.With(version.Current))
	run.To = next.Add(kind.Material{}, run.Rotation, d.now)
	if run.Trigger == Create {
		run.Adopted = true
		return d.made(next, d.describeVersion("", sight.Version)+"as it was found")
	}
	next.advance(done, d.now) // preflight → generate
	next.advance(done, d.now) // generate → apply
	run.Deadline = d.now.Add(credentialTimeout)
	return d.intend(next)
}

// intend stores that the server is about to be asked.
func (d *decider) intend(next *Role) step {
	next.Run.RetryAt = time.Time{}
	next.Run.Attempt = d.attempt(string(Apply))
	return step{act: store, next: next, permit: true}
}

// askTurn is apply: the server is asked, or was asked and nobody learnt what
// became of it.
func (d *decider) askTurn() step {
	run, sight := d.role.Run, d.facts.sight
	switch {
	case d.facts.permit:
		return step{act: turn}
	case run.Attempt == nil && run.Recall != "":
		next := d.role.clone()
		next.Discard(true, d.now)
		next.Run.Error = clip(run.Recall)
		return d.endAs(next, Cancelled, nil)
	case run.Attempt == nil: // nothing of the last one happened
		return d.intend(d.role.clone())
	case run.Before == 0:
		return d.unknown()
	case sight == nil:
		return step{act: look}
	case sight.Err != nil:
		return d.tryAgain(sight.Err, func(reason string) step {
			return d.fails("a new version was asked for, the outcome is unknown, and nobody answered who shows it: " + reason)
		})
	case sight.Version > run.Before:
		next := d.role.clone()
		next.Run.Reply = "its answer was lost"
		return d.turnDone(next)
	case sight.Version < run.Before:
		return d.fails(fewer(sight.Version, run.Before))
	case d.expired():
		return d.fails(fmt.Sprintf("a new version was asked for and not made: version %d is still the newest; %s", sight.Version, run.Error))
	}
	next := d.role.clone()
	next.mark(d.now, fmt.Sprintf("version %d is still the newest: what was sent did not land, and is sent again", sight.Version))
	return d.intend(next)
}

func fewer(now, before int) string {
	return fmt.Sprintf("version %d is the newest, and it was %d before: somebody has replaced the key or restored an earlier state; look at it, and rotate again",
		now, before)
}

// answeredTurn stores what the server answered: nothing else remembers it.
func (d *decider) answeredTurn() step {
	t := d.facts.turned
	switch {
	case t.Err == nil:
		next := d.role.clone()
		next.Run.Reply = clip(t.Evidence)
		return d.turnDone(next)
	case kind.IsDefinite(t.Err):
		return d.fails(t.Err.Error())
	case t.NoEffect:
		return d.tryAgain(t.Err, d.fails)
	}
	return d.outcomeUnknown(t.Err)
}

// outcomeUnknown stores why nobody knows what became of a call, and leaves its
// attempt to be waited for.
func (d *decider) outcomeUnknown(err error) step {
	next := d.role.clone()
	run := next.Run
	run.Tries++
	run.Error = clip(unknownOutcome + err.Error())
	next.mark(d.now, run.Error)
	return step{act: store, next: next}
}

func (d *decider) turnDone(next *Role) step {
	next.advance(done, d.now) // apply → test
	next.mark(d.now, "a new version was made: "+next.Run.Reply)
	next.Run.rest()
	next.Run.Deadline = d.now.Add(credentialTimeout)
	return step{act: store, next: next}
}

// unknown ends a rotation of which nobody can tell whether it happened. Nothing
// repeats it by itself.
func (d *decider) unknown() step {
	r, reason := d.role, "a call was interrupted"
	if r.Run.Error != "" {
		reason = strings.TrimPrefix(r.Run.Error, unknownOutcome)
	}
	s := d.fails(fmt.Sprintf("whether %s was rotated is unknown; check at its server that it still works, then rotate/%s/%s "+
		"rotates it again (nothing does so by itself): %s", r.Spec.Owns()[0], r.Kind, r.Name, reason))
	s.next.Suspended = clip(fmt.Sprintf("whether rotation %s was done is unknown; rotate/%s/%s ends this when it succeeds", r.Run.Rotation, r.Kind, r.Name))
	return s
}

// proveTurn is test: the number of the newest version has risen. Where there are
// no numbers, the answer to the call is all there is.
func (d *decider) proveTurn() step {
	run, sight := d.role.Run, d.facts.sight
	switch {
	case run.Before == 0:
		return d.made(d.role.clone(), run.Reply)
	case d.facts.permit:
		return step{act: limit}
	case sight == nil:
		return step{act: look}
	case sight.Err != nil && run.Shown > run.Before:
		return d.tryAgain(sight.Err, d.unlimited)
	case sight.Err != nil:
		return d.tryAgain(sight.Err, func(reason string) step {
			return d.fails("a new version was asked for and its server said that it was made, which could not be proven: " + reason)
		})
	case sight.Version <= run.Before:
		return d.tryAgain(fmt.Errorf("its server said that a new version was made, and version %d is still the newest", sight.Version), d.fails)
	}
	next := d.role.clone()
	next.Run.Shown = sight.Version
	switch {
	case next.Spec.MinDecryptionVersion <= sight.MinDecryptionVersion:
		return d.made(next, d.risen(next.Run))
	case d.facts.limited != nil:
		return d.tryAgain(fmt.Errorf("its server said that it was done, and shows %d", sight.MinDecryptionVersion), d.unlimited)
	case d.expired():
		return d.unlimited(run.Error)
	}
	next.Run.Attempt = d.attempt(limitCall)
	return step{act: store, next: next, permit: true}
}

// risen says what was seen of a rotation.
func (d *decider) risen(run *Run) string {
	s := d.describeVersion(fmt.Sprintf("%d → ", run.Before), run.Shown) + run.Reply
	if run.Shown > run.Before+1 {
		s += "; by more than one: somebody else rotated it, too"
	}
	return s
}

// describeVersion is empty where the server shows no versions.
func (d *decider) describeVersion(before string, newest int) string {
	if newest == 0 {
		return ""
	}
	return fmt.Sprintf("%s key version %s%d, ", d.role.Kind, before, newest)
}

// failedLimit: the new version is made; what fails here does not undo it, and
// does not make another one.
func (d *decider) failedLimit() step {
	if err := d.facts.limited.Err; !kind.IsDefinite(err) {
		return d.outcomeUnknown(err)
	}
	return d.unlimited(d.facts.limited.Err.Error())
}

// unlimited is promote where old versions could not be ended. It is not repeated:
// that would make yet another version.
func (d *decider) unlimited(reason string) step {
	next := d.role.clone()
	d.promoteKept(next, d.risen(next.Run))
	next.Run.Error = clip(fmt.Sprintf("version %d was made, and min_decryption_version could not be set to %d (the next rotation sets it): %s",
		next.Run.Shown, next.Spec.MinDecryptionVersion, reason))
	next.Failures, next.RetryAt = 0, time.Time{}
	suspended := next.Suspended
	s := d.endAs(next, Failed, nil)
	s.next.Suspended = suspended
	return s
}

// made is promote: the new version is the current one.
func (d *decider) made(next *Role, evidence string) step {
	d.promoteKept(next, evidence)
	return d.endAs(next, Completed, nil)
}

func (d *decider) promoteKept(next *Role, evidence string) {
	if v := next.With(version.Pending); v != nil {
		v.Evidence = clip(evidence)
	}
	next.mark(d.now, evidence)
	next.Promote(d.now)
	if v := next.With(version.Previous); v != nil {
		v.Stage = version.Retired
	}
	next.LastRotation = d.now
	d.serveSlot(next)
	next.Run.Promoted = true
}

// fails ends the run: what was on its way did not come about, as far as anybody
// knows.
func (d *decider) fails(reason string) step {
	next := d.role.clone()
	next.Discard(true, d.now)
	next.Run.Error = clip(reason)
	return d.endAs(next, Failed, nil)
}

// tryAgain stores why there is no result yet and when to try again, or gives up.
// What is known to have had no effect is no longer waited for.
func (d *decider) tryAgain(err error, giveUp func(reason string) step) step {
	if kind.IsDefinite(err) || d.expired() {
		return giveUp(err.Error())
	}
	next := d.role.clone()
	run := next.Run
	if t := d.facts.turned; t != nil && t.NoEffect || d.facts.limited != nil {
		run.Attempt = nil // nothing of it can still happen
	}
	run.Tries++
	run.Error = clip(err.Error())
	run.RetryAt = d.now.Add(d.pause(run.Tries))
	next.mark(d.now, fmt.Sprintf("%s: waiting: %s", run.Phase, run.Error))
	return step{act: store, next: next}
}

// keptCriteria is criteria for a secret that another server keeps.
func keptCriteria(r *Role, run *Run, state State) []Criterion {
	detail := ""
	if v := r.Get(run.To); v != nil {
		detail = v.Evidence
	}
	name := "a new version was made"
	switch {
	case run.Trigger == Create:
		name = "its server shows the secret"
	case run.Before == 0:
		name = "its server answered that a new version was made"
	}
	out := []Criterion{{Name: name, Met: run.Promoted, Detail: detail}}
	if want := r.Spec.MinDecryptionVersion; want > 0 && run.Trigger != Create {
		out = append(out, Criterion{Name: fmt.Sprintf("versions before %d no longer decrypt", want), Met: state == Completed})
	}
	return out
}

// keeper is the server that keeps the secret of r.
func (e *Engine) keeper(r *Role) keeperGuard {
	return keeperGuard{e: e, keeper: func() kind.Keeper { return e.o.Keeper(r.Kind, r.Connection) }}
}

func subjects(jobs []*job) []kind.Subject {
	out := make([]kind.Subject, len(jobs))
	for i, j := range jobs {
		out[i] = j.role.subject()
	}
	return out
}

func (r *Role) subject() kind.Subject {
	s := kind.Subject{Role: r.Name, Spec: r.Spec}
	if r.Run != nil {
		s.Rotation = r.Run.Rotation
	}
	return s
}

// look asks what the servers show.
func (e *Engine) look(jobs []*job) {
	if len(jobs) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(e.ctx, kind.CallTimeout)
	defer cancel()
	sights := e.keeper(jobs[0].role).Look(ctx, subjects(jobs))
	var fresh []*job // what has been asked for may always end
	for i, j := range jobs {
		j.facts.sight = &sights[i]
		if j.role.Run.Phase == Preflight {
			fresh = append(fresh, j)
		}
	}
	if len(fresh) == 0 || e.o.Permit == nil {
		return
	}
	for i, err := range e.o.Permit(ctx, rolesOf(fresh)) {
		if err != nil {
			fresh[i].facts.sight = &kind.Sight{Err: err}
		}
	}
}

// turn asks for new versions. The attempt of each is used by this, whatever
// comes of it.
func (e *Engine) turn(jobs []*job) {
	if len(jobs) == 0 {
		return
	}
	ctx, cancel := e.attempting(jobs)
	defer cancel()
	turned := e.keeper(jobs[0].role).Turn(ctx, subjects(jobs))
	for i, j := range jobs {
		j.facts.permit = false
		j.facts.turned = &turned[i]
	}
}

// limit ends the use of old versions, and forgets what was seen before.
func (e *Engine) limit(jobs []*job) {
	if len(jobs) == 0 {
		return
	}
	ctx, cancel := e.attempting(jobs)
	defer cancel()
	errs := e.keeper(jobs[0].role).Limit(ctx, subjects(jobs))
	for i, j := range jobs {
		j.facts.permit, j.facts.sight = false, nil
		j.facts.limited = &kind.Turned{Err: errs[i]}
	}
}

// attempting is the context of a call whose attempts are stored: it ends with the
// first of them.
func (e *Engine) attempting(jobs []*job) (context.Context, context.CancelFunc) {
	deadline := time.Now().Add(kind.CallTimeout)
	for _, j := range jobs {
		if a := j.role.Run.Attempt; a.Deadline.Before(deadline) {
			deadline = a.Deadline
		}
	}
	return context.WithDeadline(e.ctx, deadline)
}

// examineKept looks at secrets that another server keeps.
func (e *Engine) examineKept(ctx context.Context, members []int, reports []Report) {
	roles := make([]*Role, len(members))
	asked := make([]kind.Subject, len(members))
	for n, i := range members {
		roles[n], asked[n] = reports[i].Role, reports[i].Role.subject()
	}
	ctx, cancel := context.WithTimeout(ctx, kind.CallTimeout)
	defer cancel()
	sights := e.keeper(roles[0]).Look(ctx, asked)
	if e.o.Permit != nil {
		for n, err := range e.o.Permit(ctx, roles) {
			if err != nil {
				sights[n] = kind.Sight{Err: err}
			}
		}
	}
	for n, i := range members {
		s := &sights[n]
		reports[i].Sight, reports[i].Notes, reports[i].Err = s, s.Notes, s.Err
		if len(s.Problems) > 0 && s.Err == nil {
			reports[i].Err = kind.Definitely("%s", strings.Join(s.Problems, "; "))
		}
	}
}

// keeperGuard is guard for a Keeper.
type keeperGuard struct {
	e      *Engine
	keeper func() kind.Keeper
}

var _ kind.Keeper = keeperGuard{}

// Look implements kind.Keeper.
func (g keeperGuard) Look(ctx context.Context, subjects []kind.Subject) []kind.Sight {
	return guardedCall(g.e, len(subjects),
		func() []kind.Sight { return g.keeper().Look(ctx, subjects) },
		func(err error) kind.Sight { return kind.Sight{Err: err} })
}

// Turn implements kind.Keeper. What panicked may have happened.
func (g keeperGuard) Turn(ctx context.Context, subjects []kind.Subject) []kind.Turned {
	return guardedCall(g.e, len(subjects),
		func() []kind.Turned { return g.keeper().Turn(ctx, subjects) },
		func(err error) kind.Turned { return kind.Turned{Err: err} })
}

// Limit implements kind.Keeper.
func (g keeperGuard) Limit(ctx context.Context, subjects []kind.Subject) []error {
	return guardedCall(g.e, len(subjects),
		func() []error { return g.keeper().Limit(ctx, subjects) },
		func(err error) error { return err })
}
