package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// world is everything around an engine: storage, a target with nodes, and a
// supervisor that starts a new engine when one has crashed. It lives in a
// synctest bubble, so its hours cost nothing. After every write and every
// change at a node it checks DESIGN §3.
type world struct {
	t     *testing.T
	inner logical.InmemStorage
	start time.Time

	mu       sync.Mutex
	shape    shape
	inst     *instance
	plan     plan
	ops      map[domain]int
	kinds    map[domain][]string // names of the operations, in order
	late     func()              // a write that was answered with an error and is still to be applied
	readonly time.Time

	roles map[string]*Role
	doc   *publish.Document
	tombs map[string]*Tombstone
	nodes map[string]*node
	order []string
	// foreign is what others than the engine had a user accept.
	foreign  map[string][]kind.Material
	absent   map[string]bool // users that nobody has created yet
	tampered map[string]bool // users that were changed behind the engine's back
	inflight map[string]int  // changes of a user that may still land
	served   map[string]kind.Material
	lives    map[string]map[string]*life // of keys, by role and secret
	keeper   keeperWorld
	clusters clusterWorld
	watch    watchWorld
	backward map[string]bool // runs whose way back is stored
	rewind   rewind

	writeFault   fault // what the next write but writeFaultIn under a prefix meets
	writeFaultIn int
	writeFaultAt string
	rejected     string // user for whom no node changes anything
	clinging     string // user of whom no node refuses anything

	generated int
	broken    []string
	trace     []string
	quietly   bool // no trace
	inactive  bool
	leftOut   bool // an emergency has passed over a node
	abandoned bool // a role was deleted in the middle of its rotation: its consumers are not looked after
	hot       bool // something spins without a pause
	done      chan struct{}
	over      sync.WaitGroup
}

// shape is a row of the table of strategies: what a role looks like to the
// engine. A new strategy is a new row.
type shape struct {
	name       string
	strategy   kind.Strategy
	nodes      int
	partial    bool
	targetless bool
	document   bool
	place      bool // a secret of another mount
	consumers  bool // roles have two, which they share
	queue      bool // and wait for each other at them
	urgent     bool // emergencies, whose faults are those of others and some more
	// root: role a is what the engine itself logs in to the target with.
	root   bool
	tokens time.Duration // of a key ring: how long what it signed is valid
	// keeper: another server keeps the secret, and shows the number of its version
	// or not; see keep_test.go.
	keeper, shows bool
	// observed: the target tells who is logged in; unused: its roles go by that.
	observed, unused bool
}

var shapes = []shape{
	{name: "overlap", strategy: kind.Overlap, nodes: 2},
	{name: "swap", strategy: kind.Swap, nodes: 2},
	{name: "targetless", strategy: kind.Overlap, targetless: true},
	{name: "alternate", strategy: kind.Alternate, nodes: 2},
	{name: "partial", strategy: kind.Overlap, nodes: 3, partial: true},
	{name: "document", strategy: kind.Overlap, nodes: 2, document: true},
	{name: "place", strategy: kind.Overlap, nodes: 1, place: true},
	{name: "signing ring", strategy: kind.KeyRing, targetless: true, document: true, tokens: 20 * time.Minute},
	{name: "encrypting ring", strategy: kind.KeyRing, targetless: true, document: true},
	{name: "swap document", strategy: kind.Swap, nodes: 1, document: true},
	{name: "consumed", strategy: kind.Overlap, nodes: 1, consumers: true},
	{name: "consumed alternate", strategy: kind.Alternate, nodes: 1, consumers: true},
	{name: "consumed swap", strategy: kind.Swap, nodes: 1, consumers: true},
	{name: "consumed key", strategy: kind.Overlap, targetless: true, document: true, consumers: true},
	{name: "consumed ring", strategy: kind.KeyRing, targetless: true, document: true, tokens: 20 * time.Minute, consumers: true},
	{name: "root", strategy: kind.Overlap, nodes: 2, root: true},
	{name: "root swap", strategy: kind.Swap, nodes: 2, root: true},
	{name: "alternate document", strategy: kind.Alternate, nodes: 1, document: true},
	{name: "kept", strategy: kind.Kept, keeper: true, shows: true},
	{name: "kept unseen", strategy: kind.Kept, keeper: true},
	{name: "alternate unused", strategy: kind.Alternate, nodes: 2, observed: true, unused: true},
	{name: "overlap observed", strategy: kind.Overlap, nodes: 2, observed: true},
}

