package rotation

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// childPlan is what a child of a large request is to rotate. It is stored before
// the parent, and stands for the child until that has a header of its own: so a
// child that was not begun is known, and is begun by whoever goes on.
type childPlan struct {
	Roles []string `json:"roles"`
}

func planKey(parent string, child int) string {
	return storage.Plan + parent + "/" + strconv.Itoa(child)
}

func (st *Store) putPlan(ctx context.Context, parent string, child int, roles []string) error {
	return storage.Put(ctx, st.s, planKey(parent, child), childPlan{Roles: roles}, maxSmallEntry)
}

// plan is what child i of a parent is still to begin; nil when that is done.
func (st *Store) plan(ctx context.Context, parent string, child int) (*childPlan, error) {
	return storage.Get[childPlan](ctx, st.s, planKey(parent, child))
}

func (st *Store) dropPlans(ctx context.Context, parent string) error {
	keys, err := st.s.List(ctx, storage.Plan+parent+"/")
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := st.s.Delete(ctx, storage.Plan+parent+"/"+key); err != nil {
			return err
		}
	}
	return nil
}

// beginChildren splits a large request. The parent names its children before any
// of them is begun.
func (e *Engine) beginChildren(ctx context.Context, req Request) (*Header, error) {
	release, err := e.locks.lockAll(ctx, req.keys())
	if err != nil {
		return nil, err
	}
	defer release()
	id, parent, err := e.remembered(ctx, req)
	if err != nil {
		return nil, err
	}
	if parent == nil {
		if parent, err = e.openParent(ctx, id, req); err != nil {
			return nil, err
		}
	}
	if err := e.beginMissing(ctx, parent); err != nil {
		e.wake(laneRecover, parent.ID, time.Now().Add(storageTimeout))
		return nil, err
	}
	return parent, nil
}

// openParent stores a parent and what its children are to rotate.
func (e *Engine) openParent(ctx context.Context, id string, req Request) (*Header, error) {
	free, taken, err := e.sortOut(ctx, req.Trigger, req.Roles)
	if err != nil {
		return nil, err
	}
	if len(free) == 0 {
		if isRefusal(taken) && len(req.Roles) > 1 {
			taken = &Conflict{Text: "every role is in a rotation already; read status to see which"}
		}
		return nil, taken
	}
	if err := e.locks.lock(ctx, id); err != nil {
		return nil, err
	}
	defer e.locks.unlock(id)
	if err := e.st.settle(ctx); err != nil {
		return nil, err
	}
	// An earlier sending of the request may have stored it after all.
	if h, err := e.st.Header(ctx, id); err != nil || h != nil {
		return h, err
	}
	parent := &Header{
		ID: id, Trigger: req.Trigger, RequestedBy: req.RequestedBy, Reason: clip(req.Reason),
		Started: time.Now().UTC(), Requests: req.keys(), Emergency: req.Emergency, Overrides: req.Overrides,
	}
	if len(req.Keys) > 0 {
		parent.Request = parent.Requests[0]
	}
	if err := e.remember(ctx, req, id); err != nil {
		return nil, err
	}
	// The marker first: plans without a header are dropped with it.
	if err := e.st.putOpen(ctx, id); err != nil {
		return nil, err
	}
	err = e.storeParent(ctx, parent, chunks(req.Roles))
	if err != nil {
		e.wake(laneRecover, id, time.Now().Add(storageTimeout))
	}
	return parent, err
}

func (e *Engine) storeParent(ctx context.Context, parent *Header, parts [][]string) error {
	for i, part := range parts {
		if err := e.st.putPlan(ctx, parent.ID, i, part); err != nil {
			return err
		}
		parent.Children = append(parent.Children, newID())
	}
	return e.st.putHeader(ctx, parent)
}

// beginMissing begins the children of a parent that have no header yet. It may
// be called any number of times.
func (e *Engine) beginMissing(ctx context.Context, parent *Header) error {
	return e.eachMissing(ctx, parent, func(child string, roles []string) error {
		free, err := e.notSince(ctx, parent, roles)
		if err != nil {
			return err
		}
		req := Request{
			Trigger: parent.Trigger, Roles: free, RequestedBy: parent.RequestedBy, Reason: parent.Reason,
			Emergency: parent.Emergency, Overrides: parent.Overrides,
		}
		if len(free) > 0 {
			if _, err = e.beginAs(ctx, req, parent.ID, child); err == nil || !isRefusal(err) {
				return err
			}
		}
		return e.passOver(ctx, parent, child, nil, roles)
	})
}

