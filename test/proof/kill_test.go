package proof_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	killGrace = 2 * time.Second
	killRoles = 24
)

// TestPluginKilled kills the plugin's process, at random moments, while its
// roles rotate without a pause. It mostly waits, for a process to start or a
// late call to be out of the way, and so does TestVaultKilled: they share the
// time, and a cluster.
func TestPluginKilled(t *testing.T) {
	t.Parallel()
	v := sharedVault(t)
	k := newKilling(t, v, "plugin-kill")
	k.run(t, func(context.Context) error {
		_, err := v.KillPlugin()
		return err
	})
	figure(t, "plugin killed %d times, %d rotations, %d lost", *kills, k.completed, len(k.lost))
	k.verdict(t)
}

// TestVaultKilled does the same to Vault itself, with its data in raft on disk.
func TestVaultKilled(t *testing.T) {
	t.Parallel()
	v, err := startVault(servers.VaultOptions{NoMount: true, Raft: true, RawStorage: true, Dir: filepath.Join(shared.dir, "raft")})
	require.NoError(t, err)
	k := newKilling(t, v, "vault-kill")
	k.run(t, func(ctx context.Context) error {
		if err := v.Kill(); err != nil {
			return err
		}
		return v.Restart(ctx)
	})
	figure(t, "vault killed %d times, %d rotations, %d lost", *kills, k.completed, len(k.lost))
	k.verdict(t)
}

// killing is a mount whose roles rotate all the time, and what was seen of it.
type killing struct {
	*mount
	set   *servers.RedisSet
	roles []string

	stopping  atomic.Bool
	rollbacks atomic.Int64
	phases    map[string]int // of the roles, when they were interrupted
	seen      int            // numbers of the served versions, added up, when they were looked at
	slowest   time.Duration  // until rotations went on

	completed int
	lost      []string
}

func newKilling(t *testing.T, v *servers.Vault, path string) *killing {
	t.Helper()
	k := &killing{mount: newMount(t, v, path), set: sharedCluster(t), phases: map[string]int{}}
	k.connect(t, "cluster", k.set)
	for i := range killRoles {
		name := fmt.Sprintf("%s-%d", path, i)
		k.roles = append(k.roles, name)
		k.adopt(t, "cluster", k.set, name, map[string]any{"grace_period": killGrace.String()})
	}
	return k
}

// moments are where a role may stand when it is interrupted.
var moments = []string{
	"preflight", "apply (call under way)", "grace", "retire (call under way)", "way back",
}

// run rotates every role without a pause, and kills in between, after rotations
// were seen to go on by themselves: when some role is seen at one of moments,
// and a random bit later.
func (k *killing) run(t *testing.T, kill func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	random := rand.New(rand.NewPCG(uint64(*seed), 0))
	t.Logf("moments of kills come from -proof.seed=%d", *seed)
	var drivers sync.WaitGroup
	defer drivers.Wait()
	defer k.stopping.Store(true)
	for _, role := range k.roles {
		drivers.Go(func() { k.rotateAlways(ctx, role) })
	}
	for n := range *kills {
		require.NoError(t, k.awaitProgress(ctx), "after kill %d", n)
		k.awaitMoment(ctx, moments[random.IntN(len(moments))])
		wait(ctx, time.Duration(random.Int64N(int64(100*time.Millisecond))))
		require.NoError(t, kill(ctx))
		require.NoError(t, k.look(ctx), "after kill %d", n+1)
	}
	k.stopping.Store(true)
	drivers.Wait()
	require.NoError(t, k.awaitIdle(ctx))
	require.NoError(t, k.look(ctx))
	require.NoError(t, k.verifyAll(ctx))
}

// awaitMoment returns when some role stands at moment, or none did for a while.
func (k *killing) awaitMoment(ctx context.Context, moment string) {
	ctx, cancel := context.WithTimeout(ctx, 400*time.Millisecond)
	defer cancel()
	for ctx.Err() == nil {
		for _, role := range k.roles {
			if r, err := k.stored(ctx, role); err == nil && phaseOf(r) == moment {
				return
			}
		}
	}
}

