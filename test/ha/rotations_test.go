package ha_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// drivers ask for the next rotation of each role as soon as the last one is over,
// at any node, and ask again under the same idempotency_key when they hear nothing.
type drivers struct {
	*stage
	stopping atomic.Bool
	running  sync.WaitGroup

	mu sync.Mutex
	// ids are the rotations that were answered with, by key. More than one is one
	// too many.
	ids       map[string][]string
	completed []time.Time // when they were seen to be
	repeated  int         // requests that were made again
	problems  []error
}

func newDrivers(s *stage) *drivers { return &drivers{stage: s, ids: map[string][]string{}} }

func (d *drivers) start(ctx context.Context, all *sync.WaitGroup) {
	for _, r := range d.roles {
		d.running.Add(1)
		all.Go(func() {
			defer d.running.Done()
			for n := 1; ctx.Err() == nil && !d.stopping.Load(); n++ {
				if err := d.rotate(ctx, r, fmt.Sprintf("%s-%d", r.name, n)); err != nil && ctx.Err() == nil {
					d.report(err)
					return
				}
				wait(ctx, rand.N(500*time.Millisecond))
			}
		})
	}
}

func (d *drivers) stop() { d.stopping.Store(true) }

// wait returns when every rotation that was asked for has ended.
func (d *drivers) wait(ctx context.Context) error {
	ended := make(chan struct{})
	go func() { d.running.Wait(); close(ended) }()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *drivers) report(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.problems = append(d.problems, err)
}

// idText is an id in the sentence of a refusal.
var idText = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// rotate asks for a rotation until there is an answer, and returns when it has
// ended.
func (d *drivers) rotate(ctx context.Context, r *role, key string) error {
	id := ""
	err := until(ctx, 5*time.Minute, func(ctx context.Context) (err error) {
		id, err = d.request(ctx, r, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("rotating %s: %w", r.name, err)
	}
	return untilEvery(ctx, 5*time.Minute, 300*time.Millisecond, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		data, err := dataOf(d.root[d.anybody()].Logical().ReadWithContext(ctx, mountPath+"/rotations/"+id))
		if err != nil {
			return fmt.Errorf("rotation %s of %s: %w", id, r.name, err)
		}
		state := rotation.State(fmt.Sprint(data["state"]))
		if !state.Ended() {
			return fmt.Errorf("rotation %s of %s is %s in %v: %v", id, r.name, state, data["phase"], data["summary"])
		}
		if state == rotation.Completed {
			d.mu.Lock()
			d.completed = append(d.completed, time.Now())
			d.mu.Unlock()
		}
		return nil
	})
}

// request asks once. A node that was cut off may keep it waiting for long: then
// somebody else is asked, too.
func (d *drivers) request(ctx context.Context, r *role, key string) (id string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	data, err := dataOf(d.root[d.anybody()].Logical().WriteWithContext(ctx, mountPath+"/rotate/"+r.kind+"/"+r.name,
		map[string]any{"idempotency_key": key}))
	var refusal *api.ResponseError
	switch {
	case err == nil:
		id, _ = data["rotation_id"].(string)
	case errors.As(err, &refusal) && refusal.StatusCode == 400:
		id = idText.FindString(err.Error()) // it failed
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if id == "" {
		d.repeated++
		return "", errors.Join(errors.New("no rotation was answered with"), err)
	}
	if !slices.Contains(d.ids[key], id) {
		d.ids[key] = append(d.ids[key], id)
	}
	return id, nil
}

// awaitCompleted returns when a rotation was seen to be complete after a time, and
// when that was.
func (d *drivers) awaitCompleted(ctx context.Context, after time.Time) (first time.Time, err error) {
	err = until(ctx, 5*time.Minute, func(context.Context) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		if len(d.problems) > 0 {
			return errors.Join(d.problems...)
		}
		for _, at := range d.completed {
			if at.After(after) {
				first = at
				return nil
			}
		}
		return errors.New("no rotation completes")
	})
	return first, err
}
