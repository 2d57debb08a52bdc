package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
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
	// Emergency is what an emergency does beyond others, and Overrides what it sets
	// aside, in words.
	Emergency *Emergency
	Overrides []string
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

// Begin starts a rotation of the roles that are free, and says in the header
// which were not. It returns a Conflict when none was.
func (e *Engine) Begin(ctx context.Context, req Request) (*Header, error) {
	req.Roles = slices.Compact(slices.Sorted(slices.Values(req.Roles)))
	if len(chunks(req.Roles)) > 1 {
		return e.beginChildren(ctx, req)
	}
	return e.beginOne(ctx, req)
}

// Repeated returns the rotation that an earlier sending of a request started, or
// joined; nil when it is new. It starts nothing.
func (e *Engine) Repeated(ctx context.Context, req Request) (*Header, error) {
	_, h, err := e.remembered(ctx, req)
	return h, err
}

// Started reports whether h is the rotation that req itself started.
func (req Request) Started(h *Header) bool { return slices.Contains(req.keys(), h.Request) }

// chunks splits roles into lists whose headers fit their entries.
func chunks(names []string) [][]string {
	var out [][]string
	size := 0
	for i, name := range names {
		if i == 0 || len(out[len(out)-1]) >= maxRoles || size+len(name) > maxNames {
			out, size = append(out, nil), 0
		}
		last := len(out) - 1
		out[last] = append(out[last], name)
		size += len(name)
	}
	return out
}

// keys are the storage keys of the request's own keys.
func (req Request) keys() []string {
	var keys []string
	for _, k := range req.Keys {
		keys = append(keys, requestKey(k...))
	}
	return keys
}

func (e *Engine) beginOne(ctx context.Context, req Request) (*Header, error) {
	release, err := e.locks.lockAll(ctx, req.keys())
	if err != nil {
		return nil, err
	}
	defer release()
	id, found, err := e.remembered(ctx, req)
	if found != nil || err != nil {
		return found, err
	}
	return e.beginAs(ctx, req, "", id)
}

