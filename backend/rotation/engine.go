package rotation

import (
	"container/heap"
	"context"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
)

// Options is what an Engine needs from around it.
type Options struct {
	Storage logical.Storage
	Logger  hclog.Logger
	// Kind returns a kind by name; nil when there is none.
	Kind func(name string) kind.Kind
	// Target returns the target of a role's kind behind a connection. It is
	// not called for kinds without a connection type.
	Target func(kindName, connection string) kind.Target
	// Keeper returns the server behind a connection that keeps the secrets of a
	// kind of strategy Kept.
	Keeper func(kindName, connection string) kind.Keeper
	// Generation returns how often a connection was written; see
	// connection.Entry.Generation.
	Generation func(ctx context.Context, connection string) (int, error)
	// Permit says of each role, all of one connection, why that no longer lets it
	// rotate; nil where it does. It is asked before a rotation changes anything:
	// what runs may always end. Without it every role may.
	Permit func(ctx context.Context, roles []*Role) []error
	Source kind.Source
	// Publish makes a document show what roles serve, in one write. It is called
	// under the document's lock and may be repeated.
	Publish func(ctx context.Context, document string, views []publish.View) error
	// PublishTo makes a secret of another mount hold fields, and leaves its others as
	// they are; Reach says why a role's could not be written, changing nothing. Neither sends
	// anything after its context has ended.
	PublishTo func(ctx context.Context, place publish.Place, fields map[string]string) error
	Reach     func(ctx context.Context, r *Role) error
	// Consumers are brought what roles serve; nil where roles have none.
	Consumers Deliverer
	// Recorder is told what people watch; nil: nobody does.
	Recorder Recorder
	// Active reports whether this node may write and rotate: not on a standby,
	// a secondary or a mount that is going away.
	Active func() bool
}

// Engine moves rotations forward. It holds no truth: everything that matters is
// in storage, and an Engine on the same storage goes on where another stopped.
type Engine struct {
	o     Options
	st    *Store
	locks *locks
	due   *dueQueue
	// census is what a look at all roles is answered from.
	census *census

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	config atomic.Pointer[Config]
	// configured counts changes of the configuration, so that one that was read
	// before a change is not remembered after it.
	configured uint64
	kick       chan struct{}

	mu      sync.Mutex
	started bool
	since   time.Time // when it was
	lanes   map[string]*lane
	queue   []*lane // lanes with something ready, in the order they became so
	wakes   wakeHeap
	waking  map[wake]bool // what is in wakes
	busy    int           // workers at work
	slow    int           // of those, on lanes whose target did not answer in time
	dueWake time.Time     // when the schedule is looked at next
	tracks  map[string]*track
	// headless are markers of rotations without a header, and since when.
	headless map[string]time.Time
	unstored map[string]int  // roles whose last writes failed, and how many
	sent     map[string]sent // by role; see keepOutcome
	// witnesses are by role; see doubt.go.
	witnesses map[string]*witness
	looks     map[string]lookedAt
	waiting   map[string]waiting // for consumers; see joint.go
}

// Bounds on work under way. A connection may have two batches: a single
// rotation need not wait for the five hundred before it.
const (
	maxBatch    = 500
	laneWorkers = 2
)

// The engine's own lanes. Their work is on storage alone and never waits for a
// target, but for laneLook.
const (
	laneRecover   = "engine/recover"
	laneSchedule  = "engine/schedule"
	laneRotations = "engine/rotations"
	laneRetention = "engine/retention"
	laneLook      = "engine/look" // it asks targets, all at once
)

// lane is work that shares a target: one that hangs holds up its own lane.
type lane struct {
	name   string
	ready  []string
	member map[string]bool // what is in ready
	// running is in the hands of a worker, and again is what has to be looked at
	// once more after that.
	running, again map[string]bool
	queued         bool
	active         int
	slow           bool
}

// New returns an Engine that does nothing until Start.
func New(o Options) *Engine {
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.Recorder == nil {
		o.Recorder = unrecorded{}
	}
	ctx, cancel := context.WithCancel(context.Background())
	st := NewStore(o.Storage)
	return &Engine{
		o: o, st: st, locks: newLocks(), due: newDueQueue(st), census: newCensus(st),
		ctx: ctx, cancel: cancel, kick: make(chan struct{}, 1),
		lanes: map[string]*lane{}, tracks: map[string]*track{}, waking: map[wake]bool{}, headless: map[string]time.Time{}, unstored: map[string]int{}, sent: map[string]sent{}, witnesses: map[string]*witness{},
		looks: map[string]lookedAt{}, waiting: map[string]waiting{},
	}
}

