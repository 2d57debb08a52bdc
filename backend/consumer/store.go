package consumer

import (
	"context"
	"fmt"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// maxEntry bounds a stored consumer.
const maxEntry = 256 << 10

// Store reads and writes consumers.
type Store struct{ s logical.Storage }

// NewStore returns a Store over s.
func NewStore(s logical.Storage) *Store { return &Store{s: s} }

// Get reads a consumer; nil when there is none.
func (st *Store) Get(ctx context.Context, name string) (*Consumer, error) {
	c, err := storage.Get[Consumer](ctx, st.s, storage.Consumer+name)
	if c != nil {
		c.Name = name
	}
	return c, err
}

// Must reads a consumer that a role needs; that there is none is definite.
func (st *Store) Must(ctx context.Context, name string) (*Consumer, error) {
	c, err := st.Get(ctx, name)
	if err == nil && c == nil {
		err = kind.Definitely("consumer %q does not exist; write consumers/%s first", name, name)
	}
	return c, err
}

// Put writes a consumer.
func (st *Store) Put(ctx context.Context, c *Consumer) error {
	return storage.Put(ctx, st.s, storage.Consumer+c.Name, c, maxEntry)
}

// Delete removes a consumer.
func (st *Store) Delete(ctx context.Context, name string) error {
	if err := st.s.Delete(ctx, storage.Consumer+name); err != nil {
		return fmt.Errorf("deleting consumer %q: %w", name, err)
	}
	return nil
}

// List names all consumers.
func (st *Store) List(ctx context.Context) ([]string, error) {
	return st.s.List(ctx, storage.Consumer)
}

// First names a consumer that is as asked for; "" when there is none.
func (st *Store) First(ctx context.Context, is func(*Consumer) bool) (string, error) {
	names, err := st.List(ctx)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		c, err := st.Get(ctx, name)
		if err != nil {
			return "", err
		}
		if c != nil && is(c) {
			return name, nil
		}
	}
	return "", nil
}
