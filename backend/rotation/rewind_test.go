package rotation

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// rewind is a snapshot of storage that is restored: taken after write number at, and
// restored after write number back.
type rewind struct {
	at, back int
	synced   bool   // Kubernetes Secrets get what is served by then, before the engine is there
	then     string // what happens next: somebody cancels, or the first node is down for a while

	writes  int
	snap    map[string][]byte
	due     bool
	done    bool
	watches bool // nobody has said yet that what consumers have may be taken away
	// real is what was served and accepted when it was restored, and is not stored any more.
	real []kind.Material
	// number is that of what the snapshot serves.
	number int
}

// wrote counts a write, and reports whether Vault stops for the snapshot. w.mu is held.
func (r *rewind) wrote(w *world) bool {
	r.writes++
	if r.writes == r.at {
		r.snap = map[string][]byte{}
		w.eachEntry(func(key string, value []byte) { r.snap[key] = value })
	}
	r.due = r.due || r.at > 0 && r.writes == r.back
	return r.due && !r.done
}

func (w *world) eachEntry(do func(key string, value []byte)) {
	keys, err := logical.CollectKeys(context.Background(), &w.inner)
	if err != nil {
		w.violateLocked("list: %v", err)
	}
	for _, key := range keys {
		if e, err := w.inner.Get(context.Background(), key); err == nil && e != nil {
			do(key, slices.Clone(e.Value))
		}
	}
}

// restored puts the snapshot in the place of storage. The last call of the engine that
// was stopped for it has landed, or never will.
func (w *world) restored() {
	if !w.rewind.due || w.rewind.done {
		return
	}
	w.pass(30 * time.Second)
	w.mu.Lock()
	defer w.mu.Unlock()
	ctx, r := context.Background(), &w.rewind
	var real []kind.Material
	for _, role := range w.roles {
		for _, stage := range []version.Stage{version.Current, version.Previous} {
			if v := role.With(stage); v != nil {
				real = append(real, v.Material)
			}
		}
	}
	w.eachEntry(func(key string, _ []byte) { _ = w.inner.Delete(ctx, key) })
	w.roles, w.tombs, w.doc = map[string]*Role{}, map[string]*Tombstone{}, nil
	w.served, w.backward = map[string]kind.Material{}, map[string]bool{}
	for key, value := range r.snap {
		_ = w.inner.Put(ctx, &logical.StorageEntry{Key: key, Value: value})
		if name, ok := strings.CutPrefix(key, storage.Role); ok {
			w.roles[name] = &Role{}
			if err := jsonutil.DecodeJSON(value, w.roles[name]); err != nil {
				w.violateLocked("role %s: %v", name, err)
			}
			w.roles[name].Name = name
			if run := w.roles[name].Run; run != nil && r.then == "cancel" { // before anything else happens
				run.Recall = "somebody has seen what was restored"
				raw, err := jsonutil.EncodeJSON(w.roles[name])
				if err != nil {
					w.violateLocked("role %s: %v", name, err)
				}
				_ = w.inner.Put(ctx, &logical.StorageEntry{Key: key, Value: raw})
			}
		}
		if strings.HasPrefix(key, storage.Document) {
			w.doc = &publish.Document{}
			if err := jsonutil.DecodeJSON(value, w.doc); err != nil {
				w.violateLocked("document: %v", err)
			}
		}
	}
	for _, name := range w.order { // which is not the engine's any more
		for user, all := range w.nodes[name].accepts {
			w.foreign[user] = append(w.foreign[user], all...)
		}
	}
	for _, role := range w.roles {
		for _, user := range role.Spec.Owns() {
			w.tampered[user] = true
		}
	}
	for _, m := range real {
		taken := !slices.ContainsFunc(w.order, func(name string) bool { return !w.nodes[name].takes(m) })
		if taken && !slices.ContainsFunc(w.roles["a"].All(), m.Same) {
			r.real = append(r.real, m)
		}
	}
	if r.synced {
		for _, secret := range w.clusters.secret {
			for name := range secret {
				secret[name] = w.roles[name].With(version.Current).Material
			}
		}
	}
	r.done, r.watches, r.number = true, true, numberOf(w.roles["a"].With(version.Current))
	w.nodes[w.order[0]].down = r.then == "down"
	w.logLocked("RESTORED: %s; accepted: %v", describe(w.roles["a"]), w.accepting())
}

func (w *world) accepting() (out []string) {
	for _, name := range w.order {
		for user, all := range w.nodes[name].accepts {
			for _, m := range all {
				out = append(out, name+" "+user+" "+m.Secret)
			}
		}
	}
	slices.Sort(out)
	return out
}

