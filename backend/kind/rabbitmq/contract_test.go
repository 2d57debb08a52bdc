package rabbitmq

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/kindtest"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestBroker is everything that needs a broker, because starting one takes
// seconds. Those that kill it come last.
func TestBroker(t *testing.T) {
	t.Parallel()
	ca, err := servers.NewAuthority()
	require.NoError(t, err)
	elsewhere := webBackend(t)
	n := servers.RabbitMQ(t, servers.WithRabbitMQTLS(ca),
		servers.WithRabbitMQPlugins("rabbitmq_auth_backend_http"),
		servers.WithRabbitMQConfig("auth_backends.1 = internal", "auth_backends.2 = http",
			"auth_http.user_path = "+elsewhere+"/user", "auth_http.vhost_path = "+elsewhere+"/vhost",
			"auth_http.resource_path = "+elsewhere+"/resource", "auth_http.topic_path = "+elsewhere+"/topic"))
	for name, run := range map[string]func(*testing.T, *rig){
		"tags, permissions and limits stay":       tagsStay,
		"hashing of the user's record":            hashingOfTheRecord,
		"a user without a password":               userWithoutPassword,
		"vhosts":                                  vhosts,
		"users of the management API alone":       managementUsers,
		"a connection limit is no refusal":        connectionLimit,
		"open connections stay":                   openConnectionsStay,
		"another backend that accepts anything":   anotherBackend,
		"an admin that may not change users":      weakAdmin,
		"admin candidates":                        adminCandidates,
		"amqp_urls":                               amqpURLs,
		"several management URLs":                 severalManagementURLs,
		"another cluster than the one known":      anotherCluster,
		"verify names one cluster by every way":   verifyNamesOneCluster,
		"many users":                              manyUsers,
		"a login that is cut off is no refusal":   cutLoginIsNoRefusal,
		"a change that cannot be read back waits": changeThatIsNotKept,
	} {
		t.Run(name, func(t *testing.T) { run(t, newRig(t, n)) })
	}
	t.Run("TLS", func(t *testing.T) { trust(t, n, ca) })
	t.Run("contract", func(t *testing.T) { kindtest.Run(t, newRig(t, n).harness()) })
}

// webBackend is another place where the broker looks for users: it accepts every
// password of those whose names begin with open-.
func webBackend(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.FormValue("username"), "open-") {
			_, _ = fmt.Fprint(w, "allow")
			return
		}
		_, _ = fmt.Fprint(w, "deny")
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// rig is a running broker behind proxies, and a connection to it.
type rig struct {
	n          *servers.RabbitMQNode
	http, amqp *servers.Proxy
	entry      *connection.Entry
}

func newRig(t *testing.T, n *servers.RabbitMQNode) *rig {
	t.Helper()
	r := &rig{n: n, http: proxy(t, n.ManagementAddr), amqp: proxy(t, n.Addr)}
	r.entry = &connection.Entry{
		Name: "test", Type: connection.TypeRabbitMQ, AddressMap: map[string]string{n.Name: r.amqp.Addr()},
		RabbitMQ: &connection.RabbitMQ{ManagementURLs: []string{"http://" + r.http.Addr()}},
		Admin:    connection.NewAdmin(kind.Material{Username: servers.RabbitMQAdmin, Secret: servers.RabbitMQAdminPassword}),
	}
	return r
}

func proxy(t *testing.T, addr string) *servers.Proxy {
	t.Helper()
	p, err := servers.NewProxy(addr)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

func open(e *connection.Entry) kind.Target {
	return Open(func(context.Context) (*connection.Entry, error) { return e, nil })
}

func (r *rig) target() kind.Target { return open(r.entry) }

func (r *rig) harness() kindtest.Harness {
	wrong := *r.entry
	wrong.Admin = connection.NewAdmin(kind.Material{Username: servers.RabbitMQAdmin, Secret: "not-the-password"})
	return kindtest.Harness{
		Target:  r.target(),
		Nodes:   []kindtest.Node{r.n},
		Network: r,
		NewUser: func(t testing.TB, name string, accepted ...kind.Material) {
			require.NoError(t, r.n.SetUser(context.Background(), name, accepted[0].Secret, "management"))
		},
		WrongAdmin:    open(&wrong),
		ChangeRequest: "PUT /api/users/",
		Capture:       r.capture,
		Settle:        func(t testing.TB) { require.NoError(t, r.n.WaitReady(context.Background())) },
		Single:        true,
	}
}

func (r *rig) Blackhole(on bool) {
	r.http.Blackhole(on)
	r.amqp.Blackhole(on)
}

func (r *rig) LoseReplyTo(text string) { r.http.LoseReplyTo(text) }

func (r *rig) Heal() {
	r.http.Heal()
	r.amqp.Heal()
}

// capture records what goes over both wires, and what the broker logs.
func (r *rig) capture(t testing.TB) func() []byte {
	t.Helper()
	before, err := r.n.Log()
	require.NoError(t, err)
	web, wire := r.http.Capture(), r.amqp.Capture()
	return func() []byte {
		after, err := r.n.Log()
		require.NoError(t, err)
		return slices.Concat(web(), wire(), after[len(before):])
	}
}