func (s shape) kind() string {
	switch {
	case s.strategy == kind.KeyRing:
		return "fakering"
	case s.targetless:
		return "fakekey"
	}
	return "fake"
}

func (s shape) connection() string {
	if s.targetless {
		return ""
	}
	return "c"
}

// node holds the exact set of materials that it accepts, by user.
type node struct {
	name    string
	down    bool
	accepts map[string][]kind.Material
	saved   map[string][]kind.Material // what it accepts after a restart
}

// instance is one engine and its way to the world; a crash cuts both for good.
type instance struct {
	w      *world
	engine *Engine
	fence  *storage.Fenced
	dead   chan struct{}
	once   sync.Once
}

func (i *instance) kill() { i.once.Do(func() { close(i.dead) }) }

func (i *instance) isDead() bool {
	select {
	case <-i.dead:
		return true
	default:
		return false
	}
}

const testGrace = 5 * time.Minute

// generation is how often connections were written.
const generation = 1

// newWorld starts an engine on empty storage. It must be called in a bubble.
func newWorld(t *testing.T, s shape, p plan) *world {
	t.Helper()
	w := &world{
		t: t, shape: s, plan: p, start: time.Now(), ops: map[domain]int{}, kinds: map[domain][]string{},
		roles: map[string]*Role{}, tombs: map[string]*Tombstone{}, nodes: map[string]*node{},
		foreign: map[string][]kind.Material{}, tampered: map[string]bool{}, absent: map[string]bool{}, inflight: map[string]int{},
		served: map[string]kind.Material{}, done: make(chan struct{}),
		clusters: clusterWorld{
			secret: map[string]map[string]kind.Material{}, pods: map[string]map[string]kind.Material{},
			restarts: map[string]int{}, bad: map[string]bool{}, marks: map[string]string{},
		},
	}
	for i := range s.nodes {
		name := fmt.Sprintf("n%d", i+1)
		w.order = append(w.order, name)
		w.nodes[name] = &node{name: name, accepts: map[string][]kind.Material{}, saved: map[string][]kind.Material{}}
	}
	return w
}

// run starts the first engine and the supervisor.
func (w *world) run() {
	w.launch()
	w.over.Add(1)
	go w.supervise()
}

func (w *world) launch() {
	i := &instance{w: w, dead: make(chan struct{})}
	i.fence = storage.Fence(&faultyStorage{w: w, i: i})
	i.engine = New(Options{
		Storage: i.fence,
		Kind: func(name string) kind.Kind {
			switch name {
			case "fake":
				return fakeKind{w: w, connection: "fake"}
			case "fakekey":
				return fakeKind{w: w}
			case "fakering":
				return fakeRing{fakeKind{w: w}}
			}
			return nil
		},
		Target: func(_, connection string) kind.Target {
			return w.shape.target(&fakeTarget{w: w, i: i, connection: connection})
		},
		Keeper:     func(string, string) kind.Keeper { return &fakeKeeper{w: w, i: i} },
		Generation: func(context.Context, string) (int, error) { return generation, nil },
		Publish:    publish.NewDocuments(i.fence).Publish,
		Consumers:  &fakeConsumers{w: w, i: i},
		PublishTo:  i.publishTo,
		Reach:      i.reach,
		Active: func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return !w.inactive
		},
	})
	w.mu.Lock()
	w.inst = i
	w.mu.Unlock()
	i.engine.Start()
}

func (w *world) instance() *instance {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.inst
}

func (w *world) supervise() {
	defer w.over.Done()
	for {
		i := w.instance()
		select {
		case <-w.done:
			i.stop()
			return
		case <-i.dead:
			w.logf("crash")
			i.stop()
			w.restored()
			w.launch()
		}
	}
}

