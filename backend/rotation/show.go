package rotation

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// What a role serves is shown where consumers read it: in a document of this
// mount, which is one write to storage, and in a secret of another mount, which is
// a call like one to a target: its attempt is stored first, and when nobody learns
// what became of it nothing else is published there before it can no longer land.

// reached is what became of asking whether a place could be written.
type reached struct{ err error }

// unreached reports whether preflight still has to ask about the role's place.
func (d *decider) unreached() bool {
	if t := d.role.Run.Trigger; t == Reconcile || t == Retirement || t == Urgent { // the one publishes nothing, the others must not fail
		return false
	}
	return !d.role.Place.Zero() && d.facts.reached == nil
}

// limitPublish sets until when a promoted version may wait for its place before
// it is taken back.
func (r *Role) limitPublish(now time.Time) {
	if r.Run.Phase == Publish && !r.Run.Back && !r.Place.Zero() {
		r.Run.Deadline = now.Add(publishTimeout)
	}
}

// publish: consumers are to read what is served. A role that is shown nowhere goes
// on at once.
func (d *decider) publish() step {
	run, remote := d.role.Run, !d.role.Place.Zero()
	switch {
	case run.Recall != "" && d.role.returnable():
		return d.takeBack(run.Recall)
	case d.facts.published, !d.role.Shows():
		return d.shown()
	case d.facts.outcome != nil:
		return d.notShown(d.facts.outcome.Err)
	case !remote, d.facts.permit:
		return step{act: show}
	case run.Attempt != nil && !run.Attempt.Landed: // nobody learnt what became of it
		err := errors.New("a publication had no answer")
		if d.expired() && d.mayTakeBack() {
			return d.giveUp(err)
		}
		return d.sendAgain(goal{call: string(Publish)}, err)
	}
	return d.send(d.role.clone(), goal{call: string(Publish)})
}

// shown: consumers can read it.
func (d *decider) shown() step {
	run := d.role.Run
	next := d.role.clone()
	next.Run.rest()
	if next.ring() && run.Back {
		next.date(run.To, d.now)
	}
	switch {
	case run.Retired && (!next.consults() || !next.Shows() && !next.rescues()):
		return d.endAs(next, Completed, nil)
	case run.Cleared && !next.Shows():
		return d.clearedAll(next)
	case run.Retired:
		next.advance(done, d.now) // publish → sync
		return d.enterDelivery(next)
	case run.Back:
		next.advance(done, d.now) // publish → sync, on the way back
		if next.consults() && d.wasShown(next) {
			return d.enterDelivery(next)
		}
		return d.undeliveredBack(next)
	case run.urgent():
		next.advance(done, d.now) // publish → sync
		if next.rescues() {
			return d.enterDelivery(next)
		}
		return d.goOnRefusing(next)
	}
	return d.afterPublish(next)
}

// notShown goes back where waiting does not help, and tries again where it may, or
// where there is no way back.
func (d *decider) notShown(err error) step {
	if d.mayTakeBack() && (kind.IsDefinite(err) || d.expired()) {
		return d.giveUp(err)
	}
	return d.retry(err, bad)
}

// mayTakeBack reports whether the role, and its unit with it, can still go back.
func (d *decider) mayTakeBack() bool {
	u := d.facts.unit
	return d.role.returnable() && (u == nil || u.fixed() == "")
}

// giveUp turns the run round: what could not be published is taken back.
func (d *decider) giveUp(err error) step {
	next := d.role.clone()
	next.Run.rest()
	next.Run.Recall = clip(fmt.Sprintf("not published to %s: %v", next.Place, err))
	return step{act: store, next: next}
}

// reach asks whether places could be written, changing nothing. All of them are
// behind one connection: when one waits in vain, the others do not wait as well.
func (e *Engine) reach(jobs []*job) {
	var hangs atomic.Pointer[error]
	g := errgroup.Group{}
	g.SetLimit(parallelPlaces)
	for _, j := range jobs {
		g.Go(func() error {
			if err := hangs.Load(); err != nil {
				j.facts.reached = &reached{unreachedPlace(j.role, *err)}
				return nil
			}
			ctx, cancel := context.WithTimeout(e.ctx, kind.CallTimeout)
			defer cancel()
			err := e.guardedPublication(func() error { return e.o.Reach(ctx, j.role) })
			if err != nil && ctx.Err() != nil {
				hangs.Store(&err)
			}
			j.facts.reached = &reached{unreachedPlace(j.role, err)}
			return nil
		})
	}
	_ = g.Wait()
}

