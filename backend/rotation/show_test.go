package rotation

import (
	"context"
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
)

// publishTo is a secret of another mount, as publish.Remote writes it: a write
// names the version it was made from, and one that nobody waits for any more lands
// if nobody wrote meanwhile. The secret is w.doc, with a field that belongs to
// somebody else.
func (i *instance) publishTo(ctx context.Context, _ publish.Place, fields map[string]string) error {
	w := i.w
	what, err := (&fakeTarget{w: w, i: i}).enter(ctx, "publish")
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch what {
	case rejects, rejectsOne, unsavedOne:
		return kind.Definitely("injected: refused by policy")
	case oneNodeOnly:
		return errInjected
	case landsLate, landsAfter:
		deadline, _ := ctx.Deadline()
		w.landPlaceLater(deadline.Add(Skew-time.Millisecond), fields)
		if what == landsAfter {
			i.kill()
		}
		return errInjected
	}
	w.writePlace(fields)
	switch what {
	case diesBetween, crashOnReturn:
		i.kill()
	case replyLost, unsavedLost:
		return errInjected
	}
	return nil
}

func (i *instance) reach(ctx context.Context, _ *Role) error {
	what, err := (&fakeTarget{w: i.w, i: i}).enter(ctx, "preflight")
	if what == rejects {
		return kind.Definitely("injected: not allowed")
	}
	return err
}

const foreignField = "theirs"

func (w *world) writePlace(fields map[string]string) {
	next := &publish.Document{Name: "place", Body: map[string]string{foreignField: "kept"}}
	if w.doc != nil {
		next.Version, next.Body = w.doc.Version, maps.Clone(w.doc.Body)
	}
	maps.Copy(next.Body, fields)
	if w.doc == nil || !maps.Equal(next.Body, w.doc.Body) {
		next.Version++
	}
	w.logLocked("place  %v", fields)
	if next.Body[foreignField] != "kept" {
		w.violateLocked("a field of somebody else is lost: %v", next.Body)
	}
	w.noteShow(next)
	w.checkLocked()
}

func (w *world) landPlaceLater(at time.Time, fields map[string]string) {
	from := 0
	if w.doc != nil {
		from = w.doc.Version
	}
	w.over.Add(1)
	go func() {
		defer w.over.Done()
		w.pass(time.Until(at))
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.doc == nil && from == 0 || w.doc != nil && w.doc.Version == from {
			w.writePlace(fields)
		}
	}()
}

// A Vault that hangs costs a batch one call's time, however many roles would be
// published there.
func TestReachHangs(t *testing.T) {
	inWorld(t, shape{name: "place", strategy: kind.Overlap, nodes: 1, place: true}, nil, func(t *testing.T, w *world) {
		names := []string{"a"}
		for i := range 40 {
			names = append(names, fmt.Sprintf("b%d", i))
			w.seed(names[i+1], nil)
		}
		w.instance().engine.o.Reach = func(ctx context.Context, _ *Role) error {
			<-ctx.Done()
			return kind.CannotReach(ctx.Err())
		}
		began := time.Now()
		w.rotate(names...)
		for _, name := range names {
			w.idle(name)
			require.Equal(t, Failed, w.role(name).LastRun.State)
		}
		require.Less(t, time.Since(began), 3*kind.CallTimeout+preflightTimeout)
	})
}
