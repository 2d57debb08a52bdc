package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	plugin "github.com/hashicorp/vault-plugin-database-redis"
	"github.com/hashicorp/vault/builtin/logical/database"
	dbplugin "github.com/hashicorp/vault/sdk/database/dbplugin/v5"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"
)

// scenario is what is rotated.
type scenario string

const (
	staticRole     scenario = "static role"
	rootCredential scenario = "root credential"
)

func (s scenario) String() string { return string(s) }

// fault is what happens at an operation.
type fault string

const (
	fails   fault = "fails"                // nothing has happened, and an error says so
	applied fault = "fails though applied" // it has happened, and the answer is an error
	crash   fault = "crash before"         // the process ends, nothing has happened
	crashed fault = "crash after"          // the process ends, it has happened
)

type point struct {
	at   int
	what fault
}

func faultsOf(op string) []fault {
	if strings.HasPrefix(op, "read") {
		return []fault{fails, crash}
	}
	return []fault{fails, applied, crash, crashed}
}

var errFault = errors.New("a fault")

// patience is how long the engine has to put things right: its queue looks each second
// here, and tries again after ten what failed.
const patience = 75 * time.Second

// result is what became of one rotation.
type result struct {
	ops       []string
	refused   int  // how often what was served was refused, looked at after each operation
	lasting   bool // it still is at the end
	lost      bool // nothing that is stored is accepted at the end
	passwords int  // how many new ones the server was given, for one request
	shut      bool // the password from before is refused, though nobody could have known the next
}

// trial is one rotation, with faults.
type trial struct {
	server *redis
	what   scenario
	points []point
	user   string
	store  *logical.InmemStorage

	mu     sync.Mutex
	armed  bool
	ops    []string
	before string // what was served
	out    result
	given  map[string]bool
	down   chan struct{} // closed when the process has ended
	now    *process
}

// process is one life of the engine.
type process struct {
	t     *trial
	dead  atomic.Bool
	b     logical.Backend
	ready chan struct{} // closed when the queue is filled: the probe of whether storage can be written is taken away
	once  sync.Once
}

var count atomic.Int64

func newTrial(server *redis, what scenario, points []point) *trial {
	return &trial{
		server: server, what: what, points: points, user: fmt.Sprintf("u%d", count.Add(1)), store: &logical.InmemStorage{}, given: map[string]bool{},
		down: make(chan struct{}, 8),
	}
}

// start is what Vault does after an unseal.
func (t *trial) start(ctx context.Context) error {
	p := &process{t: t, ready: make(chan struct{})}
	conf := &logical.BackendConfig{
		Logger: hclog.NewNullLogger(), System: view{StaticSystemView: logical.StaticSystemView{DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: time.Hour}, p: p},
		StorageView: storage{p}, BackendUUID: t.user, Config: map[string]string{"rotation_queue_tick_interval": "1"},
	}
	b, err := database.Factory(ctx, conf)
	if err != nil {
		return err
	}
	if err := b.Initialize(ctx, &logical.InitializationRequest{Storage: storage{p}}); err != nil {
		return err
	}
	p.b = b
	t.mu.Lock()
	t.now = p
	t.mu.Unlock()
	return nil
}

func (p *process) request(ctx context.Context, op logical.Operation, path string, data map[string]any) (map[string]any, error) {
	resp, err := p.b.HandleRequest(ctx, &logical.Request{Operation: op, Path: path, Data: data, Storage: storage{p}})
	if err != nil {
		return nil, err
	}
	if resp != nil && resp.IsError() {
		return nil, resp.Error()
	}
	if resp == nil {
		return nil, nil
	}
	return resp.Data, nil
}