// rotateAlways asks for the next rotation of a role as soon as the last one is
// over, and takes every fifth back. Requests that a kill cuts off may or may not
// have been heard.
func (k *killing) rotateAlways(ctx context.Context, role string) {
	for n := 1; ctx.Err() == nil && !k.stopping.Load(); n++ {
		_, _ = k.write(ctx, "rotate/redis/"+role, nil)
		if n%5 == 0 {
			k.rollbacks.Add(1)
			_, _ = k.write(ctx, "rollback/redis/"+role, nil)
		}
		idle := func(ctx context.Context) error {
			data, err := k.read(ctx, "roles/"+role)
			if err == nil && data["rotation_id"] != "" && !k.stopping.Load() {
				err = errors.New("still rotating")
			}
			return err
		}
		wait(ctx, killGrace/2)
		_ = until(ctx, 5*time.Minute, idle)
	}
}

// served adds up the numbers of the served versions.
func (k *killing) served(ctx context.Context) (sum int, err error) {
	for _, role := range k.roles {
		r, err := k.stored(ctx, role)
		if err != nil {
			return 0, err
		}
		sum += servedNumber(r)
	}
	return sum, nil
}

func servedNumber(r *rotation.Role) int {
	if current := r.With(version.Current); current != nil {
		return current.Number
	}
	return 0
}

// awaitProgress returns when some role serves a newer version than when they
// were looked at.
func (k *killing) awaitProgress(ctx context.Context) error {
	began := time.Now()
	err := until(ctx, 3*time.Minute, func(ctx context.Context) error {
		sum, err := k.served(ctx)
		if err == nil && sum <= k.seen {
			err = errors.New("no rotation goes on")
		}
		return err
	})
	k.slowest = max(k.slowest, time.Since(began))
	return err
}

// awaitIdle returns when every rotation has ended. It only reads: what was
// interrupted ends by itself.
func (m *mount) awaitIdle(ctx context.Context) error {
	return until(ctx, 5*time.Minute, func(ctx context.Context) error {
		data, err := m.read(ctx, "status")
		if err != nil {
			return err
		}
		if running := data["running"].([]any); len(running) > 0 {
			return fmt.Errorf("still running: %v", running)
		}
		return nil
	})
}

// look checks that nothing is lost at this moment: every password that any node
// accepts is in storage, and what is served is accepted everywhere.
func (k *killing) look(ctx context.Context) error {
	// The nodes are asked before storage is: what a node accepts was stored
	// before it heard of it, and is not forgotten before it refuses it.
	accepted, err := k.accepted(ctx)
	if err != nil {
		return err
	}
	k.seen = 0
	for _, role := range k.roles {
		r, err := k.stored(ctx, role)
		if err != nil {
			return err
		}
		k.phases[phaseOf(r)]++
		k.seen += servedNumber(r)
		kept := map[string]bool{}
		for _, v := range r.Versions {
			kept[hashOf(v.Material.Secret)] = true
		}
		for node, hashes := range accepted[role] {
			for _, hash := range hashes {
				if !kept[hash] {
					k.lost = append(k.lost, fmt.Sprintf("%s: %s accepts a password that is not in storage (%s)", role, node, phaseOf(r)))
				}
			}
		}
	}
	var checks errgroup.Group
	checks.SetLimit(8)
	var mu sync.Mutex
	for _, role := range k.roles {
		checks.Go(func() error {
			refusal, err := k.checkServed(ctx, role)
			if refusal != "" {
				mu.Lock()
				k.lost = append(k.lost, refusal)
				mu.Unlock()
			}
			return err
		})
	}
	return checks.Wait()
}

func phaseOf(r *rotation.Role) string {
	switch {
	case r.Run == nil:
		return "idle"
	case r.Run.Attempt != nil && time.Since(r.Run.Attempt.Deadline.Add(-kind.CallTimeout)) > time.Second:
		return "waiting for a late call"
	case r.Run.Back:
		return "way back"
	case r.Run.Attempt != nil:
		return string(r.Run.Phase) + " (call under way)"
	}
	return string(r.Run.Phase)
}

