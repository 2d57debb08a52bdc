package rotation

import (
	"context"
	"time"

	"github.com/google/uuid"

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
		if err := e.st.forget(ctx, h); err != nil {
			return err
		}
	}
	return nil
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
