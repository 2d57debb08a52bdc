package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// domain is where a fault strikes.
type domain string

const (
	atStorage domain = "storage"
	atTarget  domain = "target"
)

// fault is what happens at the k-th operation of a domain.
type fault string

// Faults of storage.
const (
	storageFails       fault = "fails"
	crashBefore        fault = "crash-before"
	crashAfter         fault = "crash-after"
	failsThoughApplied fault = "fails-though-applied"
	appliedLate        fault = "applied-late"
	readOnly           fault = "read-only"
)

// Faults of the target.
const (
	callFails     fault = "call-fails"
	callHangs     fault = "hangs"
	replyLost     fault = "reply-lost"
	landsLate     fault = "lands-late"
	landsAfter    fault = "lands-after-crash"
	diesBetween   fault = "dies-between-nodes"
	oneNodeOnly   fault = "one-node-only"
	nodeDown      fault = "node-down"
	lies          fault = "lies"
	rejects       fault = "rejects"
	rejectsOne    fault = "one-rejects-one-hangs"
	callPanics    fault = "panics"
	unsavedOne    fault = "one-cannot-save"
	unsavedLost   fault = "not-saved-reply-lost"
	crashInCall   fault = "crash-in-call"
	crashOnReturn fault = "crash-on-return"
)

var (
	storageWriteFaults = []fault{storageFails, crashBefore, crashAfter, failsThoughApplied, appliedLate, readOnly}
	storageReadFaults  = []fault{storageFails, crashBefore}
	changeFaults       = []fault{
		callFails, callHangs, replyLost, landsLate, landsAfter, diesBetween, oneNodeOnly, nodeDown, lies, rejects,
		rejectsOne, callPanics, crashInCall, crashOnReturn, unsavedOne, unsavedLost,
	}
	lookFaults = []fault{callFails, callHangs, oneNodeOnly, nodeDown, rejects, callPanics, crashInCall}
)

type point struct {
	where domain
	at    int
	what  fault
}

func (p point) String() string { return fmt.Sprintf("%s %d %s", p.where, p.at, p.what) }

// plan is the faults of one run.
type plan struct {
	name   string
	points []point
	off    bool
}

func (p plan) String() string { return fmt.Sprintf("%s %v", p.name, p.points) }

// strikeLocked counts an operation and says what happens to it.
func (w *world) strikeLocked(d domain, name string) fault {
	w.ops[d]++
	w.kinds[d] = append(w.kinds[d], name)
	if w.ops[d] > maxOps && !w.hot {
		w.hot = true
		w.violateLocked("a hot loop: %d operations of %s, the last of them %v", w.ops[d], d, w.kinds[d][len(w.kinds[d])-12:])
	}
	if w.plan.off {
		return ""
	}
	for _, p := range w.plan.points {
		if p.where == d && p.at == w.ops[d] {
			w.logLocked("FAULT  %s", p)
			return p.what
		}
	}
	return ""
}

// faultyStorage is what one instance sees of storage. The zero instance never
// fails and is not counted.
type faultyStorage struct {
	w *world
	i *instance
}

var _ logical.Storage = (*faultyStorage)(nil)

func (s *faultyStorage) read(name string) error {
	if s.i == nil {
		return nil
	}
	s.w.cool()
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if s.i.isDead() {
		return errInjected
	}
	switch s.w.strikeLocked(atStorage, name) {
	case storageFails, failsThoughApplied, appliedLate:
		return errInjected
	case crashBefore, crashAfter:
		s.i.kill()
		return errInjected
	}
	return nil
}

func (s *faultyStorage) List(ctx context.Context, prefix string) ([]string, error) {
	if err := s.read("list " + short(prefix)); err != nil {
		return nil, err
	}
	return s.w.inner.List(ctx, prefix)
}

func (s *faultyStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if err := s.read("get " + short(key)); err != nil {
		return nil, err
	}
	return s.w.inner.Get(ctx, key)
}

