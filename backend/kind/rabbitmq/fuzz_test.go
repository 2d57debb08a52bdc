package rabbitmq

import (
	"encoding/base64"
	"encoding/json"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
)

// FuzzURLs: addresses are refused with a sentence that repeats none of them, or can be
// dialled.
func FuzzURLs(f *testing.F) {
	for _, pair := range [][2]string{
		{"https://rabbitmq.example.com:15671", "amqps://rabbitmq.example.com"},
		{"http://[::1]:15672/prefix", "amqp://[::1]:5672/"},
		{"https://u:planted@h", "amqp://u:planted@h/v"},
		{"https://h?x", "amqp://h#y"},
		{"//h", "h:5672"},
		{"https://h:%zz", "amqp://h:99999"},
		{"https://h\x00", "amqps://a b"},
	} {
		f.Add(pair[0], pair[1])
	}
	f.Fuzz(func(t *testing.T, management, amqp string) {
		c := &connection.RabbitMQ{ManagementURLs: []string{management}, AMQPURLs: []string{amqp}}
		if err := ValidateConfig(c); err != nil {
			if strings.Contains(err.Error(), "planted") || strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Fatalf("%q %q: %v", management, amqp, err)
			}
			return
		}
		m, err := manage(t.Context(), management, connection.TLS{})
		if err != nil {
			return
		}
		m.close()
		e, err := parseAMQP(amqp)
		if err != nil {
			t.Fatalf("%q was taken: %v", amqp, err)
		}
		if _, _, err := net.SplitHostPort(e.addr); err != nil {
			t.Fatalf("%q leads to %q", amqp, e.addr)
		}
	})
}

// FuzzRecords: what a management API answers is understood, or is not; a hash is that of
// one password alone.
func FuzzRecords(f *testing.F) {
	hash, err := passwordHash(hashSHA256, "password")
	if err != nil {
		f.Fatal(err)
	}
	for _, algorithm := range []string{hashSHA256, hashSHA512, hashMD5, "", "rabbit_password_hashing_none"} {
		raw, err := json.Marshal(map[string]any{"name": "app", "password_hash": hash, "hashing_algorithm": algorithm, "tags": []string{"administrator"}, "limits": map[string]any{"max-connections": 3}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, "password")
	}
	for _, text := range []string{`{"tags":"administrator,monitoring"}`, `{"tags":[1]}`, `{"limits":[]}`, `{"limits":{"a":1e99}}`, `[]`, `null`, `{"password_hash":"AAAA"}`, `{"user":"a","peer_host":1,"connected_at":-1}`} {
		f.Add([]byte(text), "x")
	}
	f.Fuzz(func(t *testing.T, raw []byte, secret string) {
		var u user
		if json.Unmarshal(raw, &u) == nil {
			if u.has(secret) && u.has(secret+"x") {
				t.Fatalf("%s is the hash of two passwords", raw)
			}
			u.algorithm()
		}
		var s session
		_ = json.Unmarshal(raw, &s)
		connectionPath(s)
		var all []listener
		_ = json.Unmarshal(raw, &all)
		for _, algorithm := range []string{hashSHA256, hashSHA512, hashMD5} {
			hash, err := passwordHash(algorithm, secret)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := base64.StdEncoding.DecodeString(hash); err != nil || len(secret) >= 16 && strings.Contains(hash, secret) {
				t.Fatalf("%q became %q", secret, hash)
			}
			if secret != "" && !(user{Hash: hash, Algorithm: algorithm}).has(secret) {
				t.Fatalf("%q is not that of %q", hash, secret)
			}
		}
	})
}

// FuzzProfile: a profile that is understood says the same when it is written again.
func FuzzProfile(f *testing.F) {
	f.Add("tag \"administrator\"\npermission \"/\" \".*\" \"^$\" \"a\"")
	f.Add("limit max-connections 3\ntopic \"/\" \"x\" \"y\" \"z\"")
	f.Add("tag \"\\x00\"\ntag \"\n")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := parseProfile(strings.Split(text, "\n"))
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		lines := r.profile()
		again, err := parseProfile(lines)
		if err != nil || !slices.Equal(again.profile(), lines) {
			t.Fatalf("%q became %q, and that %q (%v)", text, lines, again.profile(), err)
		}
	})
}
