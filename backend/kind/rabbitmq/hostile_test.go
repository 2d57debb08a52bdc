package rabbitmq

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const allOfIt = 64 << 20 // more than anything here may take

// bounds calls what talks to a hostile server, and returns its error.
func bounds(t *testing.T, call func(ctx context.Context) error) error {
	t.Helper()
	const deadline = 4 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	err := call(ctx)
	took := time.Since(began)
	runtime.ReadMemStats(&after)
	require.Error(t, err)
	require.NotContains(t, err.Error(), "its-password")
	require.Less(t, took, 2*deadline)
	require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(allOfIt))
	return err
}

// TestHostileBroker: who answers at the port of AMQP says frames without an end, or a
// byte at a time.
func TestHostileBroker(t *testing.T) {
	for name, h := range map[string]servers.Hostile{
		"a frame of four gigabytes": {Begins: "\x01\x00\x00\xff\xff\xff\xff\x00\x0a\x00\x0a\x00\x09\x00\x00\x00\x00\xff\xff\xff\xff", GoesOn: "x"},
		"a table within tables":     {Begins: "\x01\x00\x00\x7f\xff\xff\xff\x00\x0a\x00\x0a\x00\x09\x7f\xff\xff\xff", GoesOn: "\x01aF\x7f\xff\xff\xff"},
		"heartbeats without an end": {GoesOn: "\x08\x00\x00\x00\x00\x00\x00\xce"},
		"a byte at a time":          {Begins: "\x01\x00\x00\x00\xff", GoesOn: "\x00", Pause: 50 * time.Millisecond},
		"nothing":                   {},
		"another protocol":          {GoesOn: "HTTP/1.1 200 OK\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			address := h.Start(t)
			err := bounds(t, func(ctx context.Context) error {
				v, err := logIn(ctx, "a", endpoint{addr: address, host: "127.0.0.1"}, connection.TLS{}, kind.Material{Username: "app", Secret: "its-password"}, "/")
				require.False(t, v.accepted)
				return err
			})
			require.False(t, kind.IsDefinite(err), "%v", err)
		})
	}
}

// TestHostileManagement: what answers for the management API never stops, says a byte at
// a time, or repeats what it was sent.
func TestHostileManagement(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"a body without an end": func(w http.ResponseWriter, _ *http.Request) {
			_, err := io.WriteString(w, `{"name":"`)
			for err == nil {
				_, err = io.WriteString(w, strings.Repeat("x", 64<<10))
			}
		},
		"lists within lists": func(w http.ResponseWriter, _ *http.Request) {
			var err error
			for err == nil {
				_, err = io.WriteString(w, strings.Repeat("[", 64<<10))
			}
		},
		"a byte at a time": func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, " ")
				_ = http.NewResponseController(w).Flush()
				select {
				case <-time.After(50 * time.Millisecond):
				case <-r.Context().Done():
				}
			}
		},
		"what it was sent": func(w http.ResponseWriter, r *http.Request) {
			_, password, _ := r.BasicAuth()
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, `{"error":"bad_request","reason":"`+password+` is wrong"}`)
		},
		"what it was sent, as a name": func(w http.ResponseWriter, r *http.Request) {
			_, password, _ := r.BasicAuth()
			_, _ = io.WriteString(w, `{"name":"`+password+`","tags":"`+password+`"}`)
		},
		"a redirection": func(w http.ResponseWriter, r *http.Request) {
			_, password, _ := r.BasicAuth()
			http.Redirect(w, r, "http://"+password+".example.com/", http.StatusTemporaryRedirect)
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(answer)
			defer server.Close()
			defer server.CloseClientConnections()
			e := &connection.Entry{
				Name: "queue", RabbitMQ: &connection.RabbitMQ{ManagementURLs: []string{server.URL}, VHosts: []string{"/"}},
				Admin: connection.NewAdmin(kind.Material{Username: "admin", Secret: "its-password"}),
			}
			bounds(t, func(ctx context.Context) error { _, err := Verify(ctx, e); return err })
		})
	}
}
