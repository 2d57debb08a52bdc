// Package outbound sends requests to hosts that people have named: checks of consumers,
// and notifications. Whoever may name one must not get at what only this machine can.
package outbound

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"
)

// Options say how a client is to be.
type Options struct {
	// Timeout is for all of a request.
	Timeout time.Duration
	// Trust is whose certificates are taken; nil: those that the system trusts.
	Trust *tls.Config
	// Follow has redirects within the host followed.
	Follow bool
}

// maxRedirects is how many are followed.
const maxRedirects = 3

// Client sends to where u says: by no proxy, with http to this machine alone, and to no
// address that only a name in disguise would lead to. done gives it back.
func Client(u *url.URL, o Options) (client *http.Client, done func()) {
	onlyLoopback := u.Scheme != "https"
	dialer := &net.Dialer{Timeout: o.Timeout, Control: func(_, address string, _ syscall.RawConn) error {
		return permitted(address, onlyLoopback)
	}}
	transport := &http.Transport{DialContext: dialer.DialContext, TLSClientConfig: o.Trust, TLSHandshakeTimeout: o.Timeout, Proxy: nil, DisableKeepAlives: true}
	return &http.Client{
		Transport: transport, Timeout: o.Timeout,
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if !o.Follow || len(via) > maxRedirects || r.URL.Host != u.Host || r.URL.Scheme != u.Scheme {
				return http.ErrUseLastResponse
			}
			return nil
		},
	}, transport.CloseIdleConnections
}

// permitted says why nothing is sent to an address that a name has led to.
func permitted(address string, onlyLoopback bool) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return forbidden{errors.New("the address cannot be read")}
	}
	ip := at.Addr().Unmap()
	if ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() || onlyLoopback && !ip.IsLoopback() {
		return forbidden{fmt.Errorf("nothing is sent to %s", ip)}
	}
	return nil
}
