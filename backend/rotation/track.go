package rotation

import (
	"context"
	"time"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"
)

// track follows an open rotation in memory, so that callers can wait and the
// header can be closed when the last role has ended. It is rebuilt from storage
// by whoever resumes the rotation.
type track struct {
	header    *Header
	unsettled map[string]bool // roles whose credential phases go on
	open      map[string]bool // roles that have not ended
	parts     map[string]Part // roles that have
	lanes     map[string]string
	settled   chan struct{}
	ended     chan struct{}
	moved     chan struct{} // closed, and made anew, when a role settles or ends
}

// follow starts to track a rotation. It may be called again for the same one.
func (e *Engine) track(h *Header) *track {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := e.tracks[h.ID]; t != nil {
		return t
	}
	t := &track{
		header: h, unsettled: map[string]bool{}, open: map[string]bool{}, parts: map[string]Part{}, lanes: map[string]string{},
		settled: make(chan struct{}), ended: make(chan struct{}), moved: make(chan struct{}),
	}
	for _, p := range h.Roles {
		t.unsettled[p.Role], t.open[p.Role] = true, true
	}
	e.tracks[h.ID] = t
	return t
}

// progress notes where a role's run has come to.
func (e *Engine) progress(r *Role) {
	if r.Run.settled() {
		e.o.Recorder.Moved(r.Run.Rotation)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.tracks[r.Run.Rotation]
	if t == nil {
		return
	}
	t.lanes[r.Name] = r.lane()
	if r.Run.settled() {
		t.settle(r.Name)
		t.tell()
	}
}

// settlePart tells those who wait for a role that it will take long.
func (e *Engine) settlePart(r *Role) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := e.tracks[r.Run.Rotation]; t != nil && t.unsettled[r.Name] {
		t.settle(r.Name)
		t.tell()
	}
}

// tell wakes those who wait for single roles.
func (t *track) tell() {
	close(t.moved)
	t.moved = make(chan struct{})
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
	e.o.Recorder.Moved(id)
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.tracks[id]
	if t == nil || !t.open[p.Role] {
		return
	}
	t.parts[p.Role] = p
	delete(t.open, p.Role)
	t.settle(p.Role)
	t.tell()
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

// WaitRole waits for one role of a rotation, however long the others take.
func (e *Engine) WaitRole(ctx context.Context, id, role string, until Until) {
	for {
		e.mu.Lock()
		t := e.tracks[id]
		if t == nil || !t.open[role] || until == Settled && !t.unsettled[role] {
			e.mu.Unlock()
			return
		}
		moved := t.moved
		e.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return
		case <-e.ctx.Done():
			return
		}
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

// closed is h as it is kept after its last role has ended. Errors are shortened
// where there are many, to fit its entry; they are whole in the evidence.
func closed(h *Header, parts map[string]Part) *Header {
	c := *h
	c.Reason = clip(c.Reason) // an earlier version may have stored more
	limits := []int{60, 0}
	if len(h.Roles) <= 20 {
		limits = []int{maxRunes, 60, 0}
	}
	for _, limit := range limits {
		c.Roles = make([]Part, len(h.Roles))
		for i, p := range h.Roles {
			c.Roles[i] = parts[p.Role]
			c.Roles[i].Error = clipTo(c.Roles[i].Error, limit, maxText)
			c.Roles[i].Clients = clipTo(c.Roles[i].Clients, limit, maxText)
		}
		c.State, c.Finished = Summarize(c.Roles), time.Now().UTC()
		if raw, err := jsonutil.EncodeJSON(&c); err == nil && len(raw) <= maxHeaderEntry {
			break
		}
	}
	return &c
}

func (e *Engine) closeRotation(id string) error {
	e.mu.Lock()
	t := e.tracks[id]
	running := t != nil && len(t.open) > 0
	e.mu.Unlock()
	if running { // its last role will say so
		return nil
	}
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	if t == nil {
		return e.closeParent(ctx, id)
	}
	// Nothing of it changes any more.
	if err := e.st.putHeader(ctx, closed(t.header, t.parts)); err != nil {
		return err
	}
	e.o.Recorder.Moved(id)
	e.mu.Lock()
	delete(e.tracks, id)
	if parent := t.header.Parent; parent != "" {
		e.wakeLocked(laneRotations, parent, time.Now())
	}
	e.mu.Unlock()
	return nil
}
