package rotation

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// atCluster is where a consumer is asked.
const atCluster domain = "cluster"

var clusterFaults = []fault{callFails, callHangs, replyLost, rejects, callPanics, crashInCall, crashOnReturn}

// clusterWorld is what stands in clusters: what each consumer's Secret holds, what
// its pods run with, and which deliveries restarted them.
type clusterWorld struct {
	secret, pods map[string]map[string]kind.Material // by consumer and role
	restarts     map[string]int                      // by consumer and delivery
	marks        map[string]string                   // the delivery that has restarted a consumer last
	total        int
	bad          map[string]bool // secrets that pods do not start with
	rejects      string          // a role whose new secrets they do not start with
	unsynced     string          // a consumer whose Secret does not come
	surveyed     func()          // is called before each answer to a survey
}

// fakeConsumers is what one instance sees of clusters.
type fakeConsumers struct {
	w *world
	i *instance
}

var _ Deliverer = (*fakeConsumers)(nil)

func (f *fakeConsumers) enter(ctx context.Context, name string) (fault, error) {
	w := f.w
	w.cool()
	w.mu.Lock()
	dead := f.i.isDead()
	var what fault
	if !dead {
		what = w.strikeLocked(atCluster, name)
	}
	w.mu.Unlock()
	if _, ok := ctx.Deadline(); !ok {
		w.violate("%s was called without a deadline", name)
	}
	switch {
	case dead:
		return "", errInjected
	case what == callPanics:
		panic("injected")
	case what == callFails:
		return "", errInjected
	case what == callHangs:
		<-ctx.Done()
		return "", ctx.Err()
	case what == crashInCall:
		f.i.kill()
		return "", errInjected
	case what == rejects:
		return "", kind.Definitely("injected: it cannot be")
	}
	select {
	case <-time.After(callTime):
	case <-ctx.Done():
		return "", ctx.Err()
	}
	return what, nil
}

func (f *fakeConsumers) Survey(ctx context.Context, consumer, _ string) Survey {
	_, err := f.enter(ctx, "survey")
	f.w.logf("cluster survey %s%s", consumer, note(err))
	f.w.mu.Lock()
	surveyed := f.w.clusters.surveyed
	f.w.mu.Unlock()
	if surveyed != nil {
		surveyed()
	}
	return Survey{Err: err}
}

func (f *fakeConsumers) Radius(ctx context.Context, consumer string, _ Emergency) Survey {
	_, err := f.enter(ctx, "radius")
	return Survey{Err: err, Plan: []string{"restart " + consumer}}
}

func (f *fakeConsumers) Look(ctx context.Context, d Delivery) *seen.Consumer {
	if _, err := f.enter(ctx, "look"); err != nil {
		return &seen.Consumer{Error: err.Error()}
	}
	w := f.w
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.seenLocked(Check, d)
	out.Done = true
	for _, h := range d.Holds {
		served := w.roles[h.Role].With(version.Current).Material
		for _, there := range []map[string]kind.Material{w.clusters.secret[d.Consumer], w.clusters.pods[d.Consumer]} {
			if m, ok := there[h.Role]; d.Sure && ok && !m.Same(served) {
				out.Done, out.Error = false, "it runs with something else"
			}
		}
	}
	return out
}

func (f *fakeConsumers) Patience(context.Context, string, Phase) (time.Duration, error) {
	return 5 * time.Minute, nil
}

func (f *fakeConsumers) Deliver(ctx context.Context, step Phase, d Delivery) Progress {
	what, err := f.enter(ctx, string(step))
	w := f.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.logLocked("cluster %s %s%s", step, d.Consumer, note(err))
		return Progress{Err: err}
	}
	p := w.deliverLocked(step, d)
	p.Seen = w.seenLocked(step, d)
	w.logLocked("cluster %s %s by %s: done %t%s %s", step, d.Consumer, d.ID[len(d.ID)-2:], p.Done, note(p.Err), p.Waits)
	w.checkLocked()
	switch what {
	case replyLost:
		return Progress{Err: errInjected}
	case crashOnReturn:
		f.i.kill()
		return Progress{Err: errInjected}
	}
	return p
}

