package harmonyflow

import (
	"context"
	"slices"
	"strings"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/apikey"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/approle"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/databaseroot"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/encryptionkey"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/jwt"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/keeper"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/postgresql"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/rabbitmq"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/redis"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/transit"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
)

// kindEntry is a kind and how its targets are reached: open where a server is
// told of new material, keep where one makes and keeps it, root where that server
// is the Vault that a connection itself logs in to; kinds that need no server have
// none of them.
type kindEntry struct {
	kind.Kind
	open func(entry func(context.Context) (*connection.Entry, error)) kind.Target
	keep func(keeper.Call) kind.Keeper
	root func(clients *vault.Clients, connection string) kind.Target
	// hidden: the engine has roles of it, and users have none.
	hidden bool
}

// kinds is the registry: a new kind is a folder and a line here.
func kinds() []kindEntry {
	return []kindEntry{
		{Kind: redis.Kind{}, open: redis.Open},
		{Kind: postgresql.Kind{}, open: postgresql.Open},
		{Kind: apikey.Kind{}},
		{Kind: jwt.Kind{}},
		{Kind: encryptionkey.Kind{}},
		{Kind: rabbitmq.Kind{}, open: rabbitmq.Opener()},
		{Kind: transit.Kind{}, keep: transit.Open},
		{Kind: databaseroot.Kind{}, keep: databaseroot.Open},
		{Kind: approle.Kind{}, root: approle.Open, hidden: true},
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

// offered is a kind that users may have roles of.
func (b *backend) offered(name string) *kindEntry {
	if e := b.entry(name); e != nil && !e.hidden {
		return e
	}
	return nil
}

func (b *backend) kindNames() string {
	var names []string
	for _, k := range b.kinds {
		if !k.hidden {
			names = append(names, k.Name())
		}
	}
	return strings.Join(names, ", ")
}

// target returns the target behind a connection. The connection is read at
// each call, so that a change of it counts at once.
func (b *backend) target(kindName, name string) kind.Target {
	k := b.entry(kindName)
	if k.root != nil {
		return k.root(b.vaults, name)
	}
	return k.open(func(ctx context.Context) (*connection.Entry, error) {
		return b.connections.Must(ctx, name)
	})
}

// keeper returns the Vault behind a connection that keeps the secrets of a kind.
func (b *backend) keeper(kindName, name string) kind.Keeper {
	return b.entry(kindName).keep(func(ctx context.Context, f func(context.Context, *api.Client) error) error {
		return b.vaults.Do(ctx, name, f)
	})
}
