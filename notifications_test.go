package harmonyflow

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/notify"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// receiver takes webhooks, and verifies each with the library of those who made the
// standard.
type receiver struct {
	*httptest.Server
	t      *testing.T
	mu     sync.Mutex
	status int
	hangs  chan struct{} // nil: it does not
	events []map[string]any
	wrong  []error
}

func newReceiver(t *testing.T, secret string) *receiver {
	t.Helper()
	wh, err := standardwebhooks.NewWebhook(secret)
	require.NoError(t, err)
	r := &receiver{t: t, status: http.StatusNoContent}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		r.mu.Lock()
		hangs := r.hangs
		r.mu.Unlock()
		if hangs != nil {
			select {
			case <-hangs:
			case <-req.Context().Done():
				return
			}
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if err := wh.Verify(body, req.Header); err != nil {
			r.wrong = append(r.wrong, err)
		}
		if r.status < 300 {
			var m map[string]any
			_ = json.Unmarshal(body, &m)
			r.events = append(r.events, m)
		}
		w.WriteHeader(r.status)
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) types() (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	require.Empty(r.t, r.wrong)
	for _, m := range r.events {
		out = append(out, m["type"].(string))
	}
	return out
}

func TestNotifications(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	m.must("config", map[string]any{"grace_period": "1h", "allowed_hosts": "127.0.0.1"})
	m.adopt("app", "cache", 0, nil)

	secret := "whsec_" + base64.StdEncoding.EncodeToString([]byte("a key of thirty-two bytes, really"))
	hook, other := newReceiver(t, secret), newReceiver(t, secret)
	refused := m.write("notifications/ops", map[string]any{"url": "https://hooks.example.com/x", "secret": secret})
	require.Equal(t, http.StatusBadRequest, refused.code)
	require.Contains(t, refused.message, "allowed_hosts")
	require.Equal(t, http.StatusNotFound, m.read("notifications/ops").code, "nothing was changed")
	m.must("notifications/ops", map[string]any{"url": hook.URL + "/in-the-url", "secret": secret, "headers": "X-Key: in-the-header"})
	m.must("notifications/slow", map[string]any{"url": other.URL, "secret": secret, "events": "completed"})
	require.Equal(t, []string{"ops", "slow"}, m.list("notifications/").data["keys"])
	shown := m.read("notifications/ops").data
	require.Equal(t, hook.URL, shown["host"])
	require.Equal(t, []string{"X-Key"}, shown["headers"])
	require.Contains(t, m.must("notifications/ops/test", nil).data["summary"], "was taken")
	require.Equal(t, http.StatusNotFound, m.write("notifications/absent/test", nil).code)

	// One that hangs costs a rotation nothing.
	hang := make(chan struct{})
	other.mu.Lock()
	other.hangs = hang
	other.mu.Unlock()
	rotated := m.must("rotate/redis/app", map[string]any{"reason": "because"})
	m.must("retire/redis/app", nil)
	m.ended(id(rotated))
	until := func(want ...string) {
		t.Helper()
		require.Eventually(t, func() bool { return slices.Equal(want, hook.types()) }, patience, 20*time.Millisecond, "%v", hook.types())
	}
	until("notification.test", "rotation.started", "rotation.promoted", "rotation.completed")
	hook.mu.Lock()
	last := hook.events[3]["data"].(map[string]any)
	hook.mu.Unlock()
	require.Equal(t, id(rotated), last["rotation_id"])
	require.Equal(t, "because", last["reason"])
	require.Equal(t, "redis/app: rotation completed", last["summary"])
	require.Equal(t, "vault read "+mountPoint+"rotations/"+id(rotated), last["follow"])
	require.Empty(t, other.types())

	// Vault's own events carry the same, and what to read again.
	for kind, want := range map[string][2]string{
		"started": {"rotations/" + id(rotated), "false"}, "promoted": {"creds/app", "true"}, "completed": {"rotations/" + id(rotated), "false"},
	} {
		events := m.events.of("harmonyflow/" + kind)
		require.Len(t, events, 1, kind)
		got := events[0].metadata
		require.Equal(t, events[0].id, got["id"])
		require.Equal(t, "rotations/"+id(rotated), got[logical.EventMetadataPath])
		require.Equal(t, want, [2]string{got[logical.EventMetadataDataPath].(string), got[logical.EventMetadataModified].(string)})
		require.Equal(t, kind, got[logical.EventMetadataOperation])
		require.Equal(t, "because", got["reason"])
		require.Equal(t, id(rotated), got["rotation_id"])
	}
	require.Equal(t, last["roles"], m.events.of("harmonyflow/completed")[0].metadata["roles"])
	close(hang)
	require.Eventually(t, func() bool { return slices.Equal([]string{"rotation.completed"}, other.types()) }, patience, 20*time.Millisecond)

	// Somebody else's server is not sent what is signed with the stored key.
	refused = m.write("notifications/ops", map[string]any{"url": other.URL})
	require.Equal(t, http.StatusBadRequest, refused.code)
	require.Contains(t, refused.message, "in the same request")
	m.must("notifications/ops", map[string]any{"url": other.URL, "secret": secret, "headers": ""})
	require.Equal(t, other.URL, m.read("notifications/ops").data["host"])

	// A test says what is wrong; a notification that is gone is told nothing.
	other.mu.Lock()
	other.status = http.StatusInternalServerError
	other.mu.Unlock()
	refused = m.write("notifications/ops/test", nil)
	require.Equal(t, http.StatusBadRequest, refused.code)
	require.Contains(t, refused.message, "500")
	for _, name := range []string{"ops", "slow"} {
		require.Equal(t, http.StatusNoContent, m.delete("notifications/"+name).code)
	}
	require.Equal(t, http.StatusNotFound, m.list("notifications/").code)
	m.must("rotate/redis/app", map[string]any{"reason": "nobody is told"})
	require.Equal(t, http.StatusOK, m.read("metrics").code)
	require.Len(t, hook.types(), 4)
}

// Only what creds/ serves is what subscribers are told to read.
func TestEventsNameWhatIsServed(t *testing.T) {
	t.Parallel()
	b := newMount(t).b
	for want, roles := range map[string][]notify.Role{
		"creds/app": {{Role: "app", Kind: "redis"}},
		"creds/key": {{Role: "key", Kind: "jwt"}},
	} {
		require.Equal(t, want, b.servedBy(roles))
	}
	root := rotation.Part{Role: rotation.RootName("cache"), Kind: "redis"}
	for name, roles := range map[string][]notify.Role{
		"an admin credential":             {{Role: root.Key(), Kind: root.Kind}},
		"a key that another server keeps": {{Role: "orders", Kind: "transit"}},
		"several":                         {{Role: "app", Kind: "redis"}, {Role: "key", Kind: "jwt"}},
		"none":                            nil,
	} {
		require.Empty(t, b.servedBy(roles), name)
	}
}