// beginAs begins rotation id, a child of parent where there is one.
func (e *Engine) beginAs(ctx context.Context, req Request, parent, id string) (*Header, error) {
	// A role that is rotating may be locked for as long as its target hangs: it is
	// left out before the others are locked.
	free, taken, err := e.sortOut(ctx, req.Trigger, req.Roles)
	if err != nil || len(free) == 0 {
		return nil, cmp.Or(err, taken)
	}
	if req.Trigger != Urgent { // which takes them over, one by one
		unlock, err := e.locks.lockAll(ctx, namesOf(free))
		if err != nil {
			return nil, fmt.Errorf("the roles are busy; try again: %w", err)
		}
		defer unlock()
		free, taken, err = e.sortOut(ctx, req.Trigger, namesOf(free))
		if err != nil || len(free) == 0 {
			return nil, cmp.Or(err, taken)
		}
	}
	h := &Header{
		ID: id, Parent: parent, Trigger: req.Trigger, RequestedBy: req.RequestedBy, Reason: clip(req.Reason),
		Started: time.Now().UTC(), Source: req.Source, Emergency: req.Emergency, Overrides: req.Overrides,
	}
	units := unitsOf(req.Trigger, free)
	for _, r := range free {
		h.Roles = append(h.Roles, Part{Role: r.Name, Kind: r.Kind, Unit: units[r.Name]})
	}
	for _, name := range req.Roles {
		if !slices.ContainsFunc(free, func(r *Role) bool { return r.Name == name }) {
			h.Running = append(h.Running, name)
		}
	}
	if len(req.Keys) > 0 {
		h.Request, h.Requests = requestKey(req.Keys[0]...), req.keys()
	}
	if err := e.openRotation(ctx, h, req); err != nil {
		return nil, err
	}
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

// openRotation stores that a rotation is about to begin. Where that fails it may
// have happened all the same: what is stored is looked at again when nothing of
// it can still be under way.
func (e *Engine) openRotation(ctx context.Context, h *Header, req Request) error {
	if err := e.remember(ctx, req, h.ID); err != nil {
		return err
	}
	// The marker is stored before the header, and resume drops markers that
	// have none.
	if err := e.locks.lock(ctx, h.ID); err != nil {
		return err
	}
	defer e.locks.unlock(h.ID)
	if err := e.st.putHeader(ctx, h); err != nil {
		e.wake(laneRecover, h.ID, time.Now().Add(storageTimeout))
		return err
	}
	e.track(h)
	e.o.Recorder.Moved(h.ID)
	return nil
}

// sortOut reads roles and says which are free; taken is about the first that
// is not.
func (e *Engine) sortOut(ctx context.Context, t Trigger, names []string) (free []*Role, taken, err error) {
	if err := e.st.settle(ctx); err != nil {
		return nil, nil, err
	}
	roles, unreadable, err := e.st.readable(ctx, names)
	if err != nil {
		return nil, nil, err
	}
	for i, r := range roles {
		switch {
		case slices.Contains(unreadable, names[i]):
			taken = cmp.Or(taken, error(&Conflict{Text: fmt.Sprintf("the entry of role %q cannot be decoded; it may have been written by a newer version", names[i])}))
		case r == nil && taken == nil:
			taken = fmt.Errorf("role %q: %w", names[i], ErrNotFound)
		case r == nil:
		case r.Run != nil && !(t == Urgent && r.yields()):
			e.wake(r.lane(), r.Name, time.Now()) // nobody may be at it any more
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
	if h.Trigger == Urgent {
		e.takeOver(ctx, h)
		return
	}
	var mu sync.Mutex
	failed := false
	g := errgroup.Group{}
	g.SetLimit(parallelStorage)
	for _, r := range roles {
		g.Go(func() error {
			if err := e.beginRole(ctx, h, r); err != nil {
				e.o.Logger.Warn("a role cannot be stored; trying again", "role", r.Name, "error", err)
				mu.Lock()
				failed = true
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait()
	if failed {
		e.wake(laneRecover, h.ID, time.Now().Add(pause(1)))
	}
}

func (e *Engine) beginRole(ctx context.Context, h *Header, r *Role) error {
	next := r.clone()
	next.Run = newRun(h, time.Now())
	next.Run.Unit = h.unit(r.Name)
	next.mark(time.Now(), string(Preflight))
	if err := e.putRole(ctx, r, next); err != nil {
		return err
	}
	e.wake(next.lane(), next.Name, time.Now())
	return nil
}

func newRun(h *Header, now time.Time) *Run {
	return &Run{
		Rotation: h.ID, Trigger: h.Trigger, Phase: Preflight, Source: h.Source,
		Started: now.UTC(), Deadline: now.Add(preflightTimeout), Emergency: h.Emergency,
	}
}

func newID() string { return uuid.Must(uuid.NewV7()).String() }

// remembered finds the rotation that an earlier sending of the same request
// started. Where that did not come to a header, or there was none, the id is
// the one to start it under: a header that was written after all is the same.
func (e *Engine) remembered(ctx context.Context, req Request) (id string, h *Header, err error) {
	for _, key := range req.keys() {
		entry, err := e.st.request(ctx, key)
		if err != nil {
			return "", nil, err
		}
		if entry == nil {
			continue
		}
		if h, err = e.st.Header(ctx, entry.Rotation); err != nil || h != nil {
			if h != nil && h.State == "" {
				e.wake(laneRecover, h.ID, time.Now()) // it may have been stored with an error
			}
			return entry.Rotation, h, err
		}
		id = entry.Rotation
	}
	if id == "" {
		id = newID()
	}
	return id, nil, nil
}

func (e *Engine) remember(ctx context.Context, req Request, id string) error {
	for _, key := range req.keys() {
		if err := e.st.putRequest(ctx, key, requestEntry{Rotation: id, At: time.Now().UTC()}); err != nil {
			return err
		}
	}
	return nil
}

// recoverEvery is how often what is open is compared with what is under way,
// in case something slipped through.
const recoverEvery = time.Hour

// recover finds what was interrupted: every open rotation, one by its id, or one
// role's part in it (id/role), goes on where the roles' entries say it stands.
func (e *Engine) recover(items []string) {
	g := errgroup.Group{}
	g.SetLimit(parallelRecovery)
	for _, item := range items {
		g.Go(func() error {
			if item != laneRecover {
				e.resume(item)
				return nil
			}
			next := recoverEvery
			if err := e.recoverAll(); err != nil {
				e.o.Logger.Warn("interrupted rotations cannot be read; trying again", "error", err)
				next = rereadPause(err)
			}
			e.wake(laneRecover, item, time.Now().Add(next))
			return nil
		})
	}
	_ = g.Wait()
}

// parallelRecovery is how many rotations are taken up at once.
const parallelRecovery = 8

// recoverAll takes up what it can, and says what it could not read.
func (e *Engine) recoverAll() error {
	ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
	defer cancel()
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	_, noConfig := e.LoadConfig(ctx)
	notDue := e.due.rebuild(ctx)
	e.scheduleDue()
	ids, err := e.st.openRotations(ctx)
	g := errgroup.Group{}
	g.SetLimit(parallelRecovery)
	for _, id := range ids {
		g.Go(func() error { e.resume(id); return nil })
	}
	_ = g.Wait()
	return errors.Join(err, notDue, noConfig)
}

// resume takes up one open rotation, or one role's part in it. What cannot be
// read is tried again on its own.
func (e *Engine) resume(item string) {
	ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
	defer cancel()
	if err := e.resumeItem(ctx, item); err != nil {
		e.resumeLater(item, err)
	}
}

func (e *Engine) resumeLater(item string, err error) {
	e.o.Logger.Warn("an interrupted rotation cannot be taken up; trying again", "rotation", item, "error", err)
	e.wake(laneRecover, item, time.Now().Add(rereadPause(err)))
}

func (e *Engine) resumeItem(ctx context.Context, item string) error {
	id, role, _ := strings.Cut(item, "/")
	h, err := e.st.Header(ctx, id)
	if err != nil {
		return err
	}
	if h == nil || h.State != "" {
		return e.dropMarker(ctx, id)
	}
	if len(h.Children) > 0 {
		return e.beginMissing(ctx, h)
	}
	e.track(h)
	g := errgroup.Group{}
	g.SetLimit(parallelStorage)
	for _, p := range h.Roles {
		if role == "" || role == p.Role {
			g.Go(func() error {
				if err := e.resumePart(ctx, h, p); err != nil {
					e.resumeLater(id+"/"+p.Role, err)
				}
				return nil
			})
		}
	}
	return g.Wait()
}

// lockPatience is how long recovery waits for a role that somebody works at,
// perhaps for as long as its target hangs. It comes back to it.
const lockPatience = time.Second

// settleTime is after how long a write that was answered with an error has been
// applied, or never will be.
const settleTime = 2 * storageTimeout

// headlessFor is for how long a marker is known to have no header.
func (e *Engine) headlessFor(id string) time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if since, ok := e.headless[id]; ok {
		return time.Since(since)
	}
	e.headless[id] = time.Now()
	return 0
}

// dropMarker removes the marker of a rotation that has ended, or was never
// written; one that is being written now, or whose write failed just now and may
// still be applied, is left alone.
func (e *Engine) dropMarker(ctx context.Context, id string) error {
	if err := e.locks.lock(ctx, id); err != nil {
		return err
	}
	defer e.locks.unlock(id)
	h, err := e.st.Header(ctx, id)
	if err != nil || h != nil && h.State == "" {
		return err
	}
	if h == nil && e.headlessFor(id) < settleTime {
		e.wake(laneRecover, id, time.Now().Add(settleTime))
		return nil
	}
	e.mu.Lock()
	delete(e.headless, id)
	e.mu.Unlock()
	if err := e.st.dropPlans(ctx, id); err != nil {
		return err
	}
	return e.st.dropOpen(ctx, id)
}

func (e *Engine) resumePart(ctx context.Context, h *Header, p Part) error {
	// Without the lock first: a worker holds it while its target hangs, and
	// then there is nothing to do here.
	if r, err := e.st.Role(ctx, p.Role); err != nil || e.underWay(r, h.ID) {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	if e.locks.lock(wait, p.Role) != nil {
		after := pause(3)
		if h.Trigger == Urgent {
			after = pause(1)
		}
		e.wake(laneRecover, h.ID+"/"+p.Role, time.Now().Add(after))
		return nil
	}
	defer e.locks.unlock(p.Role)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	r, err := e.st.Role(ctx, p.Role)
	if err != nil || e.underWay(r, h.ID) {
		return err
	}
	ev, err := e.st.Evidence(ctx, h.ID, p.Role)
	switch {
	case err != nil:
		return err
	case ev != nil:
		if r != nil {
			e.noteDue(r)
		}
		if h.Trigger == Create && r != nil && r.With(version.Current) != nil { // whose end was cut off
			if err := e.inherited(ctx, r); err != nil {
				return err
			}
		}
		e.endedPart(h.ID, ev.Part)
		return nil
	case r == nil && time.Since(h.Started) < settleTime:
		// A create whose write failed just now may still come to be.
		e.wake(laneRecover, h.ID, h.Started.Add(settleTime))
		return nil
	case h.Trigger == Urgent && r != nil && r.Kind == p.Kind && r.takenBy(h):
		return e.seize(ctx, h, r)
	case r == nil || r.Run != nil || r.Kind != p.Kind || r.LastRun != nil && r.LastRun.At.After(h.Started):
		p.State, p.Error = Superseded, "it was interrupted before this role was begun"
		e.endedPart(h.ID, p)
		return nil
	}
	return e.beginRole(ctx, h, r)
}

// underWay has the run of a role looked at, if it is part of rotation id.
func (e *Engine) underWay(r *Role, id string) bool {
	if r == nil || r.Run == nil || r.Run.Rotation != id {
		return false
	}
	e.progress(r)
	e.wake(r.lane(), r.Name, time.Now())
	return true
}

func (st *Store) dropOpen(ctx context.Context, id string) error {
	return st.s.Delete(ctx, openKey(id))
}

// newest returns the version that a rollback brings back: the newest that was
// replaced and holds something else than what is served. Keys of a ring may still
// be in it.
func newest(r *Role) *version.Version {
	for _, v := range slices.Backward(r.Versions) {
		if !v.Compromised.IsZero() {
			continue
		}
		replaced := v.Stage == version.Retired || v.Stage == version.Previous && !v.TakenBack && (r.ring() || v.Number == r.Beside)
		if replaced && !r.Served(v.Material) && r.turnsTo(v.Material) {
			return &v
		}
	}
	return nil
}
