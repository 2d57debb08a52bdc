package rotation

import (
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
)

// A rotation is looked at while its roles end one after the other, as whoever
// resumes it does: it is closed when the last one has, and not touched before.
func TestCloseWhileRolesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, overlap(1), plan{name: t.Name()})
		several(w)
		w.run()
		defer w.close()
		id := w.rotate(w.several()...)
		e := w.instance().engine
		for w.role("a").Run != nil || w.role("b").Run != nil || w.role("c").Run != nil {
			for range 100 {
				require.NoError(t, e.closeRotation(id))
			}
			w.pass(callTime)
		}
		w.finish()
		for _, name := range w.several() {
			require.Equal(t, Completed, w.role(name).LastRun.State)
		}
	})
}
