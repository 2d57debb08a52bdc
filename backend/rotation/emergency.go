package rotation

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Emergencies. What is served was compromised: it has to be refused everywhere at once,
// and only then consumers are brought the new version, who are refused until they have it.
//
//	preflight → generate → apply → test → promote → retire → publish → sync → restart → check
//
// It takes a role over from whatever rotation that is in, once a change that this one has
// sent can no longer land. Nothing leads back from where a server has heard of the new
// version: a target that fails is asked again for as long as it takes, and nodes that
// nobody reaches are passed over and healed later. Roles do not wait for each other
// before what they had is refused; those that share a consumer are brought there together
// if they come in time, so that it is restarted once. A consumer that cannot be proven is
// told, and holds up nothing. No consumer is reserved: whoever restarts it at the same time
// sees by its annotations that somebody else does (consumer package).

// urgent reports whether a run is an emergency.
func (run *Run) urgent() bool { return run != nil && run.Trigger == Urgent }

// committed: it is an emergency that nobody can take back any more. What another rotation
// left half done is nothing to stop at.
func (run *Run) committed() bool {
	return run.urgent() && (run.TookOver != "" || run.Phase != Preflight && run.Phase != Generate)
}

// emergency is what a run does at consumers beyond others, nil where it is none.
func (run *Run) emergency() *Emergency {
	if !run.urgent() {
		return nil
	}
	return cmp.Or(run.Emergency, &Emergency{})
}

// rescues reports whether the run goes on at consumers after what they had is refused.
func (r *Role) rescues() bool { return r.Run.urgent() && r.consults() }

// decrypts reports whether earlier keys of a ring are needed for as long as what they
// encrypted is.
func (r *Role) decrypts() bool { return r.ring() && r.Spec.MaxTokenTTL == 0 }

// passesOver reports whether nodes that nobody reaches hold up nothing.
func (r *Role) passesOver() bool { return r.AllowPartial || r.Run.urgent() }

// unproven is a consumer that did not come to work with what it was brought.
type unproven struct {
	Consumer string `json:"consumer"`
	Step     Phase  `json:"step"`
	Why      string `json:"why"`
}

// maxUnproven bounds how many of them an entry keeps.
const maxUnproven = 16

// unitsPerBatch is more than a rotation has units.
const unitsPerBatch = 1000

// emergencyMark begins the end of the id of an emergency's delivery; a greater number
// after it is a later delivery of the same rotation.
const emergencyMark = "e"

func (run *Run) emergencyID() string {
	return fmt.Sprintf("%s-%s%d", run.Rotation, emergencyMark, run.Batch*unitsPerBatch+run.Unit)
}

// endEarlier goes on from promotion: from now on nothing earlier is served, verified or
// gone back to, and it is refused next.
func (d *decider) endEarlier(next *Role) step {
	next.Compromise(next.decrypts(), d.now)
	next.mark(d.now, fmt.Sprintf("version %d is served; every earlier one counts as compromised", next.Run.To))
	return d.startRetire(next)
}

// enterRescue is the beginning at consumers: with those of the unit that have not begun
// there, or after them.
func (d *decider) enterRescue(next *Role) step {
	batch := 1
	s := step{act: store, next: next}
	if u := d.facts.unit; u != nil && next.Run.Unit != 0 {
		batch += u.lastBatch()
		s.guard = func(u *unit) bool { return u.lastBatch()+1 == batch }
	}
	next.Run.Batch = batch
	return s
}

// lastBatch is the number of the last delivery of the unit that has begun, or is over.
func (u *unit) lastBatch() int {
	last := 0
	for _, m := range u.others {
		if run := m.run(); run != nil && run.Begun {
			last = max(last, run.Batch)
		}
		last = max(last, m.batch)
	}
	return last
}

