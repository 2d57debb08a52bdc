package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const callers = 16

// reader is one way to read a user and a password.
type reader struct {
	name, path string
	holds      string // stands in the answer

	p50, p99, rate series
	vault, plugin  series // ms of a processor for a read
}

// reads compares creds/ and data/ with KV version 2, and with plugins that do
// nothing else, on one Vault.
func reads(ctx context.Context, b *bench) (_ *result, err error) {
	s, err := b.startVault(servers.VaultOptions{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	b.say("%d rounds of %d reads and %s with %d callers, each", b.readRounds, b.readsARound, b.readBurst, callers)
	all, err := b.readers(ctx, s)
	if err != nil {
		return nil, err
	}
	for _, r := range all { // connections, caches
		if _, err := s.readMany(ctx, r, b.readsARound/10+1); err != nil {
			return nil, err
		}
	}
	err = turns(b.readRounds, len(all), func(_, which int) error {
		r := all[which]
		took, err := s.readMany(ctx, r, b.readsARound)
		if err != nil {
			return err
		}
		r.p50, r.p99 = append(r.p50, quantile(took, 0.5)), append(r.p99, quantile(took, 0.99))
		return s.readTogether(ctx, r, b.readBurst)
	})
	if err != nil {
		return nil, err
	}
	return readResult(all), nil
}

const (
	ofCreds    = "HarmonyFlow, `creds/`"
	ofData     = "HarmonyFlow, `data/`"
	ofExternal = "KV v2, external plugin"
)

// readers prepare what is read: a role that was rotated until it keeps all the
// versions that it may, and the same user and password elsewhere.
func (b *bench) readers(ctx context.Context, s *stage) ([]*reader, error) {
	node, err := s.redis(ctx, b.dir, 1)
	if err != nil {
		return nil, err
	}
	if err := s.connectRedis(ctx, "cache", node); err != nil {
		return nil, err
	}
	shown := fields{"document": "app", "field": "password", "username_field": "username"}
	if err := s.adoptRedis(ctx, "cache", 0, shown); err != nil {
		return nil, err
	}
	for range 5 {
		if _, err := s.write(ctx, "harmonyflow/rotate/redis/"+role(0), fields{}); err != nil {
			return nil, err
		}
		if _, err := s.write(ctx, "harmonyflow/retire/redis/"+role(0), fields{}); err != nil {
			return nil, err
		}
	}
	if _, err := s.write(ctx, "harmonyflow/rotate/redis/"+role(0), fields{}); err != nil {
		return nil, err
	}
	creds, err := s.read(ctx, "harmonyflow/creds/"+role(0))
	if err != nil {
		return nil, err
	}
	secret := fields{"username": creds["username"], "password": creds["password"]}
	floor, err := servers.Build("floor", "./test/bench/floor")
	if err != nil {
		return nil, err
	}
	if err := s.vault.MountOther(ctx, "floor", floor); err != nil {
		return nil, err
	}
	if _, err := s.write(ctx, "floor/entry", secret); err != nil {
		return nil, err
	}
	password := fmt.Sprint(creds["password"])
	all := []*reader{
		{name: ofCreds, path: "harmonyflow/creds/" + role(0), holds: password},
		{name: ofData, path: "harmonyflow/data/app", holds: password},
		{name: "KV v2, built in", path: "secret/data/app", holds: password},
		{name: "a plugin that reads nothing", path: "floor/nothing", holds: "from nowhere"},
		{name: "a plugin that reads one entry", path: "floor/entry", holds: password},
	}
	if b.kv != "" {
		if err := s.vault.MountOther(ctx, "kv-external", b.kv); err != nil {
			return nil, err
		}
		all = append(all, &reader{name: ofExternal, path: "kv-external/data/app", holds: password})
	}
	for _, mount := range []string{"secret", "kv-external"} {
		if mount == "kv-external" && b.kv == "" {
			continue
		}
		// KV upgrades a new mount for a moment.
		err := await(ctx, "a write of "+mount, time.Minute, func() (bool, error) {
			_, err := s.write(ctx, mount+"/data/app", fields{"data": secret})
			return err == nil, err
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// readMany reads one after the other and returns how long each took, in milliseconds.
func (s *stage) readMany(ctx context.Context, r *reader, n int) ([]float64, error) {
	took := make([]float64, n)
	for i := range took {
		began := time.Now()
		if err := s.readOnce(ctx, r); err != nil {
			return nil, err
		}
		took[i] = milliseconds(time.Since(began))
	}
	return took, nil
}

// readTogether reads with many callers for some time, and keeps how many answers came a
// second, and what each cost.
func (s *stage) readTogether(ctx context.Context, r *reader, lasting time.Duration) error {
	var (
		wg    sync.WaitGroup
		count atomic.Int64
		errs  = make([]error, callers)
	)
	before, err := s.processors()
	if err != nil {
		return err
	}
	began := time.Now()
	for i := range callers {
		wg.Go(func() {
			for time.Since(began) < lasting && errs[i] == nil {
				errs[i] = s.readOnce(ctx, r)
				count.Add(1)
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	after, err := s.processors()
	r.rate = append(r.rate, float64(count.Load())/took.Seconds())
	spent := after.since(before)
	r.vault = append(r.vault, spent.each(byVault, int(count.Load())))
	r.plugin = append(r.plugin, spent.each(byPlugins, int(count.Load())))
	return errors.Join(append(errs, err)...)
}

func (s *stage) readOnce(ctx context.Context, r *reader) error {
	raw, err := s.raw(ctx, http.MethodGet, r.path, nil)
	if err == nil && !bytes.Contains(raw, []byte(r.holds)) {
		err = fmt.Errorf("%s does not answer with the secret", r.path)
	}
	return err
}

func readResult(all []*reader) *result {
	by := map[string]*reader{}
	for _, r := range all {
		by[r.name] = r
	}
	external := by[ofExternal]
	if external == nil {
		external = &reader{}
	}
	r := &result{}
	t := table{head: []string{"read", "p50, ms", "p99, ms", fmt.Sprintf("reads a second, %d callers", callers), "p50 ÷ external KV's", "reads a second ÷ external KV's", "processor time a read, ms: Vault", "its plugins"}}
	p50 := plot{Name: "reads", Title: "A read, one after the other", Y: "ms (p50)", Lines: []line{{}}}
	rate := plot{Name: "reads-rate", Title: fmt.Sprintf("Reads with %d callers", callers), Y: "a second", Lines: []line{{}}}
	for _, one := range all {
		t.add(one.name, one.p50.String(), one.p99.String(), one.rate.String(), one.p50.over(external.p50).String(), one.rate.over(external.rate).String(), one.vault.String(), one.plugin.String())
		p50.Labels, rate.Labels = append(p50.Labels, one.name), append(rate.Labels, one.name)
		p50.Lines[0].add(one.p50)
		rate.Lines[0].add(one.rate)
	}
	r.tables, r.plots = []table{t}, []plot{p50, rate}
	for _, name := range []string{ofCreds, ofData} {
		r.most(name+": p50 ÷ that of external KV v2", by[name].p50.over(external.p50), 0.55)
		r.least(name+": reads a second ÷ those of external KV v2", by[name].rate.over(external.rate), 1.8)
	}
	return r
}
