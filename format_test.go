package harmonyflow

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/notify"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

const (
	formatsFile = "testdata/formats.txt"
	storedFile  = "testdata/stored-1.json"
)

// formats are the fields of everything that is stored, and their types.
func formats(t *testing.T) []string {
	t.Helper()
	entries := map[string]any{
		storage.Connection: connection.Entry{}, storage.Document: publish.Document{}, storage.DocumentSettings: publish.Settings{},
		storage.Consumer: consumer.Consumer{}, storage.Format: stamp{}, storage.Barrier: struct{}{},
	}
	maps.Copy(entries, rotation.Formats())
	maps.Copy(entries, notify.Formats())
	var out []string
	for _, prefix := range storage.All() {
		example, ok := entries[prefix]
		require.True(t, ok, "nothing says what is stored below %s; add it to the Formats of its package", prefix)
		out = append(out, prefix)
		fieldsOf(reflect.TypeOf(example), prefix, nil, &out)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func fieldsOf(of reflect.Type, at string, above []reflect.Type, out *[]string) {
	switch {
	case of.Kind() == reflect.Pointer:
		fieldsOf(of.Elem(), at, above, out)
	case of.Kind() == reflect.Slice || of.Kind() == reflect.Array:
		fieldsOf(of.Elem(), at+"[]", above, out)
	case of.Kind() == reflect.Map:
		fieldsOf(of.Elem(), at+"{}", above, out)
	case of.String() == "time.Time" || of.Kind() != reflect.Struct:
		*out = append(*out, at+" "+of.Kind().String())
	case slices.Contains(above, of):
		*out = append(*out, at+" again")
	default:
		for i := range of.NumField() {
			f := of.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case name == "-" || !f.IsExported():
			case f.Anonymous && name == "":
				fieldsOf(f.Type, at, append(above, of), out)
			default:
				if name == "" {
					name = f.Name
				}
				fieldsOf(f.Type, strings.TrimSuffix(at, "/")+"."+name, append(above, of), out)
			}
		}
	}
}

// TestStoredFormats: a field of anything that is stored is not renamed, removed or given
// another type: what was stored with it would be lost.
func TestStoredFormats(t *testing.T) {
	t.Parallel()
	now := formats(t)
	text, err := os.ReadFile(formatsFile)
	if !*update {
		require.NoError(t, err)
	}
	before := strings.Fields(strings.ReplaceAll(strings.TrimSpace(string(text)), " ", "\x00"))
	for i := range before {
		before[i] = strings.ReplaceAll(before[i], "\x00", " ")
	}
	for _, field := range before {
		require.Contains(t, now, field, "a stored field is gone or of another type: read what was stored with it, raise storedFormat, and only then take it out of "+formatsFile)
	}
	if *update {
		require.NoError(t, os.WriteFile(formatsFile, []byte(strings.Join(now, "\n")+"\n"), 0o600))
		return
	}
	require.Equal(t, before, now, "fields that are new; write them with go test . -run TestStoredFormats -update. One that must not get lost when an older version writes the entry again raises storedFormat")
}

var graceUntil = regexp.MustCompile(`"grace_until": "[^"]*"`)

// TestUpgrade goes on with what an earlier version has stored.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	if *update {
		writeStored(t)
		return
	}
	text, err := os.ReadFile(storedFile)
	require.NoError(t, err)
	var stored map[string]json.RawMessage
	require.NoError(t, json.Unmarshal(text, &stored))
	m := newMount(t)
	m.b.Cleanup(context.Background())
	later := fmt.Appendf(nil, `"grace_until": %q`, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	for key, value := range stored {
		value = graceUntil.ReplaceAll(value, later) // however long ago it was stored
		require.NoError(t, m.storage.Storage.Put(t.Context(), &logical.StorageEntry{Key: key, Value: value}))
	}
	m.start()
	prefixes := map[string]bool{}
	for key := range stored {
		for _, p := range storage.All() {
			if strings.HasPrefix(key, p) {
				prefixes[p] = true
			}
		}
	}
	require.Greater(t, len(prefixes), 12, "%v", prefixes)
	for _, name := range []string{"app", "partner", "signer", "cipher"} {
		require.NotEmpty(t, m.creds(name)["version"], name)
		require.Equal(t, http.StatusOK, m.read("roles/"+name).code)
	}
	require.Equal(t, "stored-by-an-earlier-version-0001", m.creds("partner")["previous_value"])
	require.Equal(t, "stored-by-an-earlier-version-0001", m.read("data/shop").data["data"].(map[string]any)["PARTNER_OLD"])
	require.Equal(t, []string{"ops"}, m.list("notifications/").data["keys"])
	require.Equal(t, http.StatusOK, m.read("consumers/web").code)
	require.Equal(t, http.StatusOK, m.read("connections/cache").code)
	require.EqualValues(t, 7200, m.read("config").data["grace_period"])
	running := m.read("rotations").data["keys"].([]string)
	require.NotEmpty(t, running)
	m.must("retire/api-key/partner", nil)
	r := m.must("rotate/api-key/partner", nil)
	require.Equal(t, "version 3, promoted", r.data["api-key/partner"])
}

