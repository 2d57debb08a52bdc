package publish

import (
	"encoding/json"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
)

// FuzzPlaces: what is taken for a place or a document is below the mount that it names,
// and a permission for one place is none for another.
func FuzzPlaces(f *testing.F) {
	for _, p := range [][3]string{
		{"secret", "app/db", "secret/app/*"},
		{"secret/", "../sys/raw", "*"},
		{"kv", "a/../../b", "kv/*"},
		{"a/b", "data/x", "a/b/data/?"},
		{"secret", "app//db", "secret/[a"},
		{"s", "a\x00", "s/**"},
		{"secret", "a%2f..%2fb", "secret/*"},
		{"sys", "raw/x", "secret/*/x"},
		{"secret", strings.Repeat("a/", 8) + "a", "*/*"},
		{"secret", "a?version=1", "secret/?"},
	} {
		f.Add(p[0], p[1], p[2])
	}
	f.Fuzz(func(t *testing.T, mount, name, allowed string) {
		_ = CheckField("field", name)
		if CheckName(name) == nil && (path.Clean(name) != name || strings.HasPrefix(name, "/") || strings.ContainsAny(name, "%?#\x00\\ ")) {
			t.Fatalf("%q is taken for a document", name)
		}
		p := Place{Connection: "remote", Mount: mount, Path: name}
		if err := CheckPlace(p); err != nil {
			if strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Fatalf("%q", err)
			}
			return
		}
		whole := secret{place: p}.path()
		if path.Clean(whole) != whole || !strings.HasPrefix(whole, mount+"/data/") || strings.ContainsAny(whole, "%?#\x00\\ ") {
			t.Fatalf("%+v is written to %q", p, whole)
		}
		e := &connection.Entry{Vault: &connection.Vault{AllowedPublishPaths: []string{allowed}}}
		if e.CheckPatterns() == nil && e.AllowsPublish(mount, name) && strings.Count(allowed, "/") != strings.Count(mount+"/"+name, "/") {
			t.Fatalf("%q permits %q", allowed, p)
		}
	})
}

// FuzzDocument: a stored document that can be decoded shows what it holds, and no more.
func FuzzDocument(f *testing.F) {
	full := (&Document{}).with([]View{{Role: "a", Version: 1, Fields: map[string]string{"x": "1"}}}, time.Unix(1, 0))
	full = full.with([]View{{Role: "a", Version: 2, Fields: map[string]string{"x": "2"}}}, time.Unix(2, 0))
	raw, err := json.Marshal(full)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, 1)
	f.Add(raw, -1)
	f.Add([]byte(strings.ReplaceAll(string(raw), "2", "-9223372036854775808")), 1)
	f.Add([]byte(`{}`), 0)
	f.Fuzz(func(_ *testing.T, raw []byte, version int) {
		var doc Document
		if json.Unmarshal(raw, &doc) == nil {
			doc.At(version)
			doc.Oldest()
			doc.Updated()
		}
	})
}
