package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	harmonyflow "github.com/harmonyflow/vault-plugin-secrets-harmonyflow"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// counted is storage that counts what is asked of it.
type counted struct {
	logical.Storage
	reads, writes, bytes atomic.Int64
}

func (c *counted) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	c.reads.Add(1)
	return c.Storage.Get(ctx, key)
}

func (c *counted) List(ctx context.Context, prefix string) ([]string, error) {
	c.reads.Add(1)
	return c.Storage.List(ctx, prefix)
}

func (c *counted) Put(ctx context.Context, e *logical.StorageEntry) error {
	c.writes.Add(1)
	c.bytes.Add(int64(len(e.Value)))
	return c.Storage.Put(ctx, e)
}

func (c *counted) Delete(ctx context.Context, key string) error {
	c.writes.Add(1)
	return c.Storage.Delete(ctx, key)
}

// inProcess is the engine without a Vault around it.
type inProcess struct {
	storage *counted
	backend logical.Backend
}

func startInProcess(ctx context.Context, storage logical.Storage) (*inProcess, error) {
	p := &inProcess{storage: &counted{Storage: storage}}
	b, err := harmonyflow.Factory(ctx, &logical.BackendConfig{
		Logger: hclog.NewNullLogger(), StorageView: p.storage, BackendUUID: "bench", Config: map[string]string{},
		System: &logical.StaticSystemView{
			DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: time.Hour, VersionString: "1.21.0",
			PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "1.21.0"},
		},
	})
	if err != nil {
		return nil, err
	}
	p.backend = b
	return p, b.Initialize(ctx, &logical.InitializationRequest{Storage: p.storage})
}

func (p *inProcess) request(ctx context.Context, op logical.Operation, path string, data fields) (fields, error) {
	resp, err := p.backend.HandleRequest(ctx, &logical.Request{
		Operation: op, Path: path, Data: data, Storage: p.storage, MountPoint: "harmonyflow/", DisplayName: "bench",
	})
	switch {
	case err != nil && resp != nil:
		return nil, fmt.Errorf("%s: %w: %w", path, err, resp.Error())
	case err != nil:
		return nil, fmt.Errorf("%s: %w", path, err)
	case resp == nil:
		return nil, nil
	}
	return resp.Data, nil
}

// recorded is how a role is made whose writes are counted.
type recorded struct {
	connection fields
	role       func(i int) fields
}

// recordedRedis are users that nobody else rotates.
func recordedRedis(node *servers.RedisNode, first int) recorded {
	return recorded{
		fields{"type": "redis", "addresses": node.Addr, "username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "*"},
		func(i int) fields {
			return fields{"kind": "redis", "connection": "it", "username": user(first + i), "initial_password": firstPassword(first + i)}
		},
	}
}

func recordedPostgres(url string, first int) recorded {
	return recorded{
		fields{"type": "postgresql", "connection_url": url, "username": "vault", "password": "vault-secret-of-db", "allowed_roles": "*"},
		func(i int) fields {
			return fields{"kind": "postgresql", "connection": "it", "username": user(first + i), "initial_password": firstPassword(first + i), "strategy": "swap"}
		},
	}
}

// recordWrites counts what a scheduled rotation of several roles stores.
func (b *bench) recordWrites(ctx context.Context, from recorded) (writes, error) {
	n := min(b.due, 100)
	p, err := startInProcess(ctx, &logical.InmemStorage{})
	if err != nil {
		return writes{}, err
	}
	defer p.backend.Cleanup(ctx)
	if _, err := p.request(ctx, logical.UpdateOperation, "connections/it", from.connection); err != nil {
		return writes{}, err
	}
	for i := range n {
		data := from.role(i)
		data["grace_period"], data["rotation_period"] = "0s", "720h"
		if _, err := p.request(ctx, logical.CreateOperation, "roles/"+role(i), data); err != nil {
			return writes{}, err
		}
	}
	idle := func() error {
		return await(ctx, "the end of the rotations", 5*time.Minute, func() (bool, error) {
			status, err := p.request(ctx, logical.ReadOperation, "status", nil)
			if err != nil {
				return false, err
			}
			counts, _ := status["counts"].(map[string]any)
			if counts["failed"] != int64(0) {
				return false, fmt.Errorf("rotations failed: %v", status["failed"])
			}
			return counts["running"] == int64(0) && counts["due"] == int64(0), nil
		})
	}
	if err := idle(); err != nil {
		return writes{}, err
	}
	at := time.Now().Add(2 * time.Second)
	for i := range n {
		if _, err := p.request(ctx, logical.PatchOperation, "roles/"+role(i), fields{"next_rotation": at.UTC().Format(time.RFC3339Nano)}); err != nil {
			return writes{}, err
		}
	}
	if time.Now().After(at) {
		return writes{}, errors.New("the machine is too slow to make all roles due at once")
	}
	count, size := p.storage.writes.Load(), p.storage.bytes.Load()
	time.Sleep(time.Until(at))
	if err := idle(); err != nil {
		return writes{}, err
	}
	count, size = p.storage.writes.Load()-count, p.storage.bytes.Load()-size
	return writes{each: float64(count) / float64(n), size: float64(size) / float64(count)}, nil
}
