//go:build !race

// With the race detector the seeds would take minutes, and there is one goroutine.

package harmonyflow

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/helper/jsonutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// nowhere is where every connection of a fuzzed mount leads to: nobody listens, and
// that is known at once.
const nowhere = "127.0.0.1:1"

const (
	storedSecret = "stored-secret-4f1b7c2a9e" // in every entry of a fuzzed mount that holds one
	sentSecret   = "sent-secret-8d3e6a0b5c17" // in every field of a request that is one
)

// fuzzed is a mount without servers, one for each try, made of the same entries.
type fuzzed struct {
	*backend
	storage *logical.InmemStorage
	log     *lockedBuffer
}

func newFuzzed(t testing.TB, entries map[string][]byte) *fuzzed {
	t.Helper()
	m := &fuzzed{storage: &logical.InmemStorage{}, log: &lockedBuffer{}}
	for key, value := range entries {
		require.NoError(t, m.storage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: value}))
	}
	made, err := Factory(context.Background(), &logical.BackendConfig{
		Logger: hclog.New(&hclog.LoggerOptions{Output: m.log, Level: hclog.Trace}), StorageView: m.storage, BackendUUID: "b", Config: map[string]string{},
		System: &logical.StaticSystemView{
			DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: 24 * time.Hour, VersionString: "1.21.0",
			PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "1.21.0"},
		},
	})
	require.NoError(t, err)
	m.backend = made.(*backend)
	m.answerWithin = 300 * time.Millisecond
	require.NoError(t, m.Initialize(context.Background(), &logical.InitializationRequest{Storage: m.storage}))
	return m
}

// send asks as Vault does, and returns what a client would get.
func (m *fuzzed) send(t testing.TB, op logical.Operation, path string, data map[string]any) reply {
	t.Helper()
	ctx := context.Background()
	req := &logical.Request{
		Operation: op, Path: path, Data: data, Storage: m.storage, MountPoint: mountPoint, ID: "0192", DisplayName: "fuzzer", ClientTokenAccessor: "accessor",
	}
	if op == logical.UpdateOperation {
		found, exists, err := m.HandleExistenceCheck(ctx, req)
		if err != nil {
			require.ErrorIs(t, err, logical.ErrUnsupportedPath)
		}
		if found && !exists {
			req.Operation = logical.CreateOperation
		}
	}
	resp, err := m.HandleRequest(ctx, req)
	return (&mount{TB: t}).reply(req, resp, err)
}

func (m *fuzzed) dump(t testing.TB) map[string]string {
	t.Helper()
	out := map[string]string{}
	keys, err := logical.CollectKeys(context.Background(), m.storage)
	require.NoError(t, err)
	for _, key := range keys {
		e, err := m.storage.Get(context.Background(), key)
		require.NoError(t, err)
		if e != nil && key != storage.Format && key != storage.Barrier {
			out[key] = string(e.Value)
		}
	}
	return out
}

