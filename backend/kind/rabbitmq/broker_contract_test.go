package rabbitmq

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// theirs is the password of users here: no word that an error could have.
const theirs = "what-they-log-in-with"

func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), kind.CallTimeout)
	t.Cleanup(cancel)
	return ctx
}

func (r *rig) do(t *testing.T, method, path string, body, answer any) {
	t.Helper()
	require.NoError(t, r.n.Do(t.Context(), method, path, body, answer))
}

// user makes a user with a password and tags, and every permission in "/".
func (r *rig) user(t *testing.T, name, password, tags string) kind.User {
	t.Helper()
	require.NoError(t, r.n.SetUser(t.Context(), name, password, tags))
	return kind.User{Role: "role-" + name, Username: name}
}

func (r *rig) set(t *testing.T, u kind.User, password string) {
	t.Helper()
	out := r.target().Change(limited(t), []kind.Change{{User: u, Accept: []kind.Material{{Username: u.Username, Secret: password}}, Exclusive: true}})
	require.NoError(t, out[0].Err)
	require.Len(t, out[0].Nodes, 1)
	require.NoError(t, out[0].Nodes[0].Err)
}

func (r *rig) probe(t *testing.T, u kind.User, passwords ...string) kind.NodeAnswer {
	t.Helper()
	q := kind.Question{User: u}
	for _, p := range passwords {
		q.Materials = append(q.Materials, kind.Material{Username: u.Username, Secret: p})
	}
	a := r.target().Probe(limited(t), []kind.Question{q})
	require.NoError(t, a[0].Err)
	require.Len(t, a[0].Nodes, 1)
	require.NoError(t, a[0].Nodes[0].Err)
	return a[0].Nodes[0]
}

func (r *rig) preflight(t *testing.T, u kind.User) kind.Finding {
	t.Helper()
	f := r.target().Preflight(limited(t), []kind.User{u})[0]
	require.NoError(t, f.Err)
	return f
}

func tagsStay(t *testing.T, r *rig) {
	u := r.user(t, "tagged", "old-password", "management,my-own-tag")
	r.do(t, http.MethodPut, "user-limits/tagged/max-connections", map[string]int{"value": 7}, nil)
	r.do(t, http.MethodPut, "topic-permissions/%2F/tagged", map[string]string{"exchange": "amq.topic", "write": "^a", "read": "^b"}, nil)
	look := func() (seen struct {
		User, Topics, Permissions any
	},
	) {
		user := map[string]any{}
		r.do(t, http.MethodGet, "users/tagged", nil, &user)
		delete(user, "password_hash")
		seen.User = user
		r.do(t, http.MethodGet, "users/tagged/permissions", nil, &seen.Permissions)
		r.do(t, http.MethodGet, "users/tagged/topic-permissions", nil, &seen.Topics)
		return seen
	}
	before := look()
	require.Contains(t, fmt.Sprint(before), "my-own-tag")
	require.Contains(t, fmt.Sprint(before), "max-connections:7")
	r.set(t, u, "new-password")
	require.Equal(t, before, look())
	a := r.probe(t, u, "new-password", "old-password")
	require.Equal(t, []bool{true, false}, a.Accepts)
	require.Empty(t, a.Problem)
	require.Zero(t, a.Extra)
	require.Equal(t, 1, r.probe(t, u, "old-password").Extra, "the new one, which was not asked about")
}

func hashingOfTheRecord(t *testing.T, r *rig) {
	u := r.user(t, "hashed", "first", "")
	for _, c := range []struct{ algorithm, after, note string }{
		{hashSHA256, hashSHA256, ""},
		{hashSHA512, hashSHA512, ""},
		{hashMD5, hashSHA256, "MD5"},
	} {
		sum, ok := digest(c.algorithm, []byte("salt"), "first")
		require.True(t, ok)
		r.do(t, http.MethodPut, "users/hashed", map[string]string{
			"password_hash": base64.StdEncoding.EncodeToString(sum), "hashing_algorithm": c.algorithm, "tags": "",
		}, nil)
		a := r.probe(t, u, "first")
		require.Equal(t, []bool{true}, a.Accepts, c.algorithm)
		require.Zero(t, a.Extra)
		require.Contains(t, fmt.Sprint(r.preflight(t, u).Notes), c.note)
		r.set(t, u, "second")
		a = r.probe(t, u, "first", "second")
		require.Equal(t, []bool{false, true}, a.Accepts, c.algorithm)
		var now user
		r.do(t, http.MethodGet, "users/hashed", nil, &now)
		require.Equal(t, c.after, now.Algorithm)
		require.NotEqual(t, base64.StdEncoding.EncodeToString(sum)[:5], now.Hash[:5], "each has its own salt")
	}
}