// gather has a role wait at its consumers for those of its unit that are on their way. Who
// is held up by its target is left behind, and comes with a delivery of its own.
func (d *decider) gather() (step, bool) {
	run, u := d.role.Run, d.facts.unit
	if run.Phase != Sync || run.Begun {
		return step{}, false
	}
	gathered := func(u *unit) bool {
		begun := slices.ContainsFunc(u.others, func(m member) bool {
			o := m.run()
			return o != nil && o.Begun && o.Batch == run.Batch
		})
		return begun || u.all(func(m member) bool {
			o := m.run()
			return o == nil || !m.role.consults() || o.Tries > 0 || m.role.isDelivery(o.Phase)
		})
	}
	if !gathered(u) {
		return d.await(false)
	}
	next := d.role.clone()
	next.Run.Begun = true
	return step{act: store, next: next, guard: gathered}, true
}

// rescue is a phase at consumers. What fails there is kept, and nothing stops for it.
func (d *decider) rescue() step {
	run := d.role.Run
	switch {
	case run.Over && !d.allOver(): // who leads a delivery is needed until everybody has seen what became of it
		return step{act: wait, until: d.now.Add(pollPause)}
	case run.Over && run.Retired:
		return d.rescued(d.role.clone())
	case run.Over:
		return d.goOnRefusing(d.role.clone())
	case d.facts.progress == nil && len(d.mine()) > 0:
		return step{act: bring}
	}
	next := d.role.clone()
	waits := ""
	for _, c := range d.mine() {
		at, p := run.stepFor(c), d.facts.progress[c]
		for _, line := range p.Told {
			next.mark(d.now, fmt.Sprintf("%s: %s: %s", at, c, line))
		}
		left := p.Waits
		if p.Err != nil {
			left = p.Err.Error()
		}
		until := run.until(c)
		switch {
		case p.Done:
			next.Run.reached(c, at)
		case p.Err != nil && kind.IsDefinite(p.Err), !until.IsZero() && !d.now.Before(until):
			next.notProven(unproven{c, at, clip(left)}, d.now)
			next.Run.reached(c, at)
		default:
			if until.IsZero() {
				next.Run.wait(c, d.now.Add(d.facts.patiences[c]))
			}
			waits = cmp.Or(waits, fmt.Sprintf("consumer %q: %s", c, left))
		}
	}
	d.shareUnproven(next)
	for next.Run.Phase != Check && d.allAt(next, next.Run.Phase) {
		next.advance(done, d.now)
	}
	switch moved := !slices.EqualFunc(next.Run.Delivered, run.Delivered, func(a, b delivered) bool { return a.Consumer == b.Consumer && a.Step == b.Step }); {
	case d.allAt(next, Check):
		next.Run.rest()
		next.Run.Over = true
		return step{act: store, next: next}
	case moved || next.Run.Phase != run.Phase: // what comes next need not wait
		next.Run.rest()
		return step{act: store, next: next}
	case waits != "":
		return d.pollAgain(next, waits)
	}
	return step{act: wait, until: d.now.Add(pollPause)} // for what others of the unit deliver
}

// heldUpAfter is after how many tries to have earlier versions refused consumers are
// brought the new one all the same.
const heldUpAfter = 2

// heldUp reports whether a node keeps consumers from what others already demand.
func (d *decider) heldUp() bool {
	run, f := d.role.Run, d.facts
	asked := f.permit || f.answer != nil || f.outcome != nil
	return run.urgent() && !run.Over && run.Tries >= heldUpAfter && !asked && (d.role.Shows() || d.role.rescues())
}

// bringMeanwhile publishes what is served before all that was is refused.
func (d *decider) bringMeanwhile() step {
	next := d.role.clone()
	next.mark(d.now, "consumers are brought the new version; then it goes on with what does not refuse the earlier ones: "+next.Run.Error)
	next.advance(bad, d.now) // retire → publish
	next.Run.rest()
	return step{act: store, next: next}
}

