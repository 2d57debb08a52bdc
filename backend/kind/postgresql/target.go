package postgresql

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// target is the nodes of one connection. It remembers nothing between calls.
type target struct {
	entry func(context.Context) (*connection.Entry, error)
}

// Open returns the Target behind a connection. entry is called at every call,
// so that hosts and the admin credential are those that are stored now.
func Open(entry func(context.Context) (*connection.Entry, error)) kind.Target {
	return &target{entry: entry}
}

func (t *target) open(ctx context.Context) (*fleet, error) {
	entry, err := t.entry(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the postgresql connection: %w", err)
	}
	return open(ctx, entry)
}

// namesOf is a parameter that holds all names, whatever characters they have.
func namesOf(users []kind.User) (string, error) {
	names := make([]string, len(users))
	for i, u := range users {
		names[i] = u.Username
	}
	data, err := json.Marshal(names)
	if err != nil {
		return "", fmt.Errorf("write the names of users: %w", err)
	}
	return string(data), nil
}