func (s *faultyStorage) Put(_ context.Context, e *logical.StorageEntry) error {
	return s.write("put", e.Key, func(w *world) {
		if err := w.inner.Put(context.Background(), e); err != nil {
			w.violateLocked("put: %v", err)
		}
		w.noteWrite(e.Key, e.Value)
	})
}

func (s *faultyStorage) Delete(_ context.Context, key string) error {
	return s.write("delete", key, func(w *world) {
		if err := w.inner.Delete(context.Background(), key); err != nil {
			w.violateLocked("delete: %v", err)
		}
		w.noteWrite(key, nil)
	})
}

func (s *faultyStorage) write(name, key string, apply func(*world)) error {
	w := s.w
	w.cool()
	w.mu.Lock()
	defer w.mu.Unlock()
	if s.i == nil {
		apply(w)
		return nil
	}
	if s.i.isDead() {
		return errInjected
	}
	f := cmp.Or(w.strikeLocked(atStorage, name), w.strikeWriteLocked(key))
	if f == readOnly {
		w.readonly = time.Now().Add(time.Minute)
	}
	if time.Now().Before(w.readonly) {
		return errors.New("injected: cannot write to readonly storage")
	}
	if f == storageFails {
		return errInjected
	}
	if f == crashBefore {
		s.i.kill()
		return errInjected
	}
	w.flushLocked()
	if f == appliedLate {
		w.late = func() { apply(w) }
		w.over.Add(1)
		go func() { defer w.over.Done(); w.pass(time.Second); w.mu.Lock(); w.flushLocked(); w.mu.Unlock() }()
		w.logLocked("late   %s", short(key))
		return errInjected
	}
	apply(w)
	if w.rewind.wrote(w) {
		s.i.kill()
	}
	switch f {
	case crashAfter:
		s.i.kill()
		return errInjected
	case failsThoughApplied:
		return errInjected
	}
	return nil
}

// strikeWriteLocked is for faults that count writes alone.
func (w *world) strikeWriteLocked(key string) fault {
	if w.writeFaultIn == 0 || w.plan.off || !strings.HasPrefix(key, w.writeFaultAt) {
		return ""
	}
	if w.writeFaultIn--; w.writeFaultIn > 0 {
		return ""
	}
	w.logLocked("FAULT  %s of %s", w.writeFault, short(key))
	return w.writeFault
}

// flushLocked applies a write that was answered with an error.
func (w *world) flushLocked() {
	if late := w.late; late != nil {
		w.late = nil
		late()
	}
}

// fakeTarget is what one instance sees of the target.
type fakeTarget struct {
	w          *world
	i          *instance
	connection string
}

// mine refuses to be asked about users of another connection's roles, or by who has
// forgotten what nodes there are.
func (f *fakeTarget) mine(u kind.User) {
	if r := f.w.roles[u.Role]; r != nil && r.Connection != f.connection {
		f.w.violateLocked("connection %s is asked about user %s of role %s, which is of connection %s", f.connection, u.Username, u.Role, r.Connection)
	}
	if r := f.w.roles[u.Role]; r != nil && r.NodesGeneration == generation && len(u.Known) < len(r.Nodes) {
		f.w.violateLocked("a call about role %s does not count on nodes %v, and would not miss one", u.Role, r.Nodes)
	}
}

var _ kind.Target = (*fakeTarget)(nil)

// callTime is how long a call takes that nothing delays.
const callTime = 20 * time.Millisecond