// fuzzedEntries are those of a mount that has one of everything.
func fuzzedEntries(t testing.TB) (out map[string][]byte) {
	t.Helper()
	m := newFuzzed(t, nil)
	defer m.Cleanup(context.Background())
	must := func(path string, data map[string]any) {
		t.Helper()
		r := m.send(t, logical.UpdateOperation, path, data)
		require.Less(t, r.code, 300, "%s: %s", path, r.message)
	}
	m.answerWithin = answerWithin
	authority, err := servers.NewAuthority()
	require.NoError(t, err)
	must("config", map[string]any{"allowed_hosts": "127.0.0.1,hooks.example.com"})
	must("roles/token", map[string]any{"kind": "api-key", "initial_value": storedSecret, "document": "app/tokens", "field": "token", "previous_field": "old", "rotation_period": "24h", "grace_period": "1h"})
	must("roles/signs", map[string]any{"kind": "jwt", "algorithm": "ES256", "max_token_ttl": "1h", "public_jwks": true})
	for name, data := range map[string]map[string]any{
		"cache":  {"type": "redis", "addresses": nowhere, "password": storedSecret, "allowed_roles": "*", "allowed_usernames": "*"},
		"queue":  {"type": "rabbitmq", "management_urls": "http://" + nowhere, "username": "admin", "password": storedSecret, "allowed_roles": "*", "allowed_usernames": "*"},
		"db":     {"type": "postgresql", "connection_url": "postgresql://{{username}}:{{password}}@" + nowhere + "/app?sslmode=disable", "username": "admin", "password": storedSecret, "allowed_roles": "*", "allowed_usernames": "*"},
		"remote": {"type": "vault", "address": "http://" + nowhere, "token": storedSecret, "allowed_publish_paths": "secret/*", "allowed_roles": "*"},
		"prod":   {"type": "kubernetes", "host": "https://" + nowhere, "token": storedSecret, "ca_cert": authority.PEM},
	} {
		data["verify_connection"] = false
		must("connections/"+name, data)
	}
	must("consumers/web", map[string]any{"connection": "prod", "namespace": "app", "secrets": "app", "allowed_roles": "*", "workloads": `[[{"kind":"Deployment","name":"web"}]]`})
	must("documents/app/tokens", map[string]any{"allowed_roles": "*"})
	must("notifications/ops", map[string]any{"url": "https://hooks.example.com/" + storedSecret, "format": "slack"})

	// A role with a user, which takes a server to make.
	r := &rotation.Role{Name: "app", Kind: "redis", Connection: "cache", Spec: kind.Spec{Username: "app", Strategy: kind.Overlap, Length: 32}}
	r.Given = r.Spec
	r.Add(kind.Material{Username: "app", Secret: storedSecret}, "", time.Now())
	r.Promote(time.Now())
	defer func() { // last, so that nobody looks at its server
		e, err := logical.StorageEntryJSON(storage.Role+"app", r)
		require.NoError(t, err)
		out[e.Key] = e.Value
	}()
	var stored map[string]string
	require.Eventually(t, func() bool { // what is behind an answer has ended
		stored = m.dump(t)
		for key := range stored {
			if strings.HasPrefix(key, storage.Open) {
				return false
			}
		}
		return true
	}, patience, glance)
	out = map[string][]byte{}
	for key, value := range stored {
		out[key] = []byte(value)
	}
	return out
}

var fuzzedOperations = []logical.Operation{
	logical.ReadOperation, logical.UpdateOperation, logical.ListOperation, logical.DeleteOperation, logical.PatchOperation,
}

// settings are the paths that store what they are given, or refuse it and store
// nothing. What the others refuse may be a rotation that failed.
var settings = []string{"config", "connections/", "consumers/", "documents/", "notifications/"}

