package notify

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// Options is what a Notifier needs from around it.
type Options struct {
	Storage logical.Storage
	Logger  hclog.Logger
	// Rotations reads what is told.
	Rotations Rotations
	// Standings calls f with where each role stands.
	Standings func(ctx context.Context, f func(name string, s rotation.Standing)) error
	// MayCall says which hosts config allows.
	MayCall func(host string) bool
	// Active reports whether this node is the one that tells.
	Active func() bool
	// Found is called with every event that is found, once in a while twice.
	Found func(e Event)
	// Sent is called with what became of each try.
	Sent func(to string, err error)
}

// Rotations is rotation.Store, as far as it is needed here.
type Rotations interface {
	Header(ctx context.Context, id string) (*rotation.Header, error)
	AllParts(ctx context.Context, h *rotation.Header) ([]rotation.Part, error)
	Headers(ctx context.Context) ([]string, error)
}

// Notifier sends what there is to tell.
type Notifier struct {
	o     Options
	store *Store
	out   outbox

	// send sends an event once; see Notification.send.
	send func(ctx context.Context, to *Notification, e Event) error

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	kick   chan struct{}

	mu      sync.Mutex
	started bool
	moved   map[string]bool // rotations to look at
	anew    bool            // what there is to send to has changed
	results []result
	lines   map[string]*line // by notification

	// Of the loop alone.
	loaded  bool
	all     []*Notification
	telling *telling
	letters map[string]*letter
	due     map[string]time.Time // when rotations that moved are looked at
	free    map[string]time.Time // not before, for they are large and were just looked at
	rolesAt time.Time            // when roles are looked at next
	tidyAt  time.Time
}

// line is what waits for one receiver.
type line struct {
	busy      bool
	tries     int
	next      time.Time // not before
	pending   int
	lastError string
	lastSent  time.Time
}

// result is what became of a try.
type result struct {
	to     string
	letter string
	event  Event
	err    error
}

const (
	// margin is how far back a start looks for rotations that nobody told of: their ids
	// are of when they were asked for, and not of when they were stored.
	margin = 15 * time.Minute
	// keepFor is how long an event is tried for.
	keepFor = 72 * time.Hour
	// rolesEvery is how often it is looked which roles are overdue or drifted.
	rolesEvery  = time.Minute
	tidyEvery   = 10 * time.Minute
	idlePause   = 10 * time.Second
	maxPause    = 5 * time.Minute
	loopTimeout = time.Minute
)

// New returns a Notifier that does nothing until Start.
func New(o Options) *Notifier {
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Notifier{
		send: func(ctx context.Context, to *Notification, e Event) error { return to.send(ctx, e, o.MayCall) },
		o:    o, store: NewStore(o.Storage), out: outbox{o.Storage}, ctx: ctx, cancel: cancel, kick: make(chan struct{}, 1),
		moved: map[string]bool{}, lines: map[string]*line{}, due: map[string]time.Time{}, free: map[string]time.Time{},
	}
}

// Store holds the notifications.
func (n *Notifier) Store() *Store { return n.store }

// Start has it look and send until Stop. It may be called any number of times.
func (n *Notifier) Start() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.started || n.ctx.Err() != nil {
		return
	}
	n.started = true
	n.wg.Add(1)
	go n.loop()
}

// Stop ends it, and waits for what is being sent until ctx ends.
func (n *Notifier) Stop(ctx context.Context) error {
	n.mu.Lock()
	n.cancel() // from here on nothing is started
	n.mu.Unlock()
	stopped := make(chan struct{})
	go func() { n.wg.Wait(); close(stopped) }()
	select {
	case <-stopped:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("a notification is still being sent: %w", ctx.Err())
	}
}

// Moved has a rotation looked at. It never waits.
func (n *Notifier) Moved(id string) {
	n.mu.Lock()
	n.moved[id] = true
	n.mu.Unlock()
	n.nudge()
}

// Changed has notifications read again, and tried at once.
func (n *Notifier) Changed() {
	n.mu.Lock()
	n.anew = true
	for _, l := range n.lines {
		l.next, l.tries = time.Time{}, 0
	}
	n.mu.Unlock()
	n.nudge()
}

