package outbound

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"
)

func requestTo(u *url.URL) *http.Request { return &http.Request{URL: u} }

// TestForbidden: link-local addresses and those of metadata services are not asked in
// any form in which they can be written.
func TestForbidden(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"127.0.0.1": false, "::1": false, "10.1.2.3": false, "192.168.0.1": false, "8.8.8.8": false, "2001:db8::1": false, "fd00::1": false, "::ffff:10.0.0.1": false,
		"64:ff9b::8.8.8.8": false, "64:ff9b::10.0.0.1": false,
		"169.254.169.254": true, "169.254.0.1": true, "::ffff:169.254.169.254": true, "64:ff9b::169.254.169.254": true, "64:ff9b:1::169.254.169.254": true,
		"2002:a9fe:a9fe::": true, "::169.254.169.254": true, "fe80::1": true, "fe80::1%eth0": true, "fe80::a9fe:a9fe": true,
		"100.100.100.200": true, "64:ff9b::100.100.100.200": true, "168.63.129.16": true, "192.0.0.192": true, "fd00:ec2::254": true, "fd20:ce::254": true,
		"0.0.0.0": true, "0.1.2.3": true, "::": true, "::ffff:0.0.0.0": true, "255.255.255.255": true, "224.0.0.251": true, "ff02::1": true, "ff01::1": true,
		"64:ff9b::127.0.0.1": true, "::127.0.0.1": true, "2002:7f00:1::": true,
	} {
		require.Equal(t, want, Forbidden(netip.MustParseAddr(text)), text)
	}
	require.True(t, Forbidden(netip.Addr{}))
}

// ask sends a GET by a client for address.
func ask(t *testing.T, address string, follow bool) (int, error) {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	client, done := Client(u, Options{Timeout: 5 * time.Second, Follow: follow})
	defer done()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
	require.NoError(t, err)
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	return resp.StatusCode, nil
}

// TestFormsOfAddresses: what is no IP address to Go is a name, and a name that leads
// nowhere; what is one, is looked at as the address that is dialled.
func TestFormsOfAddresses(t *testing.T) {
	useResolver(t, func(string) []netip.Addr { return nil })
	for _, host := range []string{
		"169.254.169.254", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::]", "[fe80::1%25lo]", "0.0.0.0", "[::]",
		"2852039166", "0xa9fea9fe", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376", "169.254.43518", "169.16689662", "169.254.169.254.", "①⑥⑨.254.169.254",
	} {
		for _, scheme := range []string{"http", "https"} {
			_, err := ask(t, scheme+"://"+host+":1/", true)
			require.Error(t, err, host)
			var refused *net.OpError
			reached := errors.As(err, &refused) && strings.Contains(err.Error(), "refused")
			require.False(t, reached, "%s was dialled: %v", host, err)
		}
	}
}

// TestRebinding: a name that led to a server that may be asked, and leads elsewhere at
// the next look, is looked at where it is dialled and not where it was allowed.
func TestRebinding(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer server.Close()
	port := server.URL[strings.LastIndex(server.URL, ":"):]
	answer := atomic.Pointer[[]netip.Addr]{}
	answer.Store(&[]netip.Addr{netip.MustParseAddr("127.0.0.1")})
	useResolver(t, func(string) []netip.Addr { return *answer.Load() })
	code, err := ask(t, "http://rebind.example.com"+port+"/", true)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, code)
	require.EqualValues(t, 1, asked.Load())

	for _, now := range []string{"169.254.169.254", "::ffff:169.254.169.254", "0.0.0.0", "64:ff9b::169.254.169.254"} {
		answer.Store(&[]netip.Addr{netip.MustParseAddr(now)})
		_, err = ask(t, "https://rebind.example.com"+port+"/", true)
		require.ErrorContains(t, err, "nothing is sent to", now)
	}
	answer.Store(&[]netip.Addr{netip.MustParseAddr("192.0.2.1")})
	_, err = ask(t, "http://rebind.example.com"+port+"/", true)
	require.ErrorContains(t, err, "nothing is sent to 192.0.2.1", "http leaves this machine for nobody")
	require.EqualValues(t, 1, asked.Load())
}

// TestRedirectsToForbidden: who may be asked cannot send the engine to who may not, nor
// to himself without TLS.
func TestRedirectsToForbidden(t *testing.T) {
	t.Parallel()
	var to atomic.Value
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", to.Load().(string))
		w.WriteHeader(http.StatusFound)
	}))
	defer server.Close()
	for _, location := range []string{
		"http://169.254.169.254/latest/meta-data/", "//169.254.169.254/", "https://" + strings.TrimPrefix(server.URL, "http://"), "http://localhost:1/",
		"http://[::ffff:169.254.169.254]/", "file:///etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL", "http://user:password@169.254.169.254/",
	} {
		to.Store(location)
		code, err := ask(t, server.URL+"/", true)
		require.NoError(t, err, location)
		require.Equal(t, http.StatusFound, code, "%s was followed", location)
	}
}

// TestNoProxyForRequests: a proxy of the environment of Vault sees nothing.
func TestNoProxyForRequests(t *testing.T) {
	var proxied atomic.Int32
	proxy := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { proxied.Add(1) }))
	defer proxy.Close()
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"} {
		t.Setenv(name, proxy.URL)
	}
	u := &url.URL{Scheme: "https", Host: "api.example.com"}
	client, done := Client(u, Options{Timeout: time.Second})
	defer done()
	transport := client.Transport.(*http.Transport)
	require.Nil(t, transport.Proxy) // Go reads the environment once, before this test
	_, err := ask(t, "https://127.0.0.1:1/", false)
	require.ErrorContains(t, err, "refused")
	require.Zero(t, proxied.Load())
}

// TestHeaderWithoutEnd: a header that does not end is given up, and so is a body that
// nobody asked for.
func TestHeaderWithoutEnd(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_, err = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
		for err == nil {
			_, err = io.WriteString(c, "X-More: "+strings.Repeat("x", 4096)+"\r\n")
		}
	}))
	defer server.Close()
	began := time.Now()
	_, err := ask(t, server.URL, false)
	require.Error(t, err)
	require.Less(t, time.Since(began), 5*time.Second, "it is given up for its size")
	text, reached := Silence(err)
	require.True(t, reached)
	require.NotContains(t, text, "xxxx")
}

// useResolver has every name looked up by answer, through a DNS server of the test.
func useResolver(t *testing.T, answer func(name string) []netip.Addr) {
	t.Helper()
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw := make([]byte, 1500)
		for {
			n, from, err := l.ReadFrom(raw)
			if err != nil {
				return
			}
			if reply := resolve(raw[:n], answer); reply != nil {
				_, _ = l.WriteTo(reply, from)
			}
		}
	}()
	before := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", l.LocalAddr().String())
	}}
	t.Cleanup(func() { net.DefaultResolver = before; _ = l.Close(); <-done })
}

func resolve(raw []byte, answer func(name string) []netip.Addr) []byte {
	var m dnsmessage.Message
	if m.Unpack(raw) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	m.Response, m.Authoritative, m.Additionals = true, true, nil
	for _, ip := range answer(q.Name.String()) {
		head := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 0}
		switch {
		case ip.Is4() && q.Type == dnsmessage.TypeA:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.AResource{A: ip.As4()}})
		case ip.Is6() && q.Type == dnsmessage.TypeAAAA:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.AAAAResource{AAAA: ip.As16()}})
		}
	}
	if len(m.Answers) == 0 && len(answer(q.Name.String())) == 0 {
		m.RCode = dnsmessage.RCodeNameError
	}
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}