// writeStored has the engine of now store some of everything.
func writeStored(t *testing.T) {
	t.Helper()
	m := newMount(t)
	m.must("config", map[string]any{"grace_period": "2h", "allowed_hosts": "127.0.0.1"})
	m.must("connections/prod", map[string]any{"type": "kubernetes", "host": "https://127.0.0.1:1", "token": "not-a-token", "verify_connection": false})
	m.must("connections/cache", map[string]any{"type": "redis", "addresses": "127.0.0.1:1", "username": "admin", "password": "not-a-password", "allowed_roles": "*", "verify_connection": false})
	m.must("consumers/web", map[string]any{"connection": "prod", "namespace": "app", "secrets": "db", "checks": `[{"type":"pods","selector":"app=web"}]`, "hooks": `[{"name":"revoke","url":"https://api.example.com/"}]`})
	m.must("notifications/ops", map[string]any{"url": "http://127.0.0.1:1/", "secret": "whsec_" + strings.Repeat("a", 40)})
	m.must("documents/shop", map[string]any{"allowed_roles": "*"})
	m.must("roles/app", map[string]any{"kind": "api-key", "rotation_period": "720h"})
	m.must("roles/partner", map[string]any{"kind": "api-key", "document": "shop", "field": "PARTNER", "previous_field": "PARTNER_OLD", "initial_value": "stored-by-an-earlier-version-0001"})
	m.must("roles/signer", map[string]any{"kind": "jwt", "algorithm": "HS256", "max_token_ttl": "1h"})
	m.must("roles/cipher", map[string]any{"kind": "encryption-key"})
	m.must("roles/gone", map[string]any{"kind": "api-key"})
	m.delete("roles/gone")
	m.must("rotate/api-key/app", map[string]any{"reason": "to be stored"})
	m.must("rotate/api-key/partner", map[string]any{"idempotency_key": "one"})
	m.b.Cleanup(context.Background())
	stored := map[string]json.RawMessage{}
	for key, value := range m.storage.dump(t) {
		if json.Valid([]byte(value)) {
			stored[key] = json.RawMessage(value)
		}
	}
	text, err := json.MarshalIndent(stored, "", " ")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(storedFile, append(text, '\n'), 0o600))
}

// TestDowngrade: what a newer version has stored is served, and not made worse.
func TestDowngrade(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{"kind": "api-key"})
	value := m.creds("token")["value"]
	m.stored(t) // its rotation is closed: nobody will do that for it later
	m.b.Cleanup(context.Background())
	entry, err := m.storage.Storage.Get(t.Context(), storage.Format)
	require.NoError(t, err)
	require.JSONEq(t, fmt.Sprintf(`{"format":%d}`, storedFormat), string(entry.Value))
	require.NoError(t, m.storage.Storage.Put(t.Context(), &logical.StorageEntry{Key: storage.Format, Value: []byte(`{"format":99}`)}))
	before := m.stored(t)
	m.start()
	require.Equal(t, value, m.creds("token")["value"])
	for _, r := range []reply{
		m.write("rotate/api-key/token", nil), m.write("roles/token", map[string]any{"description": "x"}), m.delete("roles/token"),
		m.write("emergency/rotate/all", map[string]any{"reason": "x"}), m.write("config", map[string]any{"workers": 3}),
	} {
		require.Equal(t, http.StatusBadRequest, r.code)
		require.Contains(t, r.message, "newer version of this engine (format 99; this one knows 1)")
	}
	require.Equal(t, before, m.stored(t))
	require.NoError(t, m.storage.Storage.Put(t.Context(), &logical.StorageEntry{Key: storage.Format, Value: []byte(`{"format":1}`)}))
	m.restart()
	m.must("rotate/api-key/token", nil)
}
