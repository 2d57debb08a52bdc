package rotation

import (
	"context"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// How long rotations are kept, and how many.
const (
	retainAge   = 90 * 24 * time.Hour
	retainCount = 10_000
	retainEvery = time.Hour
)

// retain forgets old rotations and tombstones. It runs in the background, an
// hour after it last did; what it does not get to is left for the next time.
func (e *Engine) retain() {
	defer e.wake(laneRetention, laneRetention, time.Now().Add(retainEvery))
	ctx, cancel := context.WithTimeout(e.ctx, 5*time.Minute)
	defer cancel()
	if err := e.retainRotations(ctx, time.Now()); err != nil {
		e.o.Logger.Warn("old rotations cannot be removed; trying again later", "error", err)
	}
	if err := e.retainRequests(ctx, time.Now()); err != nil {
		e.o.Logger.Warn("old requests cannot be removed; trying again later", "error", err)
	}
	if err := e.retainTombstones(ctx, time.Now()); err != nil {
		e.o.Logger.Warn("old tombstones cannot be removed; trying again later", "error", err)
	}
}

func (e *Engine) retainRotations(ctx context.Context, now time.Time) error {
	ids, err := e.st.Headers(ctx)
	if err != nil {
		return err
	}
	for i, id := range ids {
		if len(ids)-i <= retainCount && !startedBefore(id, now.Add(-retainAge)) {
			return nil // ids sort by time: the rest is younger
		}
		h, err := e.st.Header(ctx, id)
		if err != nil {
			return err
		}
		if h == nil || h.State == "" {
			continue
		}
		if with, err := e.st.ofParent(ctx, h); err != nil || with {
			if err != nil {
				return err
			}
			continue
		}
		if err := e.st.forgetAll(ctx, h); err != nil {
			return err
		}
	}
	return nil
}

// retainRequests forgets requests by their own age: one that joined a rotation,
// or came to none, stands in no header and goes with none.
func (e *Engine) retainRequests(ctx context.Context, now time.Time) error {
	keys, err := e.st.s.List(ctx, storage.Request)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelStorage)
	for _, key := range keys {
		g.Go(func() error {
			entry, err := e.st.request(ctx, storage.Request+key)
			if err != nil || entry == nil || now.Sub(entry.At) <= retainAge {
				return err
			}
			return e.st.s.Delete(ctx, storage.Request+key)
		})
	}
	return g.Wait()
}

func startedBefore(id string, t time.Time) bool {
	u, err := uuid.Parse(id)
	if err != nil {
		return false
	}
	sec, nsec := u.Time().UnixTime()
	return time.Unix(sec, nsec).Before(t)
}

func (e *Engine) retainTombstones(ctx context.Context, now time.Time) error {
	names, err := e.st.s.List(ctx, storage.Deleted)
	if err != nil {
		return err
	}
	for _, name := range names {
		t, err := e.st.Tombstone(ctx, name)
		if err != nil {
			return err
		}
		if t != nil && now.Sub(t.Deleted) > tombstoneAge {
			if err := e.st.dropTombstone(ctx, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (st *Store) dropTombstone(ctx context.Context, name string) error {
	return st.s.Delete(ctx, storage.Deleted+name)
}

func openKey(id string) string { return storage.Open + id }