func userWithoutPassword(t *testing.T, r *rig) {
	u := r.user(t, "certificate", "gone", "")
	gone := []kind.Material{{Username: u.Username, Secret: "gone"}}
	for range 2 { // a failed create is taken back, once or twice
		out := r.target().Change(limited(t), []kind.Change{{User: u, Refuse: gone}})
		require.NoError(t, out[0].Nodes[0].Err)
		require.False(t, r.preflight(t, u).HasCredential)
		a := r.probe(t, u, "gone")
		require.Equal(t, []bool{false}, a.Accepts)
		require.Zero(t, a.Extra)
		require.Empty(t, a.Problem)
	}
	r.set(t, u, "first")
	out := r.target().Change(limited(t), []kind.Change{{User: u, Refuse: gone}})
	require.NoError(t, out[0].Nodes[0].Err)
	require.Equal(t, []bool{true}, r.probe(t, u, "first").Accepts, "it is another password that is to be refused")

	two := []kind.Material{gone[0], {Secret: "another"}}
	for _, accept := range [][]kind.Material{two, {{Username: u.Username}}} {
		out := r.target().Change(limited(t), []kind.Change{{User: u, Accept: accept}})
		require.True(t, kind.IsDefinite(out[0].Nodes[0].Err))
		require.NotContains(t, out[0].Nodes[0].Err.Error(), "another")
	}
	require.Equal(t, []bool{true}, r.probe(t, u, "first").Accepts, "nothing was changed")
}

func vhosts(t *testing.T, r *rig) {
	u := r.user(t, "hosted", theirs, "")
	for _, vhost := range []string{"a/b c", "second"} {
		r.do(t, http.MethodPut, "vhosts/"+url.PathEscape(vhost), map[string]string{}, nil)
	}
	require.NoError(t, r.n.Permit(t.Context(), "hosted", "a/b c"))
	require.Empty(t, r.preflight(t, u).Problems)
	require.Empty(t, r.probe(t, u, theirs).Problem, "it logs in to the vhosts that it may use")

	r.entry.RabbitMQ.VHosts = []string{"/", "second"}
	require.Contains(t, fmt.Sprint(r.preflight(t, u).Problems), "no permission in vhost second")
	a := r.probe(t, u, theirs, "wrong")
	require.Equal(t, []bool{true, false}, a.Accepts, "the password is right")
	require.Contains(t, a.Problem, "may not use vhost second")
	r.entry.RabbitMQ.VHosts = []string{"nowhere"}
	require.Contains(t, r.probe(t, u, theirs).Problem, "vhost nowhere does not exist")
	require.Len(t, r.preflight(t, u).Problems, 1)
	r.entry.RabbitMQ.VHosts = []string{"a/b c", "/"}
	require.Empty(t, r.probe(t, u, theirs).Problem)
}

func managementUsers(t *testing.T, r *rig) {
	for tags, problems := range map[string]int{"monitoring": 0, "": 1} {
		u := kind.User{Username: "no-vhost-" + tags}
		r.do(t, http.MethodPut, "users/"+u.Username, map[string]string{"password": theirs, "tags": tags}, nil)
		require.Len(t, r.preflight(t, u).Problems, problems)
		a := r.probe(t, u, theirs, "wrong")
		require.Equal(t, []bool{true, false}, a.Accepts)
		require.Empty(t, a.Problem)
	}
}

