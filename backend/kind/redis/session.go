package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// chunk is how many commands travel in one round trip.
const chunk = 256

// peer is whom a session leads to, and how.
type peer struct {
	node     string      // how errors name it
	sentinel bool        // it watches nodes and holds no users of theirs
	tls      *tls.Config // nil: spoken to without TLS
}

// who names p at the beginning of a sentence.
func (p peer) who() string {
	if p.sentinel {
		return "sentinel " + p.node
	}
	return "node " + p.node
}

// session is one TCP connection to one node, for the length of one call. It
// never dials again: a request is sent once or not at all.
type session struct {
	peer
	addr    string // what was dialled
	client  *redis.Client
	conn    *redis.Conn
	cut     context.CancelFunc
	replied bool // it answered a command
}

type command []any

type reply struct {
	value any
	err   error
}

// dial connects, within connectCtx, to the first of addrs that answers. The
// connection dies with ctx, and with it everything that the kernel has not sent yet.
func dial(ctx, connectCtx context.Context, to peer, addrs []string) (*session, error) {
	ctx, cut := context.WithCancel(ctx)
	var raw net.Conn
	var addr string
	err := errors.New("it has no address")
	for _, addr = range addrs {
		if raw, err = (&net.Dialer{}).DialContext(connectCtx, "tcp", addr); err == nil {
			break
		}
	}
	if err != nil {
		cut()
		err = fmt.Errorf("%s cannot be reached, check that it runs and that its address is right: %w", to.who(), plain(err))
		return nil, kind.CannotReach(err)
	}
	if tcp, ok := raw.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // close means gone, not "still trying to deliver"
	}
	context.AfterFunc(ctx, func() { _ = raw.Close() })
	conn, err := to.secure(connectCtx, raw)
	if err != nil {
		cut()
		return nil, err
	}
	s := &session{peer: to, addr: addr, client: client(guarded(conn), addr), cut: cut}
	s.conn = s.client.Conn()
	return s, nil
}

// again connects once more to where s leads, for logins of their own.
func (s *session) again(ctx context.Context) (*session, error) {
	return dial(ctx, ctx, s.peer, []string{s.addr})
}

// secure speaks TLS over raw where p is spoken to with it.
func (p peer) secure(ctx context.Context, raw net.Conn) (net.Conn, error) {
	if p.tls == nil {
		return raw, nil
	}
	c := tls.Client(raw, p.tls)
	err := c.HandshakeContext(ctx)
	var record tls.RecordHeaderError
	switch {
	case err == nil:
		return abrupt{c}, nil
	case errors.As(err, &record):
		return nil, fmt.Errorf("%s does not speak TLS: check the port, or write the connection with tls=false", p.who())
	case connection.Distrust(err) != "":
		return nil, fmt.Errorf("%s cannot be trusted: %s", p.who(), connection.Distrust(err))
	case silent(err):
		return nil, kind.CannotReach(fmt.Errorf("%s did not answer a TLS handshake, check that it runs and that this port speaks TLS: %w", p.who(), plain(err)))
	}
	return nil, fmt.Errorf("%s and the engine have no TLS in common: check tls-protocols and tls-ciphers there", p.who())
}

// abrupt ends as a TCP connection does: crypto/tls waits for seconds until a
// peer that hangs has taken its goodbye.
type abrupt struct{ *tls.Conn }

func (c abrupt) Close() error { return c.NetConn().Close() }

// client makes go-redis use raw and nothing else. Without credentials it sends
// no AUTH of its own, which it would repeat after a refused HELLO.
func client(raw net.Conn, addr string) *redis.Client {
	first := make(chan net.Conn, 1)
	first <- raw
	return redis.NewClient(&redis.Options{
		Addr: addr, Protocol: 2, DisableIdentity: true, ContextTimeoutEnabled: true,
		MaxRetries: -1, DialerRetries: 1, PoolSize: 1, PipelinePoolSize: -1,
		ReadTimeout: kind.CallTimeout, WriteTimeout: kind.CallTimeout,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			select {
			case c := <-first:
				return c, nil
			default:
				return nil, net.ErrClosed
			}
		},
	})
}

func (s *session) close() {
	_ = s.conn.Close()
	_ = s.client.Close()
	s.cut()
}

// run sends commands in as few round trips as their number allows and returns
// a reply for each. After the connection is lost the rest is not sent.
func (s *session) run(ctx context.Context, commands []command) []reply {
	replies := make([]reply, 0, len(commands))
	var lost error
	for len(replies) < len(commands) {
		part := commands[len(replies):min(len(replies)+chunk, len(commands))]
		if lost == nil {
			lost = ctx.Err()
		}
		if lost != nil {
			for range part {
				replies = append(replies, reply{err: lost})
			}
			continue
		}
		cmds := make([]*redis.Cmd, len(part))
		pipe := s.conn.Pipeline()
		for i, c := range part {
			cmds[i] = pipe.Do(ctx, c...)
		}
		if _, err := pipe.Exec(ctx); err != nil && !isReply(err) {
			lost = err
		}
		for _, c := range cmds {
			value, err := c.Result()
			if errors.Is(err, redis.Nil) {
				err = nil
			}
			s.replied = s.replied || err == nil || isReply(err)
			replies = append(replies, reply{value, err})
		}
	}
	return replies
}

