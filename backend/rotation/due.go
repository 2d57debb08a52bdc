package rotation

import (
	"container/heap"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
)

// dueQueue is a cache of the due entries in storage. It holds the roles of the
// hours that have begun and only the names of later hours, so that finding
// what is due costs what is due, however many roles there are, and a look at the
// clock with nothing due reads no storage.
type dueQueue struct {
	st *Store

	mu     sync.Mutex
	built  bool
	at     map[string]*dueItem
	heap   dueHeap
	hours  map[time.Time]bool // later hours with entries
	loaded time.Time          // entries before this are in the heap
}

type dueItem struct {
	role  string
	at    time.Time
	index int
}

func newDueQueue(st *Store) *dueQueue {
	return &dueQueue{st: st, at: map[string]*dueItem{}, hours: map[time.Time]bool{}}
}

// rebuild reads which hours have entries, and those of the hours that have
// begun.
func (q *dueQueue) rebuild(ctx context.Context) error {
	hours, err := q.st.DueHours(ctx)
	if err != nil {
		return err
	}
	q.mu.Lock()
	for _, h := range hours {
		q.hours[h] = true
	}
	q.built = true
	q.mu.Unlock()
	return q.load(ctx, time.Now())
}

// load reads the entries of the hours that have begun by now.
func (q *dueQueue) load(ctx context.Context, now time.Time) error {
	q.mu.Lock()
	// First of all: what is noted from now on is kept, and may not be in what is
	// read below.
	q.loaded = hourOf(now).Add(time.Hour)
	begun := q.begunLocked(now)
	q.mu.Unlock()
	slices.SortFunc(begun, time.Time.Compare)
	var errs []error
	for _, h := range begun {
		entries, err := q.st.DueIn(ctx, h)
		if err != nil {
			errs = append(errs, err) // it is read the next time
			continue
		}
		q.mu.Lock()
		for role, at := range entries {
			if q.at[role] == nil { // what was noted meanwhile is newer
				q.pushLocked(role, at)
			}
		}
		delete(q.hours, h)
		q.mu.Unlock()
	}
	return errors.Join(errs...)
}

// begunLocked are the hours that have begun and were not read.
func (q *dueQueue) begunLocked(now time.Time) []time.Time {
	var begun []time.Time
	for h := range q.hours {
		if !h.After(now) {
			begun = append(begun, h)
		}
	}
	return begun
}

func hourOf(t time.Time) time.Time { return t.UTC().Truncate(time.Hour) }

// note records that role is to be looked at, as its entry in storage says; zero:
// not any more.
func (q *dueQueue) note(role string, at time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.forgetLocked(role)
	switch {
	case at.IsZero():
	case at.Before(q.loaded):
		q.pushLocked(role, at)
	default:
		q.hours[hourOf(at)] = true
	}
}

// again records that a role that is due is to be looked at later. It is kept
// whatever the hour: storage has it under the hour in which it came due.
func (q *dueQueue) again(role string, at time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.forgetLocked(role)
	q.pushLocked(role, at)
}

func (q *dueQueue) forgetLocked(role string) {
	if old := q.at[role]; old != nil {
		heap.Remove(&q.heap, old.index)
		delete(q.at, role)
	}
}

func (q *dueQueue) pushLocked(role string, at time.Time) {
	item := &dueItem{role: role, at: at}
	q.at[role] = item
	heap.Push(&q.heap, item)
}

// next is when the queue has to be looked at: at the first role's time, or when
// the next hour begins. ok is false before the queue was built.
func (q *dueQueue) next() (at time.Time, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.built {
		return time.Time{}, false
	}
	at = q.loaded
	if len(q.heap) > 0 && q.heap[0].at.Before(at) {
		at = q.heap[0].at
	}
	return at, true
}