func connectionLimit(t *testing.T, r *rig) {
	u := r.user(t, "limited", theirs, "")
	r.do(t, http.MethodPut, "user-limits/limited/max-connections", map[string]int{"value": 0}, nil)
	a := r.probe(t, u, theirs, "wrong")
	require.Equal(t, []bool{true, false}, a.Accepts)
	require.Empty(t, a.Problem)
}

func openConnectionsStay(t *testing.T, r *rig) {
	u := r.user(t, "connected", "old", "")
	c, err := amqp.Dial("amqp://connected:old@" + r.n.Addr + "/")
	require.NoError(t, err)
	defer func() { _ = c.Close() }()
	r.set(t, u, "new")
	require.Equal(t, []bool{false, true}, r.probe(t, u, "old", "new").Accepts)
	ch, err := c.Channel()
	require.NoError(t, err)
	_, err = ch.QueueDeclare("", false, true, true, false, nil)
	require.NoError(t, err)
}

func anotherBackend(t *testing.T, r *rig) {
	u := r.user(t, "open-user", theirs, "")
	a := r.probe(t, u, theirs, "wrong")
	require.Equal(t, -1, a.Extra)
	require.Contains(t, a.Problem, "any password")
	f := r.preflight(t, u)
	require.True(t, f.HasCredential)
	require.Contains(t, fmt.Sprint(f.Problems), "any password")

	stranger := kind.User{Username: "open-stranger"}
	f = r.preflight(t, stranger)
	require.Contains(t, fmt.Sprint(f.Problems), "not in the database")
	out := r.target().Change(limited(t), []kind.Change{{User: stranger, Accept: []kind.Material{{Secret: theirs}}, Exclusive: true}})
	require.True(t, kind.IsDefinite(out[0].Nodes[0].Err))
	require.Equal(t, -1, r.probe(t, stranger, theirs).Extra)
}

func weakAdmin(t *testing.T, r *rig) {
	u := r.user(t, "managed", theirs, "")
	for _, tags := range []string{"", "management", "policymaker,monitoring"} {
		r.user(t, "weak", "weak-password", tags)
		r.entry.Admin = connection.NewAdmin(kind.Material{Username: "weak", Secret: "weak-password"})
		f := r.target().Preflight(limited(t), []kind.User{u})[0]
		require.True(t, kind.IsDefinite(f.Err), "%v", f.Err)
		require.ErrorContains(t, f.Err, "administrator")
		_, err := Verify(limited(t), r.entry)
		require.True(t, kind.IsDefinite(err), "%v", err)
	}
}

func adminCandidates(t *testing.T, r *rig) {
	u := r.user(t, "managed", theirs, "")
	r.entry.Admin = connection.NewAdmin(kind.Material{Username: servers.RabbitMQAdmin, Secret: "not yet"})
	r.entry.Admin.Add(kind.Material{Username: servers.RabbitMQAdmin, Secret: servers.RabbitMQAdminPassword}, "", time.Time{})
	require.Empty(t, r.preflight(t, u).Problems)
}

func amqpURLs(t *testing.T, r *rig) {
	u := r.user(t, "by-url", theirs, "")
	r.entry.AddressMap = map[string]string{"rabbitmq.example.com:5672": r.amqp.Addr()}
	r.entry.RabbitMQ.AMQPURLs = []string{"amqp://rabbitmq.example.com"}
	stop := r.amqp.Capture()
	a := r.probe(t, u, theirs)
	require.Equal(t, []bool{true}, a.Accepts)
	require.Equal(t, "rabbitmq.example.com:5672", a.Node)
	require.Contains(t, string(stop()), "PLAIN", "the map was used")

	r.entry.RabbitMQ.AMQPURLs = []string{"amqp://" + r.n.Addr, "amqp://127.0.0.1:1"}
	answers := r.target().Probe(limited(t), []kind.Question{{User: u, Materials: []kind.Material{{Secret: theirs}}}})
	require.Len(t, answers[0].Nodes, 2)
	failed := 0
	for _, n := range answers[0].Nodes {
		if n.Err != nil {
			failed++
			require.Equal(t, "127.0.0.1:1", n.Node)
			require.True(t, kind.IsUnreachable(n.Err), "%v", n.Err)
		}
	}
	require.Equal(t, 1, failed)
}