// login tries the admin's credentials in order. More than one exists only
// while the admin credential itself is being rotated.
func (s *session) login(ctx context.Context, logins []kind.Material) (string, error) {
	if len(logins) == 0 {
		return "", kind.Definitely("the connection has no admin credential: write its username and password")
	}
	var err error
	for _, m := range logins {
		username := m.Username
		if username == "" {
			username = "default"
		}
		if m.Secret == "" && username == "default" {
			return username, nil // an open server; what follows says NOAUTH if it is not
		}
		err = s.run(ctx, []command{{"AUTH", username, m.Secret}})[0].err
		if err == nil {
			return username, nil
		}
		if replyCode(err) != "WRONGPASS" {
			break
		}
	}
	if replyCode(err) == "ERR" && strings.Contains(err.Error(), "wrong number of arguments") {
		return "", s.tooOld()
	}
	as := "admin"
	if s.sentinel {
		as = "the sentinel user"
	}
	return "", s.explain(err, "log in as "+as, logins[0].Username)
}

func (s *session) tooOld() error {
	return kind.Definitely("%s is a redis without ACLs: roles need redis 6 or later, so upgrade it", s.who())
}

// isReply reports whether err is an answer of the server, and not a failure to
// get one.
func isReply(err error) bool {
	var e redis.Error
	return errors.As(err, &e)
}

// replyCode is the first word of an error reply ("NOPERM"), or "". The rest of
// a reply is never shown as it is: ACL SETUSER echoes its modifiers.
func replyCode(err error) string {
	if err == nil || !isReply(err) {
		return ""
	}
	code, _, _ := strings.Cut(err.Error(), " ")
	return code
}

// explain turns what happened to one command into a sentence with a class.
// what says what was tried, in words that hold no secret.
func (s *session) explain(err error, what, user string) error {
	if why := connection.Distrust(err); why != "" { // TLS 1.3 tells of a client's certificate after the handshake
		return fmt.Errorf("%s cannot be asked to %s: %s", s.who(), what, why)
	}
	if s.tls != nil && !s.replied && dropped(err) {
		return fmt.Errorf("%s ended the connection after the TLS handshake when asked to %s: check tls_cert and tls_key, and its log", s.who(), what)
	}
	if s.tls == nil && !s.replied && dropped(err) {
		return kind.CannotReach(fmt.Errorf("%s ended the connection when asked to %s, check that it runs, and whether tls has to be true: %w", s.who(), what, plain(err)))
	}
	if errors.Is(err, bounded.ErrTooMuch) {
		return fmt.Errorf("%s answers with more than is read of any answer when asked to %s: check what listens there", s.who(), what)
	}
	if silent(err) {
		return kind.CannotReach(fmt.Errorf("%s did not answer when asked to %s, check that it runs and is not overloaded: %w", s.who(), what, plain(err)))
	}
	if !isReply(err) {
		return fmt.Errorf("what answers at the address of %s when asked to %s does not speak the protocol of redis: check the address and the port, and whether tls has to be true", s.who(), what)
	}
	if s.sentinel {
		return s.answeredSentinel(err, what, user)
	}
	return s.answered(err, what, user)
}

// answered is explain for an answer of a node.
func (s *session) answered(err error, what, user string) error {
	switch replyCode(err) {
	case "NOPERM":
		return kind.Definitely("node %s does not permit the admin user to %s: grant it the command (see the documentation of redis connections)", s.node, what)
	case "WRONGPASS":
		return fmt.Errorf("node %s refuses the login of %q when asked to %s: write the connection with the right password, or enable the user", s.node, user, what)
	case "NOAUTH":
		return fmt.Errorf("node %s wants a login when asked to %s: write the connection with a username and password", s.node, what)
	case "LOADING", "BUSY", "MASTERDOWN", "TRYAGAIN", "CLUSTERDOWN", "NOREPLICAS", "READONLY", "OOM", "MISCONF", "DENIED":
		return fmt.Errorf("node %s cannot %s now and answers %s: wait, or look at its log", s.node, what, replyCode(err))
	}
	if strings.Contains(err.Error(), "max number of clients") {
		return fmt.Errorf("node %s has as many clients as it allows and cannot %s: raise maxclients or close some", s.node, what)
	}
	if unknownCommand(err) {
		return kind.Definitely("node %s does not know how to %s: it is too old, or the command was renamed", s.node, what)
	}
	return fmt.Errorf("node %s could not %s: look at its log", s.node, what)
}

func unknownCommand(err error) bool {
	return isReply(err) && (strings.Contains(err.Error(), "unknown command") || strings.Contains(err.Error(), "unknown subcommand") ||
		strings.Contains(err.Error(), "Unknown sentinel subcommand"))
}

// plain keeps of a network error what helps, without go-redis' wrapping.
func plain(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded) || isTimeout(err):
		return context.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case errors.Is(err, net.ErrClosed), errors.Is(err, io.EOF):
		return errors.New("the connection was lost")
	}
	return err
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// silent reports whether err is the lack of any answer: no connection, one that
// was lost, or time that ran out.
func silent(err error) bool {
	if isReply(err) {
		return false
	}
	for _, lost := range []error{context.DeadlineExceeded, context.Canceled, net.ErrClosed, io.EOF, io.ErrUnexpectedEOF} {
		if errors.Is(err, lost) {
			return true
		}
	}
	var system syscall.Errno // reset, refused, no route
	return errors.As(err, &system) || isTimeout(err)
}

// dropped reports whether err is a connection that the other side ended.
func dropped(err error) bool {
	for _, lost := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, lost) {
			return true
		}
	}
	return false
}

// within bounds a step by a share of the time that ctx has left, so that a
// node that hangs leaves time for the others.
func within(ctx context.Context, share int, most time.Duration) (context.Context, context.CancelFunc) {
	d := most
	if deadline, ok := ctx.Deadline(); ok {
		d = min(d, time.Until(deadline)/time.Duration(share))
	}
	return context.WithTimeout(ctx, d)
}