func (t *trial) run(ctx context.Context) (result, error) {
	if err := t.server.user(t.user, "first", "+@all"); err != nil {
		return result{}, err
	}
	if err := t.server.user("root-"+t.user, "first", "+@all"); err != nil {
		return result{}, err
	}
	if err := t.start(ctx); err != nil {
		return result{}, err
	}
	defer func() { t.now.b.Cleanup(ctx) }()
	<-t.now.ready
	if _, err := t.now.request(ctx, logical.CreateOperation, "config/db", map[string]any{
		"plugin_name": "redis-database-plugin", "host": t.server.host, "port": t.server.port,
		"username": "root-" + t.user, "password": "first", "allowed_roles": "*",
	}); err != nil {
		return result{}, fmt.Errorf("connect: %w", err)
	}
	path := "rotate-root/db"
	if t.what == staticRole {
		path = "rotate-role/r"
		if _, err := t.now.request(ctx, logical.CreateOperation, "static-roles/r", map[string]any{
			"db_name": "db", "username": t.user, "rotation_period": "24h",
		}); err != nil {
			return result{}, fmt.Errorf("create the role: %w", err)
		}
	}
	t.before = t.served(ctx)
	if !t.server.accepts(t.subject(), t.before) {
		return result{}, errors.New("what is served at first is refused")
	}

	t.mu.Lock()
	t.armed = true
	t.mu.Unlock()
	_, _ = t.now.request(ctx, logical.UpdateOperation, path, nil)
	t.look(ctx)
	if len(t.points) > 0 {
		if err := t.recover(ctx); err != nil {
			return result{}, err
		}
	}
	t.mu.Lock()
	t.armed = false
	t.mu.Unlock()
	served := t.served(ctx)
	t.out.lasting = !t.server.accepts(t.subject(), served)
	t.out.lost = t.out.lasting && !t.known(ctx)
	t.out.ops, t.out.passwords = t.ops, len(t.given)
	return t.out, nil
}

// recover is what Vault does until time is up: it starts the process again when it has
// ended, and has it roll back what is left in its write-ahead log.
func (t *trial) recover(ctx context.Context) error {
	over := time.After(patience)
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-over:
			return nil
		case <-t.down:
			t.now.b.Cleanup(ctx)
			if err := t.start(ctx); err != nil {
				return err
			}
		case <-tick.C:
			if t.what == rootCredential {
				_, _ = t.now.request(ctx, logical.RollbackOperation, "", map[string]any{"immediate": true})
			}
			t.look(ctx)
		}
	}
}

// subject is who logs in with what is rotated.
func (t *trial) subject() string {
	if t.what == staticRole {
		return t.user
	}
	return "root-" + t.user
}

// served is what readers are told; of a root credential, what the engine logs in with.
func (t *trial) served(ctx context.Context) string {
	if t.what == rootCredential {
		return t.text(ctx, "config/db", "connection_details", "password")
	}
	return t.text(ctx, "static-role/r", "static_account", "password")
}

func (t *trial) text(ctx context.Context, key, outer, inner string) string {
	entry, err := t.store.Get(ctx, key)
	if err != nil || entry == nil {
		return ""
	}
	var all map[string]any
	if json.Unmarshal(entry.Value, &all) != nil {
		return ""
	}
	m, _ := all[outer].(map[string]any)
	s, _ := m[inner].(string)
	return s
}

// known reports whether anything that is stored is accepted: roles, connections and what
// the write-ahead log holds.
func (t *trial) known(ctx context.Context) bool {
	keys, err := logical.CollectKeys(ctx, t.store)
	if err != nil {
		return false
	}
	for _, key := range keys {
		entry, err := t.store.Get(ctx, key)
		if err != nil || entry == nil {
			continue
		}
		var all any
		if json.Unmarshal(entry.Value, &all) != nil {
			continue
		}
		for _, s := range strings.FieldsFunc(fmt.Sprint(all), func(r rune) bool { return strings.ContainsRune(" []:", r) }) {
			if t.server.accepts(t.subject(), s) {
				return true
			}
		}
	}
	return false
}

// look compares what is served with what the server takes.
func (t *trial) look(ctx context.Context) {
	served := t.served(ctx)
	refused, shut := !t.server.accepts(t.subject(), served), !t.server.accepts(t.subject(), t.before)
	t.mu.Lock()
	defer t.mu.Unlock()
	if refused {
		t.out.refused++
	}
	t.out.shut = t.out.shut || shut
}

// strike counts an operation and says what happens to it.
func (t *trial) strike(op string) fault {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.armed {
		return ""
	}
	at := len(t.ops)
	t.ops = append(t.ops, op)
	for _, p := range t.points {
		if p.at == at {
			return p.what
		}
	}
	return ""
}

