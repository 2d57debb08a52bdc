package postgresql

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// farewell bounds how long a session that is no longer needed takes to close.
const farewell = time.Second

// ask runs one statement and returns its rows as text; NULL is "".
func (s *session) ask(ctx context.Context, sql string, args ...string) ([][]string, error) {
	values := make([][]byte, len(args))
	for i, a := range args {
		values[i] = []byte(a)
	}
	result := s.conn.ExecParams(ctx, sql, values, nil, nil, nil).Read()
	if result.Err != nil {
		return nil, result.Err
	}
	rows := make([][]string, len(result.Rows))
	for i, row := range result.Rows {
		rows[i] = make([]string, len(row))
		for j, field := range row {
			rows[i][j] = string(field)
		}
	}
	return rows, nil
}

// one is ask for a statement with one row of n fields.
func (s *session) one(ctx context.Context, n int, sql string, args ...string) ([]string, error) {
	rows, err := s.ask(ctx, sql, args...)
	if err == nil && (len(rows) != 1 || len(rows[0]) != n) {
		err = errors.New("the server answers with another number of rows or fields")
	}
	if err != nil {
		return nil, err
	}
	return rows[0], nil
}

// send runs statements as one message, which the server gets whole or not at
// all.
func (s *session) send(ctx context.Context, sql string) error {
	_, err := s.conn.Exec(ctx, sql).ReadAll()
	return err
}

// codeOf is the SQLSTATE of an error that the server answered with, or "". The
// text of an answer is never shown: it may quote what was sent.
func codeOf(err error) string {
	var refused *pgconn.PgError
	if errors.As(err, &refused) {
		return refused.Code
	}
	return ""
}

// explain turns what happened into a sentence with a class. what says what was
// tried, in words that hold no secret.
func (d door) explain(err error, what, user string) error {
	var classed *kind.Error
	if errors.As(err, &classed) {
		return err
	}
	if code := codeOf(err); code != "" {
		return d.answered(code, what, user)
	}
	if why := connection.Distrust(err); why != "" {
		return fmt.Errorf("node %s cannot be trusted when asked to %s: %s", d.node, what, why)
	}
	if strings.Contains(err.Error(), "server refused TLS connection") {
		return fmt.Errorf("node %s does not speak TLS: switch ssl on there, or set sslmode=disable in connection_url", d.node)
	}
	var large *pgproto3.ExceededMaxBodyLenErr
	if errors.Is(err, bounded.ErrTooMuch) || errors.As(err, &large) {
		return fmt.Errorf("node %s answers with more than is read of any answer when asked to %s: check what listens there", d.node, what)
	}
	if silent(err) {
		return kind.CannotReach(fmt.Errorf("node %s did not answer when asked to %s, check that it runs and is not overloaded: %w", d.node, what, plain(err)))
	}
	return fmt.Errorf("what answers at the address of node %s when asked to %s does not speak the protocol of postgresql as expected: check the host, the port and pg_hba.conf", d.node, what)
}

// later is explain for a node that has answered already: time that runs out now
// does not mean that clients cannot reach it.
func (d door) later(ctx context.Context, err error, what, user string) error {
	err = d.explain(err, what, user)
	if kind.IsUnreachable(err) && (ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded)) {
		return fmt.Errorf("node %s did not %s in time: wait, or look at its load", d.node, what)
	}
	return err
}

// answered is explain for an answer of the server.
func (d door) answered(code, what, user string) error {
	switch code {
	case "28P01":
		return fmt.Errorf("node %s refuses the login of %q when asked to %s: write the connection with the right password", d.node, user, what)
	case "28000":
		return fmt.Errorf("node %s has no rule that lets %q in when asked to %s: check its pg_hba.conf, and that the user has LOGIN", d.node, user, what)
	case "3D000":
		return kind.Definitely("node %s has no database %q: correct connection_url", d.node, d.database)
	case "42501":
		return kind.Definitely("node %s does not permit the admin user to %s: grant it what the documentation of postgresql connections lists", d.node, what)
	case "42704":
		return kind.Definitely("node %s does not know a user, or a role, that it takes to %s: create it with CREATE ROLE", d.node, what)
	case "42710":
		return fmt.Errorf("node %s was asked to %s and has one since a moment ago: wait", d.node, what)
	case "22012":
		return fmt.Errorf("node %s got the request to %s too late and did not do it", d.node, what)
	case "25006":
		return fmt.Errorf("node %s is read only and cannot %s: wait, or check default_transaction_read_only", d.node, what)
	case "55P03":
		return fmt.Errorf("node %s could not %s while another session changes the same user: wait, or end that session", d.node, what)
	case "53300":
		return fmt.Errorf("node %s has as many sessions as it allows, in all or for %q, and cannot %s: raise max_connections or end some", d.node, user, what)
	}
	err := fmt.Errorf("node %s cannot %s and answers SQLSTATE %s: look at its log", d.node, what, code)
	if strings.HasPrefix(code, "22") || strings.HasPrefix(code, "42") {
		return kind.Definitely("%w", err)
	}
	return err
}

// plain keeps of a network error what helps.
func plain(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded) || isTimeout(err):
		return context.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return context.Canceled
	}
	var system syscall.Errno
	if errors.As(err, &system) {
		return system
	}
	var name *net.DNSError
	if errors.As(err, &name) {
		return name
	}
	return errors.New("the connection was lost")
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// silent reports whether err is the lack of any answer: no connection, one that
// was lost, or time that ran out.
func silent(err error) bool {
	for _, lost := range []error{context.DeadlineExceeded, context.Canceled, net.ErrClosed, io.EOF, io.ErrUnexpectedEOF, pgconn.ErrConnClosed} {
		if errors.Is(err, lost) {
			return true
		}
	}
	var system syscall.Errno // reset, refused, no route
	var name *net.DNSError
	return errors.As(err, &system) || errors.As(err, &name) || isTimeout(err)
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