// Store gives read access to what the engine keeps.
func (e *Engine) Store() *Store { return e.st }

// Start lets the engine find what was interrupted and what is due. It returns
// at once and may be called any number of times.
func (e *Engine) Start() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.started || e.ctx.Err() != nil {
		return
	}
	e.started, e.since = true, time.Now()
	now := time.Now()
	e.wakeLocked(laneRecover, laneRecover, now)
	e.wakeLocked(laneRetention, laneRetention, now.Add(time.Minute))
	e.wg.Add(1)
	go e.loop()
}

// Stop ends all work and waits for it, at most until ctx ends. Calls under way
// are abandoned; their attempts are stored, and whoever comes next waits for
// them. It may be called any number of times, and before Start.
func (e *Engine) Stop(ctx context.Context) error {
	e.mu.Lock()
	e.cancel()
	e.mu.Unlock()
	stopped := make(chan struct{})
	go func() { e.wg.Wait(); close(stopped) }()
	select {
	case <-stopped:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("work was still under way when the backend had to stop: %w", ctx.Err())
	}
}

// Tick is called by Vault once a minute: it starts what is not started and
// looks at the clock. It never waits.
func (e *Engine) Tick() {
	if e.o.Active() {
		e.Start()
		e.nudge()
	}
}

func (e *Engine) nudge() {
	select {
	case e.kick <- struct{}{}:
	default:
	}
}

func (e *Engine) loop() {
	defer e.wg.Done()
	for {
		var timer <-chan time.Time
		if pause, ok := e.dispatch(); ok {
			timer = time.After(pause)
		}
		select {
		case <-e.ctx.Done():
			return
		case <-e.kick:
		case <-timer:
		}
	}
}

// dispatch hands what is ready to workers and returns how long until more is.
func (e *Engine) dispatch() (time.Duration, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	for len(e.wakes) > 0 && !e.wakes[0].at.After(now) {
		w := heap.Pop(&e.wakes).(wake)
		delete(e.waking, w)
		e.readyLocked(w.lane, w.name)
	}
	workers := e.Config().Workers
	waiting := e.queue[:0:0]
	for _, l := range e.queue {
		for len(l.ready) > 0 && e.mayRun(l, workers) {
			e.runLocked(l)
		}
		if l.queued = len(l.ready) > 0; l.queued {
			waiting = append(waiting, l)
		} else if l.active == 0 {
			delete(e.lanes, l.name)
		}
	}
	e.queue = waiting
	if len(e.wakes) == 0 {
		return 0, false
	}
	return max(0, e.wakes[0].at.Sub(now)), true
}

// mayRun bounds workers. Lanes whose target was slow the last time get at most
// half of them, so that many bad targets cannot take all.
func (e *Engine) mayRun(l *lane, workers int) bool {
	if e.own(l.name) {
		return l.active == 0
	}
	return l.active < laneWorkers && e.busy < workers && (!l.slow || e.slow < max(1, workers/2))
}

func (e *Engine) own(name string) bool {
	switch name {
	case laneRecover, laneSchedule, laneRotations, laneRetention, laneLook:
		return true
	}
	return false
}

func (e *Engine) readyLocked(name, item string) {
	l := e.lanes[name]
	if l == nil {
		l = &lane{name: name, member: map[string]bool{}, running: map[string]bool{}, again: map[string]bool{}}
		e.lanes[name] = l
	}
	if l.running[item] { // a second worker would only wait for the first
		l.again[item] = true
		return
	}
	if !l.member[item] {
		l.member[item] = true
		l.ready = append(l.ready, item)
	}
	if !l.queued {
		l.queued = true
		e.queue = append(e.queue, l)
	}
}

// againLocked has what was woken during a batch looked at after it.
func (e *Engine) againLocked(l *lane, items []string) {
	for _, item := range items {
		delete(l.running, item)
		if l.again[item] {
			delete(l.again, item)
			e.readyLocked(l.name, item)
		}
	}
}

