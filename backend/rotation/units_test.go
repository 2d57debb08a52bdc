package rotation

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
)

func TestUnitsOf(t *testing.T) {
	place := publish.Place{Connection: "kv", Mount: "secret", Path: "app"}
	roles := []*Role{
		{Name: "a", Kind: "jwt", Document: "one"},
		{Name: "b", Kind: "jwt", Document: "one", Place: place, PlaceTarget: "x"},
		{Name: "c", Kind: "api-key", Place: place, PlaceTarget: "x"},
		{Name: "d", Kind: "redis", Document: "two"},
		{Name: "e", Kind: "redis", Place: place, PlaceTarget: "another Vault"},
		{Name: "f", Kind: "redis"},
		{Name: "g", Kind: "redis", Document: "three"},
		{Name: "h", Kind: "jwt", Document: "three"},
	}
	require.Equal(t, map[string]int{"a": 1, "b": 1, "c": 1, "g": 2, "h": 2}, unitsOf(Manual, roles))
	require.Empty(t, unitsOf(Reconcile, roles))
	require.Equal(t, map[string][]string{"jwt": {"a", "b", "c"}, "redis": {"d", "e", "f", "g", "h"}}, batches(roles))
	roles = []*Role{
		{Name: "a", Kind: "jwt", Document: "one"},
		{Name: "b", Kind: "api-key", Place: place, PlaceTarget: "x"},
		{Name: "c", Kind: "redis", Document: "one", Place: place, PlaceTarget: "x"},
	}
	require.Equal(t, map[string][]string{"jwt": {"a", "b", "c"}}, batches(roles), "the last one joins the others")

	h := &Header{}
	parts := []Part{{Role: "a", Unit: 1}, {Role: "x"}, {Role: "b", Unit: 1}, {Role: "y"}, {Role: "g", Unit: 2}}
	require.Equal(t, [][]Part{{parts[0], parts[2]}, {parts[1]}, {parts[3]}, {parts[4]}}, Units(h, parts))
}
