package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Mismatch is what KV answers to a write whose cas is not the current version.
const Mismatch = "check-and-set parameter did not match the current version"

// Registered is what AppRole answers, with 500, where a secret-id is to be made
// that it has already.
const Registered = "SecretID is already registered"

// Nonexistent is what AppRole answers about a role that it has not, with 404 or
// 500.
const Nonexistent = "does not exist"

// Incomplete is what AppRole answers where it has found half a secret-id, and
// removed it.
const Incomplete = "invalid secret id"

// upgrading is what KV answers, with 400, for a moment after it was mounted.
const upgrading = "Upgrading from non-versioned to versioned"

// knownAnswers are the error texts of Vault that are shown. An answer may repeat
// what was sent, so no other text is, and of these not what stands around them.
var knownAnswers = []string{
	Mismatch,
	"check-and-set parameter required for this call",
	"invalid token",
	"bad token",
	"permission denied",
	"Vault is sealed",
	wrongLogin,
	"invalid role ID",
	Incomplete,
	"invalid role name",
	"service account name not authorized",
	"namespace not authorized",
	"lookup failed",
	"no handler for route",
	"unsupported path",
	"unsupported operation",
	"route entry not found",
	"namespace not found",
	"rate limit quota exceeded",
	"encryption key not found",
	"local node not active but active cluster node not found",
	"could not find connection",
	Registered,
	Nonexistent,
	upgrading,
}

// Answer is what a Vault answered instead of success. Its text holds the status
// and the path, and of the body nothing but known texts.
type Answer struct {
	Status int
	Method string
	Path   string
	Known  string // one of the known texts, or ""
}

func (a *Answer) Error() string {
	if a.Known == "" {
		return fmt.Sprintf("%s %s was answered with %d %s", a.Method, a.Path, a.Status, statusText(a.Status))
	}
	return fmt.Sprintf("%s %s was answered with %d: %s", a.Method, a.Path, a.Status, a.Known)
}

// statusText adds what Vault means by its own codes.
func statusText(code int) string {
	switch code {
	case 472:
		return "(a disaster recovery secondary)"
	case 473:
		return "(a performance standby)"
	case http.StatusPreconditionFailed:
		return "(a standby that is not up to date)"
	case http.StatusServiceUnavailable:
		return "(sealed, or no node is active)"
	}
	return http.StatusText(code)
}

// AnswerOf returns what a Vault answered, if err is that: an error of its client
// or one of Do.
func AnswerOf(err error) *Answer {
	var a *Answer
	if errors.As(err, &a) {
		return a
	}
	var raw *api.ResponseError
	if !errors.As(err, &raw) {
		return nil
	}
	a = &Answer{Status: raw.StatusCode, Method: raw.HTTPMethod}
	if u, err := url.Parse(raw.URL); err == nil {
		a.Path = strings.TrimPrefix(u.Path, "/v1/")
	}
	text := strings.Join(raw.Errors, "\n")
	for _, known := range knownAnswers {
		if strings.Contains(text, known) {
			a.Known = known
			break
		}
	}
	return a
}

// class says what an answer means for a rotation. 403 is for now: a policy can
// be mended while the rotation waits.
func (a *Answer) class() kind.Class {
	switch s := a.Status; {
	case s >= 500, s < 400,
		s == http.StatusForbidden, s == http.StatusUnauthorized, s == http.StatusRequestTimeout, s == http.StatusTooEarly,
		s == http.StatusPreconditionFailed, s == http.StatusTooManyRequests, s == 472, s == 473,
		a.Known == upgrading:
		return kind.Unavailable
	}
	return kind.Definite
}

func forbidden(err error) bool {
	a := AnswerOf(err)
	return a != nil && a.Status == http.StatusForbidden
}

// redirected is a standby that names another node. The token is sent to nobody
// but the address that was given.
type redirected struct{ host string }

func (r *redirected) Error() string {
	return fmt.Sprintf("it is a standby that sends its clients to %.80q; give the address of the active node, or of something in front of all of them", r.host)
}

// noAnswer is a request that got none.
type noAnswer struct{ error }

func (n *noAnswer) Unwrap() error { return n.error }

// errTooLarge ends the reading of an answer.
var errTooLarge = fmt.Errorf("its answer has more than %d bytes", maxAnswer)

// explain turns what happened to a call into an error with its class. Nothing of
// an answer but what Answer shows gets into its text.
func (s *session) explain(err error) error {
	if err == nil {
		return nil
	}
	var known *kind.Error
	if errors.As(err, &known) {
		return err
	}
	if a := AnswerOf(err); a != nil {
		return &kind.Error{Class: a.class(), Err: fmt.Errorf("the Vault of connection %q: %w", s.name, a)}
	}
	class, text := kind.Unavailable, ""
	var (
		moved    *redirected
		blocked  forbiddenIP
		dns      *net.DNSError
		system   syscall.Errno
		netError net.Error
		silent   *noAnswer
	)
	switch {
	case errors.Is(err, errClosed):
		text = "is not asked any more: the engine is being stopped"
	case errors.As(err, &moved):
		text = "did not do it: " + moved.Error()
	case errors.As(err, &blocked):
		text = "is not asked: " + blocked.Error()
	case connection.Distrust(err) != "":
		text = "cannot be used: " + connection.Distrust(err)
	case errors.Is(err, errTooLarge):
		class, text = kind.Definite, "cannot be understood: "+errTooLarge.Error()
	case errors.As(err, &dns):
		class, text = kind.Unreachable, fmt.Sprintf("cannot be found: the name %.80q does not resolve", dns.Name)
	case errors.Is(err, context.Canceled):
		class, text = kind.Unreachable, "was not waited for"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &netError) && netError.Timeout():
		class, text = kind.Unreachable, "did not answer in time"
	case errors.As(err, &system):
		class, text = kind.Unreachable, "cannot be reached: "+system.Error()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		class, text = kind.Unreachable, "closed the connection before it answered"
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		text = "does not speak TLS: check the port and the scheme of the address"
	case errors.As(err, &silent): // as where it closes a connection while a request is on its way
		class, text = kind.Unreachable, fmt.Sprintf("did not answer (%T)", innermost(err))
	default:
		text = fmt.Sprintf("gave an answer that cannot be understood (%T); check that address leads to a Vault", innermost(err))
	}
	return &kind.Error{Class: class, Err: fmt.Errorf("the Vault of connection %q (%s) %s", s.name, s.address, text)}
}

func innermost(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}
