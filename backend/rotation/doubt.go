package rotation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// A snapshot of Vault that is restored holds rotations as they once were. What targets
// accept and consumers run with by now is of rotations that nobody has stored any more.
// An engine cannot tell whether it was started for that, or after a crash; so whoever
// finds a run that began before it did changes nothing for it on its word alone:
//
//   - nothing is done unless some node accepts what it should, and nothing that is not
//     stored (stranger),
//   - what every node accepts may have been promoted: it is not taken back unless
//     consumers run with what is served (mayUndo),
//   - nothing is served again that is not accepted (mayServeAgain),
//   - and nothing retired that consumers were not seen to have left since (leftBy).
//
// After a crash all of that is so, and costs one more question. Where it is not, the run
// waits until somebody vouches for it with reconcile/, or ends it. The rules are those of
// docs/model/rotation.pml.

// witness is what was seen before a run of before was gone on with. It is kept while the
// engine runs: what has become different since is known to it.
type witness struct {
	rotation string
	answer   kind.Answer
	asked    []kind.Material
	// why is what was wrong with what was stored then; nil: nothing.
	why error
	// consumers are why consumers are not sure to run with what is served; nil where
	// nobody looked.
	consumers map[string]error
	late      bool // a node was asked again, because it had begun to answer
}

// doubted reports whether what is stored of the run may be of a snapshot. Whoever made
// a role whatever there was before, and who asked for a reconcile or declared an
// emergency, has said what is to be so. What the engine itself logs in with nobody else
// has, and it could not log in with another one.
func (d *decider) doubted() bool {
	run := d.role.Run
	switch {
	case d.targetless, d.role.kept(), d.role.Root(), run.urgent(), run.Trigger == Reconcile, run.Trigger == Create && run.Overwrite:
		return false
	}
	return later(run.Started, run.Vouched).Before(d.since)
}

// acts reports whether something is changed in the phase of the run, at its target or
// where consumers are: preflight looks at everything itself, generate has changed nothing
// yet, and grace comes to it at its end.
func (d *decider) acts() bool {
	run := d.role.Run
	return run.Phase != Preflight && run.Phase != Generate && run.Phase != Grace && (run.Held == "" || run.Back)
}

// vouched reports whether calls may be made for the run.
func (d *decider) vouched() bool {
	return !d.doubted() || d.facts.permit || d.facts.outcome != nil || d.facts.witness != nil && d.stranger() == nil
}

// vouch is what is to be done before the run goes on; ok: nothing. Where no node answers
// it goes on as ever, by waiting or by giving up, and no call is made.
func (d *decider) vouch() (s step, ok bool) {
	switch w := d.facts.witness; {
	case d.vouched():
		return step{}, true
	case w == nil:
		return step{act: attest}, false
	case !responds(w.answer):
		return step{}, true
	}
	return d.hold(d.stranger()), false
}

// vouchNow is vouch where a call comes next, whatever the target accepts.
func (d *decider) vouchNow() (s step, ok bool) {
	if s, ok := d.vouch(); !ok {
		return s, false
	}
	if !d.vouched() {
		return d.retry(d.stranger(), bad), false
	}
	return step{}, true
}

// lateVouch is vouch for a node that has begun to answer since.
func (d *decider) lateVouch() (s step, ok bool) {
	switch {
	case d.vouched() || !responds(*d.facts.answer):
		return step{}, true
	case d.facts.witness != nil && d.facts.witness.late:
		return d.retry(d.stranger(), bad), false
	}
	return step{act: attest}, false
}

// begin is generate: what was begun and is not to be trusted ends there.
func (d *decider) begin() step {
	switch run := d.role.Run; {
	case run.Recall != "":
		return d.event(recall, run.Recall)
	case d.vouched():
		return step{act: generate}
	case d.facts.witness == nil:
		return step{act: attest}
	}
	return d.event(bad, d.stranger().Error())
}

func responds(a kind.Answer) bool {
	return slices.ContainsFunc(a.Nodes, func(n kind.NodeAnswer) bool { return n.Err == nil })
}

// stranger says why what was stored when its target was asked is not to be trusted.
func (d *decider) stranger() error { return d.facts.witness.why }

// judge says why what is stored of r is not to be trusted: at no node that answers is
// accepted what should be, and nothing else. One that differs is put right by the run, but
// where a rotation may have passed others over.
func (w *witness) judge(r *Role) error {
	err := w.answer.Err
	if err == nil {
		err = errors.New("no node of the target answers")
	}
	good, told := false, false
	for _, n := range w.answer.Nodes {
		why := n.Err
		if why == nil {
			if why = w.strange(r, n); why == nil {
				good = true
				continue
			}
			if n.Extra != 0 && r.passesOver() {
				return why
			}
		}
		if !told {
			err, told = why, n.Err == nil
		}
	}
	if good {
		return nil
	}
	return err
}