// take removes and returns the roles that are due, as far as they are known
// where there is an error.
func (q *dueQueue) take(ctx context.Context, now time.Time) (map[string]time.Time, error) {
	q.mu.Lock()
	stale := q.built && (!now.Before(q.loaded) || len(q.begunLocked(now)) > 0)
	q.mu.Unlock()
	var err error
	if stale {
		err = q.load(ctx, now)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	out := map[string]time.Time{}
	for len(q.heap) > 0 && !q.heap[0].at.After(now) {
		item := heap.Pop(&q.heap).(*dueItem)
		delete(q.at, item.role)
		out[item.role] = item.at
	}
	return out, err
}

type dueHeap []*dueItem

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *dueHeap) Push(x any) {
	item := x.(*dueItem)
	item.index = len(*h)
	*h = append(*h, item)
}

func (h *dueHeap) Pop() any {
	old := *h
	item := old[len(old)-1]
	*h = old[:len(old)-1]
	return item
}

// noteDue keeps the queue in step with a role that was just stored.
func (e *Engine) noteDue(r *Role) {
	at := r.dueAt()
	if r.Run != nil && !at.After(time.Now()) {
		at = time.Time{} // it stays due, and the end of its run notes it again
	}
	e.due.note(r.Name, at)
	e.scheduleDue()
}

