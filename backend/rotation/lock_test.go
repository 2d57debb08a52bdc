package rotation

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestLocksExcludeByName(t *testing.T) {
	l := newLocks()
	var wg sync.WaitGroup
	count := map[string]int{}
	for i := range 200 {
		name := fmt.Sprint(i % 5)
		wg.Go(func() {
			if l.lock(t.Context(), name) == nil {
				if name == "0" {
					count[name]++ // the race detector watches
				}
				l.unlock(name)
			}
		})
	}
	wg.Wait()
	require.Equal(t, 40, count["0"])
	require.Empty(t, l.held, "no lock is left behind")
}

func TestLockGivesUpWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocks()
		require.NoError(t, l.lock(t.Context(), "a"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, l.lock(ctx, "a"), context.DeadlineExceeded)
		_, err := l.lockAll(ctx, []string{"b", "a", "0"})
		require.Error(t, err)
		l.unlock("a")
		require.Empty(t, l.held, "what was taken on the way is given back")
	})
}

// Batches that overlap, in any order and with repeats, never wait for each other
// in a circle.
func TestLockAllInAnyOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocks()
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				names := []string{"a", "b", "c", "a"}
				if i%2 == 0 {
					names = []string{"c", "b", "a", "c"}
				}
				unlock, err := l.lockAll(t.Context(), names)
				if err != nil {
					t.Error(err)
					return
				}
				<-time.After(time.Millisecond)
				unlock()
			})
		}
		wg.Wait()
		require.Empty(t, l.held)
	})
}