// through is one operation of a process.
func (p *process) through(ctx context.Context, op string, do func() error) error {
	if p.dead.Load() {
		return errFault
	}
	what := p.t.strike(op)
	switch what {
	case fails:
		return errFault
	case crash:
		p.end()
		return errFault
	}
	err := do()
	if !strings.HasPrefix(op, "read") {
		p.t.mu.Lock()
		armed := p.t.armed
		p.t.mu.Unlock()
		if armed {
			p.t.look(ctx)
		}
	}
	switch what {
	case applied:
		return errFault
	case crashed:
		p.end()
		return errFault
	}
	return err
}

func (p *process) end() {
	if !p.dead.Swap(true) {
		p.t.down <- struct{}{}
	}
}

// storage is what a process sees of what is stored.
type storage struct{ p *process }

func (s storage) Get(ctx context.Context, key string) (out *logical.StorageEntry, err error) {
	err = s.p.through(ctx, "read "+key, func() error { out, err = s.p.t.store.Get(ctx, key); return err })
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (s storage) List(ctx context.Context, prefix string) (out []string, err error) {
	err = s.p.through(ctx, "read "+prefix, func() error { out, err = s.p.t.store.List(ctx, prefix); return err })
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (s storage) Put(ctx context.Context, e *logical.StorageEntry) error {
	return s.p.through(ctx, "put "+e.Key, func() error { return s.p.t.store.Put(ctx, e) })
}

func (s storage) Delete(ctx context.Context, key string) error {
	err := s.p.through(ctx, "delete "+key, func() error { return s.p.t.store.Delete(ctx, key) })
	s.p.once.Do(func() { close(s.p.ready) })
	return err
}

// view gives the engine its Redis plugin, as it is built into Vault.
type view struct {
	logical.StaticSystemView
	p *process
}

func (v view) LookupPlugin(ctx context.Context, name string, _ consts.PluginType) (*pluginutil.PluginRunner, error) {
	return v.LookupPluginVersion(ctx, name, consts.PluginTypeDatabase, "")
}

func (v view) LookupPluginVersion(context.Context, string, consts.PluginType, string) (*pluginutil.PluginRunner, error) {
	return &pluginutil.PluginRunner{Name: "redis-database-plugin", Builtin: true, BuiltinFactory: func() (any, error) {
		made, err := plugin.New()
		if err != nil {
			return nil, err
		}
		return &target{Database: made.(dbplugin.Database), p: v.p}, nil
	}}, nil
}

func (v view) ListVersionedPlugins(context.Context, consts.PluginType) ([]pluginutil.VersionedPlugin, error) {
	return nil, nil
}

// GetPinnedPluginVersion, and what follows, make it a view as built-in engines have it.
func (v view) GetPinnedPluginVersion(context.Context, consts.PluginType, string) (*pluginutil.PinnedVersion, error) {
	return nil, pluginutil.ErrPinnedVersionNotFound
}

func (v view) RequestWellKnownRedirect(context.Context, string, string) error { return nil }

func (v view) DeregisterWellKnownRedirect(context.Context, string) bool { return false }

// Vault Enterprise has a manager for scheduled rotations of root credentials.
func (v view) DeregisterRotationJob(context.Context, *rotation.RotationJobDeregisterRequest) error {
	return nil
}

func (v view) ReplicationState() consts.ReplicationState { return consts.ReplicationState(0) }

var _ logical.ExtendedSystemView = view{}

// target is the Redis plugin, whose calls fail.
type target struct {
	dbplugin.Database
	p *process
}

func (d *target) UpdateUser(ctx context.Context, req dbplugin.UpdateUserRequest) (out dbplugin.UpdateUserResponse, err error) {
	return out, d.p.through(ctx, "change "+req.Username, func() error {
		out, err = d.Database.UpdateUser(ctx, req)
		if err == nil && req.Password != nil {
			d.p.t.mu.Lock()
			if d.p.t.armed {
				d.p.t.given[req.Password.NewPassword] = true
			}
			d.p.t.mu.Unlock()
		}
		return err
	})
}
