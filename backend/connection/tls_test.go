package connection

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func issue(t *testing.T, a *servers.Authority, names ...string) (cert, key string) {
	t.Helper()
	cert, key, err := a.Issue(names...)
	require.NoError(t, err)
	return cert, key
}

func authority(t *testing.T) *servers.Authority {
	t.Helper()
	a, err := servers.NewAuthority()
	require.NoError(t, err)
	return a
}

// server wants a certificate of its clients that ca has signed.
func server(t *testing.T, ca *servers.Authority) string {
	t.Helper()
	cert, key := issue(t, ca, "db.example.com", "127.0.0.1")
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	require.NoError(t, err)
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM([]byte(ca.PEM)))
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
	})
	require.NoError(t, err)
	done := make(chan struct{})
	t.Cleanup(func() { _ = l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if c.(*tls.Conn).HandshakeContext(context.Background()) == nil {
				_, _ = c.Write([]byte("hello"))
			}
			_ = c.Close()
		}
	}()
	return l.Addr().String()
}

// greet reads what the server says to a client that both sides trust.
func greet(t *testing.T, conf TLS, addr string) error {
	t.Helper()
	host, _, err := net.SplitHostPort(addr)
	require.NoError(t, err)
	c, err := conf.Config(host)
	require.NoError(t, err)
	conn, err := tls.Dial("tcp", addr, c)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_, err = conn.Read(make([]byte, 5)) // a client learns here that its certificate is not wanted
	return err
}

func TestTLSTrust(t *testing.T) {
	ca, other := authority(t), authority(t)
	cert, key := issue(t, ca, "engine")
	strange, strangeKey := issue(t, other, "engine")
	addr := server(t, ca)
	good := TLS{CA: ca.PEM, Cert: cert, Key: key}
	require.NoError(t, greet(t, good, addr))
	good.ServerName = "db.example.com"
	require.NoError(t, greet(t, good, addr))

	for name, c := range map[string]struct {
		conf TLS
		says string
	}{
		"another authority":      {TLS{CA: other.PEM, Cert: cert, Key: key}, "tls_ca"},
		"the system's":           {TLS{Cert: cert, Key: key}, "tls_ca"},
		"another name":           {TLS{CA: ca.PEM, Cert: cert, Key: key, ServerName: "else.example.com"}, "tls_server_name"},
		"no client certificate":  {TLS{CA: ca.PEM}, "tls_cert"},
		"a stranger's":           {TLS{CA: ca.PEM, Cert: strange, Key: strangeKey}, "tls_cert"},
		"trusted, but a strange": {TLS{SkipVerify: true, Cert: strange, Key: strangeKey}, "tls_cert"},
	} {
		err := greet(t, c.conf, addr)
		require.Error(t, err, name)
		require.Contains(t, Distrust(err), c.says, name)
	}
	require.NoError(t, greet(t, TLS{SkipVerify: true, Cert: cert, Key: key}, addr))
	require.Empty(t, Distrust(net.ErrClosed))
}

func TestTLSRefusesWhatCannotBeUsed(t *testing.T) {
	ca := authority(t)
	cert, key := issue(t, ca, "engine")
	_, another := issue(t, ca, "another")
	for says, conf := range map[string]TLS{
		"tls_ca holds no certificate":        {CA: "not PEM"},
		"belong together: give both":         {Cert: cert},
		"belong together":                    {Key: key},
		"are no certificate with its key":    {Cert: cert, Key: another},
		"tls_cert and tls_key are no certif": {Cert: cert, Key: "a-secret-that-is-no-key"},
	} {
		_, err := conf.Config("host")
		require.ErrorContains(t, err, says)
		require.NotContains(t, err.Error(), "a-secret")
	}
	require.True(t, TLS{CA: "a", Cert: cert}.SameTrust(TLS{CA: "a"}))
	require.False(t, TLS{CA: "a"}.SameTrust(TLS{}))
	require.False(t, TLS{SkipVerify: true}.SameTrust(TLS{}))
	require.False(t, TLS{ServerName: "a"}.SameTrust(TLS{}))
}
