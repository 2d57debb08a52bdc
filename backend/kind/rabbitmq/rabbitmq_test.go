package rabbitmq

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

type source struct {
	io.Reader
	made string
	err  error
}

func (s source) FromPolicy(context.Context, string) (string, error) { return s.made, s.err }

func TestComplete(t *testing.T) {
	spec := kind.Spec{Username: "app.v1_a@b:c-d/e+f=g"}
	require.NoError(t, Kind{}.Complete(&spec))
	require.Equal(t, kind.Swap, spec.Strategy)
	require.Equal(t, 32, spec.Length)

	for field, spec := range map[string]kind.Spec{
		"username":    {},
		"username ":   {Username: `a"b`},
		"username  ":  {Username: strings.Repeat("a", 129)},
		"username   ": {Username: ".."},
		"strategy":    {Username: "app", Strategy: kind.Overlap},
		"strategy ":   {Username: "app", Strategy: kind.KeyRing},
		"length":      {Username: "app", Length: 15},
		"length ":     {Username: "app", Length: 513},
		"usernames":   {Usernames: []string{"app", "a\"b"}},
		"usernames ":  {Usernames: []string{"..", "app"}},
	} {
		require.ErrorContains(t, Kind{}.Complete(&spec), strings.TrimSpace(field)+" is")
	}

	pair := kind.Spec{Usernames: []string{"app-a", "app-b"}, CloseConnections: true}
	require.NoError(t, Kind{}.Complete(&pair))
	require.Equal(t, kind.Alternate, pair.Strategy)
	one := kind.Spec{Usernames: []string{"app"}}
	require.ErrorContains(t, Kind{}.Complete(&one), "two different users")
	for _, field := range []string{"usernames", "close_connections"} {
		require.Contains(t, Kind{}.Fields(), field)
	}
}

func TestCheckInitial(t *testing.T) {
	require.NoError(t, Kind{}.CheckInitial(kind.Spec{}, ` a "pass word" with ' # $ and ü`))
	for _, secret := range []string{"", "new\nline", "nul\x00", "\xff", strings.Repeat("a", 2049)} {
		require.ErrorContains(t, Kind{}.CheckInitial(kind.Spec{}, secret), "initial_password")
	}
}

func TestGenerate(t *testing.T) {
	spec := kind.Spec{Username: "app", Length: 40}
	m, err := Kind{}.Generate(t.Context(), spec, source{Reader: rand.Reader})
	require.NoError(t, err)
	require.Equal(t, "app", m.Username)
	require.Regexp(t, `^[A-Za-z0-9]{40}$`, m.Secret, "it means itself in a URL")

	spec.PasswordPolicy = "mine"
	m, err = Kind{}.Generate(t.Context(), spec, source{made: "from-the-policy"})
	require.NoError(t, err)
	require.Equal(t, "from-the-policy", m.Secret)
	for _, bad := range []string{"", "a\tb", strings.Repeat("a", 5000)} {
		_, err = Kind{}.Generate(t.Context(), spec, source{made: bad})
		require.True(t, kind.IsDefinite(err), "%v", err)
	}
	_, err = Kind{}.Generate(t.Context(), spec, source{err: errors.New("no such policy")})
	require.False(t, kind.IsDefinite(err), "%v", err)
	_, err = Kind{}.Generate(t.Context(), kind.Spec{}, source{Reader: strings.NewReader("short")})
	require.Error(t, err)
}

func TestValidateConfig(t *testing.T) {
	require.NoError(t, ValidateConfig(&connection.RabbitMQ{
		ManagementURLs: []string{"https://rabbitmq.example.com:15671/prefix/", "http://[::1]:15672"},
		AMQPURLs:       []string{"amqp://a", "amqps://b:5671/"}, VHosts: []string{"/", "a"},
	}))
	good := []string{"http://a:15672"}
	for field, list := range map[string][]connection.RabbitMQ{
		"management_urls": {
			{},
			{ManagementURLs: []string{"rabbitmq:15672"}},
			{ManagementURLs: []string{"http://user:a-secret@a:15672"}},
			{ManagementURLs: []string{"http://a:a-secret"}},
			{ManagementURLs: []string{"ftp://a"}},
			{ManagementURLs: []string{"http://a?x=a-secret"}},
		},
		"amqp_urls": {
			{ManagementURLs: good, AMQPURLs: []string{"a:5672"}},
			{ManagementURLs: good, AMQPURLs: []string{"amqp://a/vhost"}},
			{ManagementURLs: good, AMQPURLs: []string{"amqp://user:a-secret@a"}},
			{ManagementURLs: good, AMQPURLs: []string{"http://a:5672"}},
		},
		"vhosts": {{ManagementURLs: good, VHosts: []string{""}}},
	} {
		for _, c := range list {
			err := ValidateConfig(&c)
			require.ErrorContains(t, err, field)
			require.NotContains(t, err.Error(), "a-secret")
		}
	}
}

