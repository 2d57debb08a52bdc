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

// A snapshot of Vault that is restored holds rotations as they once were. What targets
// accept and consumers run with by now is of rotations that nobody has stored any more.
// An engine cannot tell whether it was started for that, or after a crash; so whoever
// finds a run that began before it did changes nothing for it on its word alone:
//
//   - no call is made unless some node accepts what it should, and nothing that is not
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
	// consumers are why consumers are not sure to run with what is served; nil where
	// nobody looked.
	consumers map[string]error
}

// doubted reports whether what is stored of the run may be of a snapshot. Whoever made
// a role whatever there was before, and who asked for a reconcile or declared an
// emergency, has said what is to be so.
func (d *decider) doubted() bool {
	run := d.role.Run
	switch {
	case d.targetless, d.role.kept(), run.urgent(), run.Trigger == Reconcile, run.Trigger == Create && run.Overwrite:
		return false
	}
	return later(run.Started, run.Vouched).Before(d.since)
}

// acts reports whether something is changed in the phase of the run, at its target or
// where consumers are: preflight looks at everything itself, and grace comes to it at its
// end.
func (d *decider) acts() bool { return d.role.Run.Phase != Preflight && d.role.Run.Phase != Grace }

// vouched reports whether calls may be made for the run.
func (d *decider) vouched() bool {
	return !d.doubted() || d.facts.permit || d.facts.outcome != nil || d.facts.witness != nil && d.stranger() == nil
}

// vouch is what is to be done before calls are made for the run; ok: nothing.
func (d *decider) vouch() (s step, ok bool) {
	switch {
	case d.vouched():
		return step{}, true
	case d.facts.witness == nil:
		return step{act: attest}, false
	}
	return d.hold(d.stranger()), false
}

// stranger says why what is stored is not to be trusted: at no node that answers is
// accepted what should be, and nothing else.
func (d *decider) stranger() error {
	w := d.facts.witness
	err := w.answer.Err
	if err == nil {
		err = errors.New("no node of the target answers")
	}
	told := false
	for _, n := range w.answer.Nodes {
		why := n.Err
		if why == nil {
			if why = d.strange(n); why == nil {
				return nil
			}
		}
		if !told {
			err, told = why, n.Err == nil
		}
	}
	return err
}

func (d *decider) strange(n kind.NodeAnswer) error {
	r := d.role
	remedy := fmt.Sprintf("it was changed, or Vault restored from a snapshot; run reconcile/%s/%s to put them back, "+
		"or keep what is there: delete the role with abandon=true and create it with that", r.Kind, r.Name)
	if n.Extra != 0 {
		return fmt.Errorf("node %s accepts passwords for user %s that are not stored: %s", n.Node, userNames(r.usernames()), remedy)
	}
	current := r.With(version.Current)
	switch {
	case current == nil: // nothing was served yet
		return nil
	case d.facts.witness.accepts(n, current.Material):
		return nil
	case r.Spec.Strategy == kind.Swap && r.Run.Phase != Retire && slices.Contains(n.Accepts, true):
		return nil // a server that knows one knows one of those
	}
	return fmt.Errorf("node %s refuses version %d of user %q, which is served: %s", n.Node, current.Number, r.inUse(), remedy)
}

func (w *witness) accepts(n kind.NodeAnswer, m kind.Material) bool {
	i := slices.IndexFunc(w.asked, m.Same)
	return i >= 0 && n.Err == nil && n.Accepts[i]
}

// everywhere reports whether every node that answers accepts m.
func (w *witness) everywhere(m kind.Material) bool {
	return !slices.ContainsFunc(w.answer.Nodes, func(n kind.NodeAnswer) bool { return n.Err == nil && !w.accepts(n, m) })
}