// accepted reads the password hashes of every role's user at every node.
func (k *killing) accepted(ctx context.Context) (map[string]map[string][]string, error) {
	byRole := map[string]map[string][]string{}
	for _, n := range k.set.Nodes {
		reply, err := n.Do(ctx, "ACL", "LIST")
		if err != nil {
			return nil, err
		}
		for _, line := range reply.([]any) {
			words := strings.Fields(line.(string)) // user NAME on #hash …
			if !slices.Contains(k.roles, words[1]) {
				continue
			}
			if byRole[words[1]] == nil {
				byRole[words[1]] = map[string][]string{}
			}
			for _, word := range words[2:] {
				if hash, ok := strings.CutPrefix(word, "#"); ok {
					byRole[words[1]][n.Addr] = append(byRole[words[1]][n.Addr], hash)
				}
			}
		}
	}
	return byRole, nil
}

// checkServed logs in at every node with what creds/ serves.
func (k *killing) checkServed(ctx context.Context, role string) (refusal string, err error) {
	err = until(ctx, 3*time.Minute, func(ctx context.Context) error {
		refusal = ""
		at := time.Now()
		data, err := k.read(ctx, "creds/"+role)
		if err != nil {
			return err
		}
		user, password := data["username"].(string), data["password"].(string)
		for _, addr := range k.set.Addrs() {
			err := login(ctx, addr, func() (string, string, error) { return user, password, nil })
			// A password that was read longer ago than the grace period may
			// have been retired since: that is no refusal, and asked again.
			if err != nil && time.Since(at) > killGrace {
				return err
			}
			if errors.Is(err, errRefused) {
				return k.stillServed(ctx, role, data["version"], err, &refusal)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	return refusal, err
}

// stillServed tells a served version that is refused, which must not be, from
// one that was rolled back since it was read: that is refused as soon as another
// is served.
func (k *killing) stillServed(ctx context.Context, role string, number any, err error, refusal *string) error {
	data, readErr := k.read(ctx, "creds/"+role)
	switch {
	case readErr != nil:
		return readErr
	case data["version"] != number:
		return err // asked again
	}
	*refusal = fmt.Sprintf("%s: version %v is served and %v", role, number, err)
	return nil
}

// verifyAll asks the engine itself what the nodes accept, at the end.
func (k *killing) verifyAll(ctx context.Context) error {
	for _, role := range k.roles {
		data, err := k.read(ctx, "verify/redis/"+role)
		if err != nil {
			return err
		}
		for _, c := range data["checks"].([]any) {
			check := c.(map[string]any)
			if fmt.Sprint(check["unknown"]) != "0" || check["ok"] != true {
				k.lost = append(k.lost, fmt.Sprintf("%s: %v", role, check))
			}
		}
	}
	counts, err := k.rotations(ctx, "manual")
	if err != nil {
		return err
	}
	k.completed = counts["completed"] + counts["rolled_back"]
	back := counts["rolled_back"] + counts["cancelled"]
	if asked := int(k.rollbacks.Load()); back > asked {
		return fmt.Errorf("%d rotations went back, and %d were asked to", back, asked)
	}
	// Superseded: killed before its role's entry was written, and before it
	// was begun again somebody asked for another.
	for _, state := range []string{"completed", "rolled_back", "cancelled", "superseded"} {
		delete(counts, state)
	}
	if len(counts) > 0 {
		return fmt.Errorf("rotations that did not complete: %v", counts)
	}
	return nil
}

func (k *killing) verdict(t *testing.T) {
	t.Helper()
	var phases []string
	for _, name := range slices.Sorted(maps.Keys(k.phases)) {
		phases = append(phases, fmt.Sprintf("%s %d", name, k.phases[name]))
	}
	t.Logf("roles were interrupted in: %s", strings.Join(phases, ", "))
	t.Logf("rotations went on after %s at the latest", k.slowest.Round(time.Millisecond))
	require.Empty(t, k.lost)
	require.GreaterOrEqual(t, k.completed, *kills, "rotations have to go on")
}
