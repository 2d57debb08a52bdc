package harmonyflow

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestCreateAdopts(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	before := aclList(t, server)
	r := m.adopt("app", "cache", 0, nil)
	require.Equal(t, "version 1, completed", r.data["redis/app"])
	require.Equal(t, "completed", r.data["state"])
	require.Equal(t, "create", m.ended(id(r))["trigger"])
	require.Equal(t, before, aclList(t, server), "adopting changes nothing")
	creds := m.creds("app")
	require.Equal(t, "user-0", creds["username"])
	require.Equal(t, password(0), creds["password"])
	require.EqualValues(t, 1, creds["version"])
	require.NotContains(t, creds, "ttl")
	require.NotContains(t, creds, "previous_password")
	require.NotContains(t, creds, "rotation_period")
}

func TestCreateGenerates(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, servers.WithUsers("blank on resetpass ~* +@all", "off off >some-old-password ~* +get"))
	m.connect("cache", server.Addr, nil)
	m.must("roles/blank", map[string]any{"kind": "redis", "connection": "cache", "username": "blank", "length": 48})
	creds := m.creds("blank")
	require.Len(t, creds["password"], 48)
	require.True(t, canLogIn(t, server, "blank", creds["password"].(string)))
}

func TestCreateOverwrites(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, map[string]any{"allowed_usernames": "user-*"})
	m.must("roles/app", map[string]any{
		"kind": "redis", "connection": "cache", "username": "user-0", "overwrite_existing": true,
	})
	creds := m.creds("app")
	require.True(t, canLogIn(t, server, "user-0", creds["password"].(string)))
	require.False(t, canLogIn(t, server, "user-0", password(0)), "what was overwritten is refused")
}

func TestCreateUsesPasswordPolicies(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{"kind": "api-key", "password_policy": "words"})
	require.True(t, strings.HasPrefix(m.creds("token")["value"].(string), "policy-"))
	require.Equal(t, "words", m.read("roles/token").data["password_policy"])
}

// TestCreateAgain: Vault sends the same request again when the plugin dies under
// it.
func TestCreateAgain(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	create := request{
		op: logical.CreateOperation, path: "roles/token", id: "one-request", data: map[string]any{"kind": "api-key"},
	}
	first := m.send(create)
	require.Equal(t, http.StatusOK, first.code, first.message)
	value := m.creds("token")["value"]
	m.restart()
	again := m.send(create)
	require.Equal(t, http.StatusOK, again.code, again.message)
	require.Equal(t, id(first), id(again))
	require.Equal(t, value, m.creds("token")["value"])
	create.id = "another-request"
	require.Equal(t, http.StatusConflict, m.send(create).code)
}

func TestPartialUpdates(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{
		"kind": "api-key", "description": "a token", "length": 40, "prefix": "tok_", "encoding": "hex",
		"rotation_schedule": "0 3 * * 6", "rotation_window": "2h", "grace_period": "30m", "keep_versions": 7, "previous_field": "OLD",
	})
	before := m.read("roles/token").data
	require.EqualValues(t, 7200, before["rotation_window"])
	require.EqualValues(t, 1800, before["grace_period"])
	require.Equal(t, "overlap", before["strategy"])
	m.must("roles/token", map[string]any{"description": "the token"})
	after := m.read("roles/token").data
	require.Equal(t, "the token", after["description"])
	before["description"] = "the token"
	require.Equal(t, before, after)

	r := m.must("roles/token", map[string]any{"rotation_schedule": "", "rotation_window": "", "rotation_period": "72h"})
	require.Equal(t, `role "token" changed`, r.data["summary"])
	after = m.read("roles/token").data
	require.EqualValues(t, 72*3600, after["rotation_period"])
	require.Equal(t, "", after["rotation_schedule"])
	r = m.must("roles/token", map[string]any{"rotation_period": "", "rotation_schedule": "0 0 13 * 5"})
	require.Len(t, r.warnings, 1, "day of month and day of week are joined by or")
}