// checkRewound: what is served by nobody but by what the snapshot does not know stays, and
// what is served from now on is accepted.
func (w *world) checkRewound() {
	if !w.rewind.watches {
		return
	}
	current := w.roles["a"].With(version.Current)
	for _, name := range w.order {
		interval := w.shape.strategy == kind.Swap
		if current.Number != w.rewind.number && !interval && !w.nodes[name].down && !w.nodes[name].takes(current.Material) {
			w.violateLocked("node %s refuses version %d, which is served anew", name, current.Number)
		}
	}
	for _, m := range w.rewind.real {
		for _, name := range w.order {
			if !w.nodes[name].takes(m) {
				w.violateLocked("node %s refuses %s, which was served when the snapshot was restored", name, m.Secret)
			}
		}
	}
}

var allSnapshots = flag.Bool("snapshots", false, "restore every snapshot at every later write, and not some of them")

// story is what people do, until the snapshot is restored.
type story struct {
	name  string
	steps []func(*world)
}

// then waits for something, or the snapshot.
func (w *world) then(cond func(*Role) bool) {
	w.until("the next step of the story", 6*time.Hour, func() bool {
		r := w.roles["a"]
		return w.rewind.due || r != nil && cond(r)
	})
}

func inPhase(p Phase) func(*world) {
	return func(w *world) {
		w.then(func(r *Role) bool { return r.Run == nil || r.Run.Phase == p || r.Run.Back })
	}
}

func untilIdle(w *world) { w.then(func(r *Role) bool { return r.Run == nil }) }

func rotateOnce(w *world) { w.rotate("a") }

var stories = []story{
	{"two rotations", []func(*world){rotateOnce, untilIdle, rotateOnce, untilIdle}},
	{"taken back, then rotated", []func(*world){rotateOnce, inPhase(Grace), func(w *world) { w.rollBack("a") }, untilIdle, rotateOnce, untilIdle}},
}

// played is a story with a snapshot; it returns the number of writes.
func played(t *testing.T, s shape, tale story, re rewind) (writes int) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, s, plan{name: fmt.Sprintf("%s/%s/snapshot %d of %d %s", s.name, tale.name, re.at, re.back, re.then), off: true})
		w.seed("a", nil)
		w.rewind = re
		w.run()
		defer w.close()
		for _, step := range tale.steps {
			if step(w); w.isDue() {
				break
			}
		}
		w.mu.Lock()
		writes = w.rewind.writes
		taken := w.rewind.snap != nil
		w.mu.Unlock()
		if !taken { // nobody asked for it, or this has written less than another time
			return
		}
		if !w.isDue() { // when all is over
			w.mu.Lock()
			w.rewind.due = true
			w.mu.Unlock()
			w.instance().kill()
		}
		w.until("the snapshot", time.Minute, func() bool { return w.rewind.done })
		w.pass(5 * time.Minute)
		w.setDown(w.order[0], false)
		w.pass(6 * time.Hour)

		// Nobody has to do anything but where the target says something else.
		r := w.role("a")
		w.mu.Lock()
		w.rewind.watches = false
		w.mu.Unlock()
		if r.Run != nil {
			require.NotEmpty(t, r.Run.Error, "it says what it waits for: %s", describe(r))
			if r.Run.Doubt || r.Run.Phase == Grace {
				w.reconcile("a")
			}
			w.idle("a")
		}
		if r = w.role("a"); r.LastRun == nil || r.LastRun.State != Completed {
			w.reconcile("a")
			w.idle("a")
		}
		w.reconcile("a") // what another life has left goes
		w.idle("a")
		r = w.role("a")
		for _, name := range w.order {
			if got := w.accepting(); !w.accepts(name, r.inUse(), secret(r, version.Current)) {
				w.violate("node %s refuses what is served at the end: %s, %v", name, describe(r), got)
			}
		}
	})
	return writes
}

func (w *world) isDue() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rewind.due
}

// A snapshot that is restored, of any moment of a rotation and at any later one, takes
// nothing from anybody: what pods run with goes on being accepted, and what was served
// and nobody has stored any more stays.
func TestRestoredSnapshots(t *testing.T) {
	for _, name := range []string{"overlap", "swap", "alternate", "document", "consumed", "consumed alternate"} {
		s := shapes[slices.IndexFunc(shapes, func(s shape) bool { return s.name == name })]
		for _, tale := range stories {
			t.Run(s.name+"/"+tale.name, func(t *testing.T) {
				t.Parallel()
				total, tries, every := played(t, s, tale, rewind{}), 0, 29*stride
				switch {
				case *allSnapshots:
					every = 1
				case s.consumers: // these write more, and all the time
					every *= 3
				}
				for at := 1; at <= total; at++ {
					for back := at + 1; back <= total+1; back++ {
						for i, then := range []string{"", "cancel", "down"} {
							if (5*at+back+i)%every != 0 {
								continue
							}
							tries++
							played(t, s, tale, rewind{at: at, back: back, synced: (at+back)%2 == 0, then: then})
							if t.Failed() {
								return
							}
						}
					}
				}
				t.Logf("%d writes, %d snapshots restored", total, tries)
			})
		}
	}
}
