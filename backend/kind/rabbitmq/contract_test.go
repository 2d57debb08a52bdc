package rabbitmq

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/kindtest"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// TestBroker is everything that needs a broker, because starting one takes
// seconds. What kills brokers comes last, with a second one beside the first.
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
		"a creation that is cut off is finished":  creationIsFinished,
		"two users, with names that need care":    twoUsers,
		"an admin is changed last":                adminIsChangedLast,
	} {
		t.Run(name, func(t *testing.T) { run(t, newRig(t, n)) })
	}
	t.Run("TLS", func(t *testing.T) { trust(t, n, ca) })
	t.Run("contract", func(t *testing.T) { kindtest.Run(t, newRig(t, n).harness(t)) })
	t.Run("cluster", func(t *testing.T) {
		second := servers.RabbitMQ(t, servers.WithRabbitMQCluster(n))
		t.Run("one of them hangs", func(t *testing.T) { oneHangs(t, newRig(t, n, second)) })
		t.Run("contract", func(t *testing.T) { kindtest.Run(t, newRig(t, n, second).harness(t)) })
	})
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

// rig is running brokers behind proxies, and a connection to them: the
// management API of the first, and AMQP at all.
type rig struct {
	nodes []*servers.RabbitMQNode
	n     *servers.RabbitMQNode // the first
	http  *servers.Proxy
	amqp  *servers.Proxy // to the first
	all   []*servers.Proxy
	entry *connection.Entry
}

func newRig(t *testing.T, nodes ...*servers.RabbitMQNode) *rig {
	t.Helper()
	r := &rig{nodes: nodes, n: nodes[0], http: proxy(t, nodes[0].ManagementAddr)}
	r.all = []*servers.Proxy{r.http}
	r.entry = &connection.Entry{
		Name: "test", Type: connection.TypeRabbitMQ, AddressMap: map[string]string{},
		RabbitMQ: &connection.RabbitMQ{ManagementURLs: []string{"http://" + r.http.Addr()}},
		Admin:    connection.NewAdmin(kind.Material{Username: servers.RabbitMQAdmin, Secret: servers.RabbitMQAdminPassword}),
	}
	for _, n := range nodes {
		p := proxy(t, n.Addr)
		r.all = append(r.all, p)
		r.entry.AddressMap[n.Name] = p.Addr()
	}
	r.amqp = r.all[1]
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
	return Opener()(func(context.Context) (*connection.Entry, error) { return e, nil })
}

func (r *rig) target() kind.Target { return kindtest.Watch(open(r.entry)) }

func (r *rig) harness(t *testing.T) kindtest.Harness {
	wrong := *r.entry
	wrong.Admin = connection.NewAdmin(kind.Material{Username: servers.RabbitMQAdmin, Secret: "not-the-password"})
	h := kindtest.Harness{
		Target:  r.target(),
		Network: r,
		NewUser: func(t testing.TB, name string, accepted ...kind.Material) {
			require.NoError(t, r.n.SetUser(context.Background(), name, accepted[0].Secret, "management"))
		},
		WrongAdmin:    open(&wrong),
		ChangeRequest: "PUT /api/users/",
		Capture:       r.capture,
		Settle:        r.settle,
		Single:        true,
		Together:      true,
		Grant:         r.grant,
		Drop:          r.drop,
		Hold:          r.hold,
		Admin:         kind.Material{Username: "second-admin", Secret: "password-of-the-second-admin"},
		AdminTarget:   r.adminTarget,
	}
	require.NoError(t, r.n.SetUser(t.Context(), h.Admin.Username, h.Admin.Secret, tagAdmin))
	for _, n := range r.nodes {
		h.Nodes = append(h.Nodes, memberNode{n})
	}
	return h
}