func (e *Engine) runLocked(l *lane) {
	n := min(maxBatch, len(l.ready))
	items := l.ready[:n:n]
	l.ready = l.ready[n:]
	for _, item := range items {
		delete(l.member, item)
		l.running[item] = true
	}
	wasSlow := l.slow
	l.active++
	if !e.own(l.name) {
		e.busy++
		if wasSlow {
			e.slow++
		}
	}
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		pace := e.work(l.name, items)
		e.mu.Lock()
		l.active--
		if pace != unknown {
			l.slow = pace == sluggish
		}
		e.againLocked(l, items)
		if !e.own(l.name) {
			e.busy--
			if wasSlow {
				e.slow--
			}
		}
		if l.active == 0 && !l.queued {
			delete(e.lanes, l.name)
			if l.slow { // remembered until its next batch
				e.lanes[l.name] = l
			}
		}
		e.mu.Unlock()
		e.nudge()
	}()
}

// pace is what a batch showed about its target.
type pace int

const (
	unknown pace = iota // it was not asked anything
	prompt
	sluggish
)

// work runs one batch and reports how its target did. A panic costs the batch a
// pause, not the process: one process serves many mounts.
func (e *Engine) work(name string, items []string) pace {
	defer func() {
		if p := recover(); p != nil {
			e.o.Logger.Error("a worker panicked; its work is tried again", "lane", name, "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			for _, item := range items {
				e.wake(name, item, time.Now().Add(time.Minute))
			}
		}
	}()
	if !e.o.Active() {
		for _, item := range items {
			e.wake(name, item, time.Now().Add(10*time.Second))
		}
		return unknown
	}
	switch name {
	case laneRecover:
		e.recover(items)
	case laneSchedule:
		e.runDue()
	case laneRotations:
		e.tend(items)
	case laneRetention:
		e.retain()
	case laneLook:
		e.lookForDrift(items)
	default:
		if strings.HasPrefix(name, laneOfSessions) {
			return e.observe(name, items)
		}
		return e.advance(name, items)
	}
	return unknown
}

// wake has item looked at in its lane at a time.
func (e *Engine) wake(name, item string, at time.Time) {
	e.mu.Lock()
	e.wakeLocked(name, item, at)
	e.mu.Unlock()
	e.nudge()
}

func (e *Engine) wakeLocked(name, item string, at time.Time) {
	w := wake{at: at, lane: name, name: item}
	if !e.waking[w] {
		e.waking[w] = true
		heap.Push(&e.wakes, w)
	}
}

// pause is exponential with jitter: a second, two, four … a minute.
func pause(n int) time.Duration {
	d := min(time.Minute, time.Second<<min(max(n, 1)-1, 6))
	return d/2 + rand.N(d/2+1) //nolint:gosec // it spreads retries, nobody must not guess it
}

type wake struct {
	at   time.Time
	lane string
	name string
}

type wakeHeap []wake

func (h wakeHeap) Len() int           { return len(h) }
func (h wakeHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h wakeHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *wakeHeap) Push(x any)        { *h = append(*h, x.(wake)) }
func (h *wakeHeap) Pop() any {
	old := *h
	w := old[len(old)-1]
	*h = old[:len(old)-1]
	return w
}

// Config returns the mount's configuration as last read or written here.
func (e *Engine) Config() Config {
	if c := e.config.Load(); c != nil {
		return *c
	}
	return DefaultConfig()
}

// LoadConfig reads the configuration from storage.
func (e *Engine) LoadConfig(ctx context.Context) (Config, error) {
	e.mu.Lock()
	began := e.configured
	e.mu.Unlock()
	c, err := e.st.ConfigOf(ctx)
	if err != nil {
		return c, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.configured == began {
		e.config.Store(&c)
	}
	return c, nil
}

// configLock is no role's name.
const configLock = "config/"

// ChangeConfig reads, changes and stores the configuration, one change at a
// time. What mutate refuses is not stored.
func (e *Engine) ChangeConfig(ctx context.Context, mutate func(*Config) error) error {
	if err := e.locks.lock(ctx, configLock); err != nil {
		return &Conflict{Text: "the configuration is being written by another request; try again"}
	}
	defer e.locks.unlock(configLock)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	c, err := e.st.ConfigOf(ctx)
	if err != nil {
		return err
	}
	if err := mutate(&c); err != nil {
		return err
	}
	if err := e.st.PutConfig(ctx, c); err != nil {
		return err
	}
	e.mu.Lock()
	e.configured++
	e.config.Store(&c)
	e.mu.Unlock()
	e.nudge()
	return nil
}
