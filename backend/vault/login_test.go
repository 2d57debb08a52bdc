package vault

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// door is a Vault that lets one secret-id in, and counts who asks.
type door struct {
	*httptest.Server
	mu      sync.Mutex
	accepts string
	broken  bool
	asked   []string
	revoked int
}

func newDoor(t *testing.T) *door {
	t.Helper()
	d := &door{}
	d.Server = httptest.NewServer(http.HandlerFunc(d.serve))
	t.Cleanup(d.Close)
	return d
}

func (d *door) serve(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.URL.Path == "/v1/auth/token/revoke-self" {
		d.revoked++
		w.WriteHeader(http.StatusNoContent)
		return
	}
	var body map[string]string
	_ = json.NewDecoder(r.Body).Decode(&body)
	d.asked = append(d.asked, body["secret_id"])
	switch {
	case d.broken:
		w.WriteHeader(http.StatusInternalServerError)
	case body["secret_id"] != d.accepts:
		w.WriteHeader(http.StatusBadRequest)
		_, _ = w.Write([]byte(`{"errors": ["invalid role or secret ID"]}`))
	default:
		_, _ = w.Write([]byte(`{"auth": {"client_token": "t", "lease_duration": 60}}`))
	}
}

func (d *door) lets(secret string, broken bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.accepts, d.broken, d.asked = secret, broken, nil
}

// rotating is a connection with three credentials.
func rotating(address string) *connection.Entry {
	e := entry(address, connection.AuthAppRole, kind.Material{Username: "r", Secret: "current"})
	for _, stage := range []version.Stage{version.Previous, version.Pending} {
		e.Admin.Versions = append(e.Admin.Versions, version.Version{Stage: stage, Material: kind.Material{Username: "r", Secret: string(stage)}})
	}
	return e
}

// as is what AsAdmin logs in with.
func (r *rig) as(e *connection.Entry) (string, error) {
	got := ""
	err := r.AsAdmin(r.t.Context(), e, func(ctx context.Context, l *Login) {
		got = l.Material.Secret
		require.NoError(r.t, l.Do(ctx, func(_ context.Context, c *api.Client) error {
			require.Equal(r.t, "t", c.Token())
			return nil
		}))
	})
	return got, err
}

// Refusals count against an AppRole as a whole, so the same is not asked again.
func TestLoginRemembersRefusals(t *testing.T) {
	t.Parallel()
	d, r := newDoor(t), newRig(t)
	e := rotating(d.URL)
	d.lets("previous", false)
	for range 5 {
		got, err := r.as(e)
		require.NoError(t, err)
		require.Equal(t, "previous", got)
	}
	require.Equal(t, []string{"current", "pending", "previous", "previous", "previous", "previous", "previous"}, d.asked)
	require.Equal(t, 5, d.revoked)

	d.lets("pending", false)
	_, err := r.as(e)
	require.True(t, Refused(err), "%v", err)
	require.Equal(t, kind.Unavailable, class(t, err))
	require.Equal(t, []string{"previous"}, d.asked)
	_, err = r.as(e)
	require.True(t, Refused(err))
	require.ErrorContains(t, err, "it is not tried again before")
	require.Len(t, d.asked, 1)

	r.Forgive(e, kind.Material{Username: "r", Secret: "pending"})
	got, err := r.as(e)
	require.NoError(t, err)
	require.Equal(t, "pending", got)

	// Vault has forgotten by then.
	d.lets("current", false)
	r.later(refusedAgain + time.Second)
	got, err = r.as(e)
	require.NoError(t, err)
	require.Equal(t, "current", got)

	// Another address, mount or connection is another door.
	other := rotating(d.URL)
	other.Name = "another"
	d.lets("", false)
	_, err = r.as(other)
	require.True(t, Refused(err))
	require.Len(t, d.asked, 3)
	r.forgetAllBut([]*connection.Entry{e})
	_, err = r.as(other)
	require.True(t, Refused(err))
	require.Len(t, d.asked, 6)
}

// What is no refusal says nothing about a credential: no other one is tried in its
// place, and it is tried again.
func TestLoginThatIsNotAnswered(t *testing.T) {
	t.Parallel()
	d, r := newDoor(t), newRig(t)
	e := rotating(d.URL)
	d.lets("current", true)
	for range 2 {
		_, err := r.as(e)
		require.Error(t, err)
		require.False(t, Refused(err))
		require.Equal(t, kind.Unavailable, class(t, err))
	}
	require.Equal(t, []string{"current", "current"}, d.asked)
	e.Admin = connection.Admin{}
	_, err := r.as(e)
	require.Equal(t, kind.Definite, class(t, err))
	r.Close(context.Background())
	_, err = r.as(e)
	require.ErrorContains(t, err, "the engine is being stopped")
}

func TestRoleOfAppRole(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"", "app", "my-app.v2", "A_1"} {
		require.NoError(t, ValidateConfig(&connection.Vault{Address: "https://v", Auth: connection.AuthAppRole, Role: role}, connection.TLS{}), role)
	}
	for _, role := range []string{"a/b", "../x", "a..b", "a b", "-a", "a?x", "a\n"} {
		require.ErrorContains(t, ValidateConfig(&connection.Vault{Address: "https://v", Auth: connection.AuthAppRole, Role: role}, connection.TLS{}),
			"give the name of the AppRole", role)
	}
}
