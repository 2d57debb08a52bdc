package postgresql

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// FuzzDialogue: what a server says is passed on as it is, and understood the same
// however it is cut into pieces.
func FuzzDialogue(f *testing.F) {
	for _, said := range []string{
		"R\x00\x00\x00\x08\x00\x00\x00\x00", "R\x00\x00\x00\x17\x00\x00\x00\x0aSCRAM-SHA-256\x00\x00", "E\x00\x00\x00\x0bSFATAL\x00\x00", "R\xff\xff\xff\xff\x00\x00\x00\x03",
		"N\x00\x00\x00\x00R\x00\x00\x00\x08\x00\x00\x00\x05", "S", "R\x00\x00\x00\x04\x00\x00\x00\x00",
	} {
		f.Add([]byte(said))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		hear := func(r io.Reader) *dialogue {
			d := &dialogue{r: r, budget: bounded.NewBudget(maxHeard)}
			got, err := io.ReadAll(d)
			if err != nil || !bytes.Equal(got, said) {
				t.Fatalf("%q became %q (%v)", said, got, err)
			}
			return d
		}
		whole, pieces := hear(bytes.NewReader(said)), hear(iotest.OneByteReader(bytes.NewReader(said)))
		if whole.asked != pieces.asked || whole.accepted != pieces.accepted {
			t.Fatalf("%q: %d %t, and in bytes %d %t", said, whole.asked, whole.accepted, pieces.asked, pieces.accepted)
		}
	})
}

// FuzzURL: a connection_url is refused with a sentence that repeats nothing of it, or
// leads to hosts that can be dialled, without a password of its own.
func FuzzURL(f *testing.F) {
	for _, text := range []string{
		"postgresql://{{username}}:{{password}}@db.example.com:5432/app?sslmode=verify-full", "postgres://{{username}}:{{password}}@[::1]:5432,b/app",
		"host=db port=5432 dbname=app user={{username}} password={{password}}", "host=/var/run/postgresql", "host='a b' dbname='it''s'", "postgresql://u:planted-password@h/x",
		"host=a,b,c port=1,2,3 dbname=x sslmode=disable user={{username}} password={{password}}", `host=a\ b`, "postgresql://h?host=x&passfile=/etc/passwd", "service=x", "postgresql://h:%zz/",
		"host=127.0.0.1 port=99999999999999999999", "postgresql://{{username}}:{{password}}@h:5432/app?options=-c%20x", "passfile=/etc/passwd host=a",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c := &connection.PostgreSQL{URL: strings.ReplaceAll(text, "PLANTED", "planted-password")}
		err := ValidateConfig(c, connection.TLS{})
		if err != nil {
			if said := err.Error(); strings.Contains(said, "planted-password") || strings.ContainsAny(said, "\n\x1b") || len(said) > 600 {
				t.Fatalf("%q: %s", text, said)
			}
			return
		}
		if len(c.Hosts) == 0 {
			t.Fatalf("%q has no hosts", text)
		}
		for _, h := range c.Hosts {
			if name, _, err := net.SplitHostPort(h); err != nil || name == "" || strings.ContainsAny(name, "/@ \x00") {
				t.Fatalf("%q leads to %q", text, h)
			}
		}
	})
}

// FuzzVerifier: a password is refused, or becomes a verifier of letters that need no
// escaping and that is not the password.
func FuzzVerifier(f *testing.F) {
	for _, text := range []string{"", "password", "it's", "pass\x00word", "\xff", "ＡＢＣ", "a\u00ad", strings.Repeat("x", 5000), "\u200bx", "é", "e\u0301"} {
		f.Add(text)
	}
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=$:-"
	f.Fuzz(func(t *testing.T, secret string) {
		if (Kind{}).CheckInitial(kind.Spec{}, secret) != nil {
			return
		}
		plain(errors.New(secret))
		v, err := saltedVerifier(secret, []byte("0123456789abcdef"))
		if err != nil {
			if len(secret) >= 8 && strings.Contains(err.Error(), secret) {
				t.Fatalf("%q: %v", secret, err)
			}
			return
		}
		if strings.Trim(v, allowed) != "" || !strings.HasPrefix(v, "SCRAM-SHA-256$") {
			t.Fatalf("%q became %q", secret, v)
		}
		for _, part := range strings.Split(strings.TrimPrefix(strings.ReplaceAll(v, "$", ":"), "SCRAM-SHA-256:"), ":")[1:] {
			if _, err := base64.StdEncoding.DecodeString(part); err != nil {
				t.Fatalf("%q became %q: %v", secret, v, err)
			}
		}
	})
}