func (w *world) deliverLocked(step Phase, d Delivery) Progress {
	c := &w.clusters
	if c.secret[d.Consumer] == nil {
		c.secret[d.Consumer], c.pods[d.Consumer] = map[string]kind.Material{}, map[string]kind.Material{}
	}
	if d.Emergency == nil {
		if step != Sync || !strings.HasSuffix(d.ID, "-3") {
			w.checkReserved(d)
		}
		w.checkUndone(d)
	}
	switch step {
	case Sync:
		if c.unsynced == d.Consumer {
			return Progress{Waits: "it is not synced"}
		}
		for _, r := range w.roles {
			if slices.Contains(r.Consumers, d.Consumer) {
				c.secret[d.Consumer][r.Name] = r.With(version.Current).Material
			}
		}
		for _, h := range d.Holds {
			if r := w.roles[h.Role]; !r.ring() && r.Document == "" && c.secret[d.Consumer][h.Role].Secret != h.Value {
				return Progress{Waits: "the Secret holds something else"}
			}
		}
	case Restart:
		key := d.Consumer + " " + d.ID
		for _, m := range c.secret[d.Consumer] {
			if c.bad[m.Secret] {
				return Progress{Err: kind.Definitely("injected: pods crash")}
			}
		}
		if m := c.secret[d.Consumer][c.rejects]; c.rejects != "" && m.Secret != "m0-"+c.rejects {
			return Progress{Err: kind.Definitely("injected: pods crash")}
		}
		if c.marks[d.Consumer] != d.ID && (d.Emergency == nil || c.restarts[key] == 0) { // emergencies do not undo each other
			c.marks[d.Consumer] = d.ID
			c.restarts[key]++
			c.total++
			c.pods[d.Consumer] = map[string]kind.Material{}
			for role, m := range c.secret[d.Consumer] {
				c.pods[d.Consumer][role] = m
			}
			return Progress{Waits: "pods start", Told: []string{"restarted"}}
		}
	case Check:
	default:
		w.violateLocked("step %s at a consumer", step)
	}
	return Progress{Done: true, Told: []string{"seen"}}
}

// checkUndone: a way back names what it takes away, and nothing that is served.
func (w *world) checkUndone(d Delivery) {
	if !strings.HasSuffix(d.ID, "2") {
		if len(d.Undone) > 0 {
			w.violateLocked("delivery %s goes ahead, and takes back %v", d.ID, d.Undone)
		}
		return
	}
	for _, h := range d.Holds {
		r := w.roles[h.Role]
		if r.Run == nil || r.Run.urgent() { // it was taken over after this was read
			continue
		}
		named := slices.ContainsFunc(d.Undone, func(u Shown) bool { return u.Role == h.Role })
		if failed := r.Get(r.Run.To); named == (r.ring() || failed == nil || r.Served(failed.Material)) {
			w.violateLocked("delivery %s back takes back %v, and role %s is %s", d.ID, d.Undone, h.Role, describe(r))
		}
	}
	for _, u := range d.Undone {
		if r := w.roles[u.Role]; r.With(version.Current).Material.Secret == u.Value {
			w.violateLocked("delivery %s takes back what role %s serves", d.ID, u.Role)
		}
	}
}

// seenLocked is what a look at a consumer shows, by the step.
func (w *world) seenLocked(step Phase, d Delivery) *seen.Consumer {
	out := &seen.Consumer{Connection: "cluster", Namespace: "ns", Mode: "restart", At: time.Now().UTC()}
	switch step {
	case Sync:
		out.Externals = []seen.External{{Name: d.Consumer, Ready: true, Refreshed: time.Now().UTC()}}
		for _, h := range d.Holds {
			out.Values = append(out.Values, seen.Value{Role: h.Role, Field: h.Field, Keys: []string{"key"}, Held: true})
		}
	case Restart, Check:
		out.Workloads = []seen.Workload{{Kind: "Deployment", Name: d.Consumer, Replicas: 1, New: 1, Ready: 1}}
		pod := seen.Pod{Workload: "Deployment/" + d.Consumer, Name: d.Consumer + "-0", New: true}
		for _, m := range w.clusters.secret[d.Consumer] {
			if w.clusters.bad[m.Secret] {
				pod.Problem = "waits: CrashLoopBackOff"
				out.Workloads[0].Problem = "pod waits: CrashLoopBackOff"
			}
		}
		out.Pods = []seen.Pod{pod}
		if step == Check {
			out.Checks = []seen.Check{{Number: 1, Type: "http", Target: "web", Ran: true, Passed: true, Result: "answered with 200", Tries: 1, InRow: 1, Times: 1}}
		}
	}
	out.Count()
	return out
}

