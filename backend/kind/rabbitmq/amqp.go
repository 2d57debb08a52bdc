package rabbitmq

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// endpoint is where a broker takes AMQP connections.
type endpoint struct {
	addr string // host:port to dial
	host string // whose certificate it shows
	tls  bool
}

// verdict is what became of a login over AMQP.
type verdict struct {
	accepted bool
	// barred is set where the password was accepted and the vhost was not opened:
	// a sentence about why, or "" where a limit alone was in the way.
	barred string
}

// failsAtOnce asks the broker to say that it refuses a login. Otherwise it
// closes the connection without a word, after three seconds, which cannot be
// told from a connection that was lost.
const failsAtOnce = "authentication_failure_close"

// plainLogin is the SASL mechanism PLAIN. Its answer is asked for after the
// library has set the capabilities of the client, and before they are sent: they
// are completed then, because there is no other way to.
type plainLogin struct {
	kind.Material
	properties amqp.Table
}

func (l *plainLogin) Mechanism() string { return "PLAIN" }

func (l *plainLogin) Response() string {
	if capabilities, ok := l.properties["capabilities"].(amqp.Table); ok {
		capabilities[failsAtOnce] = true
	}
	return "\x00" + l.Username + "\x00" + l.Secret
}

// maxLogin bounds what a broker says during a login.
const maxLogin = 1 << 20

// logIn tries a login, and to open vhost, on a connection of its own. An error
// means that the broker said neither yes nor no.
func logIn(ctx context.Context, node string, e endpoint, trust connection.TLS, m kind.Material, vhost string) (verdict, error) {
	ctx, cut := context.WithCancel(ctx)
	defer cut()
	raw, anonymous, err := e.dial(ctx, trust)
	if err != nil {
		return verdict{}, explainDial(err, node, e.addr)
	}
	conn := &witness{Conn: bounded.Conn(raw, maxLogin)}
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName("harmonyflow")
	c, err := amqp.Open(conn, amqp.Config{
		SASL: []amqp.Authentication{&plainLogin{m, properties}}, Properties: properties, Vhost: vhost, Locale: "en_US", ChannelMax: 1,
	})
	if err == nil {
		_ = c.Close() // in order, or the broker logs a warning
		return verdict{accepted: true}, nil
	}
	_ = conn.Close()
	begun, strange, end := conn.end()
	switch {
	case connection.Distrust(end) != "":
		return verdict{}, explainDial(end, node, e.addr)
	case strange:
		return verdict{}, fmt.Errorf("what answers for broker %s (%s) does not speak AMQP 0-9-1: check the port, and whether it wants TLS (amqps)", node, e.addr)
	case !begun && anonymous && ctx.Err() == nil: // its alert can be lost with the connection
		return verdict{}, kind.CannotReach(fmt.Errorf("broker %s (%s) asked for a certificate and ended the connection, check that it runs, and give tls_cert and tls_key if it wants one", node, e.addr))
	case errors.Is(err, amqp.ErrSASL):
		return verdict{}, fmt.Errorf("broker %s (%s) takes no passwords over AMQP: add PLAIN to its auth_mechanisms", node, e.addr)
	}
	return judge(ctx, err, node, e.addr, m.Username, vhost)
}

// witness remembers how its connection began and ended, which the library does
// not say. A broker that does not want the certificate of a client says so in
// the end, and what is no broker begins with something else than a frame.
type witness struct {
	net.Conn
	mu      sync.Mutex
	begun   bool
	strange bool
	err     error
}

// methodFrame is what the first byte of a broker says that follows.
const methodFrame = 1

func (w *witness) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	if n > 0 && !w.begun {
		w.begun, w.strange = true, p[0] != methodFrame
	}
	if w.err == nil {
		w.err = err
	}
	return n, err
}

func (w *witness) end() (begun, strange bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.begun, w.strange, w.err
}

// judge reads what a broker said instead of opening the connection.
func judge(ctx context.Context, err error, node, addr, username, vhost string) (verdict, error) {
	var said *amqp.Error
	if !errors.As(err, &said) || !said.Server {
		if ctx.Err() != nil {
			err = ctx.Err()
		} else {
			err = errors.New("the connection was lost")
		}
		return verdict{}, kind.CannotReach(fmt.Errorf("broker %s (%s) did not answer a login over AMQP, check that it runs and that the port is that of AMQP: %w", node, addr, err))
	}
	switch {
	case said.Code == amqp.AccessRefused:
		return verdict{}, nil
	case said.Code == amqp.NotAllowed && strings.Contains(said.Reason, "limit"):
		return verdict{accepted: true}, nil // as many connections as the user, or the vhost, may have
	case said.Code == amqp.NotAllowed && strings.Contains(said.Reason, "not found"):
		return verdict{accepted: true, barred: fmt.Sprintf("vhost %s does not exist at broker %s: create it, or correct vhosts of the connection", vhost, node)}, nil
	case said.Code == amqp.NotAllowed && strings.Contains(said.Reason, "refused"):
		return verdict{accepted: true, barred: fmt.Sprintf("user %s may not use vhost %s at broker %s: permit it with rabbitmqctl set_permissions, or correct vhosts of the connection", username, vhost, node)}, nil
	}
	return verdict{}, fmt.Errorf("broker %s (%s) cannot open vhost %s now and answers %d: wait, or look at its log", node, addr, vhost, said.Code)
}

// dial also reports whether the broker asked for a certificate and got none. With
// TLS 1.3 it may refuse that only after the handshake.
func (e endpoint) dial(ctx context.Context, trust connection.TLS) (c net.Conn, anonymous bool, err error) {
	config, err := trust.Config(e.host)
	if err != nil {
		return nil, false, kind.Definitely("%w", err)
	}
	raw, err := dialer(ctx)(ctx, "tcp", e.addr)
	if err != nil || !e.tls {
		return raw, false, err
	}
	if len(config.Certificates) == 0 && config.GetClientCertificate == nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			anonymous = true
			return &tls.Certificate{}, nil
		}
	}
	secured := tls.Client(raw, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, anonymous, err
	}
	return secured, anonymous, nil
}

func explainDial(err error, node, addr string) error {
	if kind.IsDefinite(err) {
		return err
	}
	if why := connection.Distrust(err); why != "" {
		return fmt.Errorf("broker %s (%s) cannot be logged in to over AMQP, %s", node, addr, why)
	}
	return kind.CannotReach(fmt.Errorf("broker %s (%s) cannot be reached over AMQP, check that it runs, and amqp_urls or address_map: %w", node, addr, plain(err)))
}