// parallelPlaces is how many secrets of other mounts are worked at at once.
const parallelPlaces = 8

func (e *Engine) reachPlace(ctx context.Context, r *Role) error {
	return unreachedPlace(r, e.guardedPublication(func() error { return e.o.Reach(ctx, r) }))
}

func unreachedPlace(r *Role, err error) error {
	if err == nil {
		return nil
	}
	return classed(err, "%s cannot be published to: %w", r.Place, err)
}

// classed is a new text of an error that keeps what it means.
func classed(err error, format string, args ...any) error {
	var k *kind.Error
	wrapped := fmt.Errorf(format, args...)
	if errors.As(err, &k) {
		return &kind.Error{Class: k.Class, Err: wrapped}
	}
	return wrapped
}

// publish has consumers read what roles serve. What cannot be written to storage
// now is tried again; what became of a call is for the decider.
func (e *Engine) publish(jobs []*job) []*job {
	keep := make([]bool, len(jobs))
	g := errgroup.Group{}
	g.SetLimit(parallelPlaces)
	for i, j := range jobs {
		g.Go(func() error {
			keep[i] = e.publishRole(j)
			return nil
		})
	}
	_ = g.Wait()
	var live []*job
	for i, j := range jobs {
		if keep[i] {
			live = append(live, j)
		}
	}
	return live
}

func (e *Engine) publishRole(j *job) (live bool) {
	if !j.role.Place.Zero() {
		err := e.publishPlace(j)
		j.facts.permit, j.facts.outcome = false, &kind.Outcome{Err: err}
		if err != nil {
			return true
		}
	}
	if j.role.Document != "" {
		if err := e.publishDocument(j); err != nil {
			e.o.Logger.Warn("a document cannot be written; trying again", "document", j.role.Document, "role", j.role.Name, "error", err)
			e.wake(j.role.lane(), j.role.Name, time.Now().Add(pause(2)))
			return false
		}
	}
	j.facts.published = true
	return true
}

// publishPlace writes what a role serves, and what the others of its unit serve
// there, to a secret of another mount.
func (e *Engine) publishPlace(j *job) error {
	ctx, cancel := context.WithDeadline(e.ctx, j.role.Run.Attempt.Deadline)
	defer cancel()
	place := j.role.Place
	key := placeLock + j.role.placeTarget()
	if err := e.locks.lock(ctx, key); err != nil {
		return fmt.Errorf("%s is being written to for another role", place)
	}
	defer e.locks.unlock(key)
	views, err := e.views(ctx, j, func(o *Role) bool { return o.Place == place })
	if err != nil {
		return err
	}
	fields := map[string]string{}
	for _, v := range views {
		maps.Copy(fields, v.Fields)
	}
	return e.guardedPublication(func() error { return e.o.PublishTo(ctx, place, fields) })
}

// publishDocument writes what a role serves, and what the others of its unit serve
// in its document, at once.
func (e *Engine) publishDocument(j *job) error {
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	document := j.role.Document
	if err := e.locks.lock(ctx, documentLock+document); err != nil {
		return err
	}
	defer e.locks.unlock(documentLock + document)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	views, err := e.views(ctx, j, func(o *Role) bool { return o.Document == document })
	if err != nil {
		return err
	}
	return e.o.Publish(ctx, document, views)
}

// documentLock keeps the locks of documents apart from those of roles, whose
// names hold no slash.
const documentLock = "document/"

// placeLock does so for those of secrets of other mounts.
const placeLock = "place/"

// views are what a role and those of its unit that publish to the same place have
// to show. The others are read under the lock of that place: an emergency may have
// taken one of them over, and what it serves is not to be shown as it was before.
func (e *Engine) views(ctx context.Context, j *job, same func(*Role) bool) ([]publish.View, error) {
	roles := []*Role{j.role}
	var names []string
	if j.facts.unit != nil {
		for _, m := range j.facts.unit.others {
			if m.run() != nil && same(m.role) {
				names = append(names, m.name)
			}
		}
	}
	others, err := e.st.Roles(ctx, names)
	if err != nil {
		return nil, err
	}
	for _, o := range others {
		if o != nil && o.Run != nil && o.Run.unitID() == j.role.Run.unitID() && same(o) && o.With(version.Current) != nil {
			roles = append(roles, o)
		}
	}
	var views []publish.View
	for _, r := range roles {
		v, err := r.view(e.o.Kind(r.Kind))
		if err != nil {
			return nil, err
		}
		views = append(views, v)
	}
	return views, nil
}
