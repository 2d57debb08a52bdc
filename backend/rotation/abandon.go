package rotation

import (
	"context"
	"fmt"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// busy refuses what cannot be done while a role is in a rotation, and says what
// can.
func busy(r *Role) *Conflict {
	id := r.Run.Rotation
	return &Conflict{Rotation: id, Text: fmt.Sprintf("%s is in rotation %s: ", OwnerLabel(r.Name), id) + advice(r)}
}

// advice says where a role's run stands, and what may be done about it there.
func advice(r *Role) string {
	run := r.Run
	waits := fmt.Sprintf("read rotations/%s and wait until it has ended; if its target is gone for good, "+
		"delete roles/%s with abandon=true", run.Rotation, r.Name)
	if r.Root() {
		waits = fmt.Sprintf("read rotations/%s and wait until it has ended", run.Rotation)
	}
	switch {
	case r.asked():
		return fmt.Sprintf("a new version has been asked for, which nobody can take back; read rotations/%s and wait until it has ended", run.Rotation)
	case run.committed():
		return "it is an emergency, which nothing takes back; " + waits
	case run.Doubt:
		return fmt.Sprintf("it waits, because of what its target or consumers show since Vault was started; read rotations/%s, go on with reconcile/%s/%s, "+
			"or delete roles/%s with abandon=true", run.Rotation, r.Kind, r.Name, r.Name)
	case run.Back || run.Recall != "":
		return "it is on its way back; " + waits
	case run.Held != "":
		return fmt.Sprintf("it is held, because %s; go on with resume/%s, or go back with cancel/%s", run.Held, run.Rotation, run.Rotation)
	case run.Phase == Check && !r.consults():
		return fmt.Sprintf("consumers have until %s to read what it published; wait until it has ended, or take it back with cancel/%s",
			run.CheckUntil.UTC().Format(time.RFC3339), run.Rotation)
	case run.Phase == Grace:
		return fmt.Sprintf("it is in its grace period until %s; end it now with retire/%s/%s, or take it back with cancel/%s",
			run.GraceUntil.UTC().Format(time.RFC3339), r.Kind, r.Name, run.Rotation)
	case abandonable(run) && (run.Phase == Retire || !r.returnable()):
		return "the new version is served and the previous one is being retired; " + waits
	}
	return fmt.Sprintf("it is in phase %s; read rotations/%s, or stop it with cancel/%s", run.Phase, run.Rotation, run.Rotation)
}

// lockRole takes a role's lock. A worker may hold it for as long as the target
// hangs: then the refusal, within the time of the request, names the rotation.
func (e *Engine) lockRole(ctx context.Context, name string) error {
	wait, cancel := ctx, context.CancelFunc(func() {})
	if deadline, ok := ctx.Deadline(); ok {
		wait, cancel = context.WithDeadline(ctx, deadline.Add(-time.Until(deadline)/6))
	}
	defer cancel()
	if e.locks.lock(wait, name) == nil {
		return nil
	}
	c := &Conflict{Text: OwnerLabel(name) + " is busy with its target; try again"}
	if r, err := e.st.Role(ctx, name); err == nil && r != nil && r.Run != nil {
		c.Rotation = r.Run.Rotation
		c.Text = fmt.Sprintf("%s is busy with its target in rotation %s (%s); read rotations/%s, or try again",
			OwnerLabel(name), c.Rotation, r.Run.Phase, c.Rotation)
	}
	return c
}

// abandonable reports whether a run is where cancel no longer ends it, and only
// its target can.
func abandonable(run *Run) bool {
	return run.Back || run.Doubt || run.Phase == Publish || run.Phase == Grace || run.Phase == Retire || run.committed()
}

// Abandon deletes a role whose rotation waits for a target that will not come
// back. What the target accepts is left as it is; every version is kept in the
// tombstone. It may be repeated.
func (e *Engine) Abandon(ctx context.Context, name, reason string) error {
	if err := e.lockRole(ctx, name); err != nil {
		return err
	}
	defer e.locks.unlock(name)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	r, err := e.st.Role(ctx, name)
	if err != nil || r == nil {
		return err
	}
	if r.Run == nil {
		return e.bury(ctx, r)
	}
	if err := mayAbandon(r, time.Now()); err != nil {
		return err
	}
	id := r.Run.Rotation
	if err := e.storeAbandoned(ctx, r, reason); err != nil {
		// It may have happened all the same.
		e.wake(laneRecover, id+"/"+name, time.Now().Add(storageTimeout))
		return err
	}
	return nil
}

func mayAbandon(r *Role, now time.Time) error {
	run := r.Run
	if r.asked() {
		return busy(r)
	}
	if !abandonable(run) && run.Recall != "" {
		return &Conflict{Rotation: run.Rotation, Text: fmt.Sprintf(
			"rotation %s of %s is being stopped; try again in a minute", run.Rotation, OwnerLabel(r.Name))}
	}
	if !abandonable(run) {
		return &Conflict{Rotation: run.Rotation, Text: fmt.Sprintf(
			"rotation %s of %s is in phase %s, where it can be stopped; use cancel/%s, and repeat this when it has ended",
			run.Rotation, OwnerLabel(r.Name), run.Phase, run.Rotation)}
	}
	if run.Attempt != nil {
		if t := run.Attempt.Deadline.Add(Skew); now.Before(t) {
			return &Conflict{Rotation: run.Rotation, Text: fmt.Sprintf(
				"rotation %s of %s has sent a change that may still reach its target; try again after %s",
				run.Rotation, OwnerLabel(r.Name), t.UTC().Format(time.RFC3339))}
		}
	}
	return nil
}

// storeAbandoned ends a run where it stands: its evidence first, as at every end.
func (e *Engine) storeAbandoned(ctx context.Context, r *Role, reason string) error {
	now := time.Now().UTC()
	next := r.clone()
	ended := next.Run
	ended.Error = "abandoned"
	if reason != "" {
		ended.Error += ": " + reason
	}
	next.mark(now, ended.Error)
	next.Run = nil
	next.LastRun = &Ending{Rotation: ended.Rotation, Trigger: ended.Trigger, State: Cancelled, Error: ended.Error, At: now}
	ev := evidence(r, step{next: next, ended: ended, state: Cancelled})
	if err := e.st.putEvidence(ctx, ended.Rotation, ev); err != nil {
		return err
	}
	bury := e.bury
	if ended.Trigger == Create && next.With(version.Current) == nil {
		bury = e.abandon
	}
	if err := bury(ctx, next); err != nil {
		return err
	}
	e.o.Logger.Warn("a rotation was abandoned with its role", "role", r.Name, "kind", r.Kind,
		"rotation", ended.Rotation, "phase", ended.Phase, "back", ended.Back)
	e.endedPart(ended.Rotation, ev.Part)
	return nil
}
