package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// rotated is how many of a mount's roles have users that exist, and are rotated.
const rotated = 3

// mountSize is a mount with so many roles.
type mountSize struct {
	roles                       int
	stage                       *stage
	start, memory, tick, rotate series // seconds, MB, microseconds, milliseconds
	tickReads                   int64
	seeding                     time.Duration
}

// scale looks at mounts of ten to a hundred thousand roles: when the first due role is
// rotated after an unseal, what a tick costs with nothing due, how much memory the
// plugin has, and how long one rotation takes.
func scale(ctx context.Context, b *bench) (_ *result, err error) {
	var all []*mountSize
	for _, n := range b.roles {
		m := &mountSize{roles: n}
		if err := b.seed(ctx, m); err != nil {
			return nil, fmt.Errorf("%d roles: %w", n, err)
		}
		defer func() { err = errors.Join(err, m.stage.stop()) }()
		b.say("%d roles are there after %s", n, m.seeding.Round(time.Second))
		all = append(all, m)
	}
	err = turns(b.scaleTries, len(all), func(_, which int) error { return all[which].startDue(ctx) })
	if err != nil {
		return nil, err
	}
	b.say("first due roles: done")
	err = turns(b.scaleTries, len(all), func(_, which int) error { return all[which].rotateOne(ctx) })
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		if err := m.ticks(ctx); err != nil {
			return nil, err
		}
	}
	return scaleResult(all), nil
}

func scaleResult(all []*mountSize) *result {
	r := &result{}
	t := table{head: []string{
		"roles", "first due role rotated after unseal, s", "tick with nothing due, µs", "storage requests of a tick", "memory of the plugin, MB", "one rotation, ms",
	}}
	plots := []plot{
		{Name: "scale-start", Title: "From unseal to the first due role", Y: "s"},
		{Name: "scale-memory", Title: "Memory of the plugin (RSS)", Y: "MB"},
		{Name: "scale-rotate", Title: "One rotation", Y: "ms"},
	}
	for i := range plots {
		plots[i].X, plots[i].Lines = "roles", []line{{}}
	}
	for _, m := range all {
		t.add(strconv.Itoa(m.roles), m.start.String(), m.tick.String(), strconv.FormatInt(m.tickReads, 10), m.memory.String(), m.rotate.String())
		for i, s := range []series{m.start, m.memory, m.rotate} {
			plots[i].Lines[0].X = append(plots[i].Lines[0].X, float64(m.roles))
			plots[i].Lines[0].add(s)
		}
	}
	least, most := all[0], all[len(all)-1]
	r.tables, r.plots = []table{t}, plots
	many := fmt.Sprintf("%d roles", most.roles)
	r.most(many+": from unseal to the first due role, s", most.start, 10)
	r.most(many+": tick with nothing due, µs", most.tick, 1000)
	r.most(many+": storage requests of such a tick", series{float64(most.tickReads)}, 0)
	r.most(many+": memory of the plugin, MB", most.memory, 200)
	r.most(fmt.Sprintf("one rotation, %d roles ÷ %d roles", most.roles, least.roles), most.rotate.over(least.rotate), 1.25)
	return r
}

// seed starts a Vault on disk, makes some roles as users do and the rest as copies of
// them in storage: what an entry holds is the same, and nobody waits for a hundred
// thousand rotations.
func (b *bench) seed(ctx context.Context, m *mountSize) (err error) {
	if m.stage, err = b.startVault(servers.VaultOptions{Raft: true, RawStorage: true}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.stage.stop())
		}
	}()
	s := m.stage
	node, err := s.redis(ctx, b.dir, rotated)
	if err != nil {
		return err
	}
	if err := s.connectRedis(ctx, "cache", node); err != nil {
		return err
	}
	for i := range rotated {
		if err := s.adoptRedis(ctx, "cache", i, fields{"rotation_period": "720h", "grace_period": "0s"}); err != nil {
			return err
		}
	}
	if err := s.calm(ctx); err != nil {
		return err
	}
	raw, err := s.rawStorage(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := copies(ctx, s, raw, m.roles); err != nil {
		return err
	}
	m.seeding = time.Since(began)
	return nil
}

