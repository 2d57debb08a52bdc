package rotation

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
)

// FuzzEntries: whatever stands in storage is decoded or refused, and what was decoded
// can be stored again and says the same then.
func FuzzEntries(f *testing.F) {
	formats := Formats()
	var prefixes []string
	for prefix, example := range formats {
		prefixes = append(prefixes, prefix)
		raw, err := json.Marshal(example)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(prefix, raw)
	}
	slices.Sort(prefixes)
	for _, text := range []string{
		`{"name":"app","kind":"redis","versions":[{"number":1,"material":{"secret":"x"},"stage":"current"},{"number":1}],"last":-1,"run":{"rotation":"r","phase":"grace","deadline":"0001-01-01T00:00:00Z"}}`,
		`{"run":{},"drift":{},"versions":[null]}`, `null`, `[]`, `{"grace_period":-1,"schedule":{"rotation_schedule":"x"}}`, `{"next":"9999-12-31T23:59:59Z"}`,
	} {
		for _, prefix := range prefixes {
			f.Add(prefix, []byte(text))
		}
	}
	f.Fuzz(func(t *testing.T, prefix string, raw []byte) {
		example, ok := formats[prefix]
		if !ok {
			return
		}
		v := reflect.New(reflect.TypeOf(example))
		if jsonutil.DecodeJSON(raw, v.Interface()) != nil {
			return
		}
		once, err := jsonutil.EncodeJSON(v.Interface())
		if err != nil {
			return // a time that JSON has no form for
		}
		again := reflect.New(reflect.TypeOf(example))
		if err := jsonutil.DecodeJSON(once, again.Interface()); err != nil {
			t.Fatalf("%s: %s cannot be decoded: %v", prefix, once, err)
		}
		twice, err := jsonutil.EncodeJSON(again.Interface())
		if err != nil || string(once) != string(twice) {
			t.Fatalf("%s: %s became %s (%v)", prefix, once, twice, err)
		}
		now := time.Unix(1800000000, 0)
		switch v := v.Interface().(type) {
		case *Role:
			v.State()
			v.Grace(DefaultConfig())
			v.Longest(DefaultConfig())
			v.Shows()
		case *Config:
			v.Frozen(now)
		case *Header:
			StateOf(v, v.Roles)
		}
	})
}

// FuzzClip: a text of somebody else's fits where it is stored, and stays on its line.
func FuzzClip(f *testing.F) {
	for _, text := range []string{"", "plain", strings.Repeat("é", 300), strings.Repeat("<", 300), "a\xffb", "\x1b[2J", strings.Repeat("\u2028", 200), "\\\"", "\u202e"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got := clip(text)
		raw, err := json.Marshal(got)
		if err != nil || len(raw) > maxText || utf8.RuneCountInString(got) > maxRunes+1 {
			t.Fatalf("%q became %q, %d bytes", text, got, len(raw))
		}
		if bounded.Line(got) != got {
			t.Fatalf("%q became %q", text, got)
		}
	})
}
