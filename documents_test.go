package harmonyflow

import (
	"encoding/json"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// document reads a document as a KV version 2 client does.
func (m *mount) document(path string) (data, metadata map[string]any) {
	m.Helper()
	r := m.read("data/" + path)
	require.Equal(m, http.StatusOK, r.code, r.message)
	return r.data["data"].(map[string]any), r.data["metadata"].(map[string]any)
}

// Two roles fill one document: a password with its user, and a key.
func TestDocument(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.must("config", map[string]any{"grace_period": "1h"})
	m.adopt("app", "cache", 0, map[string]any{
		"document": "web", "field": "password", "username_field": "username", "previous_field": "password-previous",
	})
	m.must("roles/key", map[string]any{"kind": "api-key", "document": "web", "field": "api-key"})

	data, metadata := m.document("web")
	key := data["api-key"]
	require.Equal(t, map[string]any{"username": "user-0", "password": password(0), "password-previous": "", "api-key": key}, data)
	require.EqualValues(t, 2, metadata["version"], "one for each role")
	require.NotEmpty(t, key)

	first := m.must("rotate/redis/app", nil)
	data, metadata = m.document("web")
	require.EqualValues(t, 3, metadata["version"])
	require.Equal(t, m.creds("app")["password"], data["password"])
	require.Equal(t, password(0), data["password-previous"])
	require.Equal(t, key, data["api-key"], "the field of another role stays")

	old := m.send(request{op: "read", path: "data/web", data: map[string]any{"version": 2}})
	require.Equal(t, http.StatusOK, old.code, "during grace the version before can be read")
	require.Equal(t, password(0), old.data["data"].(map[string]any)["password"])

	m.must("retire/redis/app", nil)
	m.ended(id(first))
	data, metadata = m.document("web")
	require.EqualValues(t, 4, metadata["version"])
	require.Equal(t, "", data["password-previous"], "emptied, not removed")
	for version := range 3 {
		r := m.send(request{op: "read", path: "data/web", data: map[string]any{"version": version + 1}})
		require.Equal(t, http.StatusNotFound, r.code, "version %d", version+1)
		requireDestroyed(t, r, version+1)
	}
	require.Equal(t, http.StatusNotFound, m.send(request{op: "read", path: "data/web", data: map[string]any{"version": 9}}).code)

	info := m.read("metadata/web").data
	require.EqualValues(t, 4, info["current_version"])
	require.EqualValues(t, 1, info["oldest_version"])
	require.Equal(t, false, info["versions"].(map[string]any)["4"].(map[string]any)["destroyed"])
	require.Equal(t, true, info["versions"].(map[string]any)["3"].(map[string]any)["destroyed"])
}

// requireDestroyed: KV's answer for a version that was destroyed has a body.
func requireDestroyed(t *testing.T, r reply, version int) {
	t.Helper()
	raw, ok := r.data["http_raw_body"].(string)
	require.True(t, ok, "%v", r.data)
	var body struct {
		Data struct {
			Data     map[string]any `json:"data"`
			Metadata map[string]any `json:"metadata"`
		} `json:"data"`
	}
	require.NoError(t, json.Unmarshal([]byte(raw), &body))
	require.Nil(t, body.Data.Data)
	require.Equal(t, true, body.Data.Metadata["destroyed"])
	require.EqualValues(t, version, body.Data.Metadata["version"])
}

func TestDocumentGoesBack(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.adopt("app", "cache", 0, map[string]any{"document": "a/b/web", "field": "password", "previous_field": "previous"})
	rotation := m.must("rotate/redis/app", nil)
	data, _ := m.document("a/b/web")
	require.NotEqual(t, password(0), data["password"])
	m.must("rollback/redis/app", nil)
	m.ended(id(rotation))
	data, metadata := m.document("a/b/web")
	require.Equal(t, map[string]any{"password": password(0), "previous": ""}, data)
	require.EqualValues(t, 3, metadata["version"], "never down")
	require.True(t, canLogIn(t, server, "user-0", password(0)))
}

// What is read is the same to the byte as long as the version is.
func TestDocumentIsStable(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/key", map[string]any{"kind": "api-key", "document": "web", "field": "key"})
	read := func() string {
		raw, err := json.Marshal(m.read("data/web").data)
		require.NoError(t, err)
		return string(raw)
	}
	first := read()
	m.must("roles/other", map[string]any{"kind": "api-key"})
	m.must("rotate/api-key/other", nil)
	m.restart()
	require.Equal(t, first, read())
}

func TestDocumentRefusals(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("documents/closed", map[string]any{"allowed_roles": "web-*"})
	m.ended(id(m.must("roles/key", map[string]any{"kind": "api-key", "document": "open", "field": "key"})))
	for name, c := range map[string]struct {
		code int
		data map[string]any
	}{
		"a field without a document":     {400, map[string]any{"field": "key"}},
		"a document without a field":     {400, map[string]any{"document": "open"}},
		"a field of another role":        {409, map[string]any{"document": "open", "field": "key"}},
		"a document that is closed":      {400, map[string]any{"document": "closed", "field": "key"}},
		"a folder":                       {400, map[string]any{"document": "open/", "field": "other"}},
		"a way up":                       {400, map[string]any{"document": "../open", "field": "other"}},
		"a part called data":             {400, map[string]any{"document": "a/data/b", "field": "other"}},
		"a field with a slash":           {400, map[string]any{"document": "open", "field": "a/b"}},
		"the same name twice":            {400, map[string]any{"document": "open", "field": "x", "previous_field": "x"}},
		"a user where there is none":     {400, map[string]any{"document": "open", "field": "x", "username_field": "user"}},
		"a field with a control":         {400, map[string]any{"document": "open", "field": "a\nb"}},
		"a document with many parts":     {400, map[string]any{"document": "a/b/c/d/e/f/g/h/i", "field": "x"}},
		"another role's field, as older": {409, map[string]any{"document": "open", "field": "mine", "previous_field": "key"}},
	} {
		before := m.stored(t)
		data := map[string]any{"kind": "api-key"}
		for k, v := range c.data {
			data[k] = v
		}
		r := m.write("roles/bad", data)
		require.Equal(t, c.code, r.code, "%s: %s", name, r.message)
		require.Equal(t, before, m.stored(t), name)
	}
	require.Equal(t, http.StatusBadRequest, m.write("roles/key", map[string]any{"field": "other"}).code)
	require.Equal(t, http.StatusNotFound, m.read("data/none").code)
	require.Equal(t, http.StatusBadRequest, m.read("data/a//b").code)

	require.Equal(t, http.StatusNoContent, m.delete("roles/key").code)
	// Consumers still read what the role left behind.
	heir := map[string]any{"kind": "api-key", "document": "open", "field": "key"}
	r := m.write("roles/heir", heir)
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, "overwrite_existing=true")
	heir["initial_value"] = "another-value-than-that"
	require.Equal(t, http.StatusConflict, m.write("roles/heir", heir).code)
	data, _ := m.document("open")
	heir["initial_value"] = data["key"]
	m.must("roles/heir", heir)
	require.Equal(t, http.StatusNoContent, m.delete("roles/heir").code)
	delete(heir, "initial_value")
	m.must("roles/heir", heir) // it goes on with what it left itself
	require.Equal(t, http.StatusNoContent, m.delete("roles/heir").code)
	heir["overwrite_existing"] = true
	m.must("roles/other", heir)
	after, _ := m.document("open")
	require.NotEqual(t, data["key"], after["key"])
}