func TestDeleteAndCreateAgain(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"grace_period": 0})
	m.ended(id(m.must("rotate/redis/app", nil)))
	served := m.creds("app")
	require.EqualValues(t, 2, served["version"])
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code, "deleting twice")
	require.Equal(t, http.StatusNotFound, m.read("creds/app").code)
	require.Equal(t, http.StatusNotFound, m.read("roles/app").code)
	require.True(t, canLogIn(t, server, "user-0", served["password"].(string)), "its secret goes on working")

	// Its user is free, and its name goes on with its numbers and its secret.
	m.must("roles/app", map[string]any{"kind": "redis", "connection": "cache", "username": "user-0"})
	again := m.creds("app")
	require.Equal(t, served["password"], again["password"])
	require.EqualValues(t, 3, again["version"])
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	m.must("roles/other", map[string]any{
		"kind": "redis", "connection": "cache", "username": "user-0", "initial_password": served["password"],
	})
	require.EqualValues(t, 1, m.creds("other")["version"])

	// Another user under the old name: the numbers go on, the material stays out.
	m.adopt("app", "cache", 1, nil)
	require.Equal(t, password(1), m.creds("app")["password"])
	require.EqualValues(t, 4, m.creds("app")["version"])
}

func TestListsTellWhatThereIs(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	require.Equal(t, http.StatusNotFound, m.list("roles/").code)
	require.Equal(t, http.StatusNotFound, m.list("connections/").code)
	require.Equal(t, http.StatusNotFound, m.list("rotations/").code)
	require.Equal(t, http.StatusOK, m.read("status").code)
	for i := range 3 {
		m.must(fmt.Sprintf("roles/token-%d", i), map[string]any{"kind": "api-key"})
	}
	r := m.list("roles/")
	require.Equal(t, []string{"token-0", "token-1", "token-2"}, r.data["keys"])
	require.Equal(t, map[string]any{"kind": "api-key", "state": "idle", "version": int64(1)}, r.data["key_info"].(map[string]any)["token-1"])
	status := m.read("status").data
	require.EqualValues(t, 3, status["roles"])
	require.Equal(t, "3 roles: 0 running, 0 due, 0 overdue, 0 failed, 0 drifted", status["summary"])
}

func TestStatusFindsWhatNeedsALook(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for _, name := range []string{"due", "overdue", "running", "drifted", "next"} {
		m.must("roles/"+name, map[string]any{"kind": "api-key", "rotation_period": "24h", "previous_field": "OLD"})
	}
	m.must("rotate/api-key/running", nil)
	// A frozen mount looks again once a minute: nothing is served meanwhile.
	m.must("config", map[string]any{"freeze": true})
	m.alter("due", func(r *rotation.Role) { r.Next = time.Now().Add(-time.Minute) })
	m.alter("overdue", func(r *rotation.Role) { r.Next = time.Now().Add(-2 * time.Hour) })
	m.alter("drifted", func(r *rotation.Role) {
		r.Drift = &rotation.Drift{Reason: "a node was down", Since: time.Now()}
		r.Next = time.Now().Add(48 * time.Hour)
	})
	m.alter("next", func(r *rotation.Role) { r.Next = time.Now().Add(time.Hour) })
	status := m.read("status").data
	for _, list := range []string{"due", "overdue", "running", "drifted"} {
		require.Equal(t, []string{"api-key/" + list}, status[list], list)
	}
	require.Equal(t, true, status["frozen"])
	require.Contains(t, status["next"], "api-key/next at ")
}

func TestConfig(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	defaults := map[string]any{"grace_period": int64(3600), "keep_versions": int64(5), "workers": int64(32), "allowed_hosts": []string{}, "freeze": false, "freeze_until": "", "freeze_reason": ""}
	require.Equal(t, defaults, m.read("config").data)
	require.Equal(t, http.StatusNoContent, m.must("config", map[string]any{"workers": 8, "grace_period": "2h"}).code)
	m.must("config", map[string]any{"freeze": true})
	want := map[string]any{"grace_period": int64(7200), "keep_versions": int64(5), "workers": int64(8), "allowed_hosts": []string{}, "freeze": true, "freeze_until": "", "freeze_reason": ""}
	require.Equal(t, want, m.read("config").data)
	m.restart()
	require.Equal(t, want, m.read("config").data)
	// null and empty clear: the default comes back.
	m.must("config", map[string]any{"grace_period": nil, "workers": "", "keep_versions": nil, "freeze": ""})
	require.Equal(t, defaults, m.read("config").data)
	m.must("config", map[string]any{"grace_period": 0})
	require.EqualValues(t, 0, m.read("config").data["grace_period"], "0 is a grace period")
}

