// Package transit is the kind of secret that Vault's transit engine keeps: a key
// that encrypts or signs for others, and that nobody ever sees. A rotation has
// transit make a new version of it; what was encrypted before still decrypts.
//
// The number of the newest version is the proof: it is read before the rotation
// and after it. min_decryption_version, where a role has it, is set at the key
// after that, so that versions before it no longer decrypt.
package transit

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/keeper"
)

// Kind is the transit kind. Its zero value is ready to use.
type Kind struct{}

var _ kind.Kind = Kind{}

// Name is what users type.
func (Kind) Name() string { return "transit" }

// ConnectionType is the type of connection that leads to the Vault.
func (Kind) ConnectionType() string { return "vault" }

// Fields are the role fields that only some kinds have.
func (Kind) Fields() []string { return []string{"mount", "key", "min_decryption_version"} }

// Complete fills in the mount.
func (Kind) Complete(spec *kind.Spec) error {
	if spec.MinDecryptionVersion < 0 {
		return fmt.Errorf("min_decryption_version is %d; give the number of the oldest version that is to decrypt, or 0 to leave it alone", spec.MinDecryptionVersion)
	}
	return keeper.Complete(spec, "transit")
}

// CheckInitial refuses every secret: transit has its own.
func (Kind) CheckInitial(kind.Spec, string) error {
	return errors.New("a transit key is kept by its Vault: give no secret")
}

// Generate is never asked for: transit makes its own.
func (Kind) Generate(context.Context, kind.Spec, kind.Source) (kind.Material, error) {
	return kind.Material{}, kind.Definitely("a transit key is made by its Vault")
}

// Open returns the keeper behind a connection.
func Open(call keeper.Call) kind.Keeper { return keys{call} }

type keys struct{ call keeper.Call }

func path(s kind.Spec) string { return s.Mount + "/keys/" + s.Key }

// Look implements kind.Keeper.
func (k keys) Look(ctx context.Context, subjects []kind.Subject) []kind.Sight {
	return keeper.Each(subjects, func(s kind.Subject) kind.Sight { return k.look(ctx, s.Spec) })
}

func (k keys) look(ctx context.Context, s kind.Spec) kind.Sight {
	data, err := keeper.Read(ctx, k.call, path(s))
	if err != nil {
		return kind.Sight{Err: err}
	}
	sight := kind.Sight{Version: keeper.Number(data["latest_version"]), MinDecryptionVersion: keeper.Number(data["min_decryption_version"])}
	if sight.Version == 0 {
		sight.Problems = []string{fmt.Sprintf("there is no transit key at %s of its Vault; create it there, or correct mount and key", path(s))}
		return sight
	}
	imported, _ := data["imported_key"].(bool)
	mayRotate, _ := data["imported_key_allow_rotation"].(bool)
	if imported && !mayRotate {
		sight.Problems = append(sight.Problems, fmt.Sprintf("the key at %s was imported without allow_rotation, so its Vault cannot make a new version of it", path(s)))
	}
	needed := []string{path(s) + "/rotate"}
	if s.MinDecryptionVersion > 0 {
		needed = append(needed, path(s)+"/config")
		limit(s, data, &sight)
	}
	switch missing, known := keeper.Lacks(ctx, k.call, needed...); {
	case !known:
		sight.Notes = append(sight.Notes, keeper.Unasked)
	case len(missing) > 0:
		sight.Problems = append(sight.Problems, keeper.Forbidden(missing))
	}
	return sight
}

// limit says what stands against the role's min_decryption_version.
func limit(s kind.Spec, data map[string]any, sight *kind.Sight) {
	want := s.MinDecryptionVersion
	if next := sight.Version + 1; want > next {
		sight.Problems = append(sight.Problems, fmt.Sprintf("min_decryption_version is %d, and the next version of the key is %d: nothing would decrypt; give at most that",
			want, next))
	}
	if encrypts := keeper.Number(data["min_encryption_version"]); encrypts > 0 && encrypts < want {
		sight.Problems = append(sight.Problems, fmt.Sprintf("min_decryption_version is %d, and the key has min_encryption_version %d, which may not be lower; raise that at %s/config",
			want, encrypts, path(s)))
	}
	if sight.MinDecryptionVersion > want {
		sight.Notes = append(sight.Notes, fmt.Sprintf("the key has min_decryption_version %d already, and the role's %d does not lower it", sight.MinDecryptionVersion, want))
	}
}

// Turn implements kind.Keeper.
func (k keys) Turn(ctx context.Context, subjects []kind.Subject) []kind.Turned {
	return keeper.Each(subjects, func(s kind.Subject) kind.Turned {
		return keeper.Turn(ctx, k.call, path(s.Spec)+"/rotate", s)
	})
}

// Limit implements kind.Keeper.
func (k keys) Limit(ctx context.Context, subjects []kind.Subject) []error {
	return keeper.Each(subjects, func(s kind.Subject) error { return k.limit(ctx, s.Spec) })
}

func (k keys) limit(ctx context.Context, s kind.Spec) error {
	data, err := keeper.Read(ctx, k.call, path(s))
	switch newest := keeper.Number(data["latest_version"]); {
	case err != nil:
		return err
	case keeper.Number(data["min_decryption_version"]) >= s.MinDecryptionVersion:
		return nil
	case s.MinDecryptionVersion > newest:
		return kind.Definitely("min_decryption_version is %d, and version %d is the newest", s.MinDecryptionVersion, newest)
	}
	return k.call(ctx, func(ctx context.Context, client *api.Client) error {
		_, err := client.Logical().WriteWithContext(ctx, path(s)+"/config", map[string]any{"min_decryption_version": s.MinDecryptionVersion})
		return err
	})
}
