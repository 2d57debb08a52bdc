package rotation

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

var keysOnly = shape{name: "targetless", targetless: true, strategy: kind.Swap}

// inCrowd runs f with so many roles that a request for all has children.
func inCrowd(t *testing.T, n int, f func(t *testing.T, w *world, names []string)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, keysOnly, plan{name: t.Name()})
		names := make([]string, n)
		for i := range names { // so long that a child holds 132 of them
			names[i] = fmt.Sprintf("r%03d-%s", i, strings.Repeat("n", 118))
			w.seed(names[i], nil)
		}
		require.Len(t, chunks(names)[0], 133)
		w.run()
		defer w.close()
		w.pass(time.Second)
		f(t, w, names)
	})
}

// Each write of a large request before the first role's fails, crashes or is
// answered with an error though it was applied, and nobody sends the request
// again: either nothing has begun, or every role is rotated once, under a parent
// that lists it and ends.
func TestLargeRequestThatIsCutOff(t *testing.T) {
	for _, what := range storageWriteFaults {
		for _, at := range []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 100, 141, 142, 143, 144, 145, 300} {
			if what == readOnly && at > 8 {
				continue // so many roles, tried for a minute, look like a hot loop
			}
			inCrowd(t, 140, func(t *testing.T, w *world, names []string) {
				w.failWrite(at, what)
				h, err := w.instance().engine.Begin(t.Context(), Request{Trigger: Manual, Roles: names, Keys: newKeys()})
				w.pass(2 * time.Hour)
				w.finish()
				ids, lerr := NewStore(&w.inner).Headers(t.Context())
				require.NoError(t, lerr)
				if len(ids) == 0 {
					require.Error(t, err)
					for _, n := range names {
						require.Nil(t, w.role(n).LastRun)
					}
				} else {
					require.Len(t, ids, 3)
					for _, n := range names {
						require.Equal(t, 2, w.role(n).Last, "each role was rotated once")
					}
					if err == nil {
						require.Contains(t, ids, h.ID)
					}
				}
				left, lerr := w.inner.List(t.Context(), storage.Plan)
				require.NoError(t, lerr)
				require.Empty(t, left)
			})
		}
	}
}

// failWrite lets the n-th write from now meet a fault, whatever is read between.
func (w *world) failWrite(n int, what fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeFault, w.writeFaultIn, w.writeFaultAt = what, n, ""
}

// failWhere lets the n-th write from now under a prefix fail.
func (w *world) failWhere(prefix string, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeFault, w.writeFaultIn, w.writeFaultAt = storageFails, n, prefix
}

// days pass; what is done every hour in them is no hot loop.
func (w *world) days(n int) {
	for range n {
		w.pass(24 * time.Hour)
		w.mu.Lock()
		w.ops[atStorage] = 0
		w.mu.Unlock()
	}
}

// A parent tells of the roles whose children have not begun, and closes with the
// last of them.
func TestParentOfChildrenThatAreMissing(t *testing.T) {
	inCrowd(t, 290, func(t *testing.T, w *world, names []string) {
		w.setInactive(true)
		req := Request{Trigger: Manual, Roles: names, Keys: newKeys()}
		w.failWhere(storage.Rotation, 2) // the first child's
		_, err := w.instance().engine.Begin(t.Context(), req)
		require.Error(t, err)
		st := NewStore(&w.inner)
		ids, err := st.Headers(t.Context())
		require.NoError(t, err)
		require.Len(t, ids, 1, "the parent is first")
		h, err := st.Header(t.Context(), ids[0])
		require.NoError(t, err)
		require.Len(t, h.Children, 3)
		require.Empty(t, h.State)
		parts, err := st.AllParts(t.Context(), h)
		require.NoError(t, err)
		require.Len(t, parts, 290)
		require.True(t, strings.HasSuffix(parts[0].Line(), "not started"), parts[0].Line())
		require.Equal(t, Running, StateOf(h, parts))

		again, err := w.instance().engine.Begin(t.Context(), req)
		require.NoError(t, err)
		require.Equal(t, h.ID, again.ID)
		require.Equal(t, h.Children, again.Children)
		w.setInactive(false)
		w.finish()
		h, err = st.Header(t.Context(), ids[0])
		require.NoError(t, err)
		require.Equal(t, Completed, h.State)
		require.False(t, h.Finished.IsZero())

		// Ids never go back in time, and other tests were further on in theirs.
		sec, nsec := uuid.MustParse(h.Children[2]).Time().UnixTime()
		later := time.Unix(sec, nsec).Add(retainAge + time.Hour)
		e := w.instance().engine
		require.NoError(t, e.retainRotations(t.Context(), later))
		require.NoError(t, e.retainRequests(t.Context(), later))
		for _, prefix := range []string{storage.Rotation, storage.Evidence, storage.Request} {
			left, err := w.inner.List(t.Context(), prefix)
			require.NoError(t, err)
			require.Empty(t, left, prefix)
		}
	})
}

