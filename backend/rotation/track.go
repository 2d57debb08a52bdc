package rotation

import (
	"context"
	"time"
)

// track follows an open rotation in memory, so that callers can wait and the
// header can be closed when the last role has ended. It is rebuilt from storage
// by whoever resumes the rotation.
type track struct {
	header    *Header
	unsettled map[string]bool // roles whose credential phases go on
	open      map[string]bool // roles that have not ended
	parts     map[string]Part // roles that have
	settled   chan struct{}
	ended     chan struct{}
}

// follow starts to track a rotation. It may be called again for the same one.
func (e *Engine) track(h *Header) *track {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := e.tracks[h.ID]; t != nil {
		return t
	}
	t := &track{
		header: h, unsettled: map[string]bool{}, open: map[string]bool{}, parts: map[string]Part{},
		settled: make(chan struct{}), ended: make(chan struct{}),
	}
	for _, p := range h.Roles {
		t.unsettled[p.Role], t.open[p.Role] = true, true
	}
	e.tracks[h.ID] = t
	return t
}

// progress notes where a role's run has come to.
func (e *Engine) progress(r *Role) {
	if !r.Run.settled() {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := e.tracks[r.Run.Rotation]; t != nil {
		t.settle(r.Name)
	}
}

func (t *track) settle(role string) {
	if t.unsettled[role] {
		delete(t.unsettled, role)
		if len(t.unsettled) == 0 {
			close(t.settled)
		}
	}
}

// endedPart notes the outcome of a role's run, and closes the rotation when it
// was the last.
func (e *Engine) endedPart(id string, p Part) {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.tracks[id]
	if t == nil || !t.open[p.Role] {
		return
	}
	t.parts[p.Role] = p
	delete(t.open, p.Role)
	t.settle(p.Role)
	if len(t.open) == 0 {
		close(t.ended)
		e.wakeLocked(laneRotations, id, time.Now())
	}
}

// Until names what a caller waits for.
type Until int

// What a caller may wait for.
const (
	Settled Until = iota // every role is promoted, has ended, or must wait
	Over                 // every role has ended
)

// Wait waits until a rotation has come as far as asked, or ctx ends. A rotation
// that is not tracked here has ended.
func (e *Engine) Wait(ctx context.Context, id string, until Until) {
	e.mu.Lock()
	t := e.tracks[id]
	e.mu.Unlock()
	if t == nil {
		return
	}
	ch := t.settled
	if until == Over {
		ch = t.ended
	}
	select {
	case <-ch:
	case <-ctx.Done():
	case <-e.ctx.Done():
	}
}

// tend closes the headers of rotations whose roles have all ended.
func (e *Engine) tend(ids []string) {
	for _, id := range ids {
		if err := e.closeRotation(id); err != nil {
			e.o.Logger.Warn("a rotation cannot be closed; trying again", "rotation", id, "error", err)
			e.wake(laneRotations, id, time.Now().Add(pause(3)))
		}
	}
}

func (e *Engine) closeRotation(id string) error {
	e.mu.Lock()
	t := e.tracks[id]
	e.mu.Unlock()
	if t == nil || len(t.open) > 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	h := *t.header
	h.Roles = nil
	for _, p := range t.header.Roles {
		p = t.parts[p.Role]
		if len(t.header.Roles) > 20 && len(p.Error) > 60 {
			p.Error = p.Error[:60] + "…" // whole in the evidence
		}
		h.Roles = append(h.Roles, p)
	}
	h.State, h.Finished = Summarize(h.Roles), time.Now().UTC()
	if err := e.st.putHeader(ctx, &h); err != nil {
		return err
	}
	e.mu.Lock()
	delete(e.tracks, id)
	e.mu.Unlock()
	return nil
}
