package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// contender rotates many credentials, once a round.
type contender struct {
	name string
	n    int // credentials a round
	// round returns what they took.
	round func(ctx context.Context) (cost, error)
	// rotate is a round of the database engine, and nothing is measured.
	rotate func(ctx context.Context) error
	rates  series
	spent  map[string]series // ms of a processor for one, by who had it
	busy   series            // percent of all processors
}

// cost is what a round took.
type cost struct {
	time time.Duration
	used used
}

// costing is the cost of do, and of nothing else.
func (s *stage) costing(do func() (time.Duration, error)) (c cost, err error) {
	before, err := s.processors()
	if err != nil {
		return cost{}, err
	}
	if c.time, err = do(); err != nil {
		return cost{}, err
	}
	after, err := s.processors()
	c.used = after.since(before)
	return c, err
}

const (
	redisDue      = "HarmonyFlow, redis"
	postgresDue   = "HarmonyFlow, postgresql"
	redisFloor    = "the floor, redis"
	postgresFloor = "the floor, postgresql"
	redisTheirs   = "database engine, redis"
	postgresOther = "database engine, postgresql"
)

// rotations compares a thousand roles that come due at once with Vault's database
// engine and with the floor: the same commands, and the same number and size of
// entries, from a plain loop.
func rotations(ctx context.Context, b *bench) (_ *result, err error) {
	r := &result{}
	s, err := b.startVault(servers.VaultOptions{Binary: b.vaultFull})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	var all []*contender
	for _, prepare := range []func(context.Context, *stage) ([]*contender, error){b.redisContenders, b.postgresContenders} {
		more, err := prepare(ctx, s)
		if err != nil {
			return nil, err
		}
		all = append(all, more...)
	}
	for _, c := range all {
		c.spent = map[string]series{}
	}
	b.say("%d rounds of %d due roles", b.dueRounds, b.due)
	err = turns(b.dueRounds, len(all), func(round, which int) error {
		c := all[which]
		took, err := c.round(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		c.rates = append(c.rates, float64(c.n)/took.time.Seconds())
		for _, who := range everybody {
			c.spent[who] = append(c.spent[who], took.used.each(who, c.n))
		}
		c.busy = append(c.busy, took.used.busy(took.time))
		b.say("round %d: %s, %d in %s", round+1, c.name, c.n, took.time.Round(time.Millisecond))
		return nil
	})
	if err != nil {
		return nil, err
	}
	rates := map[string]series{}
	t := table{head: []string{"", "credentials a round", "a second"}}
	spent := table{head: []string{"ms of a processor for one credential, by"}}
	spent.head = append(append(spent.head, everybody...), "all processors busy, percent")
	p := plot{Name: "rotations", Title: "Credentials rotated a second", Y: "a second", Log: true, Lines: []line{{}}}
	for _, c := range all {
		rates[c.name] = c.rates
		t.add(c.name, fmt.Sprint(c.n), c.rates.String())
		row := []string{c.name}
		for _, who := range everybody {
			row = append(row, c.spent[who].String())
		}
		spent.add(append(row, c.busy.String())...)
		p.Labels = append(p.Labels, c.name)
		p.Lines[0].add(c.rates)
	}
	r.tables, r.plots = []table{t, spent}, []plot{p}
	r.least("redis: HarmonyFlow ÷ database engine", rates[redisDue].over(rates[redisTheirs]), 100)
	r.least("postgresql: HarmonyFlow ÷ database engine", rates[postgresDue].over(rates[postgresOther]), 100)
	r.least("redis: HarmonyFlow ÷ the floor", rates[redisDue].over(rates[redisFloor]), 0.5)
	r.least("postgresql: HarmonyFlow ÷ the floor", rates[postgresDue].over(rates[postgresFloor]), 0.5)
	for _, n := range b.notes {
		r.note("%s", n)
	}
	return r, nil
}

// dueTogether has n roles come due at one moment, and returns how long after it the
// last was rotated: the new secret proven and served, the old one proven refused.
func (s *stage) dueTogether(ctx context.Context, name func(int) string, n int) (c cost, err error) {
	lead := 2*time.Second + time.Duration(n)*4*time.Millisecond
	var at time.Time
	for {
		at = time.Now().Add(lead)
		if err := s.each(ctx, n, func(ctx context.Context, i int) error {
			_, err := s.patch(ctx, "harmonyflow/roles/"+name(i), fields{"next_rotation": at.UTC().Format(time.RFC3339Nano)})
			return err
		}); err != nil {
			return cost{}, err
		}
		if time.Now().Before(at) {
			break
		}
		lead *= 2 // some were due before others
		if err := s.calm(ctx); err != nil {
			return cost{}, err
		}
	}
	time.Sleep(time.Until(at))
	c, err = s.costing(func() (time.Duration, error) { return 0, s.calm(ctx) })
	if err != nil {
		return cost{}, err
	}
	var last time.Time
	ended := make([]time.Time, n)
	if err := s.each(ctx, n, func(ctx context.Context, i int) error {
		creds, err := s.read(ctx, "harmonyflow/creds/"+name(i))
		if err != nil {
			return err
		}
		promoted, err := time.Parse(time.RFC3339Nano, fmt.Sprint(creds["last_vault_rotation"]))
		if err == nil && promoted.Before(at) {
			err = fmt.Errorf("role %s was not rotated", name(i))
		}
		ended[i] = promoted
		return err
	}); err != nil {
		return cost{}, err
	}
	for _, t := range ended {
		if t.After(last) {
			last = t
		}
	}
	finished, err := s.finishedAfter(ctx, at)
	if err == nil && finished.After(last) {
		last = finished
	}
	c.time = last.Sub(at)
	return c, err
}

// each calls f for 0 to n-1, 32 at once.
func (s *stage) each(ctx context.Context, n int, f func(context.Context, int) error) error {
	return several(ctx, 32, n, f)
}

func several(ctx context.Context, parallel, n int, f func(context.Context, int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i := range n {
		g.Go(func() error { return f(ctx, i) })
	}
	return g.Wait()
}

// calm waits until no role is due or rotating.
func (s *stage) calm(ctx context.Context) error {
	return await(ctx, "the end of all rotations", 20*time.Minute, func() (bool, error) {
		status, err := s.read(ctx, "harmonyflow/status")
		if err != nil {
			return false, err
		}
		counts, _ := status["counts"].(map[string]any)
		if counts["failed"] != 0.0 {
			return false, fmt.Errorf("rotations failed: %v", status["failed"])
		}
		return counts["running"] == 0.0 && counts["due"] == 0.0, nil
	})
}

// finishedAfter is when the last rotation ended that began after at.
func (s *stage) finishedAfter(ctx context.Context, at time.Time) (last time.Time, err error) {
	var ids []string
	err = await(ctx, "the last header", time.Minute, func() (bool, error) {
		data, err := s.read(ctx, "harmonyflow/rotations?limit=50")
		if err != nil {
			return false, err
		}
		ids = nil
		raw, err := json.Marshal(data["keys"])
		if err != nil {
			return false, err
		}
		if err := json.Unmarshal(raw, &ids); err != nil {
			return false, err
		}
		last = time.Time{}
		for _, id := range ids {
			one, err := s.read(ctx, "harmonyflow/rotations/"+id)
			if err != nil {
				return false, err
			}
			started, err := time.Parse(time.RFC3339Nano, fmt.Sprint(one["started"]))
			if err != nil {
				return false, err
			}
			if started.Before(at) {
				break
			}
			if one["finished"] == nil {
				return false, nil // it is closed behind its last role
			}
			finished, err := time.Parse(time.RFC3339Nano, fmt.Sprint(one["finished"]))
			if err != nil {
				return false, err
			}
			if finished.After(last) {
				last = finished
			}
		}
		return !last.IsZero(), nil
	})
	return last, err
}

// redisContenders are the roles of a Redis, the database engine's at the same, and what
// that Redis, and storage, can do.
func (b *bench) redisContenders(ctx context.Context, s *stage) ([]*contender, error) {
	node, err := s.redis(ctx, b.dir, 2*b.due+b.engineDue)
	if err != nil {
		return nil, err
	}
	if err := s.connectRedis(ctx, "cache", node); err != nil {
		return nil, err
	}
	b.say("adopting %d users of a redis", b.due)
	err = s.each(ctx, b.due, func(ctx context.Context, i int) error {
		return s.adoptRedis(ctx, "cache", i, fields{"grace_period": "0s", "rotation_period": "720h"})
	})
	if err != nil {
		return nil, err
	}
	if err := s.calm(ctx); err != nil {
		return nil, err
	}
	written, err := b.recordWrites(ctx, recordedRedis(node, b.due))
	if err != nil {
		return nil, err
	}
	for i := range min(b.due, 100) { // the floor knows their first passwords
		if _, err := node.Do(ctx, "ACL", "SETUSER", user(b.due+i), "resetpass", ">"+firstPassword(b.due+i)); err != nil {
			return nil, err
		}
	}
	b.notes = append(b.notes, fmt.Sprintf("A rotation of one of many Redis roles writes %.1f entries of %.0f bytes.", written.each, written.size))
	f := &redisFloorLoop{node: node, stage: s, first: b.due, n: b.due, written: written}
	own := &contender{name: redisDue, n: b.due, round: func(ctx context.Context) (cost, error) {
		before, err := f.counts(ctx)
		if err != nil {
			return cost{}, err
		}
		took, err := s.dueTogether(ctx, role, b.due)
		if err != nil {
			return cost{}, err
		}
		return took, f.learn(ctx, before)
	}}
	floor, err := b.mountFloor(ctx, s)
	if err != nil {
		return nil, err
	}
	f.mount = floor
	// The engine's first round says which commands the floor has to send.
	if _, err := own.round(ctx); err != nil {
		return nil, err
	}
	b.notes = append(b.notes, "Commands that a Redis got for "+fmt.Sprint(b.due)+" rotations, which are what the floor sends it: "+f.told()+".")
	all := []*contender{own, {name: redisFloor, n: b.due, round: f.costs}}
	if b.vaultFull == "" {
		return all, nil
	}
	theirs, err := b.databaseEngine(ctx, s, redisTheirs, "theirs-redis", fields{
		"plugin_name": "redis-database-plugin", "host": host(node.Addr), "port": port(node.Addr),
		"username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "*",
	}, func(i int) string { return user(2*b.due + i) })
	return append(all, theirs), err
}

func host(addr string) string { h, _, _ := strings.Cut(addr, ":"); return h }
func port(addr string) string { _, p, _ := strings.Cut(addr, ":"); return p }

// mountFloor mounts the plugin that does the least.
func (b *bench) mountFloor(ctx context.Context, s *stage) (string, error) {
	program, err := servers.Build("floor", "./test/bench/floor")
	if err != nil {
		return "", err
	}
	return "floor", s.vault.MountOther(ctx, "floor", program)
}

// databaseEngine has Vault's own engine rotate static roles, as many at once as it
// takes: that is how it is fastest.
func (b *bench) databaseEngine(ctx context.Context, s *stage, name, mount string, config fields, username func(int) string) (*contender, error) {
	if _, err := s.write(ctx, "sys/mounts/"+mount, fields{"type": "database"}); err != nil {
		return nil, err
	}
	if _, err := s.write(ctx, mount+"/config/db", config); err != nil {
		return nil, err
	}
	b.say("%s takes over %d users", name, b.engineDue)
	for i := range b.engineDue {
		// Soon after the mount was made it answers with "duplicate item".
		err := await(ctx, "a static role", time.Minute, func() (bool, error) {
			_, err := s.write(ctx, mount+"/static-roles/"+role(i), fields{"db_name": "db", "username": username(i), "rotation_period": "720h"})
			return err == nil, err
		})
		if err != nil {
			return nil, err
		}
	}
	rotate := func(ctx context.Context) error {
		return several(ctx, callers, b.engineDue, func(ctx context.Context, i int) error {
			_, err := s.write(ctx, mount+"/rotate-role/"+role(i), fields{})
			return err
		})
	}
	return &contender{name: name, n: b.engineDue, rotate: rotate, round: func(ctx context.Context) (cost, error) {
		return s.costing(func() (time.Duration, error) {
			began := time.Now()
			err := rotate(ctx)
			return time.Since(began), err
		})
	}}, nil
}

// postgresContenders are the same at a PostgreSQL.
func (b *bench) postgresContenders(ctx context.Context, s *stage) ([]*contender, error) {
	dir := filepath.Join(b.dir, "postgres")
	if err := makeOpen(dir); err != nil {
		return nil, err
	}
	node, err := servers.StartPostgres(ctx, dir, servers.WithPostgresConfig("log_statement = 'none'", "max_connections = 200"))
	if err != nil {
		return nil, err
	}
	s.stops = append(s.stops, node.Abort)
	statements := []string{"CREATE ROLE vault LOGIN CREATEROLE PASSWORD 'vault-secret-of-db'"}
	if err := node.Exec(ctx, statements...); err != nil {
		return nil, err
	}
	admin, err := node.Login(ctx, "vault", "vault-secret-of-db")
	if err != nil {
		return nil, err
	}
	for i := range 2*b.due + b.engineDue {
		if _, err := admin.Exec(ctx, fmt.Sprintf(`CREATE ROLE "%s" LOGIN PASSWORD '%s'`, user(i), firstPassword(i))); err != nil {
			return nil, errors.Join(err, admin.Close(ctx))
		}
	}
	if err := admin.Close(ctx); err != nil {
		return nil, err
	}
	url := "postgresql://{{username}}:{{password}}@" + node.Addr + "/postgres?sslmode=disable"
	if _, err := s.write(ctx, "harmonyflow/connections/db", fields{
		"type": "postgresql", "connection_url": url, "username": "vault", "password": "vault-secret-of-db", "allowed_roles": "*",
	}); err != nil {
		return nil, err
	}
	name := func(i int) string { return "db-" + role(i) }
	b.say("adopting %d users of a postgresql", b.due)
	// Each of them takes several logins, which are slow on purpose there.
	err = several(ctx, 8, b.due, func(ctx context.Context, i int) error {
		_, err := s.write(ctx, "harmonyflow/roles/"+name(i), fields{
			"kind": "postgresql", "connection": "db", "username": user(i), "initial_password": firstPassword(i), "strategy": "swap",
			"grace_period": "0s", "rotation_period": "720h",
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := s.calm(ctx); err != nil {
		return nil, err
	}
	written, err := b.recordWrites(ctx, recordedPostgres(url, b.due))
	if err != nil {
		return nil, err
	}
	b.notes = append(b.notes, fmt.Sprintf("One of many PostgreSQL roles writes %.1f entries of %.0f bytes.", written.each, written.size))
	f := &postgresFloorLoop{node: node, stage: s, mount: "floor", first: b.due, n: b.due, written: written}
	own := &contender{name: postgresDue, n: b.due, round: func(ctx context.Context) (cost, error) {
		before, err := f.sessions(ctx)
		if err != nil {
			return cost{}, err
		}
		took, err := s.dueTogether(ctx, name, b.due)
		if err != nil {
			return cost{}, err
		}
		return took, f.learn(ctx, before)
	}}
	if _, err := own.round(ctx); err != nil {
		return nil, err
	}
	b.notes = append(b.notes, fmt.Sprintf("A PostgreSQL saw %.1f logins for each, and the floor makes as many.", float64(f.logins)/float64(b.due)))
	all := []*contender{own, {name: postgresFloor, n: b.due, round: f.costs}}
	if b.vaultFull == "" {
		return all, nil
	}
	theirs, err := b.databaseEngine(ctx, s, postgresOther, "theirs-postgres", fields{
		"plugin_name": "postgresql-database-plugin", "connection_url": url, "username": "vault", "password": "vault-secret-of-db",
		"allowed_roles": "*", "password_authentication": "scram-sha-256",
	}, func(i int) string { return user(2*b.due + i) })
	return append(all, theirs), err
}

// writes are what the engine stores for a rotation.
type writes struct{ each, size float64 }

// store writes as much, several entries at a time, from a plugin that does nothing else.
func (w writes) store(ctx context.Context, s *stage, mount string, n int) (time.Duration, error) {
	data, err := s.write(ctx, mount+"/puts", fields{
		"count": int(math.Round(w.each * float64(n))), "size": int(w.size), "parallel": 32,
	})
	if err != nil {
		return 0, err
	}
	took, _ := data["nanoseconds"].(float64)
	return time.Duration(took), nil
}