func (e *Engine) scheduleDue() {
	at, ok := e.due.next()
	if !ok {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dueWake.IsZero() || at.Before(e.dueWake) {
		e.dueWake = at
		e.wakeLocked(laneSchedule, laneSchedule, at)
		e.nudge()
	}
}

// frozenPause is how often a frozen mount looks whether it still is.
const frozenPause = time.Minute

// runDue starts what is due.
func (e *Engine) runDue() {
	e.mu.Lock()
	e.dueWake = time.Time{}
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
	defer cancel()
	now := time.Now()
	due, err := e.due.take(ctx, now)
	if err != nil {
		e.o.Logger.Warn("due rotations cannot be read; trying again", "error", err)
		e.wake(laneSchedule, laneSchedule, now.Add(pause(3)))
	}
	defer e.scheduleDue()
	if len(due) == 0 {
		return
	}
	if err := e.startDue(ctx, due, now); err != nil {
		e.o.Logger.Warn("due rotations cannot be started; trying again", "error", err)
		for role := range due {
			e.due.again(role, now.Add(pause(4)))
		}
	}
}

func (e *Engine) startDue(ctx context.Context, due map[string]time.Time, now time.Time) error {
	names := make([]string, 0, len(due))
	for name := range due {
		names = append(names, name)
	}
	slices.Sort(names)
	roles, bad := e.st.roles(ctx, names)
	var begin []*Role
	var heal, leave, look []string
	for i, r := range roles {
		if err := bad[names[i]]; err != nil {
			e.o.Logger.Warn("a role that is due cannot be read; trying again", "role", names[i], "error", err)
			e.due.again(names[i], now.Add(max(pause(4), rereadPause(err))))
			continue
		}
		switch e.whatIsDue(ctx, r, names[i], due[names[i]], now) {
		case Scheduled:
			begin = append(begin, r)
		case Reconcile:
			heal = append(heal, r.Name)
		case Retirement:
			leave = append(leave, r.Name)
		case lookTrigger:
			look = append(look, r.Name)
		default: // nothing of it is due
		}
	}
	for _, name := range look {
		e.wake(laneLook, name, now)
	}
	for _, names := range batches(e.keepApart(begin, now)) {
		if err := e.beginQuietly(ctx, Request{Trigger: Scheduled, Roles: names}); err != nil {
			return err
		}
	}
	if err := e.beginQuietly(ctx, Request{Trigger: Retirement, Roles: leave, Reason: "earlier keys are outdated"}); err != nil {
		return err
	}
	return e.beginQuietly(ctx, Request{
		Trigger: Reconcile, Roles: heal, Reason: "nodes that were passed over are tried again",
	})
}

// batches are the rotations of roles that are due: one a kind, where roles that are
// shown in one place go with the first of them.
func batches(roles []*Role) map[string][]string {
	out, units := map[string][]string{}, unitsOf(Scheduled, roles)
	kinds := map[int]string{} // of the rotation, by unit
	for _, r := range roles {
		into := r.Kind
		if n := units[r.Name]; n != 0 {
			if kinds[n] == "" {
				kinds[n] = into
			}
			into = kinds[n]
		}
		out[into] = append(out[into], r.Name)
	}
	return out
}

// beginQuietly starts what nobody waits for; roles that are busy or gone stay
// due or are forgotten.
func (e *Engine) beginQuietly(ctx context.Context, req Request) error {
	if len(req.Roles) == 0 {
		return nil
	}
	_, err := e.Begin(ctx, req)
	if err != nil && !isRefusal(err) {
		return err
	}
	return nil
}

// whatIsDue checks a due entry against its role, the authority.
func (e *Engine) whatIsDue(ctx context.Context, r *Role, name string, at, now time.Time) Trigger {
	if r == nil || r.dueAt().IsZero() || r.dueAt().After(now) {
		if r == nil || r.Run == nil { // a role with a run may be locked for long
			e.dropStale(ctx, name, at)
		}
		return ""
	}
	if r.Run != nil {
		return "" // it stays due: the end of its run notes it again
	}
	if r.Drift != nil && len(r.Drift.Missed) > 0 && !r.Drift.RetryAt.After(now) {
		return Reconcile
	}
	if at := r.looksAt(); !at.IsZero() && !at.After(now) {
		return lookTrigger
	}
	if c := e.Config(); c.Frozen(now) {
		look := now.Add(frozenPause)
		if !c.FreezeUntil.IsZero() && c.FreezeUntil.Before(look) {
			look = c.FreezeUntil
		}
		e.due.again(name, look)
		return ""
	}
	if at := r.retireAt(); !at.IsZero() && !at.After(now) {
		return Retirement
	}
	// What is passed over is stored before anything that follows is served.
	if ok, moved, _ := schedule.Due(r.Schedule, r.Name, r.Next, now); !ok || !moved.IsZero() {
		e.moveSlot(ctx, r.Name)
		return ""
	}
	if free := e.apart(ctx, r, now); !free.IsZero() {
		e.due.again(name, free)
		return ""
	}
	return Scheduled
}

// dropStale removes a due entry that its role does not confirm, and notes what
// the role says instead. Under the role's lock: who stores the role now may be
// storing this very entry.
func (e *Engine) dropStale(ctx context.Context, name string, at time.Time) {
	if err := e.locks.lock(ctx, name); err != nil {
		return
	}
	defer e.locks.unlock(name)
	if err := e.st.settle(ctx); err != nil {
		e.due.again(name, time.Now().Add(pause(4)))
		return
	}
	r, err := e.st.Role(ctx, name)
	if err != nil {
		e.due.again(name, time.Now().Add(pause(4)))
		return
	}
	var real time.Time
	if r != nil {
		real = r.dueAt()
	}
	if real.IsZero() || dueKey(real, name) != dueKey(at, name) {
		_ = e.st.DropDue(ctx, at, name) // one that stays is found again
	}
	e.due.note(name, real)
}

// moveSlot stores the next slot of a role whose stored one can no longer be
// served, and accounts for those in between.
func (e *Engine) moveSlot(ctx context.Context, name string) {
	err := e.change(ctx, name, func(r *Role) error {
		now := time.Now()
		if r.Next.IsZero() || r.Next.After(now) {
			return nil // somebody else has moved it
		}
		due, moved, passed := schedule.Due(r.Schedule, r.Name, r.Next, now)
		if due && moved.IsZero() {
			return nil
		}
		e.o.Logger.Warn("a scheduled rotation was missed; waiting for the next slot",
			"role", r.Name, "slot", r.Next, "missed", passed.Count, "next", moved)
		r.Next = moved // zero: a schedule that never fires again
		r.miss(passed)
		return nil
	})
	if err != nil {
		e.due.again(name, time.Now().Add(pause(4)))
	}
}
