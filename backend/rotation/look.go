package rotation

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"
)

// Roles with auto_reconcile are looked at now and then: what their target accepts
// may have been changed by hand, lost with a node, or rewound with a restored
// snapshot. One that differs is reconciled.

// lookEvery is how often; where it cannot be mended, less and less often.
const (
	lookEvery    = 15 * time.Minute
	lookAtLeast  = 24 * time.Hour
	maxDoublings = 7
)

// lookTrigger is not one of a rotation: a look that finds nothing leaves none.
const lookTrigger Trigger = "look"

// SetAutoReconcile says whether the role is looked at.
func (r *Role) SetAutoReconcile(on bool, now time.Time) {
	switch {
	case !on:
		r.AutoReconcile, r.LookAt = false, time.Time{}
	case !r.AutoReconcile:
		r.AutoReconcile = true
		r.LookAt = now.Add(rand.N(lookEvery)).UTC() //nolint:gosec // it spreads looks, nobody must not guess it
	}
}

// looksAt is when the role is looked at next; zero: not now.
func (r *Role) looksAt() time.Time {
	if !r.AutoReconcile || r.Run != nil {
		return time.Time{}
	}
	if d := r.Drift; d != nil && d.RetryAt.After(r.LookAt) { // the last try to mend it failed
		return d.RetryAt
	}
	return r.LookAt
}

// unmended puts off the next look of a role that a reconcile did not mend: what is
// wrong takes a person, and each try leaves a failed rotation.
func (r *Role) unmended(now time.Time) {
	r.Unmended++
	if r.AutoReconcile {
		r.LookAt = now.Add(min(lookAtLeast, lookEvery<<min(r.Unmended, maxDoublings))).UTC()
	}
}

// mended has a role that is well looked at as often as others.
func (r *Role) mended(now time.Time) {
	if r.Unmended > 0 && r.AutoReconcile {
		r.LookAt = now.Add(lookEvery).UTC()
	}
	r.Unmended = 0
}

// lookForDrift asks the targets of roles whether they accept what is served, and
// nothing else, and reconciles those that do not.
func (e *Engine) lookForDrift(names []string) {
	ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
	defer cancel()
	roles, bad := e.st.roles(ctx, names)
	for name := range bad {
		e.due.again(name, time.Now().Add(pause(4)))
	}
	lanes := map[string][]*Role{}
	for _, r := range roles {
		if r != nil && !r.looksAt().IsZero() {
			lanes[r.lane()] = append(lanes[r.lane()], r)
		}
	}
	g := errgroup.Group{}
	g.SetLimit(max(1, e.Config().Workers))
	for _, roles := range lanes {
		g.Go(func() error { e.lookAt(ctx, roles); return nil })
	}
	_ = g.Wait()
	e.scheduleDue()
}

// lookAt is lookForDrift for roles of one lane: what is wrong with their connection
// is no affair of the others.
func (e *Engine) lookAt(ctx context.Context, roles []*Role) {
	for i, r := range roles {
		roles[i] = r.clone()
		roles[i].Consumers = nil // what stands against a rotation there is no drift
	}
	reports, err := e.examine(ctx, roles)
	if err != nil {
		e.o.Logger.Warn("roles cannot be looked at; trying again", "lane", roles[0].lane(), "error", err)
		for _, r := range roles {
			e.due.again(r.Name, time.Now().Add(pause(4)))
		}
		return
	}
	for _, rep := range reports {
		e.looked(ctx, rep)
	}
}

// looked stores when a role is looked at again, and then reconciles it if it has
// to: whoever is cut off in between looks once more.
func (e *Engine) looked(ctx context.Context, rep Report) {
	name := rep.Role.Name
	why := rep.drifted()
	err := e.change(ctx, name, func(r *Role) error {
		if r.looksAt().IsZero() {
			return nil
		}
		r.LookAt = time.Now().Add(lookEvery/2 + rand.N(lookEvery)).UTC() //nolint:gosec // as above
		if why == "" {
			r.Unmended = 0
		}
		return nil
	})
	var refused *Conflict
	if err != nil && !errors.As(err, &refused) {
		e.due.again(name, time.Now().Add(pause(4)))
		return
	}
	if why == "" || err != nil {
		return
	}
	e.o.Logger.Warn("a role has drifted; reconciling it", "role", name, "kind", rep.Role.Kind, "reason", why)
	if err := e.beginQuietly(ctx, Request{Trigger: Reconcile, Roles: []string{name}, Reason: clip("auto_reconcile: " + why)}); err != nil {
		e.due.again(name, time.Now().Add(pause(4)))
	}
}

// drifted says how what nodes that answered accept differs from what is stored, or
// "". That a target cannot be asked is no drift.
func (rep *Report) drifted() string {
	r := rep.Role
	for _, n := range rep.Nodes {
		if n.Err != nil {
			continue
		}
		current := false
		for _, number := range n.Accepted {
			v := r.Get(number)
			current = current || v != nil && r.Served(v.Material)
		}
		switch {
		case !current:
			return "node " + n.Node + " refuses what is served"
		case n.Unknown != 0:
			return "node " + n.Node + " accepts passwords that this engine does not know"
		}
	}
	if r.alternates() && rep.Err != nil && rep.definite && len(rep.Nodes) > 0 {
		return rep.Err.Error()
	}
	return ""
}
