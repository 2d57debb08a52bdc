package consumer

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const theKey = "hf-5a1b-the-key-itself"

// witness is a server that keeps what it was sent.
type witness struct {
	*httptest.Server
	mu   sync.Mutex
	seen []http.Header
}

func newWitness(t *testing.T, serve http.HandlerFunc) *witness {
	t.Helper()
	w := &witness{}
	w.Server = httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.seen = append(w.seen, r.Header.Clone())
		w.mu.Unlock()
		serve(rw, r)
	}))
	w.Config.ErrorLog = nil
	t.Cleanup(w.Close)
	return w
}

func (w *witness) ca() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.Certificate().Raw}))
}

func (w *witness) addr() string { return w.Listener.Addr().String() }

// headers are those of the only request that there was.
func (w *witness) headers(t *testing.T) http.Header {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	require.Len(t, w.seen, 1)
	h := w.seen[0]
	w.seen = nil
	return h
}

func (w *witness) unseen(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	require.Empty(t, w.seen)
}

// checker makes checks of consumer web, with roles api (a key), db (a user) and
// signs (whose keys are nobody's), all of which may be sent to hosts.
func checker(hosts ...string) (*step, map[string]*Source) {
	roles := map[string]*Source{
		"api":   {Role: "api", Consumers: []string{"web"}, Hosts: hosts, Fields: map[string]string{"value": theKey}},
		"db":    {Role: "db", Consumers: []string{"web"}, Hosts: hosts, Fields: map[string]string{"username": "app", "password": theKey}},
		"signs": {Role: "signs", Consumers: []string{"web"}, Hosts: hosts},
	}
	k := newClusters(Options{
		MayCall: func(string) bool { return true },
		Sources: func(_ context.Context, role string) (*Source, error) { return roles[role], nil },
	})
	return &step{cluster: &cluster{name: "prod"}, k: k, c: &Consumer{Name: "web", Namespace: "app"}}, roles
}

func TestTemplateFilled(t *testing.T) {
	t.Parallel()
	w := newWitness(t, func(http.ResponseWriter, *http.Request) {})
	s, _ := checker(w.addr())
	check := Check{Type: checkHTTP, URL: w.URL + "/v1/health", CACert: w.ca(), Headers: map[string]string{
		"X-API-Key": "{{api.value}}", "Authorization": "Bearer {{ api.value }}", "X-User": "{{db.username}}@app", "Accept": "text/plain",
	}}
	require.NoError(t, check.validate())
	require.NoError(t, s.checkURL(t.Context(), &check))
	h := w.headers(t)
	require.Equal(t, theKey, h.Get("X-API-Key"))
	require.Equal(t, "Bearer "+theKey, h.Get("Authorization"))
	require.Equal(t, "app@app", h.Get("X-User"))
	require.Equal(t, "text/plain", h.Get("Accept"))
	require.Equal(t, "{{api.value}}", check.Headers["X-API-Key"], "what is stored holds no secret")

	check = Check{Type: checkHTTP, URL: w.URL, CACert: w.ca(), BasicAuth: "db"}
	require.NoError(t, check.validate())
	require.NoError(t, s.checkURL(t.Context(), &check))
	user, password, ok := (&http.Request{Header: w.headers(t)}).BasicAuth()
	require.True(t, ok)
	require.Equal(t, "app", user)
	require.Equal(t, theKey, password)
	require.NotContains(t, fmt.Sprintf("%v %+v %#v", *s.mustFind(t, "db"), s.mustFind(t, "db"), *s.mustFind(t, "db")), theKey)
}

func (s *step) mustFind(t *testing.T, role string) *Source {
	t.Helper()
	found, err := s.k.Sources(t.Context(), role)
	require.NoError(t, err)
	return found
}

