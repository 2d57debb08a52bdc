package rotation

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// ConsumerReport is how a consumer of a role stands.
type ConsumerReport struct {
	Consumer string
	Seen     *seen.Consumer
}

// lookTimeout bounds a look at a role, its target and all of its consumers.
const lookTimeout = 25 * time.Second

// LookAt shows what the target of a role accepts, who is logged in with the previous
// version, and how its consumers stand. All of it is asked for at once, nothing is
// changed, and what does not answer in time says so.
func (e *Engine) LookAt(ctx context.Context, name string) (Report, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	r, err := e.st.Role(ctx, name)
	if err != nil {
		return Report{}, err
	}
	if r == nil {
		return Report{}, fmt.Errorf("role %q: %w", name, ErrNotFound)
	}
	var rep Report
	consumers := make([]ConsumerReport, len(r.Consumers))
	var failed error
	g := errgroup.Group{}
	g.Go(func() error { rep, failed = e.examineSessions(ctx, r); return nil })
	for i, c := range r.Consumers {
		g.Go(func() error {
			consumers[i] = ConsumerReport{Consumer: c, Seen: e.lookAtConsumer(ctx, r, c)}
			return nil
		})
	}
	_ = g.Wait()
	rep.Consumers = consumers
	return rep, failed
}

// lookAtConsumer has a consumer looked at; what panics there is its own matter.
func (e *Engine) lookAtConsumer(ctx context.Context, r *Role, consumer string) *seen.Consumer {
	d := Delivery{Consumer: consumer}
	e.addShown(&d, r)
	var out *seen.Consumer
	err := e.guardedPublication(func() (err error) {
		if d.ID, d.Since, err = e.st.broughtBy(ctx, r, consumer); err == nil {
			out = e.o.Consumers.Look(ctx, d)
		}
		return err
	})
	if err != nil {
		return &seen.Consumer{At: time.Now().UTC(), Error: clip(err.Error())}
	}
	return out
}

// broughtBy is the rotation that made what a role serves, and when the Secrets of a
// consumer were seen to have it; zero where that is not kept.
func (st *Store) broughtBy(ctx context.Context, r *Role, consumer string) (rotation string, at time.Time, err error) {
	v := r.With(version.Current)
	if v == nil {
		return "", time.Time{}, nil
	}
	var last *seen.Consumer // who went back with others begins anew, and has gone both ways
	for _, way := range []string{wayBack, WayForward} {
		p, err := storage.Get[seen.Consumer](ctx, st.s, proofKey(v.Rotation, way, string(Sync), consumer))
		if err != nil {
			return "", time.Time{}, err
		}
		if p != nil && p.Done && (last == nil || p.At.After(last.At)) {
			last = p
		}
	}
	if last != nil {
		at = last.Changed
	}
	return v.Rotation, at, nil
}
