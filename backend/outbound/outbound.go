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
	"slices"
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

// maxHeader bounds the header of an answer.
const maxHeader = 64 << 10

// Client sends to where u says: by no proxy, with http to this machine alone, and to no
// address that only a name in disguise would lead to. done gives it back.
func Client(u *url.URL, o Options) (client *http.Client, done func()) {
	onlyLoopback := u.Scheme != "https"
	dialer := &net.Dialer{Timeout: o.Timeout, Control: func(_, address string, _ syscall.RawConn) error {
		return permitted(address, onlyLoopback)
	}}
	transport := &http.Transport{DialContext: dialer.DialContext, TLSClientConfig: o.Trust, TLSHandshakeTimeout: o.Timeout, Proxy: nil, DisableKeepAlives: true, MaxResponseHeaderBytes: maxHeader}
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
	if Forbidden(ip) || onlyLoopback && !ip.IsLoopback() {
		return forbidden{fmt.Errorf("nothing is sent to %s", ip)}
	}
	return nil
}

// metadataServices answer whoever asks from a machine of their cloud with that
// machine's credentials. Most are link-local; these are not.
var metadataServices = []netip.Addr{
	netip.MustParseAddr("fd00:ec2::254"),   // Amazon
	netip.MustParseAddr("fd20:ce::254"),    // Google
	netip.MustParseAddr("100.100.100.200"), // Alibaba
	netip.MustParseAddr("168.63.129.16"),   // Azure
	netip.MustParseAddr("192.0.0.192"),     // Oracle
}

// thisNetwork is of no use as a destination, and some systems take all of it for
// themselves (RFC 1122, 3.2.1.3).
var thisNetwork = netip.MustParsePrefix("0.0.0.0/8")

// Forbidden reports whether ip is one that nobody has a server at, or that only this
// machine should ask: link-local, a metadata service, or an IPv6 address that a gateway
// takes to one of these.
func Forbidden(ip netip.Addr) bool {
	ip = ip.Unmap().WithZone("")
	if !ip.IsValid() || ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() || slices.Contains(metadataServices, ip) {
		return true
	}
	if ip.Is4() {
		return thisNetwork.Contains(ip) || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	within, has := embedded(ip)
	return has && (within.IsLoopback() || Forbidden(within))
}

// carriers are prefixes whose addresses hold an IPv4 address, and where it begins.
var carriers = []struct {
	netip.Prefix
	at int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},   // NAT64 (RFC 6052)
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12}, // NAT64 within a network (RFC 8215)
	{netip.MustParsePrefix("2002::/16"), 2},       // 6to4 (RFC 3056)
	{netip.MustParsePrefix("::/96"), 12},          // IPv4-compatible (RFC 4291)
}

// embedded is the IPv4 address that ip holds, if it is of a kind that does.
func embedded(ip netip.Addr) (netip.Addr, bool) {
	if ip.IsLoopback() {
		return ip, false
	}
	raw := ip.As16()
	for _, c := range carriers {
		if c.Contains(ip) {
			return netip.AddrFrom4([4]byte(raw[c.at : c.at+4])), true
		}
	}
	return ip, false
}
