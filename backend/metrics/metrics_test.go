package metrics

import (
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// BenchmarkMetrics is a look at many roles: the first, which reads them, and the
// later ones, which read nothing.
func BenchmarkMetrics(b *testing.B) {
	for _, roles := range []int{1_000, 100_000} {
		s := &logical.InmemStorage{}
		for i := range roles {
			r := &rotation.Role{Name: fmt.Sprintf("role-%06d", i), Kind: "redis", Next: time.Now().Add(time.Hour)}
			r.Add(kind.Material{Username: "app", Secret: "a secret that is as long as one"}, "", time.Now())
			r.Promote(time.Now())
			if err := rotation.NewStore(s).PutRole(b.Context(), nil, r); err != nil {
				b.Fatal(err)
			}
		}
		look := func(e *rotation.Engine) {
			text, err := New().Text(Look{At: time.Now(), Each: func(f func(string, rotation.Standing)) error { return e.EachStanding(b.Context(), f) }})
			if err != nil || len(text) == 0 {
				b.Fatal(err)
			}
		}
		engine := func() *rotation.Engine {
			return rotation.New(rotation.Options{Storage: s, Active: func() bool { return true }})
		}
		b.Run(fmt.Sprintf("first/%d", roles), func(b *testing.B) {
			for b.Loop() {
				look(engine())
			}
		})
		b.Run(fmt.Sprintf("later/%d", roles), func(b *testing.B) {
			e := engine()
			look(e)
			for b.Loop() {
				look(e)
			}
		})
	}
}
