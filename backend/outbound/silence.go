package outbound

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
)

// forbidden is why nothing is sent to an address.
type forbidden struct{ error }

// Silence says why a host did not answer, and whether it was reached at all. What it
// wrote itself, into a certificate too, is not repeated: it may have been shown a secret
// before.
func Silence(err error) (text string, reached bool) {
	var (
		own       forbidden
		untrusted *tls.CertificateVerificationError
		dns       *net.DNSError
		system    syscall.Errno
		netError  net.Error
	)
	switch {
	case errors.As(err, &own):
		return "is not asked: " + own.Error(), false
	case errors.Is(err, bounded.ErrTooMuch):
		return "answered with more than is read of any answer", true
	case errors.As(err, &untrusted):
		return "has a certificate that is not trusted, or not for this host", true
	case errors.As(err, &dns):
		return fmt.Sprintf("cannot be found: the name %.80q does not resolve", dns.Name), false
	case errors.Is(err, context.Canceled):
		return "was not waited for", false
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &netError) && netError.Timeout():
		return "did not answer in time", false
	case errors.As(err, &system):
		return "cannot be reached: " + system.Error(), false
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return "closed the connection before it answered", false
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "does not speak TLS: check the port and the scheme", true
	}
	return fmt.Sprintf("gave an answer that cannot be understood (%T)", innermost(err)), true
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