func (w *witness) strange(r *Role, n kind.NodeAnswer) error {
	remedy := fmt.Sprintf("it was changed, or Vault restored from a snapshot; run reconcile/%s/%s to put them back, "+
		"or keep what is there: delete the role (abandon=true) and create it with that", r.Kind, r.Name)
	if n.Extra != 0 {
		return fmt.Errorf("node %s accepts unknown passwords for user %s: %s", n.Node, userNames(r.usernames()), remedy)
	}
	current := r.With(version.Current)
	switch {
	case current == nil: // nothing was served yet
		return nil
	case w.accepts(n, current.Material):
		return nil
	case r.Spec.Strategy == kind.Swap && r.Run.Phase != Retire && slices.Contains(n.Accepts, true):
		return nil // a server that knows one knows one of those
	}
	return fmt.Errorf("node %s refuses version %d of user %q: %s", n.Node, current.Number, r.inUse(), remedy)
}

func (w *witness) accepts(n kind.NodeAnswer, m kind.Material) bool {
	i := slices.IndexFunc(w.asked, m.Same)
	return i >= 0 && n.Err == nil && n.Accepts[i]
}

// mayUndo is what is to be done before a version that was not promoted, by what is
// stored, is taken back; ok: nothing.
func (d *decider) mayUndo() (s step, ok bool) {
	run, w, failing := d.role.Run, d.facts.witness, d.role.Get(d.role.Run.To)
	switch {
	case !d.doubted(), failing == nil, run.Promoted, run.Adopted, d.role.Served(failing.Material), run.Doomed != "": // that was given up by then
		return step{}, true
	case w == nil:
		return step{act: attest}, false
	case !responds(w.answer):
		return step{}, true // no call is made before one does
	case d.stranger() != nil:
		return d.hold(d.stranger()), false
	case !d.mayBeServed(failing.Material):
		return step{}, true
	case d.role.consults():
		return d.leftBy()
	case run.Recall != "", d.facts.outcome != nil: // somebody has said so; it was asked for just now, in vain
		return step{}, true
	}
	takes := ""
	if !run.Back {
		takes = fmt.Sprintf("cancel/%s takes it back, or ", run.Rotation)
	}
	return d.hold(fmt.Errorf("every node accepts version %d, and whether clients have it is not known since Vault was started: "+
		"%srun reconcile/%s/%s to go on", failing.Number, takes, d.role.Kind, d.role.Name)), false
}

// mayBeServed reports whether m may have been promoted, which it is when every node
// accepts it. One that is not there settles it only where consumers can be asked.
func (d *decider) mayBeServed(m kind.Material) bool {
	some, all := false, true
	for _, n := range d.facts.witness.answer.Nodes {
		if n.Err != nil {
			all = all && d.role.consults()
			continue
		}
		accepts := d.facts.witness.accepts(n, m)
		some, all = some || accepts, all && accepts
	}
	return all || some && d.role.passesOver()
}

// mayServeAgain is what is to be done before the previous version is served again; ok:
// nothing.
func (d *decider) mayServeAgain() (s step, ok bool) {
	w, previous := d.facts.witness, d.role.With(version.Previous)
	switch {
	case !d.doubted(), !d.role.Run.Promoted, previous == nil:
		return step{}, true
	case w == nil:
		return step{act: attest}, false
	case !responds(w.answer) && d.role.Run.Recall != "": // somebody has said so
		return step{}, true
	case d.stranger() != nil:
		return d.hold(d.stranger()), false
	}
	for _, n := range w.answer.Nodes {
		if d.role.Spec.Strategy != kind.Swap && n.Err == nil && !w.accepts(n, previous.Material) {
			return d.hold(fmt.Errorf("node %s refuses version %d, which would be served again: it was changed, or Vault restored from a snapshot; "+
				"run reconcile/%s/%s to go on", n.Node, previous.Number, d.role.Kind, d.role.Name)), false
		}
	}
	return step{}, true
}

// leftBy is what is to be done before something is taken from consumers: they are looked
// at, and have to run with what is served. ok: nothing.
func (d *decider) leftBy() (s step, ok bool) {
	w := d.facts.witness
	if w == nil || w.consumers == nil {
		return step{act: attest}, false
	}
	for _, c := range d.role.Consumers {
		if err := w.consumers[c]; err != nil {
			return d.hold(fmt.Errorf("consumer %q is not sure to run with version %d since Vault was started; restart it, or run reconcile/%s/%s to go on: %w",
				c, numberOf(d.role.With(version.Current)), d.role.Kind, d.role.Name, err)), false
		}
	}
	return step{}, true
}