// The first is the example of https://www.rabbitmq.com/docs/passwords.
func TestHash(t *testing.T) {
	require.True(t, user{Hash: "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR", Algorithm: hashSHA256}.has("test12"))
	for _, algorithm := range []string{hashSHA256, hashSHA512, hashMD5} {
		hash, err := passwordHash(algorithm, "right")
		require.NoError(t, err)
		u := user{Hash: hash, Algorithm: algorithm}
		require.True(t, u.has("right"))
		require.False(t, u.has("wrong"))
		again, err := passwordHash(algorithm, "right")
		require.NoError(t, err)
		require.NotEqual(t, hash, again)
	}
	_, err := passwordHash("my_own_hashing", "right")
	require.True(t, kind.IsDefinite(err))
	for _, u := range []user{{}, {Hash: "AAAA"}, {Hash: "?"}, {Hash: "c2FsdHNhbHQ=", Algorithm: "my_own_hashing"}} {
		require.False(t, u.has(""))
		require.False(t, u.has("salt"))
	}
}

func TestPlan(t *testing.T) {
	hash, err := passwordHash(hashSHA256, "one")
	require.NoError(t, err)
	u := user{Name: "u", Hash: hash, Algorithm: hashSHA256, exists: true}
	none := user{Name: "u", Algorithm: hashSHA256, exists: true}
	one, two := []kind.Material{{Secret: "one"}}, []kind.Material{{Secret: "two"}}
	for name, c := range map[string]struct {
		change kind.Change
		user   user
		due    bool
		secret string
	}{
		"another":                    {kind.Change{Accept: two, Exclusive: true}, u, true, "two"},
		"the same":                   {kind.Change{Accept: one, Exclusive: true}, u, false, "one"},
		"the same twice":             {kind.Change{Accept: append(one, one...)}, u, false, "one"},
		"accept wins over refuse":    {kind.Change{Accept: one, Refuse: one}, u, false, "one"},
		"the first":                  {kind.Change{Accept: one}, none, true, "one"},
		"refuse what is accepted":    {kind.Change{Refuse: one}, u, true, ""},
		"refuse what is not":         {kind.Change{Refuse: two}, u, false, ""},
		"nothing at all":             {kind.Change{Exclusive: true}, u, true, ""},
		"nothing at all, as it is":   {kind.Change{Exclusive: true}, none, false, ""},
		"nothing is asked":           {kind.Change{}, u, false, ""},
		"refuse where there is none": {kind.Change{Refuse: one}, none, false, ""},
	} {
		due, secret, err := plan(c.change, c.user)
		require.NoError(t, err, name)
		require.Equal(t, c.due, due, name)
		require.Equal(t, c.secret, secret, name)
	}
	for name, c := range map[string]struct {
		change kind.Change
		user   user
	}{
		"two at once":    {kind.Change{Accept: append(one, two...)}, u},
		"empty":          {kind.Change{Accept: []kind.Material{{}}}, u},
		"unknown hashes": {kind.Change{Accept: one}, user{exists: true, Algorithm: "my_own_hashing"}},
	} {
		_, _, err := plan(c.change, c.user)
		require.True(t, kind.IsDefinite(err), name)
	}
}

func TestTags(t *testing.T) {
	for text, want := range map[string]tags{`["a","b"]`: {"a", "b"}, `"a,b"`: {"a", "b"}, `""`: {}, `[]`: {}} {
		var got tags
		require.NoError(t, json.Unmarshal([]byte(text), &got))
		require.Equal(t, want, got, text)
	}
	require.Error(t, json.Unmarshal([]byte("7"), &tags{}))
	require.True(t, tags{"x", "monitoring"}.manages())
	require.False(t, tags{"impersonator"}.manages())
}

// fake is a management API that says what no broker of a test does.
type fake struct {
	answers map[string]string // by method and path
	status  map[string]int
	puts    atomic.Int32
	ends    atomic.Int32 // DELETE
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	what := r.Method + " " + strings.TrimPrefix(r.URL.EscapedPath(), "/api/")
	if r.Method == http.MethodPut {
		f.puts.Add(1)
	}
	if r.Method == http.MethodDelete {
		f.ends.Add(1)
	}
	w.Header().Set("Location", "http://127.0.0.1:1/api/whoami")
	if status := f.status[what]; status != 0 {
		w.WriteHeader(status)
	}
	_, _ = fmt.Fprint(w, f.answers[what])
}