func (i *instance) stop() {
	i.fence.Close(context.Background())
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := i.engine.Stop(ctx); err != nil {
		i.w.violate("stop: %v", err)
	}
}

// restart replaces the engine, as a plugin reload does.
func (w *world) restart() {
	i := w.instance()
	i.kill()
	w.until("a new engine", time.Minute, func() bool { return w.inst != i })
}

// close ends the world. Every goroutine of it has ended when it returns.
func (w *world) close() {
	close(w.done)
	w.over.Wait()
	w.pass(30 * time.Second) // late effects land
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.broken {
		w.t.Errorf("%s", b)
	}
	if len(w.broken) > 0 && !w.quietly {
		w.t.Logf("%s\n%s", w.plan, strings.Join(w.trace, "\n"))
	}
}

func (w *world) pass(d time.Duration) { <-time.After(d) }

// until waits in virtual time for cond, which is called with w.mu held.
func (w *world) until(what string, limit time.Duration, cond func() bool) bool {
	end := time.Now().Add(limit)
	step := 100 * time.Millisecond
	for {
		w.mu.Lock()
		ok := cond()
		w.mu.Unlock()
		if ok {
			return true
		}
		if time.Now().After(end) {
			w.violate("%s: not within %s", what, limit)
			return false
		}
		w.pass(step)
		step = min(step*2, 10*time.Second)
	}
}

// do is a user (or a client library) who repeats a request until it is
// answered; a refusal is an answer.
func (w *world) do(what string, f func(context.Context, *Engine) error) error {
	for range 100 {
		i := w.instance()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		err := f(ctx, i.engine)
		cancel()
		w.logf("%s: %s", what, answer(err))
		if err == nil || isRefusal(err) && !transient(err) {
			return err
		}
		w.pass(3 * time.Second)
	}
	w.violate("%s: never answered", what)
	return nil
}

func answer(err error) string {
	if err == nil {
		return "ok"
	}
	return err.Error()
}

// transient are refusals that a user would try again after.
func transient(err error) bool {
	for _, s := range []string{"no answer from", "busy with its target", "may still reach its target", "injected", "deadline"} {
		if strings.Contains(err.Error(), s) {
			return true
		}
	}
	return false
}

func (w *world) logf(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.logLocked(format, args...)
}

func (w *world) logLocked(format string, args ...any) {
	if len(w.trace) < 4000 {
		w.trace = append(w.trace, fmt.Sprintf("%10s  ", time.Since(w.start).Round(time.Millisecond))+fmt.Sprintf(format, args...))
	}
}

func (w *world) violate(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violateLocked(format, args...)
}

func (w *world) violateLocked(format string, args ...any) {
	w.logLocked("VIOLATION: "+format, args...)
	if len(w.broken) < 3 {
		w.broken = append(w.broken, fmt.Sprintf("%s: %s", w.plan, fmt.Sprintf(format, args...)))
	}
}

