package harmonyflow

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// What connections of type rabbitmq take, and what they are refused; what they
// are good for is shown by test/e2e/testdata/rabbitmq.txt.
func TestRabbitMQConnections(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	ca, err := servers.NewAuthority()
	require.NoError(t, err)
	cert, key, err := ca.Issue("engine")
	require.NoError(t, err)
	good := map[string]any{
		"type": "rabbitmq", "management_urls": "https://queue.example.com:15671", "username": "admin", "password": "queue-admin-password",
		"allowed_roles": "app", "tls_ca": ca.PEM, "tls_cert": cert, "tls_key": key, "verify_connection": false,
	}
	m.must("connections/queue", good)
	read := m.read("connections/queue").data
	require.Equal(t, "admin", read["username"])
	require.Equal(t, []string{"https://queue.example.com:15671"}, read["management_urls"])
	require.Equal(t, ca.PEM, read["tls_ca"])
	require.NotContains(t, read, "password")
	require.NotContains(t, read, "tls_key")

	m.must("connections/queue", map[string]any{"vhosts": "/,orders", "verify_connection": false})
	require.Equal(t, []string{"/", "orders"}, m.read("connections/queue").data["vhosts"])

	with := func(more map[string]any) map[string]any {
		data := maps.Clone(good)
		maps.Copy(data, more)
		return data
	}
	elsewhere := httptest.NewServer(http.RedirectHandler("http://127.0.0.1:1/", http.StatusFound))
	t.Cleanup(elsewhere.Close)
	for name, c := range map[string]struct {
		path string
		data map[string]any
		says string
	}{
		"no URL":                       {"new", with(map[string]any{"management_urls": ""}), "management_urls is empty"},
		"credentials in a URL":         {"new", with(map[string]any{"management_urls": "http://admin:url-password@queue:15672"}), "management_urls"},
		"credentials in an AMQP URL":   {"new", with(map[string]any{"amqp_urls": "amqp://app:url-password@queue"}), "amqp_urls"},
		"no username":                  {"new", with(map[string]any{"username": ""}), "username is missing"},
		"no password":                  {"new", map[string]any{"type": "rabbitmq", "management_urls": "http://queue:15672", "username": "admin"}, "password is missing"},
		"a field of redis":             {"new", with(map[string]any{"addresses": "queue:5672"}), `field "addresses" is not for`},
		"forget_nodes":                 {"queue", map[string]any{"forget_nodes": true}, `field "forget_nodes" is not for`},
		"a certificate without a key":  {"queue", map[string]any{"tls_cert": cert}, "belong together"},
		"a key of another certificate": {"queue", map[string]any{"tls_cert": ca.PEM, "tls_key": key}, "tls_cert and tls_key"},
		"no authority":                 {"queue", map[string]any{"tls_ca": "queue", "password": "queue-admin-password"}, "tls_ca"},
		"another URL":                  {"queue", map[string]any{"management_urls": "https://else.example.com", "verify_connection": false}, "password in the same request"},
		"another AMQP URL":             {"queue", map[string]any{"amqp_urls": "amqp://else.example.com", "verify_connection": false}, "password in the same request"},
		"another address":              {"queue", map[string]any{"address_map": map[string]any{"rabbit@a": "else:1"}, "verify_connection": false}, "password in the same request"},
		"less trust":                   {"queue", map[string]any{"tls_skip_verify": true, "verify_connection": false}, "password in the same request"},
		"another name to trust":        {"queue", map[string]any{"tls_server_name": "else.example.com", "verify_connection": false}, "password in the same request"},
		"another user":                 {"queue", map[string]any{"username": "root"}, "password in the same request"},
		"nobody listens":               {"new", with(map[string]any{"management_urls": "https://127.0.0.1:1", "verify_connection": true}), "nothing was stored"},
		"it sends elsewhere":           {"new", with(map[string]any{"management_urls": elsewhere.URL, "verify_connection": true}), "sends elsewhere"},
	} {
		before := m.stored(t)
		r := m.write("connections/"+c.path, c.data)
		require.Equal(t, http.StatusBadRequest, r.code, name)
		require.Contains(t, r.message, c.says, name)
		require.NotContains(t, r.message, "url-password", name)
		require.Equal(t, before, m.stored(t), name)
	}
	r := m.write("roles/app", map[string]any{"kind": "rabbitmq", "connection": "queue", "username": "admin", "initial_password": "some-password"})
	require.GreaterOrEqual(t, r.code, 400, "the admin is not a role's")
	require.Contains(t, r.message, "admin")
	require.Equal(t, http.StatusNoContent, m.delete("connections/queue").code)
}