// enter counts a call, lets it take its time, and says what happens to it.
func (f *fakeTarget) enter(ctx context.Context, name string) (fault, error) {
	w := f.w
	w.cool()
	w.mu.Lock()
	dead := f.i.isDead()
	var what fault
	if !dead {
		what = w.strikeLocked(atTarget, name)
	}
	if what == nodeDown {
		last := w.nodes[w.order[len(w.order)-1]]
		last.down = true
		time.AfterFunc(4*time.Minute, func() { w.setDown(last.name, false) })
	}
	w.mu.Unlock()
	if _, ok := ctx.Deadline(); !ok {
		w.violate("%s was called without a deadline", name)
	}
	if dead {
		return "", errInjected
	}
	switch what {
	case callPanics:
		panic("injected")
	case callFails:
		return "", errInjected
	case callHangs:
		<-ctx.Done()
		return "", errInjected
	case crashInCall:
		f.i.kill()
		return "", errInjected
	}
	select {
	case <-time.After(callTime):
	case <-ctx.Done():
		return "", ctx.Err()
	case <-f.i.dead:
		return "", errInjected
	}
	return what, nil
}

func (f *fakeTarget) Preflight(ctx context.Context, users []kind.User) []kind.Finding {
	out := make([]kind.Finding, len(users))
	what, err := f.enter(ctx, "preflight")
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	f.w.logLocked("target preflight %s%s", userList(users), note(err))
	for i, u := range users {
		f.mine(u)
		out[i].Err = err
		if err != nil {
			continue
		}
		if !f.w.absent[u.Username] {
			out[i].Profile = []string{"may read"}
		} else if u.Exists() {
			out[i].Problems = []string{"injected: there is no user " + u.Username}
		}
		if what == rejects {
			out[i].Problems = []string{"injected: the admin may not change users"}
		}
		for j, name := range f.w.order {
			n := f.w.nodes[name]
			out[i].Nodes = append(out[i].Nodes, kind.NodeError{Node: name, Err: f.reach(n, what, j)})
			out[i].HasCredential = out[i].HasCredential || len(n.accepts[u.Username]) > 0
		}
	}
	return out
}

func (f *fakeTarget) reach(n *node, what fault, index int) error {
	if n.down {
		return errDown
	}
	if f.w.shape.root && !slices.ContainsFunc(f.w.rootLogins(), n.takes) {
		return errors.New("injected: the admin is refused")
	}
	if what == oneNodeOnly && index > 0 {
		return errInjected
	}
	return nil
}

func (f *fakeTarget) Probe(ctx context.Context, questions []kind.Question) []kind.Answer {
	out := make([]kind.Answer, len(questions))
	what, err := f.enter(ctx, "probe")
	if what == rejects {
		err = kind.Definitely("injected: refused by policy")
	}
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	for i, q := range questions {
		f.mine(q.User)
		f.checkConcluded(q)
		out[i].Err = err
		if err != nil {
			f.w.logLocked("target probe %s%s", q.Username, note(err))
			continue
		}
		for j, name := range f.w.order {
			out[i].Nodes = append(out[i].Nodes, f.ask(q, f.w.nodes[name], what, j))
		}
		f.w.logLocked("target probe %s: %s", q.Username, answers(q, out[i]))
	}
	return out
}

// checkConcluded: what a rotation proves refused is seen to be, once.
func (f *fakeTarget) checkConcluded(q kind.Question) {
	r := f.w.roles[q.Role]
	if len(q.Concluded) == 0 || r != nil && r.Run != nil && r.Run.Phase == Preflight {
		return
	}
	if r != nil && r.Run != nil && (r.Run.Trigger == Reconcile || r.Run.urgent()) {
		f.w.violateLocked("a refusal of role %s is to be concluded, and somebody wants to see it", q.Role)
	}
	for _, m := range q.Concluded {
		if r == nil || slices.ContainsFunc(r.Versions, func(v version.Version) bool { return v.Material.Same(m) && v.Refused.IsZero() }) {
			f.w.violateLocked("a refusal of role %s is to be concluded, and was never seen", q.Role)
		}
	}
}

func (f *fakeTarget) ask(q kind.Question, n *node, what fault, index int) kind.NodeAnswer {
	a := kind.NodeAnswer{Node: n.name, Err: f.reach(n, what, index)}
	if a.Err != nil {
		return a
	}
	accepted := n.accepts[q.Username]
	known := 0
	for _, m := range q.Materials {
		ok := slices.ContainsFunc(accepted, m.Same)
		if ok {
			known++
		}
		a.Accepts = append(a.Accepts, ok)
	}
	a.Extra = len(accepted) - known
	return a
}