// TestTemplateStaysHome tries to have a secret sent to where its role does not let it,
// with checks as they could have been stored: nothing of this was validated.
func TestTemplateStaysHome(t *testing.T) {
	t.Parallel()
	home := newWitness(t, func(http.ResponseWriter, *http.Request) {})
	thief := newWitness(t, func(http.ResponseWriter, *http.Request) {})
	_, homePort, err := net.SplitHostPort(home.addr())
	require.NoError(t, err)
	key := map[string]string{"X-Api-Key": "{{api.value}}"}
	for name, c := range map[string]struct {
		check Check
		says  string
	}{
		"another port":        {Check{URL: thief.URL, Headers: key}, "does not let its secret be sent to " + thief.addr()},
		"basic auth":          {Check{URL: thief.URL, BasicAuth: "db"}, "does not let its secret be sent to"},
		"no port":             {Check{URL: "https://127.0.0.1/", Headers: key}, "add 127.0.0.1 to its secret_hosts"},
		"another name":        {Check{URL: "https://localhost:" + homePort, Headers: key}, "does not let"},
		"another host":        {Check{URL: "https://evil.example.com:" + homePort, Headers: key}, "does not let"},
		"suffix":              {Check{URL: "https://api.example.com.evil.com", Headers: key}, "does not let"},
		"prefix":              {Check{URL: "https://xapi.example.com", Headers: key}, "does not let"},
		"trailing dot":        {Check{URL: "https://api.example.com./", Headers: key}, "written as it is"},
		"fullwidth":           {Check{URL: "https://\uff41pi.example.com/", Headers: key}, "written as it is"},
		"Kelvin sign":         {Check{URL: "https://\u212aey.example.com/", Headers: key}, "written as it is"},
		"userinfo":            {Check{URL: "https://" + home.addr() + "@" + thief.addr() + "/", Headers: key}, "over https:// alone"},
		"user and password":   {Check{URL: "https://api.example.com:x@" + thief.addr() + "/", Headers: key}, "over https:// alone"},
		"backslash":           {Check{URL: `https://` + thief.addr() + `\@` + home.addr() + `/`, Headers: key}, "url is none"},
		"IPv6":                {Check{URL: "https://[::1]:" + homePort, Headers: key}, "does not let"},
		"IPv6 in disguise":    {Check{URL: "https://[::ffff:127.0.0.1]:" + homePort, Headers: key}, "does not let"},
		"IPv6 with a zone":    {Check{URL: "https://[fe80::1%25eth0]/", Headers: key}, "written as it is"},
		"IPv4 in hexadecimal": {Check{URL: "https://0x7f000001:" + homePort, Headers: key}, "does not let"},
		"IPv4 made short":     {Check{URL: "https://127.1:" + homePort, Headers: key}, "does not let"},
		"odd port":            {Check{URL: "https://api.example.com:0443/", Headers: key}, "written as it is"},
		"port 0":              {Check{URL: "https://api.example.com:0/", Headers: key}, "written as it is"},
		"http":                {Check{URL: "http://api.example.com/", Headers: key}, "over https:// alone"},
		"http to this one":    {Check{URL: "http://127.0.0.1:1/", Headers: key}, "does not let"},
		"ftp":                 {Check{URL: "ftp://api.example.com/", Headers: key}, "over https:// alone"},
		"no such role":        {Check{URL: home.URL, Headers: map[string]string{"X": "{{gone.value}}"}}, `no role "gone" that has consumer "web"`},
		"one of two roles":    {Check{URL: home.URL, Headers: map[string]string{"X": "{{api.value}} {{gone.value}}"}}, `no role "gone"`},
		"not its field":       {Check{URL: home.URL, Headers: map[string]string{"X": "{{api.password}}"}}, "has no password that a check may send"},
		"a key":               {Check{URL: home.URL, Headers: map[string]string{"X": "{{signs.value}}"}}, "keys are sent to nobody"},
		"basic auth of a key": {Check{URL: home.URL, BasicAuth: "api"}, "may send"},
	} {
		s, _ := checker(home.addr(), "api.example.com", "key.example.com")
		c.check.Type, c.check.CACert = checkHTTP, home.ca()+thief.ca()
		err := s.checkURL(t.Context(), &c.check)
		require.ErrorContains(t, err, c.says, name)
		require.True(t, kind.IsDefinite(err), name)
		require.NotContains(t, err.Error(), theKey, name)
		home.unseen(t)
		thief.unseen(t)
	}
}

