package keeper_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/keeper"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// callTo is a Call to a server, by the same client that connections use.
func callTo(t *testing.T, address string) keeper.Call {
	t.Helper()
	entry := &connection.Entry{
		Name: "other", Type: connection.TypeVault, Vault: &connection.Vault{Address: address, Auth: connection.AuthToken},
		Admin: connection.Admin{Set: version.Set{Versions: []version.Version{{Number: 1, Stage: version.Current, Material: kind.Material{Secret: "a-token"}}}}},
	}
	clients := vault.New(func(context.Context, string) (*connection.Entry, error) { return entry, nil }, nil)
	t.Cleanup(func() { clients.Close(context.Background()) })
	return func(ctx context.Context, f func(context.Context, *api.Client) error) error {
		return clients.Do(ctx, "other", f)
	}
}

var subject = kind.Subject{Role: "a", Rotation: "an-id", Spec: kind.Spec{Mount: "m", Key: "k"}}

// answering is a Vault that knows its token and answers one path, once.
func answering(t *testing.T, answer http.HandlerFunc) (address string, asked *atomic.Int64) {
	t.Helper()
	asked = new(atomic.Int64)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/m/rotate/k" {
			asked.Add(1)
			answer(w, r)
			return
		}
		_, _ = w.Write([]byte(`{"data": {"ttl": 0, "renewable": false}}`))
	}))
	t.Cleanup(server.Close)
	return server.URL, asked
}

// What an answer says of its effect decides whether a rotation may be repeated.
func TestTurn(t *testing.T) {
	t.Parallel()
	status := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = w.Write([]byte(body))
		}
	}
	for name, c := range map[string]struct {
		answer           http.HandlerFunc
		failed, noEffect bool
		definite         bool
		evidence         string
	}{
		"done, with a body": {answer: status(200, `{"request_id": "r-1", "data": {"latest_version": 5}}`), evidence: "request r-1"},
		"done, without one": {answer: status(204, ""), evidence: "answered 204 No Content on "},
		"bad request":       {answer: status(400, `{"errors": ["key not found"]}`), failed: true, noEffect: true, definite: true},
		"forbidden":         {answer: status(403, `{"errors": ["permission denied"]}`), failed: true, noEffect: true},
		"no such path":      {answer: status(404, `{"errors": ["no handler for route"]}`), failed: true, noEffect: true, definite: true},
		"too many":          {answer: status(429, `{"errors": ["rate limit quota exceeded"]}`), failed: true, noEffect: true},
		"sealed":            {answer: status(503, `{"errors": ["Vault is sealed"]}`), failed: true, noEffect: true},
		"refused by name":   {answer: status(500, `{"errors": ["1 error: cannot be done: no user secret-text"]}`), failed: true, noEffect: true, definite: true},
		"internal error":    {answer: status(500, `{"errors": ["failed to update user secret-text"]}`), failed: true},
		"bad gateway":       {answer: status(502, "a proxy says so"), failed: true},
		"unavailable":       {answer: status(503, "a proxy says so"), failed: true},
		"request timeout":   {answer: status(408, ""), failed: true},
		"cut off": {answer: func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				_ = conn.Close()
			}
		}, failed: true},
		"no JSON": {answer: status(200, "<html>"), failed: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address, asked := answering(t, c.answer)
			got := keeper.Turn(t.Context(), callTo(t, address), "m/rotate/k", subject, "cannot be done")
			require.Equal(t, c.failed, got.Err != nil, "%v", got.Err)
			require.Equal(t, c.noEffect, got.NoEffect, "%v", got.Err)
			require.Equal(t, c.definite, kind.IsDefinite(got.Err), "%v", got.Err)
			require.Contains(t, got.Evidence, c.evidence)
			require.LessOrEqual(t, asked.Load(), int64(1))
			if got.Err != nil {
				require.NotContains(t, got.Err.Error(), "secret-text")
				require.NotContains(t, got.Err.Error(), "a-token")
			}
		})
	}
}

// The other Vault's audit log names the rotation.
func TestTurnSaysWhoAsks(t *testing.T) {
	t.Parallel()
	var seen string
	address, _ := answering(t, func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header.Get("X-Correlation-Id")
		w.WriteHeader(http.StatusNoContent)
	})
	require.NoError(t, keeper.Turn(t.Context(), callTo(t, address), "m/rotate/k", subject).Err)
	require.Equal(t, "an-id", seen)
}

// What nobody received had no effect; what nobody answered may have.
func TestTurnOfWhatIsNotThere(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	gone := listener.Addr().String()
	require.NoError(t, listener.Close())
	got := keeper.Turn(t.Context(), callTo(t, "http://"+gone), "m/rotate/k", subject)
	require.Error(t, got.Err)
	require.True(t, got.NoEffect)
	require.False(t, kind.IsDefinite(got.Err))

	received := make(chan struct{})
	address, _ := answering(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // from then on the server notices that the client has gone
		close(received)
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() { <-received; cancel(errors.New("enough")) }()
	got = keeper.Turn(ctx, callTo(t, address), "m/rotate/k", subject)
	require.Error(t, got.Err)
	require.False(t, got.NoEffect)

	ended, cancelNow := context.WithTimeout(t.Context(), -time.Second)
	defer cancelNow()
	address, asked := answering(t, func(http.ResponseWriter, *http.Request) {})
	got = keeper.Turn(ended, callTo(t, address), "m/rotate/k", subject)
	require.Error(t, got.Err)
	require.True(t, got.NoEffect)
	require.Zero(t, asked.Load())
}

func TestLacks(t *testing.T) {
	t.Parallel()
	answer := `{"data": {"a/b": ["read"], "a/c": ["update"], "a/d": ["root"], "a/e": ["deny"]}}`
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/sys/capabilities-self" {
			_, _ = w.Write([]byte(answer))
			return
		}
		_, _ = w.Write([]byte(`{"data": {"ttl": 0, "renewable": false}}`))
	}))
	t.Cleanup(server.Close)
	missing, known := keeper.Lacks(t.Context(), callTo(t, server.URL), "a/b", "a/c", "a/d", "a/e", "a/f")
	require.True(t, known)
	require.Equal(t, []string{"a/b", "a/e", "a/f"}, missing)
	require.Contains(t, keeper.Forbidden(missing), `path "a/b" { capabilities = ["update"] }`)
	answer = `nonsense`
	_, known = keeper.Lacks(t.Context(), callTo(t, server.URL), "a/b")
	require.False(t, known)
}

func TestComplete(t *testing.T) {
	t.Parallel()
	spec := kind.Spec{Key: "orders"}
	require.NoError(t, keeper.Complete(&spec, "transit"))
	require.Equal(t, kind.Spec{Key: "orders", Mount: "transit", Strategy: kind.Kept}, spec)
	require.Equal(t, []string{"transit/orders"}, spec.Owns())
	for _, bad := range []kind.Spec{
		{},
		{Key: "a/b"},
		{Key: "a..b"},
		{Key: "a b"},
		{Key: "a\n"},
		{Key: "?x"},
		{Key: "a", Mount: "/transit"},
		{Key: "a", Mount: "transit/"},
		{Key: "a", Mount: "../sys"},
		{Key: "a", Mount: "sys?x"},
	} {
		require.Error(t, keeper.Complete(&bad, "transit"), "%+v", bad)
	}
}
