package redis

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

type source struct {
	io.Reader
	made string
	err  error
}

func (s source) FromPolicy(context.Context, string) (string, error) { return s.made, s.err }

func TestComplete(t *testing.T) {
	spec := kind.Spec{Username: "app.v1_a@b:c-d"}
	require.NoError(t, Kind{}.Complete(&spec))
	require.Equal(t, kind.Overlap, spec.Strategy)
	require.Equal(t, 32, spec.Length)
	for strategy, spec := range map[kind.Strategy]kind.Spec{
		kind.Swap:      {Username: "default", Strategy: kind.Swap, CloseConnections: true},
		kind.Alternate: {Usernames: []string{"app-a", "app-b"}},
	} {
		require.NoError(t, Kind{}.Complete(&spec))
		require.Equal(t, strategy, spec.Strategy)
	}

	for field, spec := range map[string]kind.Spec{
		"username":   {},
		"username ":  {Username: `a"b`},
		"strategy":   {Username: "app", Strategy: kind.KeyRing},
		"usernames":  {Usernames: []string{"default", "app"}},
		"usernames ": {Usernames: []string{"app", "a b"}},
		"length":     {Username: "app", Length: 15},
		"length ":    {Username: "app", Length: 513},
		"username  ": {Username: strings.Repeat("a", 129)},
	} {
		require.ErrorContains(t, Kind{}.Complete(&spec), strings.TrimSpace(field)+" is")
	}
}

func TestCheckInitial(t *testing.T) {
	require.NoError(t, Kind{}.CheckInitial(kind.Spec{}, ` a "pass word" with ' # $ and ü`))
	for _, secret := range []string{"", "new\nline", "nul\x00", "\xff", strings.Repeat("a", 4097)} {
		require.ErrorContains(t, Kind{}.CheckInitial(kind.Spec{}, secret), "initial_password")
	}
}

func TestGenerate(t *testing.T) {
	spec := kind.Spec{Username: "app", Length: 40}
	m, err := Kind{}.Generate(t.Context(), spec, source{Reader: rand.Reader})
	require.NoError(t, err)
	require.Equal(t, "app", m.Username)
	require.Len(t, m.Secret, 40)

	spec.PasswordPolicy = "mine"
	m, err = Kind{}.Generate(t.Context(), spec, source{made: "from-the-policy"})
	require.NoError(t, err)
	require.Equal(t, "from-the-policy", m.Secret)
	for _, bad := range []string{"", "a\tb", strings.Repeat("a", 5000)} {
		_, err = Kind{}.Generate(t.Context(), spec, source{made: bad})
		require.True(t, kind.IsDefinite(err), "%v", err)
	}
	_, err = Kind{}.Generate(t.Context(), spec, source{err: errors.New("no such policy")})
	require.False(t, kind.IsDefinite(err), "%v", err)
}

func TestValidateConfig(t *testing.T) {
	c := connection.Redis{Addresses: []string{"redis-0.redis:6379", "[::1]:6379"}}
	require.NoError(t, ValidateConfig(&c))
	require.Equal(t, TopologyAuto, c.Topology)
	require.Equal(t, PersistAuto, c.Persistence)

	good := []string{"a:1"}
	for field, c := range map[string]connection.Redis{
		"addresses":       {},
		"addresses ":      {Addresses: []string{"redis://a:1"}},
		"addresses  ":     {Addresses: []string{"a"}},
		"addresses   ":    {Addresses: []string{"a:http"}},
		"sentinel_master": {Addresses: good, Topology: "sentinel"},
		"topology ":       {Addresses: good, Topology: "ring"},
		"persistence":     {Addresses: good, Persistence: "rdb"},
		"allowed_cidrs":   {Addresses: good, AllowedCIDRs: []string{"10.0.0.1"}},
	} {
		require.ErrorContains(t, ValidateConfig(&c), strings.TrimSpace(field))
	}
}