// checkProofs: what was seen at consumers is kept once, whatever was done twice, and
// a delivery that was proven has all of its steps. rotations are those that are kept.
func (w *world) checkProofs(h *Header) {
	if !w.shape.consumers {
		return
	}
	ctx, st := context.Background(), NewStore(&w.inner)
	proofs, more, err := st.Proofs(ctx, h.ID, "", maxProofs, true)
	if err != nil || more != 0 {
		w.violateLocked("proofs of %s: %d more, %v", h.ID, more, err)
	}
	known := map[string]bool{}
	for _, p := range proofs {
		if known[p.Consumer+p.Way] {
			w.violateLocked("consumer %s has two proofs of way %s in rotation %s", p.Consumer, p.Way, h.ID)
		}
		known[p.Consumer+p.Way] = true
	}
	for _, part := range h.Roles {
		r := w.roles[part.Role]
		if r == nil || part.State != Completed || h.Trigger == Create || h.Trigger == Reconcile || h.Trigger == Retirement {
			continue
		}
		for _, c := range r.Consumers {
			i := slices.IndexFunc(proofs, func(p *Proof) bool { return p.Consumer == c && p.Way == WayForward })
			if i < 0 || !slices.Equal(proofs[i].Steps, deliverySteps) || proofs[i].State() != "proven" {
				w.violateLocked("rotation %s of role %s completed, and what was seen at consumer %s is not kept", h.ID, r.Name, c)
				continue
			}
			if all := proofs[i].All(); len(all.Pods) != 1 || len(all.Externals) != 1 || len(all.Checks) != 1 || len(all.Workloads) != 1 || len(all.Values) == 0 {
				w.violateLocked("what is kept of consumer %s in rotation %s is not whole: %+v", c, h.ID, all)
			}
		}
	}
}

// noteProof: what is kept of consumers fits, and no secret is in it.
func (w *world) noteProof(key string, value []byte) {
	if len(value) > maxSmallEntry {
		w.violateLocked("%s has %d bytes", key, len(value))
	}
	for _, r := range w.roles {
		for _, v := range r.Versions {
			if v.Material.Secret != "" && strings.Contains(string(value), `"`+v.Material.Secret+`"`) {
				w.violateLocked("%s holds a secret of role %s", key, r.Name)
			}
		}
	}
}

// checkReserved: a consumer is one rotation's. The last sync of one that has retired
// restarts nothing and reserves nothing, whichever of the two is asked about.
func (w *world) checkReserved(d Delivery) {
	id := d.ID[:len(d.ID)-2]
	for _, r := range w.roles {
		run := r.Run
		if run == nil || run.urgent() || run.Rotation == id || run.Joint != nil && run.deliveryID() == d.ID || !slices.Contains(r.Consumers, d.Consumer) {
			continue
		}
		if run.Phase == Sync && !run.Retired || run.Phase == Restart || run.Phase == Check {
			w.violateLocked("consumer %s is worked at by %s and by the rotation of role %s", d.Consumer, id, r.Name)
		}
	}
}

// checkPods: what pods run with is accepted, so that none of them is refused; with
// swap, but for the interval.
func (w *world) checkPods() {
	if !w.shape.consumers || w.abandoned {
		return
	}
	if w.shape.targetless {
		w.checkKeys()
		return
	}
	for consumer, pods := range w.clusters.pods {
		for role, m := range pods {
			r := w.roles[role]
			if r == nil || w.touched(r) && !w.rewind.watches || r.Spec.Strategy == kind.Swap || r.compromised(m) {
				continue
			}
			for _, name := range w.order {
				if n := w.nodes[name]; !n.down && !n.takes(m) {
					w.violateLocked("node %s refuses %s of role %s, which pods of consumer %s run with: %s", name, m.Secret, role, consumer, describe(r))
				}
			}
		}
	}
}

// checkKeys: who checks a secret that no server holds goes by the document, which
// shows what pods run with.
func (w *world) checkKeys() {
	for consumer, pods := range w.clusters.pods {
		for role, m := range pods {
			r := w.roles[role]
			if r == nil || r.ring() || w.doc == nil || w.doc.Body[r.Field] == "" || r.compromised(m) {
				continue
			}
			if m.Secret != w.doc.Body[r.Field] && m.Secret != w.doc.Body[r.Spec.PreviousField] {
				w.violateLocked("the document does not show %s of role %s, which pods of consumer %s run with: %s", m.Secret, role, consumer, describe(r))
			}
		}
	}
}

// checkDelivered: at rest pods run with what is served.
func (w *world) checkDelivered(r *Role) {
	for _, c := range r.Consumers {
		if w.abandoned {
			return
		}
		pods := w.clusters.pods[c]
		if m, ok := pods[r.Name]; ok && !r.Served(m) && r.LastRun != nil && r.LastRun.Trigger != Create && !r.compromised(m) {
			w.violateLocked("at rest pods of consumer %s run with %s of role %s, which serves %s", c, m.Secret, r.Name, describe(r))
		}
	}
}

// running seeds what pods ran with before.
func (w *world) running(names ...string) {
	for _, name := range names {
		r := w.roles[name]
		for _, c := range r.Consumers {
			if w.clusters.pods[c] == nil {
				w.clusters.pods[c], w.clusters.secret[c] = map[string]kind.Material{}, map[string]kind.Material{}
			}
			w.clusters.pods[c][name] = r.With(version.Current).Material
			w.clusters.secret[c][name] = r.With(version.Current).Material
		}
	}
}