// hold waits for what may need somebody who knows; see vouchFor. What the phase was given
// begins anew when it goes on.
func (d *decider) hold(err error) step {
	s := d.putOff(err)
	run := s.next.Run
	run.Doubt, run.Tries, run.RetryAt = true, d.role.Run.Tries, d.now.Add(d.pause(holdPause))
	if !run.Deadline.IsZero() {
		run.Deadline = later(run.Deadline, run.RetryAt.Add(credentialTimeout))
	}
	s.anew = true // it may be so by then
	return s
}

// holdPause is how often what a run is held for is looked at, as a number of tries.
const holdPause = 5

// vouchFor has the run go on whatever is found: somebody has asked for it.
func (run *Run) vouchFor(now time.Time) {
	run.Vouched, run.Doubt = now.UTC(), false
	run.RetryAt, run.Error = time.Time{}, ""
	if !run.Deadline.IsZero() {
		run.Deadline = later(run.Deadline, now.Add(credentialTimeout))
	}
}

// attest asks what targets accept, and where that was seen already how consumers stand.
func (e *Engine) attest(jobs []*job) {
	var there []*job
	by := map[string][]*job{}
	for _, j := range jobs {
		if w := j.facts.witness; w == nil || !responds(w.answer) {
			lane := j.role.targetLane()
			by[lane] = append(by[lane], j)
		} else {
			there = append(there, j)
		}
	}
	for _, of := range by {
		e.attestAt(of)
	}
	e.standsAt(there)
}

// witnessOf is what this engine has seen of the run of r before it went on with it.
func (e *Engine) witnessOf(r *Role) *witness {
	e.mu.Lock()
	defer e.mu.Unlock()
	if w := e.witnesses[r.Name]; w != nil && w.rotation == r.Run.Rotation {
		return w
	}
	delete(e.witnesses, r.Name)
	return nil
}

func (e *Engine) forgetWitness(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.witnesses, name)
}

// attestAt asks one target. The lane of a consumer does not know what generation its
// connection has.
func (e *Engine) attestAt(jobs []*job) {
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	generation, err := e.o.Generation(ctx, jobs[0].role.Connection)
	if err != nil {
		for _, j := range jobs {
			j.facts.witness = &witness{rotation: j.role.Run.Rotation, answer: kind.Answer{Err: err}, late: j.facts.witness != nil, why: err}
		}
		return
	}
	before := make([]facts, len(jobs))
	for i, j := range jobs {
		before[i] = j.facts
		j.generation, j.step.ask, j.step.goal = generation, j.role.All(), goal{}
	}
	e.probe(jobs)
	for i, j := range jobs {
		w := &witness{rotation: j.role.Run.Rotation, answer: *j.facts.answer, asked: j.facts.asked, late: before[i].witness != nil}
		w.why = w.judge(j.role)
		j.facts = before[i]
		j.facts.witness = w
		if responds(w.answer) {
			e.mu.Lock()
			e.witnesses[j.role.Name] = w
			e.mu.Unlock()
		}
	}
}

// standsAt looks at the consumers of roles: why each is not sure to run with what its role
// serves. All of them have the time of one look; who gets none of it is looked at later.
func (e *Engine) standsAt(jobs []*job) {
	if len(jobs) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(e.ctx, lookTimeout)
	defer cancel()
	var mu sync.Mutex
	g := errgroup.Group{}
	g.SetLimit(parallelConsumers)
	for _, j := range jobs {
		j.facts.witness.consumers = map[string]error{}
		for _, c := range j.role.Consumers {
			g.Go(func() error {
				err := e.guardedPublication(func() error { return e.runsWith(ctx, j.role, c) })
				mu.Lock()
				defer mu.Unlock()
				j.facts.witness.consumers[c] = err
				return nil
			})
		}
	}
	_ = g.Wait()
}

// runsWith is nil where a consumer is sure to run with what r serves.
func (e *Engine) runsWith(ctx context.Context, r *Role, consumer string) (err error) {
	if err := ctx.Err(); err != nil {
		return errors.New("there was no time to look at it")
	}
	d := Delivery{Consumer: consumer, Sure: true}
	e.addShown(&d, r)
	if d.ID, d.Since, err = e.st.broughtBy(ctx, r, consumer); err != nil {
		return err
	}
	if d.ID == r.Run.Rotation {
		d.ID = r.Run.deliveryID() // its way back has marked pods as well
	}
	if seen := e.o.Consumers.Look(ctx, d); !seen.Done {
		return errors.New(clip(seen.Error))
	}
	return nil
}