func TestPlan(t *testing.T) {
	a, b, c := kind.Material{Secret: "a"}, kind.Material{Secret: "b"}, kind.Material{Secret: "c"}
	ha, hb, hc := hashOf("a"), hashOf("b"), hashOf("c")
	list := func(m ...kind.Material) []kind.Material { return m }
	for name, x := range map[string]struct {
		change kind.Change
		user   user
		step   step
		want   []any
	}{
		"adds what is missing":           {kind.Change{Accept: list(a, b)}, user{hashes: []string{ha}}, whole, []any{"#" + hb}},
		"adds and removes at once":       {kind.Change{Accept: list(b), Refuse: list(a, c)}, user{hashes: []string{ha}}, whole, []any{"#" + hb, "!" + ha}},
		"accept wins over refuse":        {kind.Change{Accept: list(a), Refuse: list(a)}, user{hashes: []string{ha}}, whole, nil},
		"exclusive replaces":             {kind.Change{Accept: list(b, b), Exclusive: true}, user{hashes: []string{ha, hc}}, whole, []any{"resetpass", "#" + hb}},
		"exclusive already":              {kind.Change{Accept: list(b), Exclusive: true}, user{hashes: []string{hb}}, whole, nil},
		"exclusive ends nopass":          {kind.Change{Accept: list(b), Exclusive: true}, user{nopass: true}, whole, []any{"resetpass", "#" + hb}},
		"exclusive of nothing":           {kind.Change{Exclusive: true}, user{hashes: []string{ha}}, whole, []any{"resetpass"}},
		"a link user accepts first":      {kind.Change{Accept: list(b), Exclusive: true}, user{hashes: []string{ha}}, acceptOnly, []any{"#" + hb}},
		"a link user keeps nopass first": {kind.Change{Accept: list(b), Exclusive: true}, user{nopass: true}, acceptOnly, nil},
		"a link user refuses last":       {kind.Change{Accept: list(b), Refuse: list(a)}, user{hashes: []string{ha, hb}}, refuseToo, []any{"!" + ha}},
	} {
		x.user.exists = true
		got, err := plan(x.change, x.user, "n", x.step)
		require.NoError(t, err, name)
		require.Equal(t, x.want, got, name)
	}
	for name, x := range map[string]struct {
		change kind.Change
		user   user
	}{
		"unknown user":   {kind.Change{Accept: list(a)}, user{}},
		"nopass":         {kind.Change{Accept: list(a)}, user{exists: true, nopass: true}},
		"refuse, nopass": {kind.Change{Refuse: list(a)}, user{exists: true, nopass: true}},
		"empty secret":   {kind.Change{Accept: list(kind.Material{}), Exclusive: true}, user{exists: true}},
	} {
		_, err := plan(x.change, x.user, "n", whole)
		require.True(t, kind.IsDefinite(err), name)
	}
}

func TestReadMembersKeepsFailedNodes(t *testing.T) {
	var f facts
	f.readMembers("a1 10.0.0.1:6379@16379,host-1 myself,master - 0 0 1 connected 0-5460\n" +
		"b2 10.0.0.2:6379@16379 slave,fail a1 1 1 1 disconnected\n" +
		"c3 ::1:6379@16379 master,fail? - 0 0 2 connected 5461-16383\n" +
		"d4 :0@0 master,noaddr - 0 0 3 disconnected\n" +
		"e5 10.0.0.5:6379@16379 handshake - 0 0 0 disconnected\n")
	require.Equal(t, []member{{"a1", "10.0.0.1:6379"}, {"b2", "10.0.0.2:6379"}, {"c3", "[::1]:6379"}}, f.members)
	require.Equal(t, "a1", f.id)
	f.cluster = true
	require.Equal(t, []string{"10.0.0.2:6379", "[::1]:6379"}, f.neighbours())
}

func TestMay(t *testing.T) {
	for rules, want := range map[string]bool{
		"+@all":                            true,
		"-@all +acl|getuser +acl|setuser":  true,
		"-@all +acl|getuser":               false,
		"+@all -@dangerous":                false,
		"-@all +acl":                       true,
		"+@all -acl|setuser":               false,
		"-@all +@admin":                    true,
		"-@all +config|rewrite +info +acl": true,
	} {
		f := facts{rules: []string{rules}}
		require.Equal(t, want, f.may("acl|setuser"), rules)
	}
	require.True(t, (&facts{rules: []string{"-@all", "-@all +acl|setuser"}}).may("acl|setuser"), "a selector")
}

func TestKnownNodesThatAreGone(t *testing.T) {
	up := func(cluster bool) *node { return &node{facts: facts{cluster: cluster}} }
	down := &node{err: errors.New("down")}
	known := []string{"b:1", "a:1", "b:1"}
	require.Equal(t, []string{"a:1", "b:1"}, (&fleet{nodes: []*node{up(false)}}).missing(known), "a dead replica vanishes from INFO")
	require.Empty(t, (&fleet{nodes: []*node{up(true), up(true), down}}).missing(known), "who is not in CLUSTER NODES has left")
	require.Len(t, (&fleet{nodes: []*node{up(true), down, down}}).missing(known), 2, "a minority proves nothing")
}