// Cancelling a parent whose children are missing begins none of them.
func TestCancelOfAParentWithMissingChildren(t *testing.T) {
	inCrowd(t, 290, func(t *testing.T, w *world, names []string) {
		w.setInactive(true)
		req := Request{Trigger: Manual, Roles: names, Keys: newKeys()}
		w.failWhere(storage.Rotation, 3) // the second child's
		_, err := w.instance().engine.Begin(t.Context(), req)
		require.Error(t, err)
		h, err := w.instance().engine.Repeated(t.Context(), req)
		require.NoError(t, err)
		for range 2 {
			_, err = w.instance().engine.Cancel(t.Context(), h.ID, "")
			require.NoError(t, err)
		}
		w.setInactive(false)
		w.finish()
		for i, n := range names {
			if i >= 133 {
				require.Nil(t, w.role(n).LastRun, n)
			} else {
				require.Equal(t, Cancelled, w.role(n).LastRun.State)
			}
		}
		_, err = w.instance().engine.Cancel(t.Context(), h.ID, "")
		require.NoError(t, err)
	})
}

// Of roles that are all taken no rotation is stored; and of a child whose roles
// are all taken it is said so.
func TestLargeRequestForTakenRoles(t *testing.T) {
	inCrowd(t, 140, func(t *testing.T, w *world, names []string) {
		w.setInactive(true)
		e := w.instance().engine
		_, err := e.Begin(t.Context(), Request{Trigger: Manual, Roles: names[133:]})
		require.NoError(t, err)
		h, err := e.Begin(t.Context(), Request{Trigger: Manual, Roles: names})
		require.NoError(t, err)
		parts, err := e.st.AllParts(t.Context(), h)
		require.NoError(t, err)
		require.Len(t, parts, 133)
		require.Equal(t, names[133:], h.Running)
		req := Request{Trigger: Manual, Roles: names, Keys: newKeys()}
		var c *Conflict
		_, err = e.Begin(t.Context(), req)
		require.ErrorAs(t, err, &c)
		again, err := e.Repeated(t.Context(), req)
		require.NoError(t, err)
		require.Nil(t, again)
		requests, err := w.inner.List(t.Context(), storage.Request)
		require.NoError(t, err)
		require.Empty(t, requests, "a request that came to nothing leaves nothing")
		w.setInactive(false)
		w.finish()
	})
}

// Eight connections that hang cost one call's time, not eight, and the ninth
// answers; more roles than a batch are asked in batches.
func TestExamineAsksAllLanesAtOnce(t *testing.T) {
	inWorld(t, overlap(1), nil, func(t *testing.T, w *world) {
		e := w.instance().engine
		good := e.o.Target
		e.o.Target = func(k, connection string) kind.Target {
			if connection == "c" {
				return good(k, connection)
			}
			return silent{}
		}
		roles := []*Role{w.role("a")}
		for i := range 8 {
			r := w.newRole(fmt.Sprintf("bad%d", i))
			r.Connection = r.Name
			r.Spec.Username = ""
			roles = append(roles, r)
		}
		began := time.Now()
		reports, err := e.examine(t.Context(), roles)
		require.NoError(t, err)
		require.LessOrEqual(t, time.Since(began), kind.CallTimeout+time.Second)
		require.NoError(t, reports[0].Err)
		for _, rep := range reports[1:] {
			require.Error(t, rep.Err)
		}

		w.ops[atTarget] = 0
		roles = nil
		for i := range 2*maxBatch + 1 {
			r := w.newRole(fmt.Sprintf("r%05d", i))
			roles = append(roles, r)
		}
		reports, err = e.examine(t.Context(), roles)
		require.NoError(t, err)
		require.Len(t, reports, len(roles))
		require.Equal(t, 2*3, w.ops[atTarget], "preflight and probe of three batches")
		require.False(t, slices.ContainsFunc(reports, func(r Report) bool { return len(r.Nodes) == 0 }))
		w.finish()
	})
}