// copies makes roles of users that do not exist, from the first role, with all that a
// create leaves behind.
func copies(ctx context.Context, s *stage, raw logical.Storage, n int) error {
	store := rotation.NewStore(raw)
	first, err := store.Role(ctx, role(0))
	if err != nil {
		return err
	}
	ids, err := store.Headers(ctx)
	if err != nil {
		return err
	}
	header, err := store.Header(ctx, ids[0])
	if err != nil {
		return err
	}
	return s.each(ctx, n-rotated, func(ctx context.Context, i int) error {
		i += rotated
		r := *first
		r.Name, r.Spec.Username, r.Given.Username = role(i), user(i), user(i)
		r.Versions = slices.Clone(r.Versions)
		for v := range r.Versions {
			r.Versions[v].Material = kind.Material{Username: user(i), Secret: firstPassword(i)}
		}
		// As a period would have it, all through the month.
		r.Next = r.Next.Add(-time.Duration(i) * 300 * time.Hour / time.Duration(n))
		if err := store.PutRole(ctx, nil, &r); err != nil {
			return err
		}
		claim := rotation.Claim{Role: r.Name, Target: r.Target, Username: user(i)}
		if err := storage.Put(ctx, raw, rotation.ClaimKey(claim.Target, claim.Username), claim, 1<<16); err != nil {
			return err
		}
		if i >= keptRotations {
			return nil
		}
		h := *header
		h.ID = h.ID[:24] + fmt.Sprintf("%012x", i)
		h.Roles = []rotation.Part{header.Roles[0]}
		h.Roles[0].Role = r.Name
		return storage.Put(ctx, raw, storage.Rotation+h.ID, h, 1<<16)
	})
}

// keptRotations are how many rotations the engine keeps.
const keptRotations = 10_000

// startDue has a role come due while Vault is sealed, and measures from the unseal until
// the role serves its new secret.
func (m *mountSize) startDue(ctx context.Context) error {
	s := m.stage
	at, err := m.sealBeforeDue(ctx)
	if err != nil {
		return err
	}
	time.Sleep(time.Until(at))
	unsealed := time.Now()
	if err := s.vault.Unseal(ctx); err != nil {
		return err
	}
	var promoted time.Time
	err = await(ctx, "the rotation of the role that is due", 2*time.Minute, func() (bool, error) {
		creds, err := s.read(ctx, "harmonyflow/creds/"+role(1))
		if err != nil {
			return false, err // not active yet
		}
		promoted, err = time.Parse(time.RFC3339Nano, fmt.Sprint(creds["last_vault_rotation"]))
		return err == nil && promoted.After(at), err
	})
	if err != nil {
		return err
	}
	m.start = append(m.start, promoted.Sub(unsealed).Seconds())
	// The first look counts every role, which is the most that the plugin holds.
	if err := s.calm(ctx); err != nil {
		return err
	}
	memory, err := s.memory()
	m.memory = append(m.memory, memory)
	return err
}

// sealBeforeDue seals the Vault shortly before a role comes due, and says when that is.
func (m *mountSize) sealBeforeDue(ctx context.Context) (time.Time, error) {
	s := m.stage
	for lead := 2 * time.Second; ; lead *= 2 {
		at := time.Now().Add(lead)
		if _, err := s.patch(ctx, "harmonyflow/roles/"+role(1), fields{"next_rotation": at.UTC().Format(time.RFC3339Nano)}); err != nil {
			return at, err
		}
		if err := s.vault.Client().Sys().SealWithContext(ctx); err != nil {
			return at, err
		}
		if time.Now().Before(at) {
			return at, nil
		}
		// It may have been rotated before the Vault was sealed.
		if err := s.vault.Unseal(ctx); err != nil {
			return at, err
		}
		if err := s.calm(ctx); err != nil {
			return at, err
		}
	}
}

// memory is what the plugin's process holds, in MB.
func (s *stage) memory() (float64, error) {
	pids, err := s.vault.PluginPIDs()
	if err != nil || len(pids) != 1 {
		return 0, errors.Join(err, fmt.Errorf("the plugin has %d processes", len(pids)))
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pids[0]))
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(status)) {
		if text, ok := strings.CutPrefix(l, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(text), "kB")), 64)
			return kb / 1024, err
		}
	}
	return 0, errors.New("/proc does not tell how much memory a process has")
}