// FuzzAPI sends any body to any path. Nothing may panic or be the engine's fault, no
// secret may stand in what is answered, and a refusal leaves everything as it was.
func FuzzAPI(f *testing.F) {
	entries := fuzzedEntries(f)
	m := newFuzzed(f, entries)
	for _, p := range m.Paths {
		for op := range p.Operations {
			n := max(slices.Index(fuzzedOperations, op), 0)
			if op == logical.CreateOperation {
				n = 1
			}
			for kindName, name := range map[string]string{"redis": "app", "api-key": "token"} {
				body := map[string]any{}
				for field := range p.Fields {
					body[field] = "1h"
				}
				delete(body, "name")
				delete(body, "kind")
				raw, err := json.Marshal(body)
				require.NoError(f, err)
				f.Add(byte(n), example(p, kindName, name), raw)
				f.Add(byte(n), example(p, kindName, name), []byte(`{}`))
			}
		}
	}
	m.Cleanup(context.Background())
	for path, body := range map[string]string{
		"roles/new":             `{"kind":"api-key","initial_value":"a-value-that-is-given","previous_field":"old","rotation_schedule":"0 3 * * *","rotation_window":"1h","rotation_timezone":"Europe/Zurich"}`,
		"roles/user":            `{"kind":"redis","connection":"cache","username":"user","initial_password":"x"}`,
		"roles/two":             `{"kind":"postgresql","connection":"db","usernames":["a","b"],"username_field":"user","field":"password","document":"app/db","overwrite_existing":true}`,
		"roles/key":             `{"kind":"encryption-key","encoding":"base64","length":32,"keys_field":"keys","next_field":"next"}`,
		"connections/new":       `{"type":"redis","addresses":["127.0.0.1:1"],"password":"p","address_map":{"10.0.0.1:6379":"127.0.0.1:1"},"allowed_cidrs":"10.0.0.0/8"}`,
		"connections/rabbit":    `{"type":"rabbitmq","management_urls":"https://127.0.0.1:1","amqp_urls":"amqps://127.0.0.1:2","vhosts":"/","username":"a","password":"p"}`,
		"connections/pg":        `{"type":"postgresql","connection_url":"postgresql://{{username}}:{{password}}@127.0.0.1:1/app?sslmode=verify-full","username":"a","password":"p"}`,
		"connections/kube":      `{"type":"kubernetes","kubeconfig":"apiVersion: v1\nkind: Config\n"}`,
		"connections/vault":     `{"type":"vault","address":"https://127.0.0.1:1","auth":"approle","role_id":"r","secret_id":"s","namespace":"a/b"}`,
		"consumers/new":         `{"connection":"prod","namespace":"app","external_secrets":"app=web","workloads":[[{"kind":"Deployment","name":"web"}],[{"kind":"StatefulSet","selector":"a=b"}]],"checks":[{"type":"http","url":"https://127.0.0.1/","headers":{"X-Api-Key":"{{token.value}}"}},{"type":"logs","forbid":"x"}],"hooks":[{"name":"a","url":"https://127.0.0.1/"}]}`,
		"notifications/new":     `{"url":"https://hooks.example.com/x","secret":"whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz","headers":"X-Team: platform"}`,
		"config":                `{"grace_period":"2h","workers":3,"allowed_hosts":["*.example.com"],"freeze":true,"freeze_until":"2030-01-01T00:00:00Z"}`,
		"rotate/all":            `{"dry_run":true}`,
		"emergency/rotate/all":  `{"reason":"because","restart_namespaces":"prod/app","hooks":"none","dry_run":"true"}`,
		"rotate/api-key/token":  `{"idempotency_key":"once","reason":"because"}`,
		"retire/api-key/token":  `{"version":1}`,
		"rotate-root/cache":     `{"dry_run":true}`,
		"documents/app/another": `{"allowed_roles":["a*"]}`,
	} {
		f.Add(byte(1), path, []byte(body))
		f.Add(byte(4), path, []byte(body))
	}
	f.Fuzz(func(t *testing.T, op byte, path string, body []byte) {
		var data map[string]any
		if len(body) > 64<<10 || jsonutil.DecodeJSON(body, &data) != nil && len(body) > 0 {
			return // Vault refuses it
		}
		m := newFuzzed(t, entries)
		defer m.Cleanup(context.Background())
		if data == nil {
			data = map[string]any{}
		}
		sent := m.plant(data)
		if strings.HasPrefix(path, "connections/") {
			data["verify_connection"] = false // nobody is to be asked
		}
		operation := fuzzedOperations[int(op)%len(fuzzedOperations)]
		if operation == logical.ListOperation && !strings.HasSuffix(path, "/") {
			path += "/"
		}
		if strings.Contains(path, storedSecret) || strings.Contains(path, sentSecret) {
			return
		}
		r := m.send(t, operation, path, data)
		if strings.Contains(r.message, context.DeadlineExceeded.Error()) {
			return // which is short here
		}
		require.Less(t, r.code, http.StatusInternalServerError, "%s %s: %s", operation, path, r.message)
		shown, err := json.Marshal(map[string]any{"data": r.data, "warnings": r.warnings, "message": r.message})
		require.NoError(t, err)
		serves := r.code < 300 && (strings.HasPrefix(path, "creds/") || strings.HasPrefix(path, "data/"))
		for where, text := range map[string]string{"the answer": string(shown), "the log": m.log.String()} {
			require.False(t, !serves && strings.Contains(text, storedSecret), "%s %s: %s shows what is stored: %s", operation, path, where, text)
			require.False(t, sent && strings.Contains(text, sentSecret), "%s %s: %s shows what was sent: %s", operation, path, where, text)
		}
		require.NotContains(t, r.message, "\x1b")
		reads := operation == logical.ReadOperation || operation == logical.ListOperation
		isSetting := slices.ContainsFunc(settings, func(p string) bool { return strings.HasPrefix(path, p) })
		if reads || isSetting && r.code >= 300 {
			require.Equal(t, kept(entries), kept(m.dump(t)), "%s %s: %s", operation, path, r.message)
		}
	})
}

// kept are the entries of settings. Others change by themselves: servers are looked at.
func kept[T string | []byte](entries map[string]T) map[string]string {
	out := map[string]string{}
	for key, value := range entries {
		for _, prefix := range []string{storage.Config, storage.Connection, storage.Consumer, storage.DocumentSettings, storage.Document, storage.Notification} {
			if strings.HasPrefix(key, prefix) {
				out[key] = string(value)
			}
		}
	}
	return out
}

