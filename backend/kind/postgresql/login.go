package postgresql

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// What a server asks for during a login (AuthenticationRequest of its
// protocol). Everything else is a method that is not about a password.
const (
	askedNothing   = 0
	askedPlaintext = 3
	askedMD5       = 5
	askedSASL      = 10
)

// maxMessage bounds one message of a server, and maxHeard all of a session: far more
// than the largest answer that is asked for.
const (
	maxMessage = 1 << 20
	maxHeard   = 16 << 20
)

// door is where logins of one node go.
type door struct {
	node string // host:port, as connection_url names it
	dial string // what is dialled for it
	settings
	tls *tls.Config // nil: plaintext
}

// session is one TCP connection to one node, for the length of one call. It
// never dials again: a request is sent once or not at all.
type session struct {
	door
	conn   *pgconn.PgConn
	heard  *dialogue
	forget func() bool
	raw    net.Conn
}

// login connects within connectCtx. The session dies with ctx, and with it
// everything that the kernel has not sent yet. What was heard of the server is
// there in either case.
func (d door) login(ctx, connectCtx context.Context, m kind.Material) (*session, *dialogue, error) {
	heard := &dialogue{budget: bounded.NewBudget(maxHeard)}
	raw, err := (&net.Dialer{}).DialContext(connectCtx, "tcp", d.dial)
	if err != nil {
		return nil, heard, err
	}
	s := &session{door: d, heard: heard, raw: raw}
	s.forget = context.AfterFunc(ctx, func() {
		if tcp, ok := raw.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // gone, not "still trying to deliver"
		}
		_ = raw.Close()
	})
	config, err := d.config(m, s)
	if err == nil {
		s.conn, err = pgconn.ConnectConfig(connectCtx, config)
	}
	if err != nil {
		s.forget()
		_ = raw.Close()
		return nil, heard, err
	}
	return s, heard, nil
}

func (s *session) close(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
	defer cancel()
	_ = s.conn.Close(ctx)
	<-s.conn.CleanupDone()
	s.forget()
	_ = s.raw.Close()
}

// config says everything that pgconn would otherwise look for in the
// environment of the process, or in files of its home directory.
func (d door) config(m kind.Material, s *session) (*pgconn.Config, error) {
	if os.Getenv("PGSERVICE") != "" {
		return nil, kind.Definitely("the environment of the Vault server holds PGSERVICE, which may send logins elsewhere: start Vault without it")
	}
	c, err := pgconn.ParseConfig("host=localhost port=5432 user=nobody password=none dbname=none sslmode=disable sslcert='' sslkey='' " +
		"sslrootcert='' sslpassword='' sslcertmode=allow sslsni=1 sslnegotiation=postgres passfile='' target_session_attrs=any " +
		"connect_timeout=0 min_protocol_version=3.0 max_protocol_version=3.0 channel_binding=prefer require_auth=scram-sha-256,md5 " +
		"krbsrvname='' krbspn=''")
	if err != nil {
		return nil, errors.New("the defaults of a postgresql login cannot be read: report this")
	}
	host, port, err := net.SplitHostPort(d.node)
	if err != nil {
		return nil, kind.Definitely("the host of node %s cannot be read: correct connection_url", d.node)
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, kind.Definitely("the port of node %s cannot be read: correct connection_url", d.node)
	}
	c.Host, c.Port, c.TLSConfig, c.Fallbacks = host, uint16(number), d.tls, nil
	c.User, c.Password, c.Database = m.Username, m.Secret, d.database
	c.RuntimeParams = map[string]string{"application_name": d.application, "client_encoding": "UTF8"}
	c.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
	first := make(chan net.Conn, 1)
	first <- s.raw
	// A second connection would be one to cancel what the first has sent. The
	// server has a time limit of its own for that.
	c.DialFunc = func(context.Context, string, string) (net.Conn, error) {
		select {
		case conn := <-first:
			return conn, nil
		default:
			return nil, net.ErrClosed
		}
	}
	c.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
		s.heard.r = r
		f := pgproto3.NewFrontend(s.heard, w)
		f.SetMaxBodyLen(maxMessage) // it makes room for what is announced
		return f
	}
	return c, nil
}

// dialogue follows what a server says during a login: a login proves a password
// only where the server has asked for it.
type dialogue struct {
	r        io.Reader
	asked    uint32 // the last method; askedNothing where there was none
	accepted bool   // the server has said so; what it refuses after that, it refuses to the right user

	budget *bounded.Budget

	head [9]byte // type, length and method of a message
	have int
	skip int64 // of the rest of a message
}

