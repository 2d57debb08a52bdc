package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// rotator rotates one credential, again and again.
type rotator struct {
	name     string
	once     func(ctx context.Context) error
	after    func(ctx context.Context) error // not measured
	p50, p99 series
}

// latency measures `vault write -f harmonyflow/rotate/redis/<one>`, which answers when the
// new password is proven and served, beside rotate-role of Vault's database engine.
func latency(ctx context.Context, b *bench) (_ *result, err error) {
	var all []*rotator
	for _, where := range []struct {
		name string
		raft bool
	}{{"in memory", false}, {"raft on disk", true}} {
		s, err := b.startVault(servers.VaultOptions{Binary: b.vaultFull, Raft: where.raft})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.stop()) }()
		more, err := b.rotators(ctx, s, where.name)
		if err != nil {
			return nil, err
		}
		all = append(all, more...)
	}
	b.say("%d rounds of %d rotations, each", b.rotationRounds, b.rotationsARound)
	err = turns(b.rotationRounds, len(all), func(_, which int) error {
		r := all[which]
		took := make([]float64, b.rotationsARound)
		for i := range took {
			began := time.Now()
			if err := r.once(ctx); err != nil {
				return err
			}
			took[i] = milliseconds(time.Since(began))
			if r.after == nil {
				continue
			}
			if err := r.after(ctx); err != nil {
				return err
			}
		}
		r.p50, r.p99 = append(r.p50, quantile(took, 0.5)), append(r.p99, quantile(took, 0.99))
		return nil
	})
	if err != nil {
		return nil, err
	}
	r := &result{}
	t := table{head: []string{"one rotation, storage", "p50, ms", "p99, ms"}}
	p := plot{Name: "latency", Title: "One rotation of a Redis user", Y: "ms", Log: true, Lines: []line{{Name: "p50"}, {Name: "p99"}}}
	for _, one := range all {
		t.add(one.name, one.p50.String(), one.p99.String())
		p.Labels = append(p.Labels, one.name)
		p.Lines[0].add(one.p50)
		p.Lines[1].add(one.p99)
	}
	r.tables, r.plots = []table{t}, []plot{p}
	return r, nil
}

func (b *bench) rotators(ctx context.Context, s *stage, where string) ([]*rotator, error) {
	node, err := s.redis(ctx, b.dir, 2)
	if err != nil {
		return nil, err
	}
	if err := s.connectRedis(ctx, "cache", node); err != nil {
		return nil, err
	}
	if err := s.adoptRedis(ctx, "cache", 0, nil); err != nil {
		return nil, err
	}
	all := []*rotator{{
		name: "HarmonyFlow, `rotate/redis/<one>`, " + where,
		once: func(ctx context.Context) error { return s.promoted(ctx, 0) },
		after: func(ctx context.Context) error {
			_, err := s.write(ctx, "harmonyflow/retire/redis/"+role(0), fields{})
			return err
		},
	}}
	if b.vaultFull == "" {
		return all, nil
	}
	one := *b
	one.engineDue = 1
	theirs, err := one.databaseEngine(ctx, s, redisTheirs, "theirs", fields{
		"plugin_name": "redis-database-plugin", "host": host(node.Addr), "port": port(node.Addr),
		"username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "*",
	}, func(int) string { return user(1) })
	if err != nil {
		return nil, err
	}
	return append(all, &rotator{
		name: "database engine, `rotate-role/<one>`, " + where,
		once: theirs.rotate,
	}), nil
}

// promoted rotates role number i, and fails unless the new secret is served.
func (s *stage) promoted(ctx context.Context, i int) error {
	data, err := s.write(ctx, "harmonyflow/rotate/redis/"+role(i), fields{})
	if err == nil && data["state"] != "grace" {
		err = fmt.Errorf("the rotation of %s is %v: %v", role(i), data["state"], data["redis/"+role(i)])
	}
	return err
}