// healthy answers for a cluster of two, of which one is down, and a user u.
func healthy() *fake {
	return &fake{status: map[string]int{}, answers: map[string]string{
		"GET whoami":       `{"name":"admin","tags":["administrator"]}`,
		"GET nodes":        `[{"name":"rabbit@a","running":true},{"name":"rabbit@b","running":false}]`,
		"GET overview":     `{"node":"rabbit@a","rabbitmq_version":"9.9","listeners":[{"node":"rabbit@a","protocol":"amqp","port":1}]}`,
		"GET cluster-name": `{"name":"c"}`,
		"GET global-parameters/internal_cluster_id": `{"value":"rabbitmq-cluster-id-x"}`,
		"GET users/u":                   `{"name":"u","password_hash":"","hashing_algorithm":"rabbit_password_hashing_sha256","tags":[]}`,
		"GET users/u/permissions":       `[{"vhost":"/"}]`,
		"GET users/u/topic-permissions": `[]`,
	}}
}

func (f *fake) entry(t *testing.T) *connection.Entry {
	t.Helper()
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	return &connection.Entry{
		Name: "test", Type: connection.TypeRabbitMQ, AddressMap: map[string]string{"a:1": "127.0.0.1:1"},
		RabbitMQ: &connection.RabbitMQ{ManagementURLs: []string{s.URL}},
		Admin:    connection.NewAdmin(kind.Material{Username: "admin", Secret: "admin-secret"}),
	}
}

var changeU = []kind.Change{{User: kind.User{Username: "u"}, Accept: []kind.Material{{Secret: "new-password"}}, Exclusive: true}}

func TestWhatManagementAPIsAnswer(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil    func(*fake)
		says     string
		definite bool
	}{
		"redirects":         {func(f *fake) { f.status["GET whoami"] = http.StatusFound }, "sends elsewhere", false},
		"no JSON":           {func(f *fake) { f.answers["GET whoami"] = "<html>" }, "is no management API", false},
		"another JSON":      {func(f *fake) { f.answers["GET whoami"] = `{"ok":true}` }, "is no management API", false},
		"overloaded":        {func(f *fake) { f.status["GET whoami"] = http.StatusServiceUnavailable }, "answers 503", false},
		"too many requests": {func(f *fake) { f.status["GET nodes"] = http.StatusTooManyRequests }, "answers 429", false},
		"no nodes":          {func(f *fake) { f.answers["GET nodes"] = "[]" }, "is no management API", false},
		"no right to list": {func(f *fake) {
			f.status["GET nodes"] = http.StatusUnauthorized
			f.answers["GET nodes"] = `{"reason":"Not monitor user"}`
		}, "administrator", true},
		"not an admin":        {func(f *fake) { f.answers["GET whoami"] = `{"name":"admin","tags":"management"}` }, "administrator", true},
		"a refused password":  {func(f *fake) { f.status["GET whoami"] = http.StatusUnauthorized }, "right password", false},
		"another user's data": {func(f *fake) { f.answers["GET users/u"] = `{"name":"v"}` }, "is no management API", false},
		"a hashing of its own": {func(f *fake) {
			f.answers["GET users/u"] = `{"name":"u","password_hash":"AAAAAAAAAA==","hashing_algorithm":"mine","tags":[]}`
		}, "not known here", true},
		"a refused change":          {func(f *fake) { f.status["PUT users/u"] = http.StatusBadRequest }, "400", true},
		"a change that is not kept": {func(*fake) {}, "another password", false},
	} {
		f := healthy()
		c.spoil(f)
		out := open(f.entry(t)).Change(t.Context(), changeU)[0]
		err := out.Err
		if err == nil {
			require.Len(t, out.Nodes, 2, name)
			require.Equal(t, "rabbit@a", out.Nodes[0].Node)
			err = out.Nodes[0].Err
		}
		require.ErrorContains(t, err, c.says, name)
		require.Equal(t, c.definite, kind.IsDefinite(err), name)
		require.False(t, kind.IsUnreachable(err), name)
		require.NotContains(t, err.Error(), "secret", name)
	}
}

