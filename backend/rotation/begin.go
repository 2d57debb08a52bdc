package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Request asks for a rotation.
type Request struct {
	Trigger     Trigger
	Roles       []string
	RequestedBy Requester
	Reason      string
	// Keys identify the request itself; a repeat of any of them answers with
	// the rotation that the first one started.
	Keys [][]string
	// Source is the version that a rollback brings back.
	Source int
}

// Conflict is a request that cannot be served as things stand. Its text says
// what to do.
type Conflict struct {
	Rotation string
	Text     string
}

func (c *Conflict) Error() string { return c.Text }

// ErrNotFound is wrapped by errors about things that do not exist.
var ErrNotFound = errors.New("not found")

func busy(r *Role) *Conflict {
	text := fmt.Sprintf("role %q is in rotation %s (%s); read rotations/%s, or stop it with cancel/%s",
		r.Name, r.Run.Rotation, r.Run.Phase, r.Run.Rotation, r.Run.Rotation)
	if r.Run.Phase == Grace && !r.Run.Back {
		text = fmt.Sprintf("role %q is in its grace period in rotation %s until %s; end it now with retire/%s/%s",
			r.Name, r.Run.Rotation, r.Run.GraceUntil.UTC().Format(time.RFC3339), r.Kind, r.Name)
	}
	return &Conflict{Rotation: r.Run.Rotation, Text: text}
}

// Begin starts a rotation of the roles that are free, and says in the header
// which were not. It returns a Conflict when none was.
func (e *Engine) Begin(ctx context.Context, req Request) (*Header, error) {
	if len(req.Roles) > maxRoles {
		return e.beginChildren(ctx, req)
	}
	return e.beginOne(ctx, req, "")
}

// beginChildren splits a large request.
func (e *Engine) beginChildren(ctx context.Context, req Request) (*Header, error) {
	parent := &Header{
		ID: newID(), Trigger: req.Trigger, RequestedBy: req.RequestedBy, Reason: req.Reason,
		Started: time.Now().UTC(), State: Running,
	}
	if found, err := e.repeated(ctx, req); found != nil || err != nil {
		return found, err
	}
	if err := e.remember(ctx, req, parent.ID); err != nil {
		return nil, err
	}
	req.Keys = nil
	for part := range slices.Chunk(req.Roles, maxRoles) {
		child := req
		child.Roles = part
		h, err := e.beginOne(ctx, child, parent.ID)
		var c *Conflict
		if errors.As(err, &c) {
			parent.Running = append(parent.Running, part[:min(len(part), 20)]...)
			continue
		}
		if err != nil {
			return nil, err
		}
		parent.Children = append(parent.Children, h.ID)
	}
	if len(parent.Children) == 0 {
		return nil, &Conflict{Text: "every role is in a rotation already; read status to see which"}
	}
	return parent, e.st.putHeader(ctx, parent)
}

func (e *Engine) beginOne(ctx context.Context, req Request, parent string) (*Header, error) {
	for _, k := range req.Keys {
		name := requestKey(k...)
		if err := e.locks.lock(ctx, name); err != nil {
			return nil, err
		}
		defer e.locks.unlock(name)
	}
	if found, err := e.repeated(ctx, req); found != nil || err != nil {
		return found, err
	}
	// A role that is rotating may be locked for as long as its target hangs: it is
	// left out before the others are locked.
	free, taken, err := e.sortOut(ctx, req.Roles)
	if err != nil || len(free) == 0 {
		return nil, cmp.Or(err, taken)
	}
	unlock, err := e.locks.lockAll(ctx, namesOf(free))
	if err != nil {
		return nil, fmt.Errorf("the roles are busy; try again: %w", err)
	}
	defer unlock()
	free, taken, err = e.sortOut(ctx, namesOf(free))
	if err != nil || len(free) == 0 {
		return nil, cmp.Or(err, taken)
	}
	h := &Header{
		ID: newID(), Parent: parent, Trigger: req.Trigger, RequestedBy: req.RequestedBy, Reason: req.Reason,
		Started: time.Now().UTC(), Source: req.Source,
	}
	for _, r := range free {
		h.Roles = append(h.Roles, Part{Role: r.Name, Kind: r.Kind})
	}
	for _, name := range req.Roles {
		if !slices.ContainsFunc(free, func(r *Role) bool { return r.Name == name }) {
			h.Running = append(h.Running, name)
		}
	}
	if err := e.remember(ctx, req, h.ID); err != nil {
		return nil, err
	}
	if len(req.Keys) > 0 {
		h.Request = requestKey(req.Keys[0]...)
	}
	if err := e.st.putHeader(ctx, h); err != nil {
		return nil, err
	}
	e.track(h)
	e.beginRoles(ctx, h, free)
	return h, nil
}

func namesOf(roles []*Role) []string {
	names := make([]string, len(roles))
	for i, r := range roles {
		names[i] = r.Name
	}
	return names
}