// TestTemplatePermission: what was permitted once is looked at again.
func TestTemplatePermission(t *testing.T) {
	t.Parallel()
	w := newWitness(t, func(http.ResponseWriter, *http.Request) {})
	s, roles := checker(strings.ToUpper(w.addr()), "API.Example.com")
	s.c.Checks = []Check{{Type: checkHTTP, URL: w.URL, CACert: w.ca(), Headers: map[string]string{"X-Api-Key": "{{api.value}}"}}}
	check := &s.c.Checks[0]
	require.NoError(t, s.c.CheckTemplates(t.Context(), s.k.Sources))
	require.NoError(t, (&Consumer{Name: "web", Checks: []Check{{
		Type: checkHTTP, URL: "https://api.EXAMPLE.com:443/", BasicAuth: "db",
	}}}).CheckTemplates(t.Context(), s.k.Sources), "names are not told apart by case, nor https by its port")
	require.NoError(t, s.checkURL(t.Context(), check))
	w.headers(t)

	found := Finding{}
	require.NoError(t, s.planChecks(t.Context(), &found))
	require.Empty(t, found.Problems)
	refused := func(says string) {
		t.Helper()
		require.ErrorContains(t, s.checkURL(t.Context(), check), says)
		require.ErrorContains(t, s.c.CheckTemplates(t.Context(), s.k.Sources), "check 1 of checks: ")
		found := Finding{}
		require.NoError(t, s.planChecks(t.Context(), &found))
		require.Contains(t, strings.Join(found.Problems, "\n"), says)
		w.unseen(t)
	}
	roles["api"].Consumers = []string{"other"}
	refused("add web to the consumers of roles/api")
	roles["api"].Consumers, roles["api"].Hosts = []string{"web"}, nil
	refused("to its secret_hosts if it may")
	delete(roles, "api")
	refused("there is no role")

	s.k.Sources = func(context.Context, string) (*Source, error) { return nil, errors.New("storage is not there") }
	err := s.checkURL(t.Context(), check)
	require.Error(t, err)
	require.False(t, kind.IsDefinite(err), "it is waited for")
	w.unseen(t)
	s.k.MayCall = func(string) bool { return false }
	require.ErrorContains(t, s.checkURL(t.Context(), check), "allowed_hosts")
}

// TestTemplateRedirect: with a secret no redirect is followed, not even on the same
// host, whose other paths may be anybody's.
func TestTemplateRedirect(t *testing.T) {
	t.Parallel()
	thief := newWitness(t, func(http.ResponseWriter, *http.Request) {})
	for _, to := range []string{thief.URL + "/", "/elsewhere"} {
		w := newWitness(t, func(rw http.ResponseWriter, r *http.Request) { http.Redirect(rw, r, to, http.StatusTemporaryRedirect) })
		s, _ := checker(w.addr(), thief.addr())
		check := &Check{Type: checkHTTP, URL: w.URL, CACert: w.ca() + thief.ca(), Headers: map[string]string{"X-Api-Key": "{{api.value}}"}}
		require.ErrorContains(t, s.checkURL(t.Context(), check), "answered with 307")
		w.headers(t)
		thief.unseen(t)
	}
}

// TestTemplateEcho: servers that repeat what they were shown, in every place that an
// error could be made of.
func TestTemplateEcho(t *testing.T) {
	t.Parallel()
	for name, raw := range map[string]string{
		"no HTTP":     theKey + "\r\n\r\n",
		"status":      "HTTP/1.1 999 " + theKey + "\r\n\r\n",
		"status code": "HTTP/1.1 " + theKey + "\r\n\r\n",
		"header":      "HTTP/1.1 200 OK\r\n" + theKey + "\r\n\r\n",
		"location":    "HTTP/1.1 302 Found\r\nLocation: https://" + theKey + ":x%zz/\r\n\r\n",
		"length":      "HTTP/1.1 200 OK\r\nContent-Length: " + theKey + "\r\n\r\n",
		"encoding":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: " + theKey + "\r\n\r\n",
		"body":        "HTTP/1.1 500 Oops\r\nContent-Length: 22\r\n\r\n" + theKey,
	} {
		w := newWitness(t, func(rw http.ResponseWriter, _ *http.Request) {
			conn, _, err := rw.(http.Hijacker).Hijack()
			if err == nil {
				_, _ = conn.Write([]byte(raw))
				_ = conn.Close()
			}
		})
		s, _ := checker(w.addr())
		check := &Check{Type: checkHTTP, URL: w.URL, CACert: w.ca(), Headers: map[string]string{"X-Api-Key": "{{api.value}}"}}
		err := s.checkURL(t.Context(), check)
		require.Error(t, err, name)
		require.NotContains(t, err.Error(), theKey, name)
		require.Equal(t, theKey, w.headers(t).Get("X-Api-Key"), name)
	}
}

func TestTemplateUnsendable(t *testing.T) {
	t.Parallel()
	w := newWitness(t, func(http.ResponseWriter, *http.Request) {})
	s, roles := checker(w.addr())
	for _, secret := range []string{theKey + "\r\nX-Evil: yes", theKey + "\x00", theKey + "é", theKey + " "} {
		roles["api"].Fields["value"] = secret
		err := s.checkURL(t.Context(), &Check{Type: checkHTTP, URL: w.URL, CACert: w.ca(), Headers: map[string]string{"X-Api-Key": "{{api.value}}"}})
		require.ErrorContains(t, err, "no header may have")
		require.NotContains(t, err.Error(), theKey)
	}
	roles["db"].Fields["username"] = "a:b"
	require.ErrorContains(t, s.checkURL(t.Context(), &Check{Type: checkHTTP, URL: w.URL, CACert: w.ca(), BasicAuth: "db"}), "colon")
	w.unseen(t)
}

