package servers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	// RedisMaster is what sentinels call the primary.
	RedisMaster = "cache-primary"
	// RedisDownAfter is after how long without an answer a sentinel takes a node
	// for dead: long enough for a machine that stands still for a moment.
	RedisDownAfter = 2 * time.Second

	sentinelCount  = 3
	sentinelQuorum = 2
)

// SentinelOptions is how sentinels are started.
type SentinelOptions struct {
	// AuthUser and AuthPass are what they log in to nodes with.
	AuthUser, AuthPass string
	// Options are those of the sentinels themselves, Nodes those of the nodes.
	Options, Nodes []RedisOption
}

// WatchedSet is a primary and two replicas, and three sentinels that watch them.
// Two of those have to agree that a node is dead.
type WatchedSet struct {
	RedisSet
	Sentinels []*RedisNode
}

// StartWatched starts a primary, two replicas and three sentinels, and waits
// until the sentinels know all of them, and each other.
func StartWatched(ctx context.Context, dir string, o SentinelOptions) (*WatchedSet, error) {
	nodes, err := StartReplicated(ctx, dir, 2, o.Nodes...)
	if err != nil {
		return nil, err
	}
	set := &WatchedSet{RedisSet: *nodes}
	lines := []string{
		fmt.Sprintf("sentinel monitor %s 127.0.0.1 %d %d", RedisMaster, set.Nodes[0].port, sentinelQuorum),
		fmt.Sprintf("sentinel down-after-milliseconds %s %d", RedisMaster, RedisDownAfter.Milliseconds()),
		fmt.Sprintf("sentinel failover-timeout %s %d", RedisMaster, 3*RedisDownAfter.Milliseconds()),
		"sentinel sentinel-user " + RedisAdmin, "sentinel sentinel-pass " + RedisAdminPassword, // at each other
	}
	if o.AuthUser != "" {
		lines = append(lines, "sentinel auth-user "+RedisMaster+" "+o.AuthUser)
	}
	if o.AuthPass != "" {
		lines = append(lines, "sentinel auth-pass "+RedisMaster+" "+o.AuthPass)
	}
	opts := append(slices.Clone(o.Options), WithConfig(lines...), func(o *redisOptions) { o.sentinel = true })
	more, err := startSet(ctx, filepath.Join(dir, "sentinels"), sentinelCount, opts...)
	if err != nil {
		return nil, errors.Join(err, set.Kill())
	}
	set.Sentinels = more.Nodes
	if err := set.WaitWatched(ctx); err != nil {
		return nil, errors.Join(err, set.Kill())
	}
	return set, nil
}

// RedisSentinel starts nodes and sentinels for the length of a test.
func RedisSentinel(t testing.TB, o SentinelOptions) *WatchedSet {
	t.Helper()
	set, err := StartWatched(context.Background(), t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanUp(t, slices.Concat(set.Sentinels, set.Nodes)...) })
	return set
}

// Kill ends every sentinel and every node.
func (s *WatchedSet) Kill() error {
	return errors.Join((&RedisSet{Nodes: s.Sentinels}).Kill(), s.RedisSet.Kill())
}

// SentinelAddrs returns the addresses of the sentinels.
func (s *WatchedSet) SentinelAddrs() []string { return (&RedisSet{Nodes: s.Sentinels}).Addrs() }

// WaitWatched waits until every sentinel is logged in to every node, knows the
// others, and could have a replica promoted.
func (s *WatchedSet) WaitWatched(ctx context.Context) error {
	return poll(ctx, func(ctx context.Context) error {
		for _, n := range s.Sentinels {
			if err := s.watches(ctx, n); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *WatchedSet) watches(ctx context.Context, n *RedisNode) error {
	if _, err := n.Do(ctx, "SENTINEL", "CKQUORUM", RedisMaster); err != nil {
		return fmt.Errorf("sentinel %s: %w", n.Addr, err)
	}
	master, err := n.SentinelMaster(ctx)
	if err != nil {
		return err
	}
	if master["flags"] != "master" || master["num-slaves"] != fmt.Sprint(len(s.Nodes)-1) || master["num-other-sentinels"] != fmt.Sprint(len(s.Sentinels)-1) {
		return fmt.Errorf("sentinel %s does not see everybody: %v", n.Addr, master)
	}
	others, err := n.Do(ctx, "SENTINEL", "REPLICAS", RedisMaster)
	if err != nil {
		return fmt.Errorf("sentinel %s: %w", n.Addr, err)
	}
	if strings.Count(fmt.Sprint(others), " flags slave ") != len(s.Nodes)-1 { // nothing beside, as s_down
		return fmt.Errorf("sentinel %s takes a replica for dead: %v", n.Addr, others)
	}
	return nil
}

// SentinelMaster is what a sentinel says about the primary.
func (n *RedisNode) SentinelMaster(ctx context.Context) (map[string]string, error) {
	reply, err := n.Do(ctx, "SENTINEL", "MASTER", RedisMaster)
	if err != nil {
		return nil, fmt.Errorf("sentinel %s: %w", n.Addr, err)
	}
	list, _ := reply.([]any)
	out := map[string]string{}
	for i := 0; i+1 < len(list); i += 2 {
		out[fmt.Sprint(list[i])] = fmt.Sprint(list[i+1])
	}
	return out, nil
}
