package version

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Whatever a role goes through: material that a target may accept is never
// forgotten, one version is current at most, and no number is used twice.
func TestSetForgetsNothingThatMayBeAccepted(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		s := Set{}
		now := time.Unix(0, 0)
		accepted := map[string]bool{} // what a target accepts
		numbers := map[int]string{}
		made := 0
		for range rapid.IntRange(1, 80).Draw(rt, "steps") {
			now = now.Add(time.Second)
			switch rapid.SampledFrom([]string{"add", "again", "promote", "back", "discard", "refuse", "prune", "clone"}).Draw(rt, "step") {
			case "add":
				if s.With(Pending) == nil {
					made++
					m := fmt.Sprint("m", made)
					s.Add(kind.Material{Secret: m}, "r", now)
					accepted[m] = true
				}
			case "again": // a rollback brings old material back
				if all := s.All(); s.With(Pending) == nil && len(all) > 0 {
					m := rapid.SampledFrom(all).Draw(rt, "material")
					s.Add(m, "r", now)
					accepted[m.Secret] = true
				}
			case "promote":
				if s.With(Pending) != nil {
					s.Promote(now)
				}
			case "back":
				s.PromoteBack("r", now)
			case "discard":
				s.Discard(false, now)
			case "refuse":
				if all := s.All(); len(all) > 0 {
					m := rapid.SampledFrom(all).Draw(rt, "material")
					if p := s.With(Pending); !s.Served(m) && (p == nil || !p.Material.Same(m)) {
						delete(accepted, m.Secret) // proven at every node
						s.MarkRefused(m, now)
					}
				}
			case "prune":
				s.Prune(rapid.IntRange(0, 4).Draw(rt, "keep"))
			case "clone":
				c := s.Clone()
				c.Promote(now)
				c.Prune(1)
			}
			check(rt, &s, accepted, numbers)
		}
	})
}

func check(rt *rapid.T, s *Set, accepted map[string]bool, numbers map[int]string) {
	held := map[string]bool{}
	current, last := 0, 0
	for _, v := range s.Versions {
		held[v.Material.Secret] = true
		if v.Stage == Current {
			current++
		}
		if v.Number <= last || v.Number > s.Last {
			rt.Fatalf("version %d after %d, the last is %d", v.Number, last, s.Last)
		}
		last = v.Number
		if m, ok := numbers[v.Number]; ok && m != v.Material.Secret {
			rt.Fatalf("number %d is used for two materials", v.Number)
		}
		numbers[v.Number] = v.Material.Secret
	}
	if current > 1 {
		rt.Fatalf("%d current versions", current)
	}
	may := map[string]bool{}
	for _, m := range s.Accepted() {
		may[m.Secret] = true
	}
	for m := range accepted {
		if !held[m] {
			rt.Fatalf("%s may be accepted and was forgotten", m)
		}
		if !may[m] {
			rt.Fatalf("%s may be accepted and is not listed as such", m)
		}
	}
}

// TestPruneForgetsCopiesFirst: what stands under two numbers takes no room from what could
// be gone back to.
func TestPruneForgetsCopiesFirst(t *testing.T) {
	now := time.Now()
	s := Set{}
	for _, secret := range []string{"first", "second", "second"} {
		s.Add(kind.Material{Secret: secret}, "", now)
		s.Promote(now)
		for _, m := range s.All() {
			s.MarkRefused(m, now)
		}
	}
	s.Get(2).Stage = Retired // as of a role that was deleted, and is served again
	s.Prune(2)
	if len(s.Versions) != 2 || s.Versions[0].Number != 1 || s.Versions[1].Number != 3 {
		t.Fatalf("kept are %v", s.Versions)
	}
}