func TestCheckTrust(t *testing.T) {
	t.Parallel()
	w := newWitness(t, func(http.ResponseWriter, *http.Request) {})
	other := newWitness(t, func(http.ResponseWriter, *http.Request) {})
	s, _ := checker(w.addr())
	err := s.checkURL(t.Context(), &Check{Type: checkHTTP, URL: w.URL})
	require.ErrorContains(t, err, "give ca_cert of who signed it")
	require.NoError(t, s.checkURL(t.Context(), &Check{Type: checkHTTP, URL: w.URL, CACert: w.ca()}))
	w.headers(t)
	// The certificate of another server is not of who signed it for this name.
	_, port, err := net.SplitHostPort(other.addr())
	require.NoError(t, err)
	require.ErrorContains(t, s.checkURL(t.Context(), &Check{Type: checkHTTP, URL: "https://localhost:" + port, CACert: other.ca()}), "not for this host")
}

func TestTemplatesThatCannotBe(t *testing.T) {
	t.Parallel()
	https := "https://api.example.com/"
	for says, c := range map[string]Check{
		"url holds {{":                        {URL: "https://{{api.value}}.example.com/"},
		"path holds {{":                       {Service: "http:web:80", Path: "/{{api.value}}"},
		"body holds {{":                       {URL: https, Body: `{"key":"{{api.value}}"}`},
		"sent through the API server":         {Service: "http:web:80", Headers: map[string]string{"X-Key": "{{api.value}}"}},
		"takes out on the way":                {Service: "http:web:80", Headers: map[string]string{"X-Api-Key": "{{api.value}}"}},
		"basic_auth is not for type pods":     {Type: checkPods, Selector: "a=b", BasicAuth: "db"},
		"ca_cert is not for type logs":        {Type: checkLogs, Forbid: "x", CACert: "x"},
		"with a template that is none":        {URL: https, Headers: map[string]string{"X-Key": "{{api.value | print}}"}},
		"X-Call with a template that is none": {URL: https, Headers: map[string]string{"X-Call": `{{ env "HOME" }}`}},
		"X-Open with a template that is none": {URL: https, Headers: map[string]string{"X-Open": "{{api.value"}},
		"X-None with a template that is none": {URL: https, Headers: map[string]string{"X-None": "{{api.private_key}}"}},
		"X-Path with a template that is none": {URL: https, Headers: map[string]string{"X-Path": "{{../api.value}}"}},
		"checks hold no credentials":          {URL: https, Headers: map[string]string{"Authorization": "Bearer x"}},
		"one and the same":                    {URL: https, BasicAuth: "db", Headers: map[string]string{"authorization": "Bearer {{api.value}}"}},
		"no name of a role":                   {URL: https, BasicAuth: "../db"},
		"not the name of a file":              {URL: https, CACert: "/etc/ssl/ca.pem"},
		"ca_cert is for a url with https://":  {URL: "http://127.0.0.1/", CACert: "x"},
		"query holds {{":                      {Type: checkPrometheus, URL: https, Query: `up{key="{{api.value}}"}`, Expect: "== 1"},
	} {
		if c.Type == "" {
			c.Type = checkHTTP
		}
		require.ErrorContains(t, c.validate(), says)
	}
	both := Check{Type: checkHTTP, Service: "http:web:80", BasicAuth: "db"}
	require.ErrorContains(t, both.validate(), "not sent through the API server")
}

func TestParseSecretHost(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"api.example.com": "api.example.com", "API.Example.COM:443": "api.example.com", "api:8443": "api:8443", "10.0.0.1": "10.0.0.1",
		"::1": "[::1]", "[::1]": "[::1]", "[0:0::1]:8443": "[::1]:8443", "127.0.0.1:15671": "127.0.0.1:15671",
	} {
		h, err := ParseSecretHost(text)
		require.NoError(t, err, text)
		require.Equal(t, want, h.String())
		again, err := ParseSecretHost(h.String())
		require.NoError(t, err)
		require.Equal(t, h, again)
	}
	for _, text := range []string{
		"", "*", "*.example.com", "https://api.example.com", "api.example.com/", "api.example.com.", "u@api.example.com", "api.example.com:",
		"api.example.com:https", "api.example.com:0", "api.example.com:65536", "api.example.com:08443", "a b", "a,b", "api.example.com?x", "api#x",
		"fe80::1%eth0", "\uff41pi.example.com", "api..example.com", "-api", "{{api.value}}",
	} {
		_, err := ParseSecretHost(text)
		require.Error(t, err, text)
	}
}