// seed installs a role that has been there for long: version 1 is current and
// accepted everywhere.
func (w *world) seed(name string, change func(*Role)) {
	w.t.Helper()
	r := w.newRole(name)
	r.Created, r.Profile = time.Now(), []string{"may read"} // as its creation has found
	user := r.Spec.Owns()[0]
	w.absent[user+"2"] = true // the other one, where they take turns
	r.Add(kind.Material{Username: user, Secret: "m0-" + name, KeyID: "kid-m0-" + name}, "", time.Now())
	r.Promote(time.Now())
	if w.shape.keeper {
		r.Versions[0].Material = kind.Material{}
		w.keeper.of(name).newest = 1
	}
	if change != nil {
		change(r)
	}
	user = r.Spec.Owns()[0]
	initial := []kind.Material{r.With(version.Current).Material}
	for _, n := range w.nodes {
		n.set(user, initial)
	}
	w.foreign[user] = initial // until it is stored
	defer delete(w.foreign, user)
	if err := NewStore(&faultyStorage{w: w}).PutRole(context.Background(), nil, r); err != nil {
		w.t.Fatal(err)
	}
	w.running(name)
	if r.Target != "" {
		if err := storage.Put(context.Background(), &w.inner, ClaimKey(r.Target, r.Spec.Owns()[0]), Claim{Role: name, Target: r.Target, Username: r.Spec.Owns()[0]}, maxSmallEntry); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) newRole(name string) *Role {
	grace := testGrace
	r := &Role{
		Name: name, Kind: w.shape.kind(), Connection: w.shape.connection(), GracePeriod: &grace,
		AllowPartial: w.shape.partial, KeepVersions: 3,
		Spec: kind.Spec{Role: name, Strategy: w.shape.strategy},
	}
	if !w.shape.targetless {
		r.Spec.Username, r.Target = "u-"+name, "target"
	}
	if w.shape.strategy == kind.Alternate {
		r.Spec.Usernames, r.Spec.Username = []string{"u-" + name, "u-" + name + "2"}, ""
		r.Spec.CloseConnections = true
		r.UntilUnused = w.shape.unused
	}
	if least := testMinimum; w.shape.unused {
		r.GraceMinimum = &least
	}
	if w.shape.keeper {
		r.Spec.Username, r.Spec.Mount, r.Spec.Key = "", "mount", name
	}
	if w.shape.consumers {
		r.Consumers = []string{"c1", "c2"}
		if r.Connection != "" {
			r.Connection += "-" + name // servers of several kinds share consumers
		}
	}
	if w.shape.document { // all roles fill one
		r.Document = "doc"
	}
	if w.shape.place {
		r.Place, r.PlaceTarget = publish.Place{Connection: "kv", Mount: "secret", Path: "app"}, "other"
	}
	if r.Shows() {
		r.Field, r.UsernameField = "secret-"+name, "user-"+name
		if w.shape.strategy == kind.Overlap {
			r.Spec.PreviousField = "previous-" + name
		}
	}
	if w.shape.strategy == kind.KeyRing {
		w.ringRole(r)
	}
	return r
}

// role returns what storage holds.
func (w *world) role(name string) *Role {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.roles[name]
}

// phase waits until a role's run is in phase p, or has ended.
func (w *world) phase(name string, p Phase) {
	w.until("phase "+string(p), 3*time.Hour, func() bool {
		r := w.roles[name]
		return r == nil || r.Run == nil || r.Run.Phase == p || r.Run.Back
	})
}

// idle waits until the runs of roles have ended.
func (w *world) idle(names ...string) {
	for _, name := range names {
		w.until("the end of the run of "+name, 6*time.Hour, func() bool {
			r := w.roles[name]
			return r == nil || r.Run == nil
		})
	}
}

// tamper changes a node behind the engine's back.
func (w *world) tamper(name, user string, set ...kind.Material) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.foreign[user] = append(w.foreign[user], set...)
	w.tampered[user] = true
	w.nodes[name].set(user, set)
}

func (w *world) setDown(name string, down bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := w.nodes[name]; n != nil {
		n.down = down
	}
}

// calm clears every fault.
func (w *world) calm() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.plan.off = true
	w.readonly = time.Time{}
	for _, n := range w.nodes {
		n.down = false
	}
}