func TestConnections(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server, moved := servers.Redis(t, users(1)), servers.Redis(t, users(1))
	r := m.connect("cache", server.Addr, nil)
	require.Equal(t, "standalone, 1 node", r.data["summary"])
	require.Len(t, r.data["nodes"], 1)
	data := m.read("connections/cache").data
	require.NotContains(t, data, "password")
	require.Equal(t, servers.RedisAdmin, data["username"])
	require.Equal(t, []string{server.Addr}, data["addresses"])

	// What is not given stays.
	m.must("connections/cache", map[string]any{"allowed_usernames": "user-*", "topology": "standalone"})
	data = m.read("connections/cache").data
	require.Equal(t, []string{"*"}, data["allowed_roles"])
	require.Equal(t, []string{"user-*"}, data["allowed_usernames"])
	m.must("connections/cache", map[string]any{"allowed_usernames": nil, "topology": ""})
	data = m.read("connections/cache").data
	require.Equal(t, []string{}, data["allowed_usernames"])
	require.Equal(t, "auto", data["topology"])

	// Stored untried, and known by its own identity as soon as a role needs it.
	down := proxy(t, server.Addr)
	down.Cut(true)
	r = m.connect("down", down.Addr(), map[string]any{"verify_connection": false})
	require.Equal(t, "stored without being tried", r.data["summary"])
	r = m.write("roles/app", map[string]any{"kind": "redis", "connection": "down", "username": "user-0"})
	require.Equal(t, http.StatusBadRequest, r.code, r.message)
	down.Heal()
	m.adopt("app", "down", 0, nil)
	identity := m.read("connections/down").data["identity"]
	require.NotEmpty(t, identity)
	require.Equal(t, m.read("connections/cache").data["identity"], identity, "one server behind two addresses")

	// A server that moves takes the claims on its users along.
	m.must("connections/down", map[string]any{"addresses": moved.Addr, "password": servers.RedisAdminPassword})
	require.Equal(t, identity, m.read("connections/down").data["identity"])
	r = m.write("roles/thief", map[string]any{"kind": "redis", "connection": "down", "username": "user-0", "initial_password": password(0)})
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, `belongs to role "app"`)
	m.connect("new-name", moved.Addr, nil)
	require.Equal(t, identity, m.read("connections/new-name").data["identity"])
	// But not to a server whose users may be claimed under another identity.
	other := servers.Redis(t)
	m.connect("other", other.Addr, nil)
	r = m.write("connections/down", map[string]any{"addresses": other.Addr, "password": servers.RedisAdminPassword})
	require.Equal(t, http.StatusConflict, r.code, r.message)
}

// TestAdminPasswordGoesOnlyWhereItWasGivenFor: nothing that a request may change
// without the password leads the stored one somewhere else.
func TestAdminPasswordGoesOnlyWhereItWasGivenFor(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	stranger := proxy(t, server.Addr)
	m.connect("cache", server.Addr, nil)
	heard := stranger.Capture()
	for _, change := range []map[string]any{
		{"addresses": stranger.Addr()},
		{"addresses": []string{server.Addr, stranger.Addr()}},
		{"addresses": stranger.Addr(), "username": servers.RedisAdmin},
		{"addresses": stranger.Addr(), "password": nil},
		{"addresses": stranger.Addr(), "verify_connection": false},
		{"address_map": server.Addr + "=" + stranger.Addr()},
		{"allowed_cidrs": "0.0.0.0/0,::/0"},
	} {
		r := m.write("connections/cache", change)
		require.Equal(t, http.StatusBadRequest, r.code, "%v", change)
	}
	require.Empty(t, heard())
	// Taken away is changed, too.
	m.must("connections/cache", map[string]any{"allowed_cidrs": "127.0.0.0/8", "password": servers.RedisAdminPassword})
	require.Equal(t, http.StatusBadRequest, m.write("connections/cache", map[string]any{"allowed_cidrs": nil}).code)
}

// Fields of one type of connection mean nothing to another: they are refused
// with its name. Types that share a field share what may be given for it.
func TestConnectionTypes(t *testing.T) {
	types := connectionTypes()
	schema := map[string]framework.FieldType{}
	for name, f := range commonConnectionFields() {
		schema[name] = f.Type
	}
	for _, ct := range types {
		for name, f := range ct.fields {
			known, ok := schema[name]
			require.True(t, !ok || known == f.Type, "field %s of type %s", name, ct.name)
			schema[name] = f.Type
		}
	}
	ct := types[0]
	req := &logical.Request{Data: map[string]any{"type": ct.name, "shoe_size": "44"}}
	_, err := ct.connectionFrom(nil, "new", req, &framework.FieldData{Raw: req.Data, Schema: ct.fields})
	require.ErrorContains(t, err, `field "shoe_size" is not for a connection of type `+ct.name)
}