func severalManagementURLs(t *testing.T, r *rig) {
	u := r.user(t, "by-any", theirs, "")
	hangs := proxy(t, r.n.ManagementAddr)
	hangs.Blackhole(true)
	r.entry.RabbitMQ.ManagementURLs = []string{"http://127.0.0.1:1", "http://" + hangs.Addr(), "http://" + r.http.Addr() + "/"}
	r.set(t, u, "new")
	require.Equal(t, []bool{true}, r.probe(t, u, "new").Accepts)

	r.entry.RabbitMQ.ManagementURLs = r.entry.RabbitMQ.ManagementURLs[:2]
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err := r.target().Probe(ctx, []kind.Question{{User: u}})[0].Err
	require.True(t, kind.IsUnreachable(err), "%v", err)
}

func anotherCluster(t *testing.T, r *rig) {
	u := r.user(t, "moved", theirs, "")
	r.entry.Members = []string{clusterIDPrefix + "of-another", "other:1"}
	f := r.target().Preflight(limited(t), []kind.User{u})[0]
	require.ErrorContains(t, f.Err, "another cluster")
	require.False(t, kind.IsDefinite(f.Err) || kind.IsUnreachable(f.Err))
	info, err := Verify(limited(t), r.entry)
	require.NoError(t, err, "writing the connection is how an operator says that this is meant")
	r.entry.Members = info.Members
	require.Empty(t, r.preflight(t, u).Problems)
}

func verifyNamesOneCluster(t *testing.T, r *rig) {
	first, err := Verify(limited(t), r.entry)
	require.NoError(t, err)
	require.Contains(t, first.Identity, clusterIDPrefix)
	require.Contains(t, first.Summary, "1 node")
	require.Equal(t, r.n.Name, first.Nodes[0].Name)
	require.Empty(t, first.Warnings)

	r.entry.RabbitMQ.ManagementURLs = []string{"http://" + r.n.ManagementAddr, "http://127.0.0.1:1"}
	r.entry.AddressMap = nil
	again, err := Verify(limited(t), r.entry)
	require.NoError(t, err)
	require.Equal(t, first.Identity, again.Identity)
	r.entry.AddressMap = map[string]string{r.n.Name: "127.0.0.1:1"}
	gone, err := Verify(limited(t), r.entry)
	require.NoError(t, err)
	require.Contains(t, gone.Warnings[len(gone.Warnings)-1], "amqp_urls or address_map")

	r.entry.Admin = connection.NewAdmin(kind.Material{Username: servers.RabbitMQAdmin, Secret: "wrong-secret"})
	_, err = Verify(limited(t), r.entry)
	require.ErrorContains(t, err, "right password")
	require.NotContains(t, err.Error(), "wrong-secret")
}

func manyUsers(t *testing.T, r *rig) {
	const count = 100
	var changes []kind.Change
	var questions []kind.Question
	for i := range count {
		u := r.user(t, fmt.Sprintf("many-%d", i), "old", "")
		fresh := kind.Material{Username: u.Username, Secret: "fresh"}
		changes = append(changes, kind.Change{User: u, Accept: []kind.Material{fresh}, Exclusive: true})
		questions = append(questions, kind.Question{User: u, Materials: []kind.Material{fresh, {Secret: "old"}}})
	}
	began := time.Now()
	for _, o := range r.target().Change(limited(t), changes) {
		require.NoError(t, o.Err)
		require.NoError(t, o.Nodes[0].Err)
	}
	changed := time.Since(began)
	for _, a := range r.target().Probe(limited(t), questions) {
		require.NoError(t, a.Err)
		require.NoError(t, a.Nodes[0].Err)
		require.Equal(t, []bool{true, false}, a.Nodes[0].Accepts)
		require.Zero(t, a.Nodes[0].Extra)
	}
	t.Logf("%d users: changed in %s, proven in %s", count, changed.Round(time.Millisecond), (time.Since(began) - changed).Round(time.Millisecond))
}

