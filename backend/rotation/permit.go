package rotation

import (
	"context"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// forbid lets preflight end for the roles that their connection no longer lets
// rotate. All of them are of one connection.
func (e *Engine) forbid(ctx context.Context, roles []*Role, findings []kind.Finding) {
	if e.o.Permit == nil {
		return
	}
	for i, err := range e.o.Permit(ctx, roles) {
		if err != nil {
			findings[i] = kind.Finding{Err: err}
		}
	}
}

// WithClaim runs do while nobody can claim, or give back, a user of a target;
// owner is the role that has it, "" when none does.
func (e *Engine) WithClaim(ctx context.Context, target, username string, do func(owner string) error) error {
	key := ClaimKey(target, username)
	if err := e.locks.lock(ctx, key); err != nil {
		return &Conflict{Text: "a role of this user is being created; try again"}
	}
	defer e.locks.unlock(key)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	owner, err := e.Owner(ctx, target, username)
	if err != nil {
		return err
	}
	return do(owner)
}

// Owner names the role that owns a user of a target, or a field of a document; "" when none does.
func (e *Engine) Owner(ctx context.Context, target, username string) (string, error) {
	key := ClaimKey(target, username)
	held, err := storage.Get[Claim](ctx, e.st.s, key)
	if err != nil || held == nil {
		return "", err
	}
	owner, err := e.st.Role(ctx, held.Role)
	if err != nil || owner == nil || !owner.holds(key) {
		return "", err
	}
	return owner.Name, nil
}

func rolesOf(jobs []*job) []*Role {
	roles := make([]*Role, len(jobs))
	for i, j := range jobs {
		roles[i] = j.role
	}
	return roles
}