func (s shape) consumerScenarios() []scenario {
	keep := []string{"rotate", "rollback in grace", "cancel before promote", "retire early", "rollback after retire", "scheduled", "batch"}
	out := slices.DeleteFunc(everyScenario(), func(sc scenario) bool {
		return !slices.Contains(keep, sc.name) || sc.not != nil && sc.name != "batch" && sc.not(s)
	})
	if s.strategy == kind.KeyRing {
		return out
	}
	return append(out, scenario{name: "pods crash", seed: one, steps: func(w *world) {
		w.crashing("m1")
		w.rotate("a")
		w.idle("a")
	}, check: serves("a", "m0-a")}, scenario{name: "pods of one of a unit crash", seed: several, steps: func(w *world) {
		w.crashing("m1")
		w.rotate(w.several()...)
		w.idle(w.several()...)
	}, check: allEnded(RolledBack)})
}

func (w *world) crashing(secret string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clusters.bad[secret] = true
}

func consumed(s kind.Strategy) shape {
	return shape{name: "consumed " + string(s), strategy: s, nodes: 1, consumers: true}
}

// inConsumedWorld runs f with roles a and b that share a consumer.
func inConsumedWorld(t *testing.T, s shape, f func(*testing.T, *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, s, plan{name: t.Name()})
		several(w)
		w.run()
		defer w.close()
		f(t, w)
	})
}

// Five secrets of one service that are rotated together cost one restart of each of
// its consumers.
func TestOneRestartForManySecrets(t *testing.T) {
	for _, strategy := range []kind.Strategy{kind.Overlap, kind.Alternate, kind.Swap} {
		inConsumedWorld(t, consumed(strategy), func(t *testing.T, w *world) {
			w.rotate(w.several()...)
			w.idle(w.several()...)
			w.finish()
			require.Equal(t, 2, w.clusters.total, "two consumers, one restart each")
			for _, name := range w.several() {
				require.Equal(t, Completed, w.role(name).LastRun.State)
			}
		})
	}
}

// A consumer that fails is left as it is where the role says so, until somebody
// decides.
func TestHeldUntilSomebodyDecides(t *testing.T) {
	for _, back := range []bool{false, true} {
		inWorld(t, consumed(kind.Overlap), func(r *Role) { r.HoldOnFailure = true }, func(t *testing.T, w *world) {
			w.crashing("m1")
			id := w.rotate("a")
			w.until("it is held", time.Hour, func() bool { return w.roles["a"].Run != nil && w.roles["a"].Run.Held != "" })
			require.Equal(t, Held, w.role("a").Run.state())
			w.pass(24 * time.Hour)
			require.NotEmpty(t, w.role("a").Run.Held)
			for _, m := range []string{"m0-a", "m1"} {
				require.True(t, w.accepts("n1", "u-a", m), "both stay accepted")
			}
			if back {
				w.cancel(id)
			} else {
				w.mu.Lock()
				w.clusters.bad = map[string]bool{}
				w.mu.Unlock()
				require.NoError(t, w.do("resume", func(ctx context.Context, e *Engine) error { _, err := e.Resume(ctx, id); return err }))
			}
			w.idle("a")
			w.finish()
			want := map[bool]string{true: "m0-a", false: "m1"}[back]
			require.Equal(t, want, secret(w.role("a"), version.Current))
		})
	}
}

// A rotation that wants a consumer of another one waits for it, and is not rolled
// back for that.
func TestConsumersAreReserved(t *testing.T) {
	inConsumedWorld(t, consumed(kind.Overlap), func(t *testing.T, w *world) {
		for _, name := range w.several() {
			w.rotate(name)
		}
		w.idle(w.several()...)
		w.finish()
		for _, name := range w.several() {
			require.Equal(t, Completed, w.role(name).LastRun.State, fmt.Sprint(w.role(name).LastRun))
		}
	})
}

// Roles of several servers that go back together share a consumer's lane for a
// while, and never a call to a server.
func TestConsumersOfSeveralServers(t *testing.T) {
	for _, strategy := range []kind.Strategy{kind.Overlap, kind.Alternate, kind.Swap} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, consumed(strategy), plan{name: t.Name()})
			w.seed("a", func(r *Role) { r.Consumers = []string{"c1", "c2"} })
			w.seed("b", func(r *Role) { r.Consumers = []string{"c1", "c3"} })
			w.run()
			defer w.close()
			w.crashing("m1")
			w.rotate("a", "b")
			w.idle("a", "b")
			w.finish()
			for _, name := range []string{"a", "b"} {
				require.Equal(t, RolledBack, w.role(name).LastRun.State)
			}
		})
	}
}