// finish lets the world come to rest without faults and checks what must be
// true then.
func (w *world) finish() {
	w.calm()
	w.until("rest", 8*time.Hour, func() bool {
		for _, r := range w.roles {
			if r.Run != nil || r.Drift != nil && len(r.Drift.Missed) > 0 {
				return false
			}
		}
		open, err := w.inner.List(context.Background(), storage.Open)
		return err == nil && len(open) == 0 && w.late == nil
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.checkLocked()
	w.restartNodesLocked() // what is proven is saved, too
	for _, r := range w.roles {
		w.checkAtRest(r)
	}
	w.checkRotations()
}

func (w *world) checkAtRest(r *Role) {
	if v := r.With(version.Pending); v != nil {
		w.violateLocked("at rest role %s still has pending version %d", r.Name, v.Number)
	}
	current := r.With(version.Current)
	if current == nil {
		w.violateLocked("at rest role %s has no current version", r.Name)
		return
	}
	if r.Drift != nil {
		w.violateLocked("at rest role %s is drifted: %+v", r.Name, r.Drift)
	}
	if r.ring() {
		w.checkRingAtRest(r)
		return
	}
	w.checkPublished(r, current.Material)
	w.checkDelivered(r)
	for _, v := range r.Versions {
		if v.Stage != version.Current && v.Refused.IsZero() && !r.Served(v.Material) && !w.shape.targetless {
			w.violateLocked("at rest version %d (%s) of role %s is not proven refused", v.Number, v.Stage, r.Name)
		}
	}
	if w.touched(r) {
		return
	}
	for _, n := range w.order {
		for _, user := range r.Spec.Owns() {
			for _, m := range w.nodes[n].accepts[user] {
				if !m.Same(current.Material) {
					w.violateLocked("at rest node %s accepts %s of %s besides the current version of role %s", n, m.Secret, user, r.Name)
				}
			}
		}
	}
}

// touched: somebody else has changed a user of r.
func (w *world) touched(r *Role) bool {
	return slices.ContainsFunc(r.Spec.Owns(), func(user string) bool { return w.tampered[user] })
}

// takes reports whether the node accepts m.
func (n *node) takes(m kind.Material) bool {
	return slices.ContainsFunc(n.accepts[m.Username], m.Same)
}

func (w *world) checkRotations() {
	ctx := context.Background()
	st := NewStore(&w.inner)
	ids, err := st.Headers(ctx)
	if err != nil {
		w.violateLocked("headers: %v", err)
	}
	for _, id := range ids {
		h, err := st.Header(ctx, id)
		if err != nil || h == nil {
			w.violateLocked("header %s: %v", id, err)
			continue
		}
		if !h.State.Ended() {
			w.violateLocked("at rest rotation %s is %q", id, h.State)
		}
		if h.Parent != "" {
			if p, err := st.Header(ctx, h.Parent); err != nil || p == nil || !slices.Contains(p.Children, id) {
				w.violateLocked("rotation %s has no parent: %v", id, err)
			}
		}
		w.checkTogether(h)
		w.checkProofs(h)
		for _, p := range h.Roles {
			if e, err := st.Evidence(ctx, id, p.Role); err != nil || e == nil && p.State != Superseded {
				w.violateLocked("no evidence of role %s in rotation %s (%s): %v", p.Role, id, p.State, err)
			}
		}
	}
}

// checkLocked is DESIGN §3 at one instant.
func (w *world) checkLocked() {
	for _, name := range w.order {
		for user := range w.nodes[name].accepts {
			w.checkAccepted(user)
		}
		w.checkRoot()
		w.checkPods()
	}
	for _, r := range w.roles {
		w.checkServed(r)
	}
	w.checkDocument()
	w.checkRoot()
	w.checkPods()
	w.checkRewound()
}

// rootLogins are the credentials that a driver would try, as stored.
func (w *world) rootLogins() []kind.Material {
	r := w.roles["a"]
	if r == nil { // nobody has adopted it: the connection has it
		return []kind.Material{*material("a", "m0-a")}
	}
	return append([]kind.Material{r.With(version.Current).Material}, r.Accepted()...)
}

// checkRoot: no node is ever without a credential that the engine would try there.
func (w *world) checkRoot() {
	if !w.shape.root || w.tampered["u-a"] {
		return
	}
	for _, name := range w.order {
		if !slices.ContainsFunc(w.rootLogins(), w.nodes[name].takes) {
			w.violateLocked("locked out: node %s accepts no admin credential that is stored", name)
		}
	}
}

func (w *world) checkAccepted(user string) {
	for _, name := range w.order {
		for _, m := range w.nodes[name].accepts[user] {
			if !w.stored(user, m) {
				w.violateLocked("lost: node %s accepts %s of %s, which is not in storage", name, m.Secret, user)
			}
		}
	}
}

func (w *world) stored(user string, m kind.Material) bool {
	holds := func(r *Role) bool {
		return slices.Contains(r.Spec.Owns(), user) && slices.ContainsFunc(r.Versions, func(v version.Version) bool { return v.Material.Same(m) })
	}
	if slices.ContainsFunc(w.foreign[user], m.Same) {
		return true
	}
	for _, r := range w.roles {
		if holds(r) {
			return true
		}
	}
	for _, t := range w.tombs {
		for ; t != nil; t = t.Earlier {
			if holds(t.Role) {
				return true
			}
		}
	}
	return false
}

func (w *world) checkServed(r *Role) {
	current, run := r.With(version.Current), r.Run
	if current == nil {
		return
	}
	key := fmt.Sprintf("%s/%d", r.Name, current.Number)
	if m, ok := w.served[key]; ok && !m.Same(current.Material) {
		w.violateLocked("version %d of role %s is served with two materials", current.Number, r.Name)
	}
	w.served[key] = current.Material
	if w.shape.targetless || w.touched(r) {
		return
	}
	interval := r.Spec.Strategy == kind.Swap && run != nil && (run.Phase == Apply || run.urgent() && !run.Promoted)
	previous := r.With(version.Previous)
	for _, name := range w.order {
		n := w.nodes[name]
		if n.down || w.passedOver(r, name) {
			continue
		}
		if !interval && !n.takes(current.Material) {
			w.violateLocked("node %s refuses the served version %d of role %s", name, current.Number, r.Name)
		}
		if run != nil && run.Phase == Grace && !run.Back && previous != nil && r.Spec.Strategy != kind.Swap && !n.takes(previous.Material) {
			w.violateLocked("node %s refuses previous version %d of role %s in its grace period", name, previous.Number, r.Name)
		}
	}
}

// passedOver: allow_partial does not promise anything for this node.
func (w *world) passedOver(r *Role, node string) bool {
	return r.Run != nil && slices.Contains(r.Run.Missed, node) || r.Drift != nil && slices.Contains(r.Drift.Missed, node)
}

// maxOps is far more than any scenario needs: something spins.
const maxOps = 20_000

// cool holds up an engine that spins, so that the test ends with an error
// instead of never.
func (w *world) cool() {
	w.mu.Lock()
	hot := w.hot
	w.mu.Unlock()
	if hot {
		select {
		case <-time.After(time.Hour):
		case <-w.done:
		}
	}
}

// noteWrite keeps the decoded copy of what storage holds.
func (w *world) noteWrite(key string, value []byte) {
	if name, ok := strings.CutPrefix(key, storage.Role); ok {
		before := w.roles[name]
		delete(w.roles, name)
		if value != nil {
			r := &Role{}
			if err := jsonutil.DecodeJSON(value, r); err != nil {
				w.violateLocked("role entry: %v", err)
			}
			r.Name = name
			w.checkDirection(before, r)
			w.checkMoves(before, r)
			w.checkUnused(before, r)
			w.checkKept(before, r)
			if r.Run != nil && r.Run.Doubt && strings.Contains(r.Run.Error, "snapshot") && !w.touched(r) {
				w.violateLocked("the run of %s is doubted after no more than a crash: %s", r.Name, describe(r))
			}
			w.roles[name] = r
			w.leftOut = w.leftOut || r.Run.urgent() && len(r.Run.Missed) > 0
			w.noteKeys(r)
		}
	}
	if name, ok := strings.CutPrefix(key, storage.Deleted); ok {
		delete(w.tombs, name)
		if value != nil {
			t := &Tombstone{}
			if err := jsonutil.DecodeJSON(value, t); err != nil {
				w.violateLocked("tombstone: %v", err)
			}
			w.tombs[name] = t
		}
	}
	if name, ok := strings.CutPrefix(key, storage.Document); ok {
		w.noteDocument(name, value)
	}
	if strings.HasPrefix(key, storage.Proof) {
		w.noteProof(key, value)
	}
	w.logWrite(key, value)
	w.checkWrite(key)
}

// checkDirection: a way back that is stored never turns forward again, and what
// was served once is replaced by a newer number, never taken away.
func (w *world) checkDirection(before, r *Role) {
	if before != nil && r.Created.Equal(before.Created) &&
		numberOf(r.With(version.Current)) < numberOf(before.With(version.Current)) {
		w.violateLocked("the served version of %s vanishes: %s, then %s", r.Name, describe(before), describe(r))
	}
	if r.Run == nil {
		return
	}
	run := fmt.Sprintf("%s/%s/%t", r.Run.Rotation, r.Name, r.Run.alone()) // which begins anew
	if w.backward == nil {
		w.backward = map[string]bool{}
	}
	if w.backward[run] && !r.Run.Back {
		w.violateLocked("the rotation of %s turns forward again: %s", r.Name, describe(r))
	}
	w.backward[run] = w.backward[run] || r.Run.Back
}

// checkWrite is checkLocked for what a write can have changed.
func (w *world) checkWrite(key string) {
	name, ok := strings.CutPrefix(key, storage.Role)
	if r := w.roles[name]; ok && r != nil {
		for _, user := range r.Spec.Owns() {
			w.checkAccepted(user)
		}
		w.checkServed(r)
		w.checkDocument()
		w.checkRewound()
		return
	}
	if ok || strings.HasPrefix(key, storage.Document) || strings.HasPrefix(key, storage.Deleted) {
		w.checkLocked()
	}
}

func (w *world) logWrite(key string, value []byte) {
	if value == nil {
		w.logLocked("store  %s: removed", short(key))
		return
	}
	name, ok := strings.CutPrefix(key, storage.Role)
	if !ok {
		w.logLocked("store  %s", short(key))
		return
	}
	w.logLocked("store  role %s: %s", name, describe(w.roles[name]))
}

func short(key string) string {
	for _, p := range []string{storage.Rotation, storage.Open, storage.Request, storage.Claim, storage.Due} {
		if strings.HasPrefix(key, p) {
			return strings.TrimSuffix(p, "/")
		}
	}
	if rest, ok := strings.CutPrefix(key, storage.Evidence); ok {
		_, role, _ := strings.Cut(rest, "/")
		return "evidence of " + role
	}
	return key
}

// describe prints a role's stages and where its run stands.
func describe(r *Role) string {
	if r == nil {
		return "no role"
	}
	var s []string
	if run := r.Run; run == nil {
		s = append(s, r.State())
		if r.LastRun != nil {
			s = append(s, "("+string(r.LastRun.State)+")")
		}
	} else {
		p := string(run.Phase)
		if run.Back {
			p = "back"
		}
		s = append(s, p)
		if run.Attempt != nil {
			s = append(s, "attempt="+run.Attempt.Call)
		}
		if run.Recall != "" {
			s = append(s, "recalled")
		}
		if run.Tries > 0 {
			s = append(s, fmt.Sprintf("tries=%d", run.Tries))
		}
		if run.Doomed != "" {
			s = append(s, "doomed")
		}
		if run.Error != "" {
			s = append(s, "error="+run.Error)
		}
	}
	for _, v := range r.Versions {
		t := fmt.Sprintf("v%d=%s/%s", v.Number, cmp.Or(v.Material.Secret, "("+v.Evidence+")"), v.Stage)
		if !v.Refused.IsZero() {
			t += "/refused"
		}
		s = append(s, t)
	}
	if r.Drift != nil {
		s = append(s, "missed="+strings.Join(r.Drift.Missed, ","))
	}
	return strings.Join(s, " ")
}

// fakeKind generates material that can be told apart.
type fakeKind struct {
	w          *world
	connection string
}

var _ kind.Kind = fakeKind{}

func (k fakeKind) Name() string                         { return "fake" }
func (k fakeKind) ConnectionType() string               { return k.connection }
func (k fakeKind) Fields() []string                     { return nil }
func (k fakeKind) Complete(*kind.Spec) error            { return nil }
func (k fakeKind) CheckInitial(kind.Spec, string) error { return nil }
func (k fakeKind) Generate(_ context.Context, s kind.Spec, _ kind.Source) (kind.Material, error) {
	k.w.mu.Lock()
	defer k.w.mu.Unlock()
	k.w.generated++
	secret := fmt.Sprintf("m%d", k.w.generated)
	return kind.Material{Username: s.Username, Secret: secret, KeyID: "kid-" + secret}, nil
}

var (
	errInjected = errors.New("injected fault")
	errDown     = kind.CannotReach(errors.New("node is down"))
)