func (n *Notifier) nudge() {
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

func (n *Notifier) loop() {
	defer n.wg.Done()
	for {
		timer := time.NewTimer(n.safely())
		select {
		case <-n.ctx.Done():
			timer.Stop()
			return
		case <-n.kick:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// safely is one turn of the loop, and how long until the next.
func (n *Notifier) safely() (next time.Duration) {
	defer func() {
		if p := recover(); p != nil {
			n.o.Logger.Error("telling met a defect", "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			n.loaded, next = false, time.Minute
		}
	}()
	if !n.o.Active() {
		n.loaded = false
		return idlePause
	}
	ctx, cancel := context.WithTimeout(n.ctx, loopTimeout)
	defer cancel()
	if err := n.turn(ctx); err != nil {
		if n.ctx.Err() == nil {
			n.o.Logger.Warn("what there is to tell cannot be read or stored; trying again", "error", err)
		}
		n.loaded = false // what is remembered may not be what is stored
		return idlePause
	}
	return n.dispatch()
}

func (n *Notifier) turn(ctx context.Context) error {
	n.mu.Lock()
	anew := n.anew
	n.anew = false
	n.mu.Unlock()
	if anew {
		n.loaded = false
	}
	if !n.loaded {
		if err := n.load(ctx); err != nil {
			return err
		}
	}
	if err := n.settle(ctx); err != nil {
		return err
	}
	now := time.Now()
	for id := range n.takeMoved() {
		if n.due[id].IsZero() {
			n.due[id] = later(now, n.free[id])
		}
	}
	for id, at := range n.due {
		if at.After(now) {
			continue
		}
		if err := n.look(ctx, id); err != nil {
			return err
		}
		delete(n.due, id)
	}
	if len(n.all) > 0 && !now.Before(n.rolesAt) {
		n.rolesAt = now.Add(rolesEvery)
		if err := n.lookAtRoles(ctx); err != nil {
			return err
		}
	}
	if !now.Before(n.tidyAt) {
		n.tidyAt = now.Add(tidyEvery)
		return n.tidy(ctx)
	}
	return nil
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// apart is how long a rotation is left alone after a look at it, which reads every
// one of its roles.
func apart(roles int) time.Duration { return time.Second * time.Duration(1+roles/20) }

func (n *Notifier) takeMoved() map[string]bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	moved := n.moved
	n.moved = map[string]bool{}
	return moved
}

// load reads everything, and finds rotations that moved while nobody looked.
func (n *Notifier) load(ctx context.Context) error {
	all, err := n.store.All(ctx)
	if err != nil {
		return err
	}
	letters, err := n.out.letters(ctx)
	if err != nil {
		return err
	}
	t, err := n.out.telling(ctx)
	if err != nil {
		return err
	}
	if len(all) == 0 { // nothing is told, nor kept to be told
		for id := range letters {
			if err := n.out.drop(ctx, id); err != nil {
				return err
			}
		}
		n.loaded, n.all, n.letters, n.telling = true, nil, map[string]*letter{}, nil
		return nil
	}
	if t == nil {
		t = &telling{Since: time.Now().UTC()}
		if err := n.out.putTelling(ctx, t); err != nil {
			return err
		}
	}
	ids, err := n.o.Rotations.Headers(ctx)
	if err != nil {
		return err
	}
	from := idAt(t.Since.Add(-margin))
	n.mu.Lock()
	for _, id := range ids {
		if l := letters[id]; id >= from && (l == nil || !l.Over) || l != nil && !l.Over {
			n.moved[id] = true
		}
	}
	n.mu.Unlock()
	n.loaded, n.all, n.letters, n.telling = true, all, letters, t
	return nil
}

// idAt is the least id of rotations that were asked for at t: ids begin with the
// time (UUID version 7).
func idAt(t time.Time) string {
	ms := fmt.Sprintf("%012x", t.UnixMilli())
	return ms[:8] + "-" + ms[8:]
}

// look finds what is new of a rotation, and stores it to be sent.
func (n *Notifier) look(ctx context.Context, id string) error {
	if len(n.all) == 0 {
		return nil
	}
	h, err := n.o.Rotations.Header(ctx, id)
	if err != nil {
		return err
	}
	if h == nil { // retention was faster
		delete(n.free, id)
		return nil
	}
	if h.Parent != "" { // which tells of its children
		if n.due[h.Parent].IsZero() {
			n.due[h.Parent] = later(time.Now(), n.free[h.Parent])
		}
		return nil
	}
	if h.Started.Before(n.oldest()) {
		return nil
	}
	l := n.letters[id]
	if l == nil {
		l = &letter{id: id}
	}
	if l.Over {
		return nil
	}
	parts, err := n.o.Rotations.AllParts(ctx, h)
	if err != nil {
		return err
	}
	n.free[id] = time.Now().Add(apart(len(parts)))
	if h.State != "" {
		delete(n.free, id)
	}
	next := &letter{id: id, Told: slices.Clone(l.Told), Events: slices.Clone(l.Events), Over: h.State != ""}
	var found []Event
	for _, e := range eventsOf(h, parts) {
		if !next.told(e.Kind) {
			next.add(e, n.since(h.Started))
			found = append(found, e)
		}
	}
	if len(found) == 0 && !next.Over {
		return nil
	}
	return n.keep(ctx, next, found)
}

// oldest is when the first of the notifications was made.
func (n *Notifier) oldest() time.Time {
	return slices.MinFunc(n.all, func(a, b *Notification) int { return a.Created.Compare(b.Created) }).Created
}

// since are the notifications that were there at t.
func (n *Notifier) since(t time.Time) []*Notification {
	return slices.DeleteFunc(slices.Clone(n.all), func(x *Notification) bool { return t.Before(x.Created) })
}

func (n *Notifier) keep(ctx context.Context, l *letter, found []Event) error {
	if err := n.out.put(ctx, l); err != nil {
		return err
	}
	n.letters[l.id] = l
	for _, e := range found {
		n.o.Found(e)
	}
	return nil
}

// lookAtRoles finds roles that have become overdue or have drifted.
func (n *Notifier) lookAtRoles(ctx context.Context) error {
	now := time.Now()
	are := map[Kind][]Role{Overdue: nil, Drift: nil}
	err := n.o.Standings(ctx, func(name string, s rotation.Standing) {
		for _, in := range s.In(now) {
			k := map[string]Kind{"overdue": Overdue, "drifted": Drift}[in]
			if k != "" {
				are[k] = append(are[k], Role{Role: rotation.Part{Role: name, Kind: s.Kind}.Key(), Kind: s.Kind})
			}
		}
	})
	if err != nil {
		return err
	}
	next := &telling{Since: n.telling.Since, Roles: map[Kind][]string{}}
	var found []Event
	for k, roles := range are {
		known := map[string]bool{}
		for _, label := range n.telling.Roles[k] {
			known[label] = true
		}
		var fresh []Role
		for _, r := range roles {
			if !known[r.label()] {
				fresh = append(fresh, r)
			}
			next.Roles[k] = append(next.Roles[k], r.label())
		}
		slices.Sort(next.Roles[k])
		next.Roles[k] = next.Roles[k][:min(len(next.Roles[k]), maxTold)]
		if len(fresh) > 0 && len(known) < maxTold {
			found = append(found, ofRoles(k, fresh))
		}
	}
	if maps.EqualFunc(next.Roles, n.telling.Roles, slices.Equal) {
		return nil
	}
	// What is to be sent is stored first: whoever is cut off in between tells it twice.
	for _, e := range found {
		l := &letter{id: e.ID, Over: true}
		l.add(e, n.all)
		if err := n.keep(ctx, l, []Event{e}); err != nil {
			return err
		}
	}
	if err := n.out.putTelling(ctx, next); err != nil {
		return err
	}
	n.telling = next
	return nil
}

// maxTold bounds how many roles are remembered to have been told. Where there are
// more, somebody knows.
const maxTold = 1000

// tidy drops what was told and need not be remembered, and gives up what nobody took
// for days.
func (n *Notifier) tidy(ctx context.Context) error {
	if n.telling == nil {
		return nil
	}
	now := time.Now()
	since := now.Add(-time.Minute)
	for id, l := range n.letters {
		if l.strike(func(e Event, to string) bool { return now.Sub(e.At) < keepFor && n.there(to) }) {
			n.o.Logger.Warn("events that nobody took were dropped", "rotation", id)
			if err := n.out.put(ctx, l); err != nil {
				return err
			}
		}
		if h := timeOf(id); !l.Over && !h.IsZero() && h.Before(since) {
			since = h
		}
	}
	if since.After(n.telling.Since) {
		next := *n.telling
		next.Since = since.UTC()
		if err := n.out.putTelling(ctx, &next); err != nil {
			return err
		}
		n.telling = &next
	}
	for id, l := range n.letters {
		if l.Over && len(l.Events) == 0 && id < idAt(n.telling.Since.Add(-2*margin)) || l.Over && len(l.Events) == 0 && timeOf(id).IsZero() {
			if err := n.out.drop(ctx, id); err != nil {
				return err
			}
			delete(n.letters, id)
		}
	}
	return nil
}

// timeOf is when a rotation was asked for; zero for the letters of roles.
func timeOf(id string) time.Time {
	var high, low int64
	if _, err := fmt.Sscanf(id, "%08x-%04x-", &high, &low); err != nil {
		return time.Time{}
	}
	return time.UnixMilli(high<<16 | low)
}

func (n *Notifier) there(name string) bool {
	return slices.ContainsFunc(n.all, func(x *Notification) bool { return x.Name == name })
}

// settle stores what became of what was sent.
func (n *Notifier) settle(ctx context.Context) error {
	for {
		n.mu.Lock()
		if len(n.results) == 0 {
			n.mu.Unlock()
			return nil
		}
		r := n.results[0]
		n.mu.Unlock()
		if l := n.letters[r.letter]; l != nil && r.err == nil {
			next := *l
			if next.strike(func(e Event, to string) bool { return e.ID != r.event.ID || to != r.to }) {
				if err := n.out.put(ctx, &next); err != nil {
					return err
				}
				n.letters[r.letter] = &next
			}
		}
		n.mu.Lock()
		n.results = n.results[1:]
		n.noteLocked(r)
		n.mu.Unlock()
	}
}

func (n *Notifier) noteLocked(r result) {
	l := n.lineLocked(r.to)
	l.busy = false
	if r.err == nil {
		l.tries, l.next, l.lastError, l.lastSent = 0, time.Time{}, "", time.Now()
		return
	}
	l.tries++
	pause := min(maxPause, time.Second<<min(l.tries-1, 9))
	l.next = time.Now().Add(pause/2 + rand.N(pause/2+1)) //nolint:gosec // it spreads retries, nobody must not guess it
	l.lastError = r.err.Error()
}

func (n *Notifier) lineLocked(name string) *line {
	l := n.lines[name]
	if l == nil {
		l = &line{}
		n.lines[name] = l
	}
	return l
}

// dispatch has each receiver sent the first of what waits for it, unless it is at
// that already, and returns how long until there is more to do.
func (n *Notifier) dispatch() time.Duration {
	now := time.Now()
	first := map[string]result{}
	pending := map[string]int{}
	for id, l := range n.letters {
		for _, s := range l.Events {
			for _, to := range s.To {
				pending[to]++
				if f, ok := first[to]; !ok || s.At.Before(f.event.At) {
					first[to] = result{to: to, letter: id, event: s.Event}
				}
			}
		}
	}
	next := rolesEvery
	if len(n.all) == 0 {
		next = time.Hour
	}
	for _, at := range n.due {
		next = min(next, max(0, at.Sub(now)))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for name := range n.lines {
		if !n.there(name) && !n.lines[name].busy {
			delete(n.lines, name)
		}
	}
	for _, to := range n.all {
		l := n.lineLocked(to.Name)
		l.pending = pending[to.Name]
		r, ok := first[to.Name]
		switch {
		case !ok || l.busy:
		case now.Before(l.next):
			next = min(next, l.next.Sub(now))
		case n.ctx.Err() == nil:
			l.busy = true
			n.wg.Add(1)
			go n.deliver(to, r)
		}
	}
	return next
}

func (n *Notifier) deliver(to *Notification, r result) {
	defer n.wg.Done()
	defer n.nudge()
	r.err = fmt.Errorf("it met a defect of the engine")
	defer func() {
		if p := recover(); p != nil {
			n.o.Logger.Error("sending met a defect", "notification", to.Name, "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
		}
		n.mu.Lock()
		n.results = append(n.results, r)
		n.mu.Unlock()
		n.o.Sent(to.Name, r.err)
	}()
	r.err = n.send(n.ctx, to, r.event)
}

// Try sends a test to a notification at once, and says what became of it.
func (n *Notifier) Try(ctx context.Context, to *Notification) error {
	e := Event{Kind: Test, At: time.Now().UTC(), Summary: Event{Kind: Test}.sentence()}
	e.ID = idOf(to.Name, e.At.Format(time.RFC3339Nano))
	err := n.send(ctx, to, e)
	n.o.Sent(to.Name, err)
	return err
}

// Health is how it stands with one receiver.
type Health struct {
	Pending   int
	LastError string
	LastSent  time.Time
}

// Health of a notification, since the plugin started.
func (n *Notifier) Health(name string) Health {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.lines[name]
	if l == nil {
		return Health{}
	}
	return Health{Pending: l.pending, LastError: l.lastError, LastSent: l.lastSent}
}

// Pending is how many deliveries are outstanding.
func (n *Notifier) Pending() (all int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.lines {
		all += l.pending
	}
	return all
}