// sortOut reads roles and says which are free; taken is about the first that
// is not.
func (e *Engine) sortOut(ctx context.Context, names []string) (free []*Role, taken, err error) {
	roles, err := e.st.Roles(ctx, names)
	if err != nil {
		return nil, nil, err
	}
	for i, r := range roles {
		switch {
		case r == nil && taken == nil:
			taken = fmt.Errorf("role %q: %w", names[i], ErrNotFound)
		case r == nil:
		case r.Run != nil:
			if taken == nil {
				taken = busy(r)
			}
		default:
			free = append(free, r)
		}
	}
	return free, taken, nil
}

// beginRoles gives each role its run. A role whose entry cannot be written now
// is begun later, by whoever resumes the rotation.
func (e *Engine) beginRoles(ctx context.Context, h *Header, roles []*Role) {
	var mu sync.Mutex
	failed := false
	g := errgroup.Group{}
	g.SetLimit(parallelStorage)
	for _, r := range roles {
		g.Go(func() error {
			next := r.clone()
			next.Run = newRun(h, time.Now())
			next.mark(time.Now(), string(Preflight))
			if err := e.putRole(ctx, r, next); err != nil {
				e.o.Logger.Warn("a role cannot be stored; trying again", "role", r.Name, "error", err)
				mu.Lock()
				failed = true
				mu.Unlock()
				return nil
			}
			e.wake(next.lane(), next.Name, time.Now())
			return nil
		})
	}
	_ = g.Wait()
	if failed {
		e.wake(laneRecover, h.ID, time.Now().Add(pause(1)))
	}
}

func newRun(h *Header, now time.Time) *Run {
	return &Run{
		Rotation: h.ID, Trigger: h.Trigger, Phase: Preflight, Source: h.Source,
		Started: now.UTC(), Deadline: now.Add(preflightTimeout),
	}
}

func newID() string { return uuid.Must(uuid.NewV7()).String() }

// repeated finds the rotation that an earlier sending of the same request
// started.
func (e *Engine) repeated(ctx context.Context, req Request) (*Header, error) {
	for _, k := range req.Keys {
		entry, err := e.st.request(ctx, requestKey(k...))
		if err != nil {
			return nil, err
		}
		if entry == nil {
			continue
		}
		h, err := e.st.Header(ctx, entry.Rotation)
		if err != nil || h != nil {
			return h, err
		}
	}
	return nil, nil
}

func (e *Engine) remember(ctx context.Context, req Request, id string) error {
	for _, k := range req.Keys {
		if err := e.st.putRequest(ctx, requestKey(k...), requestEntry{Rotation: id, At: time.Now().UTC()}); err != nil {
			return err
		}
	}
	return nil
}

// recover finds what was interrupted: every open rotation goes on where its
// roles' entries say it stands.
func (e *Engine) recover() {
	ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
	defer cancel()
	if err := e.recoverAll(ctx); err != nil {
		e.o.Logger.Warn("interrupted rotations cannot be read; trying again", "error", err)
		e.wake(laneRecover, laneRecover, time.Now().Add(pause(2)))
	}
}

func (e *Engine) recoverAll(ctx context.Context) error {
	if _, err := e.LoadConfig(ctx); err != nil {
		return err
	}
	if err := e.due.rebuild(ctx); err != nil {
		return err
	}
	e.scheduleDue()
	ids, err := e.st.openRotations(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := e.resume(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// resume takes up one open rotation.
func (e *Engine) resume(ctx context.Context, id string) error {
	h, err := e.st.Header(ctx, id)
	if err != nil {
		return err
	}
	if h == nil || h.State != "" {
		return e.st.dropOpen(ctx, id)
	}
	e.track(h)
	for _, p := range h.Roles {
		if err := e.resumePart(ctx, h, p); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) resumePart(ctx context.Context, h *Header, p Part) error {
	if err := e.locks.lock(ctx, p.Role); err != nil {
		return err
	}
	defer e.locks.unlock(p.Role)
	r, err := e.st.Role(ctx, p.Role)
	if err != nil {
		return err
	}
	if r != nil && r.Run != nil && r.Run.Rotation == h.ID {
		e.progress(r)
		e.wake(r.lane(), r.Name, time.Now())
		return nil
	}
	ev, err := e.st.Evidence(ctx, h.ID, p.Role)
	switch {
	case err != nil:
		return err
	case ev != nil:
		e.endedPart(h.ID, ev.Part)
		return nil
	case r == nil || r.Run != nil || r.Kind != p.Kind:
		p.State, p.Error = Superseded, "it was interrupted before this role was begun"
		e.endedPart(h.ID, p)
		return nil
	}
	e.beginRoles(ctx, h, []*Role{r})
	return nil
}

func (st *Store) dropOpen(ctx context.Context, id string) error {
	return st.s.Delete(ctx, openKey(id))
}

// newest returns the version that a rollback brings back: the newest that is
// retired and holds something else than what is served.
func newest(r *Role) *version.Version {
	for _, v := range slices.Backward(r.Versions) {
		if v.Stage == version.Retired && !r.Served(v.Material) {
			return &v
		}
	}
	return nil
}
