package notify

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

// FuzzNotification: what is given is refused with a sentence that repeats no secret of
// it, or is sent where it says, signed so that whoever has the key can check it.
func FuzzNotification(f *testing.F) {
	for _, n := range [][4]string{
		{"https://hooks.example.com/x", "json", testKey, "X-Team: platform"},
		{"http://127.0.0.1:8080", "slack", "", ""},
		{"https://u:p@h/", "json", "whsec_", "A: b\r\nC: d"},
		{"http://[::1]/", "json", "whsec_AAAA", "Webhook-Id: 1"},
		{"https://h/\x00", "xml", testKey, "no colon"},
		{"file:///etc/passwd", "json", testKey, ":"},
		{"https://h/?a=b#c", "slack", "", "Host: x"},
	} {
		f.Add(n[0], n[1], n[2], n[3], "because <b> `x` & y")
	}
	f.Fuzz(func(t *testing.T, address, format, secret, headers, text string) {
		header, err := ParseHeaders(headers)
		if err != nil {
			if len(headers) > 60 && strings.Contains(err.Error(), headers) {
				t.Fatalf("%q: %v", headers, err)
			}
			return
		}
		n := &Notification{URL: address, Format: Format(format), Secret: secret, Header: header, Mount: "harmonyflow/"}
		if err := n.Check(func(string) bool { return true }); err != nil {
			if strings.ContainsAny(err.Error(), "\n\x1b") || len(secret) > 30 && strings.Contains(err.Error(), secret) {
				t.Fatalf("%+v: %q", n, err)
			}
			return
		}
		n.Host()
		e := Event{ID: "id", Kind: Completed, At: time.Unix(1, 0), Summary: text, Reason: text, Roles: []Role{{Role: text, Kind: "redis", Error: text}}}
		body, err := n.body(e)
		if err != nil || !json.Valid(body) {
			t.Fatalf("%q: %v", body, err)
		}
		if n.Format == Slack {
			if said := n.text(e); strings.ContainsAny(strings.ReplaceAll(said, "\n`vault read harmonyflow/status`", ""), "<>`") {
				t.Fatalf("%q became %q", text, said)
			}
			return
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, n.URL, nil)
		if err != nil {
			return // that is said when it is sent
		}
		r.Header.Set(idHeader, e.ID)
		if err := n.sign(r, e.ID, body, time.Now()); err != nil {
			t.Fatal(err)
		}
		wh, err := standardwebhooks.NewWebhook(secret)
		if err != nil {
			t.Fatalf("%q is taken: %v", secret, err)
		}
		if err := wh.Verify(body, r.Header); err != nil {
			t.Fatal(err)
		}
		if wh.Verify(slices.Concat(body, []byte(" ")), r.Header) == nil {
			t.Fatal("what was changed on the way is taken")
		}
	})
}