// Without a word of the broker a login was neither refused nor accepted.
func cutLoginIsNoRefusal(t *testing.T, r *rig) {
	u := r.user(t, "cut", theirs, "")
	r.amqp.Cut(true)
	a := r.target().Probe(limited(t), []kind.Question{{User: u, Materials: []kind.Material{{Secret: theirs}}}})[0]
	require.NoError(t, a.Err)
	require.True(t, kind.IsUnreachable(a.Nodes[0].Err), "%v", a.Nodes[0].Err)
	r.amqp.Heal()
	r.amqp.LoseReplyTo("PLAIN") // after the password was sent
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	a = r.target().Probe(ctx, []kind.Question{{User: u, Materials: []kind.Material{{Secret: theirs}}}})[0]
	require.NoError(t, a.Err)
	require.True(t, kind.IsUnreachable(a.Nodes[0].Err), "%v", a.Nodes[0].Err)
}

func changeThatIsNotKept(t *testing.T, r *rig) {
	u := r.user(t, "unsure", "old", "")
	r.http.LoseReplyTo("PUT /api/users/")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	out := r.target().Change(ctx, []kind.Change{{User: u, Accept: []kind.Material{{Secret: "new"}}, Exclusive: true}})
	require.NoError(t, out[0].Err)
	require.False(t, kind.IsDefinite(out[0].Nodes[0].Err))
	require.Error(t, out[0].Nodes[0].Err)
	r.http.Heal()
	require.Equal(t, []bool{false, true}, r.probe(t, u, "old", "new").Accepts, "it was applied, and its answer lost")
}

// trust tries both protocols over TLS, where the broker wants a certificate too.
func trust(t *testing.T, n *servers.RabbitMQNode, ca *servers.Authority) {
	r := newRig(t, n)
	r.entry.AddressMap = nil
	u := r.user(t, "secure", "old", "")
	cert, key, err := ca.Issue("engine")
	require.NoError(t, err)
	other, err := servers.NewAuthority()
	require.NoError(t, err)
	good := connection.TLS{CA: ca.PEM, Cert: cert, Key: key}
	web := proxy(t, n.HTTPSAddr)
	r.entry.RabbitMQ.ManagementURLs = []string{"https://" + web.Addr()}
	wire := proxy(t, n.TLSAddr)

	for name, way := range map[string]func(){
		"as the broker says": func() {},
		"by address_map":     func() { r.entry.AddressMap = map[string]string{n.Name: wire.Addr()} },
		"by URL":             func() { r.entry.RabbitMQ.AMQPURLs = []string{"amqps://" + wire.Addr()} },
	} {
		r.entry.TLS = good
		way()
		_, err := Verify(limited(t), r.entry)
		require.NoError(t, err, name)
		stop := web.Capture()
		r.set(t, u, "new-"+name)
		require.Equal(t, []bool{false, true}, r.probe(t, u, "old", "new-"+name).Accepts, name)
		require.NotContains(t, string(stop()), "PUT", "nothing is readable on the way")
	}
	r.entry.TLS.ServerName = "rabbitmq.example.com"
	require.Empty(t, r.preflight(t, u).Problems)

	for says, bad := range map[string]connection.TLS{
		"tls_ca":          {CA: other.PEM, Cert: cert, Key: key},
		"tls_cert":        {CA: ca.PEM},
		"tls_server_name": {CA: ca.PEM, Cert: cert, Key: key, ServerName: "other.example.com"},
	} {
		r.entry.TLS = bad
		r.entry.RabbitMQ.ManagementURLs = []string{"https://" + n.HTTPSAddr}
		r.entry.RabbitMQ.AMQPURLs = nil
		_, err := Verify(limited(t), r.entry)
		require.ErrorContains(t, err, says)
		require.False(t, kind.IsUnreachable(err), "clients may trust it")
		r.entry.RabbitMQ.ManagementURLs = []string{"http://" + n.ManagementAddr}
		r.entry.RabbitMQ.AMQPURLs = []string{"amqps://" + n.TLSAddr}
		f := r.preflight(t, u)
		require.ErrorContains(t, f.Nodes[0].Err, says)
	}
	r.entry.TLS, r.entry.RabbitMQ.AMQPURLs = good, []string{"amqps://" + n.Addr}
	f := r.preflight(t, u)
	require.Error(t, f.Nodes[0].Err)
	require.True(t, strings.Contains(f.Nodes[0].Err.Error(), "does not speak TLS") || kind.IsUnreachable(f.Nodes[0].Err), "%v", f.Nodes[0].Err)
}