// eachMissing calls begin for each child that has a plan and no header.
func (e *Engine) eachMissing(ctx context.Context, parent *Header, begin func(child string, roles []string) error) error {
	if parent.State != "" {
		return nil
	}
	if err := e.locks.lock(ctx, parent.ID); err != nil {
		return err
	}
	defer e.locks.unlock(parent.ID)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	missing := false
	for i, child := range parent.Children {
		h, err := e.st.Header(ctx, child)
		if err != nil {
			return err
		}
		if h != nil {
			continue
		}
		plan, err := e.st.plan(ctx, parent.ID, i)
		if err != nil {
			return err
		}
		if plan == nil {
			continue
		}
		missing = true
		if err := begin(child, plan.Roles); err != nil {
			return err
		}
	}
	if !missing {
		e.wake(laneRotations, parent.ID, time.Now()) // its last child may have ended unnoticed
	}
	return nil
}

// notSince returns the roles that were not rotated since their parent was asked for, by
// anybody: a child that is begun late rotates nothing twice. An emergency may.
func (e *Engine) notSince(ctx context.Context, parent *Header, names []string) ([]string, error) {
	roles, _, err := e.st.readable(ctx, names)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, r := range roles {
		if r != nil && (parent.Trigger == Urgent || r.LastRun == nil || !r.LastRun.At.After(parent.Started)) {
			out = append(out, r.Name)
		}
	}
	return out, nil
}

// passOver stores a child that begins nothing.
func (e *Engine) passOver(ctx context.Context, parent *Header, child string, parts []Part, running []string) error {
	now := time.Now().UTC()
	err := e.st.putHeader(ctx, &Header{
		ID: child, Parent: parent.ID, Trigger: parent.Trigger, RequestedBy: parent.RequestedBy, Reason: clip(parent.Reason),
		Started: now, Finished: now, State: Superseded, Roles: parts, Running: running,
	})
	if err == nil {
		e.wake(laneRotations, parent.ID, time.Now())
	}
	return err
}

// cancelMissing has the children of a parent that were not begun never begin.
func (e *Engine) cancelMissing(ctx context.Context, parent *Header) error {
	return e.eachMissing(ctx, parent, func(child string, roles []string) error {
		parts, err := e.st.planned(ctx, roles)
		if err != nil {
			return err
		}
		for i := range parts {
			parts[i].State, parts[i].Error = Superseded, "it was cancelled before this role was begun"
		}
		return e.passOver(ctx, parent, child, parts, nil)
	})
}

// planned are the parts of a child that has not begun.
func (st *Store) planned(ctx context.Context, names []string) ([]Part, error) {
	roles, _, err := st.readable(ctx, names)
	if err != nil {
		return nil, err
	}
	var parts []Part
	for _, r := range roles {
		if r != nil {
			parts = append(parts, Part{Role: r.Name, Kind: r.Kind})
		}
	}
	return parts, nil
}

// closeParent stores the outcome of a parent whose children have all ended.
func (e *Engine) closeParent(ctx context.Context, id string) error {
	h, err := e.st.Header(ctx, id)
	if err != nil || h == nil || h.State != "" || len(h.Children) == 0 {
		return err
	}
	var parts []Part
	for i, id := range h.Children {
		child, err := e.st.Header(ctx, id)
		if err != nil {
			return err
		}
		if child == nil {
			if plan, err := e.st.plan(ctx, h.ID, i); err != nil || plan != nil {
				return err // it is begun first
			}
			continue
		}
		if child.State == "" {
			return nil // its end comes here again
		}
		parts = append(parts, child.Roles...)
	}
	h.State, h.Finished = Summarize(parts), time.Now().UTC()
	if err := e.st.dropPlans(ctx, h.ID); err != nil {
		return fmt.Errorf("removing the plan of rotation %s: %w", h.ID, err)
	}
	if err := e.st.putHeader(ctx, h); err != nil {
		return err
	}
	e.o.Recorder.Moved(id)
	return nil
}

// forgetAll removes a rotation with its children; the parent goes last, so that
// what is left of it after an error is found again.
func (st *Store) forgetAll(ctx context.Context, h *Header) error {
	for _, id := range h.Children {
		child, err := st.Header(ctx, id)
		if err != nil {
			return err
		}
		if child != nil {
			if err := st.forget(ctx, child); err != nil {
				return err
			}
		}
	}
	return st.forget(ctx, h)
}

// ofParent reports whether h is forgotten with its parent.
func (st *Store) ofParent(ctx context.Context, h *Header) (bool, error) {
	if h.Parent == "" {
		return false, nil
	}
	parent, err := st.Header(ctx, h.Parent)
	return parent != nil && slices.Contains(parent.Children, h.ID), err
}
