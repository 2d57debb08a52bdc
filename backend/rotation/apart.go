package rotation

import (
	"context"
	"slices"
	"time"
)

// apart says when a due role may begin that must keep a distance from another
// (apart_from, apart_by); zero: now. Until then it stays due. Rotations that
// were asked for by hand do not wait: whoever asks sees both.
func (e *Engine) apart(ctx context.Context, r *Role, now time.Time) time.Time {
	if r.ApartFrom == "" {
		return time.Time{}
	}
	other, err := e.st.Role(ctx, r.ApartFrom)
	switch {
	case err != nil:
		return now.Add(pause(4))
	case other == nil: // not created yet, or deleted
		return time.Time{}
	case other.Run != nil:
		return now.Add(apartPause)
	}
	if free := other.lastChange().Add(r.ApartBy); free.After(now) {
		return free
	}
	return time.Time{}
}

// apartPause is how often a role looks whether the other one is idle again.
const apartPause = time.Minute

// lastChange is when the last rotation ended that changed what is served. One
// that failed before, or a reconcile, changed nothing: a role that keeps
// failing must not keep another from its rotation.
func (r *Role) lastChange() time.Time {
	if last := r.LastRun; last != nil && last.State == Completed && last.Trigger != Reconcile && last.Trigger != Retirement && last.At.After(r.LastRotation) {
		return last.At
	}
	return r.LastRotation
}

// keepApart leaves out of roles that begin together those of which one must
// keep a distance from another. They stay due.
func (e *Engine) keepApart(roles []*Role, now time.Time) []*Role {
	var out []*Role
	for _, r := range roles {
		if slices.ContainsFunc(out, func(o *Role) bool { return o.ApartFrom == r.Name || r.ApartFrom == o.Name }) {
			e.due.again(r.Name, now.Add(apartPause))
			continue
		}
		out = append(out, r)
	}
	return out
}