// While a broker hangs, the others would carry a change out when they take it
// for dead, a minute later: so nothing is sent, and what is accepted can be seen.
func oneHangs(t *testing.T, r *rig) {
	u := r.user(t, "beside-a-hanging-one", "old", "")
	r.settle(t)
	answers := r.target().Probe(limited(t), []kind.Question{{User: u}})
	require.NoError(t, answers[0].Err)
	require.Len(t, answers[0].Nodes, 2)
	for _, n := range answers[0].Nodes {
		require.NoError(t, n.Err)
		u.Known = append(u.Known, n.Node)
	}
	const down = "rabbit@down-before"
	u.Known, r.entry.AddressMap[down] = append(u.Known, down), "127.0.0.1:1"
	require.NoError(t, r.nodes[1].Pause())
	patient := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		t.Cleanup(cancel)
		return ctx
	}
	capture := r.http.Capture()
	fresh := kind.Change{User: u, Accept: []kind.Material{{Secret: "new"}}, Exclusive: true}
	created := kind.Change{User: kind.User{Username: "to-be-created", Profile: []string{`tag "x"`}}, Accept: fresh.Accept}
	outs := r.target().Change(patient(), []kind.Change{fresh, created})
	out := outs[0]
	sessions := r.target().(kind.Observer).Sessions(patient(), []kind.SessionsQuestion{{User: u, Before: time.Now()}})[0]
	stranger := r.target().Probe(patient(), []kind.Question{{User: kind.User{Username: u.Username}}})[0]
	both := kind.Question{User: u, Materials: []kind.Material{{Secret: "old"}, {Secret: "new"}}}
	answers = r.target().Probe(patient(), []kind.Question{both})
	finding := r.target().Preflight(patient(), []kind.User{u})[0]
	sent := string(capture())
	require.NoError(t, r.nodes[1].Resume())

	require.NoError(t, out.Err)
	require.Len(t, out.Nodes, 3, "nobody knows whether the third has left")
	for _, n := range out.Nodes {
		require.Error(t, n.Err)
		require.False(t, kind.IsDefinite(n.Err), "%v", n.Err)
	}
	require.NotContains(t, sent, "PUT ")
	require.NotEmpty(t, outs[1].Nodes)
	for _, n := range outs[1].Nodes {
		require.Error(t, n.Err)
		require.False(t, kind.IsDefinite(n.Err), "%v", n.Err)
	}
	require.ErrorContains(t, sessions.Err, "hangs")
	require.True(t, kind.IsUnreachable(stranger.Err), "whose nodes nobody remembers: %v", stranger.Err)
	require.NoError(t, answers[0].Err)
	require.NoError(t, finding.Err)
	require.Len(t, answers[0].Nodes, 3)
	for i, n := range answers[0].Nodes {
		if n.Node == r.n.Name {
			require.NoError(t, n.Err)
			require.Equal(t, []bool{true, false}, n.Accepts)
			require.NoError(t, finding.Nodes[i].Err)
			continue
		}
		require.True(t, kind.IsUnreachable(n.Err), "%v", n.Err)
		require.True(t, kind.IsUnreachable(finding.Nodes[i].Err), "%v", finding.Nodes[i].Err)
	}
	r.settle(t)
	for _, n := range r.target().Change(limited(t), []kind.Change{fresh})[0].Nodes {
		require.NoError(t, n.Err)
	}
	answers = r.target().Probe(limited(t), []kind.Question{both})
	require.Len(t, answers[0].Nodes, 2, "the third has left: the members say so")
	for _, n := range answers[0].Nodes {
		require.NoError(t, n.Err)
		require.Equal(t, []bool{false, true}, n.Accepts)
	}
}
