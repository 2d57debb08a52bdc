// Package databaseroot is the kind of secret that Vault's database engine keeps:
// the password of the user that the engine itself logs in to a database with. A
// rotation has it make a new one, which only that Vault knows.
//
// The database engine shows no version, and answers nothing but that it was
// done. So an outcome that nobody learnt stays unknown: the rotation fails, and
// only who asks again repeats it.
package databaseroot

import (
	"context"
	"errors"
	"fmt"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/keeper"
)

// Kind is the database-root kind. Its zero value is ready to use.
type Kind struct{}

var _ kind.Kind = Kind{}

// Name is what users type.
func (Kind) Name() string { return "database-root" }

// ConnectionType is the type of connection that leads to the Vault.
func (Kind) ConnectionType() string { return "vault" }

// Fields are the role fields that only some kinds have.
func (Kind) Fields() []string { return []string{"mount", "key"} }

// Complete fills in the mount.
func (Kind) Complete(spec *kind.Spec) error { return keeper.Complete(spec, "database") }

// CheckInitial refuses every secret: only that Vault knows it.
func (Kind) CheckInitial(kind.Spec, string) error {
	return errors.New("the root password of a database is kept by its Vault: give no secret")
}

// Generate is never asked for.
func (Kind) Generate(context.Context, kind.Spec, kind.Source) (kind.Material, error) {
	return kind.Material{}, kind.Definitely("the root password of a database is made by its Vault")
}

// Open returns the keeper behind a connection.
func Open(call keeper.Call) kind.Keeper { return databases{call} }

type databases struct{ call keeper.Call }

func config(s kind.Spec) string { return s.Mount + "/config/" + s.Key }
func rotate(s kind.Spec) string { return s.Mount + "/rotate-root/" + s.Key }

// Look implements kind.Keeper.
func (d databases) Look(ctx context.Context, subjects []kind.Subject) []kind.Sight {
	return keeper.Each(subjects, func(s kind.Subject) kind.Sight { return d.look(ctx, s.Spec) })
}

func (d databases) look(ctx context.Context, s kind.Spec) (sight kind.Sight) {
	data, err := keeper.Read(ctx, d.call, config(s))
	if err != nil {
		return kind.Sight{Err: err}
	}
	details, _ := data["connection_details"].(map[string]any)
	if details == nil {
		sight.Problems = []string{fmt.Sprintf("there is no database at %s of its Vault; configure it there, or correct mount and key", config(s))}
		return sight
	}
	if username, _ := details["username"].(string); username == "" {
		sight.Problems = append(sight.Problems, fmt.Sprintf("the database at %s has no username of its own, so its Vault cannot rotate it; "+
			"give it username and password, and {{username}} and {{password}} in its connection_url", config(s)))
	}
	if period := keeper.Number(data["rotation_period"]); period > 0 || data["rotation_schedule"] != nil && data["rotation_schedule"] != "" {
		sight.Notes = append(sight.Notes, "that Vault has a schedule of its own for this password (rotation_period or rotation_schedule)")
	}
	switch missing, known := keeper.Lacks(ctx, d.call, rotate(s)); {
	case !known:
		sight.Notes = append(sight.Notes, keeper.Unasked)
	case len(missing) > 0:
		sight.Problems = append(sight.Problems, keeper.Forbidden(missing))
	}
	return sight
}

// refusals are the answers of the database engine from before it has touched
// anything, although their status is 500.
var refusals = []string{"unable to rotate root credentials", "failed to find entry for connection with name"}

// Turn implements kind.Keeper.
func (d databases) Turn(ctx context.Context, subjects []kind.Subject) []kind.Turned {
	return keeper.Each(subjects, func(s kind.Subject) kind.Turned {
		return keeper.Turn(ctx, d.call, rotate(s.Spec), s, refusals...)
	})
}

// Limit implements kind.Keeper. There are no versions here to limit.
func (d databases) Limit(_ context.Context, subjects []kind.Subject) []error {
	return keeper.Each(subjects, func(kind.Subject) error {
		return kind.Definitely("the root password of a database has no versions")
	})
}