func (d *dialogue) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if over := d.budget.Spend(n); over != nil {
		return 0, over
	}
	if !d.accepted {
		d.follow(p[:n])
	}
	return n, err
}

func (d *dialogue) follow(p []byte) {
	for len(p) > 0 && !d.accepted {
		if d.skip > 0 {
			n := min(d.skip, int64(len(p)))
			d.skip -= n
			p = p[n:]
			continue
		}
		d.head[d.have] = p[0]
		d.have++
		p = p[1:]
		switch {
		case d.have < 5 || d.have < 9 && d.head[0] == 'R':
		case d.have == 5:
			d.skip, d.have = int64(binary.BigEndian.Uint32(d.head[1:5]))-4, 0
		default:
			d.skip, d.have = int64(binary.BigEndian.Uint32(d.head[1:5]))-8, 0
			d.method(binary.BigEndian.Uint32(d.head[5:9]))
		}
	}
}

func (d *dialogue) method(code uint32) {
	switch code {
	case 0:
		d.accepted = true
	case 11, 12: // more of askedSASL
	default:
		d.asked = code
	}
}

// verdict is what one login showed.
type verdict struct {
	accepted bool
	open     bool   // the server let it in without a proof
	problem  string // why the login could not be tried with a password
	err      error  // why nothing is known
}

// try logs in as m and says what that proves. SCRAM proves the password to the
// server and the server's knowledge of it to us; with MD5 it takes another
// login to show that not every password will do.
func (d door) try(ctx context.Context, m kind.Material) verdict {
	v, asked := d.knock(ctx, m)
	if v.accepted && asked == askedMD5 {
		other := d.tryAny(ctx, m.Username)
		v.open, v.err = other.open, other.err
	}
	return v
}

func (d door) knock(ctx context.Context, m kind.Material) (v verdict, asked uint32) {
	s, heard, err := d.login(ctx, ctx, m)
	if err == nil {
		_, err = s.ask(ctx, "SELECT 1")
		s.close(ctx)
		if err != nil {
			return verdict{err: d.later(ctx, err, "answer a new session of user "+m.Username, m.Username)}, heard.asked
		}
		return verdict{accepted: true}, heard.asked
	}
	var refused *pgconn.PgError
	_ = errors.As(err, &refused)
	switch {
	case heard.accepted && heard.asked == askedNothing:
		return verdict{accepted: true, open: true}, heard.asked
	case heard.asked != askedNothing && heard.asked != askedSASL && heard.asked != askedMD5:
		return verdict{problem: fmt.Sprintf("node %s asks user %s for something else than the proof of a password (%s): "+
			"give pg_hba.conf a rule with scram-sha-256 for it", d.node, m.Username, methodName(heard.asked))}, heard.asked
	case refused == nil:
		return verdict{err: d.later(ctx, err, "test a login of user "+m.Username, m.Username)}, heard.asked
	case heard.accepted && denies(refused.Code):
		// The password was right; this database, or one more session, is not for it.
		return verdict{accepted: true}, heard.asked
	case refused.Code == "28P01":
		return verdict{}, heard.asked
	case refused.Code == "28000":
		return verdict{problem: fmt.Sprintf("node %s refuses every login of user %s from here: "+
			"check that the user has LOGIN and pg_hba.conf a rule with scram-sha-256 for it, for database %s", d.node, m.Username, d.database)}, heard.asked
	}
	return verdict{err: d.later(ctx, err, "test a login of user "+m.Username, m.Username)}, heard.asked
}

// denies reports whether a code is about what an accepted user may do.
func denies(code string) bool {
	switch code {
	case "42501", "3D000", "55000", "53300":
		return true
	}
	return false
}

func methodName(code uint32) string {
	switch code {
	case askedPlaintext:
		return "the password itself, as password, ldap, pam and radius do"
	case 7, 8, 9:
		return "GSSAPI or SSPI"
	}
	return fmt.Sprintf("method %d", code)
}

// tryAny logs in with a password that nobody has: whether any will do.
func (d door) tryAny(ctx context.Context, username string) verdict {
	v, _ := d.knock(ctx, kind.Material{Username: username, Secret: rand.Text()})
	v.open = v.open || v.accepted
	return v
}

func (d door) openly(username string) string {
	return fmt.Sprintf("node %s lets user %s in with any password, or with none (trust, ident or cert in pg_hba.conf): "+
		"give it a rule with scram-sha-256 for the user", d.node, username)
}
