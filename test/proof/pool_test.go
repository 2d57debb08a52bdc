package proof_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
)

const (
	poolRotations = 100
	poolRoles     = 5
	poolClients   = 40
	poolRate      = 200  // logins a second, of all clients together
	poolLogins    = 8000 // at least, however slow the machine is: rotations go on until then
	poolGrace     = 2 * time.Second
)

// TestNoLoginIsRefused keeps a pool of clients logging in anew, 200 times a
// second over a cluster of six, through a hundred rotations of their passwords
// (through more, where they are slower than that).
// A client reads creds/ with a token that may do nothing else, again whenever
// half a grace period has passed, as the documentation tells it to.
func TestNoLoginIsRefused(t *testing.T) {
	v, set := sharedVault(t), sharedCluster(t)
	m := newMount(t, v, "pool")
	m.connect(t, "cluster", set)
	names := make([]string, poolRoles)
	for i := range names {
		names[i] = fmt.Sprintf("pool-%d", i)
		m.adopt(t, "cluster", set, names[i], map[string]any{"grace_period": poolGrace.String()})
	}
	token, err := v.TokenFor(t.Context(), "pool-client", `path "pool/creds/*" { capabilities = ["read"] }`)
	require.NoError(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	running, stop := context.WithCancel(ctx)
	pool := &pool{addrs: set.Addrs()}
	var clients sync.WaitGroup
	for i := range poolClients {
		c := &poolClient{pool: pool, mount: &mount{vault: v, path: m.path, c: v.Client()}, role: names[i%poolRoles]}
		c.mount.c.SetToken(token)
		clients.Go(func() { c.work(running) })
	}

	began := time.Now()
	var rotations errgroup.Group
	var rotated atomic.Int64
	for _, name := range names {
		rotations.Go(func() error {
			for n := 0; n < poolRotations/poolRoles || pool.logins.Load() < poolLogins; n++ {
				if err := m.rotateWhole(ctx, name); err != nil {
					return err
				}
				rotated.Add(1)
			}
			return nil
		})
	}
	err = rotations.Wait()
	took := time.Since(began)
	stop()
	clients.Wait()
	require.NoError(t, err)

	counts, err := m.rotations(ctx, "manual")
	require.NoError(t, err)
	figure(t, "%d rotations, %d logins, %d refused", counts["completed"], pool.logins.Load(), pool.refused.Load())
	rate := float64(pool.logins.Load()) / took.Seconds()
	t.Logf("%.0f logins a second for %.0f s; clients read creds/ %d times; %d logins came too late to count",
		rate, took.Seconds(), pool.reads.Load(), pool.late.Load())
	require.NoError(t, errors.Join(pool.problems...))
	require.Zero(t, pool.refused.Load())
	require.EqualValues(t, rotated.Load(), counts["completed"])
	require.GreaterOrEqual(t, counts["completed"], poolRotations)
	require.Less(t, pool.late.Load(), pool.logins.Load()/100, "the clients were too slow for this to show anything")
}

// rotateWhole rotates a role and waits until its previous password was retired
// by the end of the grace period.
func (m *mount) rotateWhole(ctx context.Context, role string) error {
	data, err := dataOf(m.write(ctx, "rotate/redis/"+role, nil))
	if err != nil {
		return err
	}
	id := data["rotation_id"].(string)
	return until(ctx, 3*time.Minute, func(ctx context.Context) error {
		data, err := m.read(ctx, "rotations/"+id)
		if err == nil && data["state"] != "completed" {
			err = fmt.Errorf("rotation %s of %s: %v", id, role, data)
		}
		return err
	})
}

// pool counts what its clients see.
type pool struct {
	addrs                  []string
	logins, refused, reads atomic.Int64
	late                   atomic.Int64 // see work
	mu                     sync.Mutex
	problems               []error
}

func (p *pool) report(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.problems) < 10 {
		p.problems = append(p.problems, err)
	}
}

type poolClient struct {
	pool           *pool
	mount          *mount
	role           string
	user, password string
	readAt         time.Time
}

func (c *poolClient) work(ctx context.Context) {
	tick := time.NewTicker(poolClients * time.Second / poolRate)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// A login that has begun is finished: the password it sent counts.
		err := login(context.WithoutCancel(ctx), c.pool.addrs[rand.IntN(len(c.pool.addrs))], c.credential)
		if errors.Is(err, errRefused) && time.Since(c.readAt) > poolGrace {
			// The machine kept the client from sending what it had read for longer
			// than it is promised to be accepted.
			c.pool.late.Add(1)
			continue
		}
		c.pool.logins.Add(1)
		if err != nil {
			c.pool.refused.Add(1)
			c.pool.report(fmt.Errorf("%s, read %s ago: %w", c.role, time.Since(c.readAt), err))
		}
	}
}

// credential reads creds/ again when half a grace period is about to have
// passed since it did so last.
func (c *poolClient) credential() (user, password string, err error) {
	if time.Since(c.readAt) > poolGrace/2-100*time.Millisecond {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		at := time.Now()
		data, err := c.mount.read(ctx, "creds/"+c.role)
		if err != nil {
			return "", "", err
		}
		c.pool.reads.Add(1)
		c.user, c.password, c.readAt = data["username"].(string), data["password"].(string), at
	}
	return c.user, c.password, nil
}
