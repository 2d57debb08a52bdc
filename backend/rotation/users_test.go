package rotation

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// TestLooksAreApart: roles whose connection cannot be read hold up no other.
func TestLooksAreApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, shapeOf(t, []string{"strategy=overlap"}), plan{})
		w.run()
		defer w.close()
		w.seed("a", nil)
		w.seed("b", func(r *Role) { r.Connection = "bad" })
		e := w.instance().engine
		e.o.Generation = func(_ context.Context, c string) (int, error) {
			if c == "bad" {
				return 0, errInjected
			}
			return 0, nil
		}
		for _, name := range []string{"a", "b"} {
			require.NoError(t, e.Update(t.Context(), name, func(r *Role) error {
				r.SetAutoReconcile(true, time.Now())
				r.LookAt = time.Now().Add(10 * time.Second)
				return nil
			}))
		}
		w.tamper("n1", "u-a")
		w.pass(30 * time.Second)
		require.NotNil(t, w.role("a").LastRun)
		require.Equal(t, Reconcile, w.role("a").LastRun.Trigger)
		require.False(t, w.role("b").LookAt.After(time.Now()), "it was not looked at")
	})
}