// rotateOne measures one rotation by hand.
func (m *mountSize) rotateOne(ctx context.Context) error {
	const times = 20
	took := make([]float64, times)
	for i := range took {
		began := time.Now()
		if _, err := m.stage.write(ctx, "harmonyflow/rotate/redis/"+role(2), fields{}); err != nil {
			return err
		}
		took[i] = milliseconds(time.Since(began))
		if err := m.stage.calm(ctx); err != nil {
			return err
		}
	}
	m.rotate = append(m.rotate, quantile(took, 0.5))
	return nil
}

// ticks measures a tick in this process, on what is stored: Vault sends one a minute.
func (m *mountSize) ticks(ctx context.Context) error {
	raw, err := m.stage.rawStorage(ctx)
	if err != nil {
		return err
	}
	// In memory: what is measured is what the engine does, and that it asks nothing.
	inmem := &logical.InmemStorage{}
	if err := copies(ctx, m.stage, &overlay{InmemStorage: inmem, below: raw}, m.roles); err != nil {
		return err
	}
	for _, key := range []string{storage.Connection + "cache", storage.Format} {
		e, err := raw.Get(ctx, key)
		if err == nil && e != nil {
			err = inmem.Put(ctx, e)
		}
		if err != nil {
			return err
		}
	}
	p, err := startInProcess(ctx, inmem)
	if err != nil {
		return err
	}
	defer p.backend.Cleanup(ctx)
	tick := func() error {
		_, err := p.request(ctx, logical.RollbackOperation, "", nil)
		return err
	}
	asked := func() int64 { return p.storage.reads.Load() + p.storage.writes.Load() }
	// When it has found what was interrupted and what is due, which is nothing.
	err = await(ctx, "a tick that asks nothing", time.Minute, func() (bool, error) {
		before := asked()
		err := tick()
		time.Sleep(100 * time.Millisecond)
		return asked() == before, err
	})
	if err != nil {
		return err
	}
	runtime.GC()
	const many = 200
	before := asked()
	for range 10 {
		began := time.Now()
		for range many {
			if err := tick(); err != nil {
				return err
			}
		}
		m.tick = append(m.tick, float64(time.Since(began).Microseconds())/many)
	}
	time.Sleep(100 * time.Millisecond) // what ticks have started
	m.tickReads = asked() - before
	return nil
}

// overlay writes into memory, and reads from below what is not there.
type overlay struct {
	*logical.InmemStorage
	below logical.Storage
}

func (o *overlay) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if e, err := o.InmemStorage.Get(ctx, key); err != nil || e != nil {
		return e, err
	}
	return o.below.Get(ctx, key)
}

func (o *overlay) List(ctx context.Context, prefix string) ([]string, error) {
	return o.below.List(ctx, prefix)
}

// rawStorage is what the mount stores, from outside.
type rawStorage struct {
	s      *stage
	prefix string
}

func (s *stage) rawStorage(ctx context.Context) (*rawStorage, error) {
	mount, err := s.read(ctx, "sys/mounts/harmonyflow")
	if err != nil {
		return nil, err
	}
	return &rawStorage{s, fmt.Sprintf("sys/raw/logical/%v/", mount["uuid"])}, nil
}

func (r *rawStorage) Put(ctx context.Context, e *logical.StorageEntry) error {
	_, err := r.s.write(ctx, r.prefix+e.Key, fields{"value": base64.StdEncoding.EncodeToString(e.Value), "encoding": "base64"})
	return err
}

func (r *rawStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	data, err := r.s.read(ctx, r.prefix+key+"?encoding=base64")
	if err != nil {
		if strings.Contains(err.Error(), "answers 404") {
			err = nil
		}
		return nil, err
	}
	value, err := base64.StdEncoding.DecodeString(fmt.Sprint(data["value"]))
	return &logical.StorageEntry{Key: key, Value: value}, err
}

func (r *rawStorage) List(ctx context.Context, prefix string) ([]string, error) {
	data, err := r.s.list(ctx, r.prefix+prefix)
	if err != nil {
		return nil, err
	}
	var keys []string
	raw, err := json.Marshal(data["keys"])
	if err == nil {
		err = json.Unmarshal(raw, &keys)
	}
	return keys, err
}

func (r *rawStorage) Delete(ctx context.Context, key string) error {
	_, err := r.s.call(ctx, "DELETE", r.prefix+key, nil)
	return err
}