// grant gives a user one more of everything, with names and patterns that need care.
func (r *rig) grant(t testing.TB, name string) {
	const vhost = `granted/a "b", c`
	ctx, escaped := context.Background(), url.PathEscape(name)
	var u user
	require.NoError(t, r.n.Do(ctx, http.MethodGet, "users/"+escaped, nil, &u))
	for path, body := range map[string]any{
		"vhosts/" + url.PathEscape(vhost):          map[string]string{},
		"users/" + escaped:                         map[string]any{"password_hash": u.Hash, "hashing_algorithm": u.Algorithm, "tags": append(u.Tags, "granted, too")},
		"user-limits/" + escaped + "/max-channels": map[string]int{"value": 77},
		"topic-permissions/%2F/" + escaped:         map[string]string{"exchange": "amq.topic", "write": "^a, b", "read": "\\.c$"},
	} {
		require.NoError(t, r.n.Do(ctx, http.MethodPut, path, body, nil))
	}
	require.NoError(t, r.n.Do(ctx, http.MethodPut, "permissions/"+url.PathEscape(vhost)+"/"+escaped,
		map[string]string{"configure": "", "write": `^"x", y`, "read": ".*"}, nil))
}

func (r *rig) drop(t testing.TB, name string) {
	require.NoError(t, r.n.Do(context.Background(), http.MethodDelete, "users/"+url.PathEscape(name), nil, nil))
}

// hold opens a connection to the last broker.
func (r *rig) hold(t testing.TB, m kind.Material) func() bool {
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName("held")
	at := r.nodes[len(r.nodes)-1].Addr
	c, err := amqp.DialConfig("amqp://"+at, amqp.Config{
		SASL: []amqp.Authentication{&amqp.PlainAuth{Username: m.Username, Password: m.Secret}}, Vhost: "/", Properties: properties,
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return func() bool { return !c.IsClosed() }
}

func (r *rig) adminTarget(candidates ...kind.Material) kind.Target {
	e := *r.entry
	e.Admin = connection.NewAdmin(candidates[0])
	for _, m := range candidates[1:] {
		e.Admin.Add(m, "", time.Time{})
	}
	return open(&e)
}

// memberNode is a broker that waits for its peers when it is started.
type memberNode struct{ *servers.RabbitMQNode }

func (m memberNode) Start(context.Context) error { return m.Launch() }

// settle waits until every broker answers and sees all the others.
func (r *rig) settle(t testing.TB) {
	t.Helper()
	// All at once: one may have to be started again for another to come up.
	var g errgroup.Group
	for _, n := range r.nodes {
		g.Go(func() error { return n.WaitReady(context.Background()) })
	}
	require.NoError(t, g.Wait())
	for _, n := range r.nodes {
		require.Eventually(t, func() bool {
			var seen []member
			err := n.Do(context.Background(), http.MethodGet, "nodes?disable_stats=true&columns=name,running", nil, &seen)
			return err == nil && len(seen) == len(r.nodes) && !slices.ContainsFunc(seen, func(m member) bool { return !m.Running })
		}, time.Minute, 100*time.Millisecond)
	}
}

func (r *rig) Blackhole(on bool) {
	for _, p := range r.all {
		p.Blackhole(on)
	}
}

func (r *rig) LoseReplyTo(text string) { r.http.LoseReplyTo(text) }

func (r *rig) Heal() {
	for _, p := range r.all {
		p.Heal()
	}
}

// capture records what goes over all wires, and what the brokers log.
func (r *rig) capture(t testing.TB) func() []byte {
	t.Helper()
	var stops []func() []byte
	for _, p := range r.all {
		stops = append(stops, p.Capture())
	}
	for _, n := range r.nodes {
		before, err := n.Log()
		require.NoError(t, err)
		stops = append(stops, func() []byte {
			after, err := n.Log()
			require.NoError(t, err)
			return after[len(before):]
		})
	}
	return func() []byte {
		var seen [][]byte
		for _, stop := range stops {
			seen = append(seen, stop())
		}
		return slices.Concat(seen...)
	}
}