func TestDownMemberCounts(t *testing.T) {
	t.Parallel()
	f := healthy()
	e := f.entry(t)
	for _, urls := range [][]string{nil, {"amqp://127.0.0.1:1"}} {
		e.RabbitMQ.AMQPURLs = urls
		finding := open(e).Preflight(t.Context(), []kind.User{{Username: "u"}})[0]
		require.NoError(t, finding.Err)
		require.Len(t, finding.Nodes, 2)
		for _, n := range finding.Nodes {
			require.True(t, kind.IsUnreachable(n.Err), "%v", n.Err)
		}
		require.ErrorContains(t, finding.Nodes[1].Err, "forget_cluster_node")
		require.Empty(t, finding.Problems)
	}
	f.answers["GET nodes"] = `[{"name":"rabbit@a","running":true,"partitions":["rabbit@b"]},{"name":"rabbit@b","running":false}]`
	require.Contains(t, fmt.Sprint(open(e).Preflight(t.Context(), []kind.User{{Username: "u"}})[0].Problems), "come apart")
	require.Zero(t, f.puts.Load())
}

func TestVerifyWithoutAClusterID(t *testing.T) {
	t.Parallel()
	f := healthy()
	f.status["GET global-parameters/internal_cluster_id"] = http.StatusNotFound
	e := f.entry(t)
	first, err := Verify(t.Context(), e)
	require.NoError(t, err)
	require.Len(t, first.Warnings, 2, "neither broker answers")
	again, err := Verify(t.Context(), e)
	require.NoError(t, err)
	require.Equal(t, first.Identity, again.Identity)
	f.answers["GET cluster-name"] = `{"name":"d"}`
	other, err := Verify(t.Context(), e)
	require.NoError(t, err)
	require.NotEqual(t, first.Identity, other.Identity)

	e.RabbitMQ.AMQPURLs = []string{"amqp://127.0.0.1:1"}
	info, err := Verify(t.Context(), e)
	require.NoError(t, err)
	require.Contains(t, fmt.Sprint(info.Warnings), "cluster of 2 brokers")
}

// With a management API over TLS no password goes over plain AMQP.
func TestNoPlainAMQPBesideHTTPS(t *testing.T) {
	t.Parallel()
	f := healthy()
	s := httptest.NewUnstartedServer(f)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // of connections that end early
	s.StartTLS()
	t.Cleanup(s.Close)
	e := f.entry(t)
	e.RabbitMQ.ManagementURLs, e.TLS.SkipVerify = []string{s.URL}, true
	_, err := Verify(t.Context(), e)
	require.True(t, kind.IsDefinite(err), "%v", err)
	require.ErrorContains(t, err, "listeners.ssl")
}

func TestNoProxyOfTheEnvironment(t *testing.T) {
	m, err := manage(t.Context(), "http://a", connection.TLS{})
	require.NoError(t, err)
	require.Nil(t, m.client.Transport.(*http.Transport).Proxy)
}

func TestNothingIsSentAfterTheDeadline(t *testing.T) {
	t.Parallel()
	f := healthy()
	e := f.entry(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	out := open(e).Change(ctx, changeU)[0]
	require.True(t, kind.IsUnreachable(out.Err), "%v", out.Err)
	require.Zero(t, f.puts.Load())
	for _, broken := range []*connection.Entry{nil, {}, {RabbitMQ: &connection.RabbitMQ{ManagementURLs: []string{"http://127.0.0.1:1"}}}} {
		out := open(broken).Change(t.Context(), changeU)[0]
		require.True(t, kind.IsDefinite(out.Err), "%v", out.Err)
	}
}

// Neither is a refused login, and clients may well get in elsewhere.
func TestWhatIsNoBroker(t *testing.T) {
	t.Parallel()
	start := []byte("\x01\x00\x00\x00\x00\x00\x1f\x00\x0a\x00\x0a\x00\x09" + "\x00\x00\x00\x00" +
		"\x00\x00\x00\x08EXTERNAL" + "\x00\x00\x00\x05en_US" + "\xce")
	for says, first := range map[string][]byte{
		"does not speak AMQP 0-9-1": []byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"check the port":            []byte("AMQP\x03\x01\x00\x00"),
		"auth_mechanisms":           start,
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		done := make(chan struct{})
		go func() {
			defer close(done)
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 8))
			_, _ = c.Write(first)
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		_, err = logIn(ctx, "rabbit@a", endpoint{addr: l.Addr().String()}, connection.TLS{}, kind.Material{Username: "u", Secret: "a-secret"}, "/")
		cancel()
		require.ErrorContains(t, err, says)
		require.False(t, kind.IsDefinite(err) || kind.IsUnreachable(err), "%v", err)
		require.NotContains(t, err.Error(), "a-secret")
		require.NoError(t, l.Close())
		<-done
	}
}