// goOnRefusing comes back to nodes that did not refuse what they had to. The call is made
// again, whatever they show by then: one may refuse it, and not have saved that.
func (d *decider) goOnRefusing(next *Role) step {
	next.Run.Over = true
	for next.Run.Phase != Retire {
		next.advance(done, d.now)
	}
	next.Run.rest()
	if !d.targetless {
		next.Run.Attempt = &version.Attempt{Call: string(Retire), Deadline: d.now, Landed: true}
	}
	return step{act: store, next: next}
}

// until is until when the next step at a consumer may take; zero where it has not begun.
func (run *Run) until(consumer string) time.Time {
	for _, d := range run.Delivered {
		if d.Consumer == consumer {
			return d.Until
		}
	}
	return time.Time{}
}

// wait stores until when the next step at a consumer may take.
func (run *Run) wait(consumer string, until time.Time) {
	if !slices.ContainsFunc(run.Delivered, func(d delivered) bool { return d.Consumer == consumer }) {
		run.Delivered = append(slices.Clone(run.Delivered), delivered{Consumer: consumer})
	}
	for i := range run.Delivered {
		if run.Delivered[i].Consumer == consumer {
			run.Delivered[i].Until = until
		}
	}
}

// allAt reports whether every consumer of a role has come as far as a step, or was given
// up there, whoever delivers to it.
func (d *decider) allAt(next *Role, p Phase) bool {
	return !slices.ContainsFunc(next.Consumers, func(c string) bool {
		run := next.Run
		if name := d.leader(c); name != next.Name {
			for _, m := range d.facts.unit.everybody() {
				if m.name == name {
					run = m.run()
				}
			}
		}
		return deliveryRank[run.stepAt(c)] < deliveryRank[p]
	})
}

// notProven keeps where a consumer could not be proven.
func (r *Role) notProven(u unproven, now time.Time) {
	r.mark(now, fmt.Sprintf("%s: %s: not proven: %s", u.Step, u.Consumer, u.Why))
	if len(r.Run.Unproven) < maxUnproven {
		r.Run.Unproven = append(r.Run.Unproven, u)
	}
}

// shareUnproven takes over what others have seen of the consumers that a role shares.
func (d *decider) shareUnproven(next *Role) {
	for _, m := range d.facts.unit.everybody() {
		run := m.run()
		if run == nil || run.deliveryID() != d.role.Run.deliveryID() {
			continue
		}
		for _, u := range run.Unproven {
			known := slices.ContainsFunc(next.Run.Unproven, func(o unproven) bool { return o.Consumer == u.Consumer && o.Step == u.Step })
			if !known && slices.Contains(d.role.Consumers, u.Consumer) {
				next.notProven(u, d.now)
			}
		}
	}
}

// allOver reports whether all that share a delivery are done with it.
func (d *decider) allOver() bool {
	return !slices.ContainsFunc(d.facts.unit.everybody(), func(m member) bool {
		run := m.run()
		return run != nil && run.deliveryID() == d.role.Run.deliveryID() && !run.Over
	})
}

// rescued is the end: partial where a consumer could not be proven.
func (d *decider) rescued(next *Role) step {
	list := next.Run.Unproven
	if len(list) == 0 {
		return d.endAs(next, Completed, nil)
	}
	var words []string
	for _, u := range list[:min(len(list), 3)] {
		words = append(words, fmt.Sprintf("consumer %q (%s): %s", u.Consumer, u.Step, clipTo(u.Why, 120, maxText)))
	}
	if more := len(list) - len(words); more > 0 {
		words = append(words, fmt.Sprintf("and %d more", more))
	}
	next.Run.Error = clip(strings.Join(words, "; "))
	return d.endAs(next, Partial, nil)
}

// yields reports whether an emergency may take the role over from its run. What is being
// created is served to nobody yet, and what an emergency has not replaced it will.
func (r *Role) yields() bool {
	switch run := r.Run; {
	case run.Trigger == Create && r.With(version.Current) == nil:
		return false
	default:
		return !run.urgent() || run.Promoted
	}
}