// Change does what kind.Target promises: nothing of it happens after the
// deadline of ctx and a little skew.
func (f *fakeTarget) Change(ctx context.Context, changes []kind.Change) []kind.Outcome {
	w := f.w
	w.mu.Lock()
	for _, c := range changes {
		if w.inflight[c.Username]++; w.inflight[c.Username] > 1 {
			w.violateLocked("user %s is changed while an earlier change may still land", c.Username)
		}
		w.checkChange(c)
	}
	w.mu.Unlock()
	landed := func() {
		for _, c := range changes {
			w.inflight[c.Username]--
		}
	}
	entered := false
	defer func() {
		if !entered { // a panic
			w.mu.Lock()
			landed()
			w.mu.Unlock()
		}
	}()
	what, err := f.enter(ctx, "change")
	entered = true
	w.mu.Lock()
	defer w.mu.Unlock()
	if what == landsLate || what == landsAfter {
		deadline, _ := ctx.Deadline()
		f.landLater(deadline.Add(Skew-time.Millisecond), changes, landed)
		err = errInjected
		if what == landsAfter {
			f.i.kill()
		}
	} else {
		defer landed()
	}
	out := make([]kind.Outcome, len(changes))
	for i, c := range changes {
		if err != nil {
			out[i].Err = err
		} else {
			out[i] = f.change(c, what)
		}
		w.logLocked("target change %s: %s%s", c.Username, wanted(c), note(firstError(out[i])))
	}
	if what == unsavedOne || what == unsavedLost {
		w.restartNodesLater(90 * time.Second)
	}
	if what == diesBetween || what == crashOnReturn {
		f.i.kill()
	}
	w.checkLocked()
	return out
}

// checkChange refuses what no driver of a swap target could do.
func (w *world) checkChange(c kind.Change) {
	single := w.shape.strategy == kind.Swap || w.shape.strategy == kind.Alternate
	if single && len(c.Accept) > 1 {
		w.violateLocked("a target with one password is asked to accept %d", len(c.Accept))
	}
	if r := w.roles[c.Role]; r != nil && r.alternates() && !c.CloseBefore.IsZero() && c.Username == r.inUse() {
		w.violateLocked("the sessions of user %s are ended, which is in use", c.Username)
	}
	for _, m := range slices.Concat(c.Accept, c.Refuse) {
		if m.Username != c.Username {
			w.violateLocked("user %s is changed for the material of %s", c.Username, m.Username)
		}
	}
	for _, m := range c.Accept {
		if slices.ContainsFunc(c.Refuse, m.Same) {
			w.violateLocked("a change accepts and refuses the same material")
		}
	}
}

func (f *fakeTarget) landLater(at time.Time, changes []kind.Change, landed func()) {
	w := f.w
	w.over.Add(1)
	go func() {
		defer w.over.Done()
		w.pass(time.Until(at))
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, c := range changes {
			w.logLocked("target lands late %s: %s", c.Username, wanted(c))
			for _, name := range w.order {
				w.nodes[name].apply(c, w.shape.strategy)
				w.nodes[name].save(c.Username)
			}
		}
		landed()
		w.checkLocked()
	}()
}

