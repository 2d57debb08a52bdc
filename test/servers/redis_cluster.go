package servers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

const (
	clusterPrimaries = 3
	clusterSlots     = 16384
)

// StartCluster starts a cluster of three primaries with one replica each and
// waits until it is whole.
func StartCluster(ctx context.Context, dir string, opts ...RedisOption) (*RedisSet, error) {
	opts = append([]RedisOption{func(o *redisOptions) { o.cluster = true }}, opts...)
	set, err := startSet(ctx, dir, 2*clusterPrimaries, opts...)
	if err != nil {
		return nil, err
	}
	if err := set.join(ctx); err != nil {
		return nil, errors.Join(err, set.Kill())
	}
	return set, nil
}

// RedisCluster starts a cluster of six for the length of a test.
func RedisCluster(t testing.TB, opts ...RedisOption) *RedisSet {
	t.Helper()
	set, err := StartCluster(context.Background(), t.TempDir(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanUp(t, set.Nodes...) })
	return set
}

func (s *RedisSet) join(ctx context.Context) error {
	for i, n := range s.Nodes {
		if i < clusterPrimaries {
			from, to := clusterSlots*i/clusterPrimaries, clusterSlots*(i+1)/clusterPrimaries-1
			if _, err := n.Do(ctx, "CLUSTER", "ADDSLOTSRANGE", from, to); err != nil {
				return fmt.Errorf("give slots to %s: %w", n.Addr, err)
			}
		}
		if _, err := n.Do(ctx, "CLUSTER", "SET-CONFIG-EPOCH", i+1); err != nil {
			return fmt.Errorf("number the node %s: %w", n.Addr, err)
		}
		if i > 0 {
			if _, err := s.Nodes[0].Do(ctx, "CLUSTER", "MEET", "127.0.0.1", n.port); err != nil {
				return fmt.Errorf("introduce %s: %w", n.Addr, err)
			}
		}
	}
	for i, replica := range s.Nodes[clusterPrimaries:] {
		if err := replica.follow(ctx, s.Nodes[i]); err != nil {
			return err
		}
	}
	return s.WaitCluster(ctx)
}

// follow makes n a replica of primary, as soon as n has heard of it.
func (n *RedisNode) follow(ctx context.Context, primary *RedisNode) error {
	id, err := primary.Do(ctx, "CLUSTER", "MYID")
	if err != nil {
		return fmt.Errorf("ask %s for its id: %w", primary.Addr, err)
	}
	return poll(ctx, func(ctx context.Context) error {
		if _, err := n.Do(ctx, "CLUSTER", "REPLICATE", id); err != nil {
			return fmt.Errorf("make %s a replica of %s: %w", n.Addr, primary.Addr, err)
		}
		return nil
	})
}

// WaitCluster waits until every node sees every other one alive, all slots
// served and its replication link up.
func (s *RedisSet) WaitCluster(ctx context.Context) error {
	err := poll(ctx, func(ctx context.Context) error {
		for _, n := range s.Nodes {
			info, err := n.Do(ctx, "CLUSTER", "INFO")
			if err != nil {
				return fmt.Errorf("cluster node %s: %w", n.Addr, err)
			}
			if !strings.Contains(fmt.Sprint(info), "cluster_state:ok") {
				return fmt.Errorf("the cluster is not whole at %s", n.Addr)
			}
			nodes, err := n.Do(ctx, "CLUSTER", "NODES")
			if err != nil {
				return fmt.Errorf("cluster node %s: %w", n.Addr, err)
			}
			if text := fmt.Sprint(nodes); strings.Count(text, "connected\n")+strings.Count(text, "connected ") < len(s.Nodes) ||
				strings.Contains(text, "fail") || strings.Contains(text, "handshake") ||
				strings.Count(text, "slave") != clusterPrimaries {
				return fmt.Errorf("%s does not see the whole cluster", n.Addr)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.WaitReplicating(ctx)
}