// takenBy reports whether emergency h takes the role, whatever has happened to it since
// that was asked for, but for a later emergency.
func (r *Role) takenBy(h *Header) bool {
	switch {
	case r.Run != nil:
		return r.yields() && !(r.Run.urgent() && r.Run.Rotation > h.ID)
	case r.LastRun != nil:
		return r.LastRun.Trigger != Urgent || r.LastRun.Rotation < h.ID
	}
	return true
}

// takeOver begins the roles of an emergency, each under its own lock: one that is held for
// as long as its target hangs holds up no other.
func (e *Engine) takeOver(ctx context.Context, h *Header) {
	g := errgroup.Group{}
	g.SetLimit(parallelStorage)
	for _, p := range h.Roles {
		g.Go(func() error {
			if err := e.resumePart(ctx, h, p); err != nil {
				e.resumeLater(h.ID+"/"+p.Role, err)
			}
			return nil
		})
	}
	_ = g.Wait()
}

// seize begins a role's part in an emergency, and ends the run that it is in: first the
// evidence, as at every end. What that run has sent is waited for.
func (e *Engine) seize(ctx context.Context, h *Header, r *Role) error {
	if r.Run == nil {
		return e.beginRole(ctx, h, r)
	}
	now := time.Now().UTC()
	next := r.clone()
	ended := next.Run
	ended.Error = "superseded by emergency rotation " + h.ID
	next.mark(now, ended.Error)
	next.Run = nil
	next.LastRun = &Ending{Rotation: ended.Rotation, Trigger: ended.Trigger, State: Superseded, Error: ended.Error, At: now}
	ev := evidence(r, step{next: next, ended: ended, state: Superseded})
	err := e.st.putEvidence(ctx, ended.Rotation, ev)
	if err != nil {
		return err
	}
	next.Discard(next.kept(), now)
	next.Run = newRun(h, now)
	next.Run.Unit, next.Run.TookOver = h.unit(r.Name), ended.Rotation
	if next.Run.Attempt, err = e.stillSent(ctx, r); err != nil {
		return err
	}
	next.mark(now, fmt.Sprintf("takes over from rotation %s (%s, in %s)", ended.Rotation, ended.Trigger, ended.Phase))
	next.mark(now, string(Preflight))
	if err := e.putRole(ctx, r, next); err != nil {
		return err
	}
	e.o.Logger.Warn("an emergency has taken over a role", "role", r.Name, "kind", r.Kind, "rotation", h.ID, "from", ended.Rotation, "phase", ended.Phase)
	e.o.Recorder.Ended(ev.outcome())
	e.endedPart(ended.Rotation, ev.Part)
	e.forgetLooks(r.Name)
	e.wakeUnit(ended.Rotation, ended.Unit, r.Name)
	e.wakeJoint(ended.Joint, r.Name)
	e.wake(next.lane(), next.Name, time.Now())
	return nil
}

// stillSent is the last change that may still land of those that the run of a role has
// sent, or others of its unit for it where they publish together.
func (e *Engine) stillSent(ctx context.Context, r *Role) (*version.Attempt, error) {
	var last *version.Attempt
	take := func(a *version.Attempt) {
		if a != nil && !a.Landed && (last == nil || a.Deadline.After(last.Deadline)) {
			last = a
		}
	}
	take(r.Run.Attempt)
	if r.Place.Zero() || r.Run.Unit == 0 {
		return last, nil
	}
	u, err := e.unitOf(ctx, r.Run.unitID())
	if err != nil {
		return nil, err
	}
	for _, m := range u.others {
		if run := m.run(); run != nil && run.Phase == Publish && m.role.Place == r.Place {
			take(run.Attempt)
		}
	}
	return last, nil
}