func (f *fakeTarget) change(c kind.Change, what fault) kind.Outcome {
	w := f.w
	f.mine(c.User)
	var out kind.Outcome
	if w.absent[c.Username] && len(c.Accept) > 0 {
		if len(c.Profile) == 0 {
			return kind.Outcome{Err: kind.Definitely("injected: nobody said what user %s is to be", c.Username)}
		}
		delete(w.absent, c.Username)
	}
	for i, name := range w.order {
		n := w.nodes[name]
		var err error
		switch {
		case n.down:
			err = errDown
		case f.reach(n, "", 0) != nil:
			err = f.reach(n, "", 0)
		case what == rejects, what == rejectsOne && i == 0, c.Username == w.rejected, c.Exclusive && c.Username == w.clinging:
			err = kind.Definitely("injected: refused by policy")
		case what == diesBetween && i > 0, what == oneNodeOnly && i > 0, what == rejectsOne:
			err = errInjected
		case what == lies:
			n.save(c.Username) // what it accepts can be tried; what it has on its disk nobody sees
		default:
			n.apply(c, w.shape.strategy)
			if what != unsavedLost && (what != unsavedOne || i > 0) {
				n.save(c.Username)
			} else if what == unsavedOne {
				err = kind.Definitely("injected: the node cannot save its users")
			}
		}
		if what == replyLost || what == unsavedLost {
			err = cmp.Or(err, errInjected)
		}
		out.Nodes = append(out.Nodes, kind.NodeError{Node: name, Err: err})
	}
	return out
}

func (n *node) apply(c kind.Change, s kind.Strategy) {
	set := n.accepts[c.Username]
	if c.Exclusive || s != kind.Overlap && len(c.Accept) > 0 {
		set = nil
	}
	set = slices.DeleteFunc(slices.Clone(set), func(m kind.Material) bool { return slices.ContainsFunc(c.Refuse, m.Same) })
	for _, m := range c.Accept {
		if !slices.ContainsFunc(set, m.Same) {
			set = append(set, m)
		}
	}
	n.accepts[c.Username] = set
}

// save makes what the node holds for user survive its restart.
func (n *node) save(user string) { n.saved[user] = slices.Clone(n.accepts[user]) }

// restart leaves the node with what it saved.
func (n *node) restart() {
	n.accepts = maps.Clone(n.saved)
}

// set is what a user of the node accepts from now on, whoever says so.
func (n *node) set(user string, ms []kind.Material) {
	n.accepts[user] = ms
	n.save(user)
}

func (w *world) restartNodesLater(d time.Duration) {
	w.over.Add(1)
	go func() {
		defer w.over.Done()
		w.pass(d)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.restartNodesLocked()
	}()
}

// restartNodesLocked restarts every node, and checks that it made no difference
// that matters.
func (w *world) restartNodesLocked() {
	w.logLocked("nodes restart")
	for _, n := range w.nodes {
		n.restart()
	}
	w.checkLocked()
}

func note(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

func firstError(o kind.Outcome) error {
	if o.Err != nil {
		return o.Err
	}
	for _, n := range o.Nodes {
		if n.Err != nil {
			return fmt.Errorf("%s: %w", n.Node, n.Err)
		}
	}
	return nil
}

func secrets(ms []kind.Material) string {
	var s []string
	for _, m := range ms {
		s = append(s, m.Secret)
	}
	return strings.Join(s, "+")
}

func wanted(c kind.Change) string {
	var s []string
	if len(c.Accept) > 0 {
		s = append(s, "accept "+secrets(c.Accept))
	}
	if len(c.Refuse) > 0 {
		s = append(s, "refuse "+secrets(c.Refuse))
	}
	if c.Exclusive {
		s = append(s, "and nothing else")
	}
	return strings.Join(s, ", ")
}

func answers(q kind.Question, a kind.Answer) string {
	var s []string
	for _, n := range a.Nodes {
		if n.Err != nil {
			s = append(s, n.Node+" "+n.Err.Error())
			continue
		}
		var ok []kind.Material
		for i, m := range q.Materials {
			if n.Accepts[i] {
				ok = append(ok, m)
			}
		}
		t := n.Node + " accepts " + secrets(ok)
		if n.Extra != 0 {
			t += fmt.Sprintf(" and %d unknown", n.Extra)
		}
		s = append(s, t)
	}
	return strings.Join(s, ", ")
}

func userList(users []kind.User) string {
	var s []string
	for _, u := range users {
		s = append(s, u.Username)
	}
	return strings.Join(s, " ")
}
