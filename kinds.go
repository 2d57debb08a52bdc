package harmonyflow

import (
	"context"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/apikey"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/encryptionkey"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/jwt"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/postgresql"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/rabbitmq"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/redis"
)

// kindEntry is a kind and how its targets are reached; open is nil for kinds
// that need no server.
type kindEntry struct {
	kind.Kind
	open func(entry func(context.Context) (*connection.Entry, error)) kind.Target
}

// kinds is the registry: a new kind is a folder and a line here.
func kinds() []kindEntry {
	return []kindEntry{
		{Kind: redis.Kind{}, open: redis.Open},
		{Kind: postgresql.Kind{}, open: postgresql.Open},
		{Kind: apikey.Kind{}},
		{Kind: jwt.Kind{}},
		{Kind: encryptionkey.Kind{}},
		{Kind: rabbitmq.Kind{}, open: rabbitmq.Open},
	}
}

func (b *backend) entry(name string) *kindEntry {
	i := slices.IndexFunc(b.kinds, func(k kindEntry) bool { return k.Name() == name })
	if i < 0 {
		return nil
	}
	return &b.kinds[i]
}

func (b *backend) kind(name string) kind.Kind {
	if e := b.entry(name); e != nil {
		return e.Kind
	}
	return nil
}

func (b *backend) kindNames() string {
	names := make([]string, len(b.kinds))
	for i, k := range b.kinds {
		names[i] = k.Name()
	}
	return strings.Join(names, ", ")
}

// target returns the target behind a connection. The connection is read at
// each call, so that a change of it counts at once.
func (b *backend) target(kindName, name string) kind.Target {
	return b.entry(kindName).open(func(ctx context.Context) (*connection.Entry, error) {
		return b.connections.Must(ctx, name)
	})
}