// plant puts a secret into every field of a request that is one, in the shape that it
// has. It is not done where the same text stands in a field that is none.
func (m *fuzzed) plant(data map[string]any) (planted bool) {
	for _, name := range slices.Sorted(maps.Keys(data)) {
		if !m.secretFields[name] {
			continue
		}
		switch v := data[name].(type) {
		case []any:
			data[name] = []any{sentSecret}
		case map[string]any:
			data[name] = map[string]any{sentSecret: sentSecret}
		case string:
			if v == "" {
				continue
			}
			data[name] = sentSecret
		default:
			continue
		}
		planted = true
	}
	return planted
}

// FuzzStored puts anything where the engine stores something, and looks at everything.
// What cannot be understood is said, and harms nothing else.
func FuzzStored(f *testing.F) {
	entries := fuzzedEntries(f)
	keys := slices.Sorted(maps.Keys(entries))
	for i, key := range keys {
		f.Add(byte(i), entries[key])
		f.Add(byte(i), bytes.Replace(entries[key], []byte(`1`), []byte(`-1`), 3))
		f.Add(byte(i), []byte(`{}`))
		f.Add(byte(i), []byte(`null`))
	}
	f.Fuzz(func(t *testing.T, which byte, value []byte) {
		lookAtStored(t, entries, keys[int(which)%len(keys)], value)
	})
}

// TestStoredWithoutAField leaves each field of each entry out, and puts each of a few other
// things in its place.
func TestStoredWithoutAField(t *testing.T) {
	t.Parallel()
	entries := fuzzedEntries(t)
	tried := 0
	for _, key := range slices.Sorted(maps.Keys(entries)) {
		var whole any
		if json.Unmarshal(entries[key], &whole) != nil {
			continue
		}
		for _, changed := range without(whole) {
			value, err := json.Marshal(changed)
			require.NoError(t, err)
			lookAtStored(t, entries, key, value)
			tried++
		}
	}
	t.Logf("%d changes of %d entries", tried, len(entries))
	require.Greater(t, tried, 500)
}

// without are all that v is without one of its fields or items, at any depth, and with
// something else in its place.
func without(v any) (out []any) {
	switch v := v.(type) {
	case map[string]any:
		for name, field := range v {
			rest := maps.Clone(v)
			delete(rest, name)
			out = append(out, rest)
			for _, other := range append(without(field), instead(field)...) {
				one := maps.Clone(v)
				one[name] = other
				out = append(out, one)
			}
		}
	case []any:
		for i, item := range v {
			out = append(out, slices.Delete(slices.Clone(v), i, i+1))
			for _, other := range append(without(item), instead(item)...) {
				one := slices.Clone(v)
				one[i] = other
				out = append(out, one)
			}
		}
	}
	return out
}

// instead are other values of the type of v.
func instead(v any) []any {
	switch v := v.(type) {
	case string:
		return []any{"", "other"}
	case bool:
		return []any{!v}
	case float64:
		return []any{-1, 0, 1 << 40}
	case []any:
		return []any{[]any{}, nil}
	case map[string]any:
		return []any{map[string]any{}, nil}
	}
	return nil
}

// lookAtStored looks at everything in a mount, one of whose entries was replaced.
func lookAtStored(t *testing.T, entries map[string][]byte, key string, value []byte) {
	t.Helper()
	changed := maps.Clone(entries)
	changed[key] = value
	m := newFuzzed(t, changed)
	defer m.Cleanup(context.Background())
	for _, path := range []string{
		"config", "status", "metrics", "rotations", "creds/token", "creds/app", "creds/signs", "roles/token", "roles/app", "roles/signs", "jwks/signs",
		"data/app/tokens", "metadata/app/tokens", "documents/app/tokens", "consumers/web", "notifications/ops", "connections/cache", "connections/queue",
		"connections/db", "connections/remote", "connections/prod", "roles/", "connections/", "consumers/", "documents/", "notifications/", "rotations/", "metadata/", "deleted/",
	} {
		var op logical.Operation = logical.ReadOperation
		if strings.HasSuffix(path, "/") {
			op = logical.ListOperation
		}
		r := m.send(t, op, path, nil)
		require.NotContains(t, r.message, "a defect of the engine", "%s with %s = %s", path, key, value)
		require.NotContains(t, r.message, storedSecret)
	}
	require.NotContains(t, m.log.String(), "panicked", "%s = %s", key, value)
}