// mayUndo is what is to be done before a version that was not promoted, by what is
// stored, is taken back; ok: nothing.
func (d *decider) mayUndo(on event) (s step, ok bool) {
	if !d.doubted() {
		return step{}, true
	}
	w, pending := d.facts.witness, d.role.With(version.Pending)
	if w == nil {
		return step{act: attest}, false
	}
	if err := d.stranger(); err != nil {
		return d.hold(err), false
	}
	if pending == nil || d.role.Run.Adopted || !w.everywhere(pending.Material) {
		return step{}, true
	}
	switch {
	case d.role.consults():
		return d.leftBy(fmt.Sprintf("every node accepts version %d, which consumers may run with", pending.Number))
	case on == recall: // somebody has said so
		return step{}, true
	}
	return d.hold(fmt.Errorf("every node accepts version %d, and whether clients have it is not known since Vault was started: "+
		"it is served when all nodes answer, cancel/%s takes it back", pending.Number, d.role.Run.Rotation)), false
}

// mayServeAgain is what is to be done before the previous version is served again; ok:
// nothing.
func (d *decider) mayServeAgain() (s step, ok bool) {
	switch previous := d.role.With(version.Previous); {
	case !d.doubted(), !d.role.Run.Promoted, previous == nil:
		return step{}, true
	case d.facts.witness == nil:
		return step{act: attest}, false
	case d.stranger() != nil:
		return d.hold(d.stranger()), false
	case d.role.Spec.Strategy != kind.Swap && !d.facts.witness.everywhere(previous.Material):
		return d.hold(fmt.Errorf("a node refuses version %d, which would be served again: it was changed, or Vault restored from a snapshot; "+
			"run reconcile/%s/%s to put it back", previous.Number, d.role.Kind, d.role.Name)), false
	}
	return step{}, true
}

// leftBy is what is to be done before something is taken from consumers: they are looked
// at, and have to run with what is served. ok: nothing.
func (d *decider) leftBy(why string) (s step, ok bool) {
	if d.facts.witness.consumers == nil {
		return step{act: attest}, false
	}
	for _, c := range d.role.Consumers {
		if err := d.facts.witness.consumers[c]; err != nil {
			return d.hold(fmt.Errorf("%s: consumer %q: %w; restart what does not run with version %d, or run reconcile/%s/%s to go on all the same",
				why, c, err, numberOf(d.role.With(version.Current)), d.role.Kind, d.role.Name)), false
		}
	}
	return step{}, true
}

// hold waits for what may need somebody who knows; see vouchFor.
func (d *decider) hold(err error) step {
	s := d.putOff(err)
	s.anew = true // it may be so by then
	s.next.Run.Doubt = slices.ContainsFunc(d.facts.witness.answer.Nodes, func(n kind.NodeAnswer) bool { return n.Err == nil })
	return s
}

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
	var ask []*job
	by := map[string][]*job{}
	for _, j := range jobs {
		if j.facts.witness == nil {
			lane := j.role.targetLane()
			by[lane] = append(by[lane], j)
		} else {
			ask = append(ask, j)
		}
	}
	for _, of := range by {
		e.attestAt(of)
	}
	for _, j := range ask {
		j.facts.witness.consumers = e.standsAt(j.role)
	}
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
			j.facts.witness = &witness{rotation: j.role.Run.Rotation, answer: kind.Answer{Err: err}}
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
		w := &witness{rotation: j.role.Run.Rotation, answer: *j.facts.answer, asked: j.facts.asked}
		j.facts = before[i]
		j.facts.witness = w
		e.mu.Lock()
		e.witnesses[j.role.Name] = w
		e.mu.Unlock()
	}
}

// standsAt says of each consumer of a role why it is not sure to run with what the role
// serves; nil where it is.
func (e *Engine) standsAt(r *Role) map[string]error {
	wrong := make([]error, len(r.Consumers))
	g := errgroup.Group{}
	g.SetLimit(parallelConsumers)
	for i, c := range r.Consumers {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(e.ctx, lookTimeout)
			defer cancel()
			d := Delivery{Consumer: c, Sure: true}
			e.addShown(&d, r)
			if d.ID = r.With(version.Current).Rotation; d.ID == r.Run.Rotation {
				d.ID = r.Run.deliveryID() // its way back has marked pods as well
			}
			wrong[i] = e.guardedPublication(func() error {
				if seen := e.o.Consumers.Look(ctx, d); !seen.Done {
					return errors.New(clip(seen.Error))
				}
				return nil
			})
			return nil
		})
	}
	_ = g.Wait()
	out := map[string]error{}
	for i, c := range r.Consumers {
		out[c] = wrong[i]
	}
	return out
}
