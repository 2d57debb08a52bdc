package rotation

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// A write is answered with an error and applied a second later; in between
// somebody asks for the way back. Whatever was decided from what stood there
// before must not overwrite what the write has made true: the model's two
// counterexamples to "after an error, read again" (docs/model, SEEN), at every
// write of a rotation and at every moment of that second.
func TestLateWriteMeetsCancel(t *testing.T) {
	for n := 1; n < 40; n++ {
		for after := 50 * time.Millisecond; after < 1200*time.Millisecond; after += 150 * time.Millisecond {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, overlap(2), plan{name: t.Name()})
				w.seed("a", nil)
				w.run()
				defer w.close()
				w.pass(time.Second)
				w.nextWrite(n, appliedLate)
				req := Request{Trigger: Manual, Roles: []string{"a"}}
				_, _ = w.instance().engine.Begin(context.Background(), req)
				w.pass(after)
				_, _ = w.instance().engine.RollBack(context.Background(), "a", Request{})
				w.idle("a")
				w.finish()
			})
		}
	}
}
