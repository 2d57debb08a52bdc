package outbound

import (
	"net/netip"
	"net/url"
	"testing"
)

// FuzzForbidden: no way of writing an address leads to one that is forbidden.
func FuzzForbidden(f *testing.F) {
	for _, text := range []string{
		"127.0.0.1", "::1", "::ffff:169.254.169.254", "fe80::1%eth0", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "::169.254.169.254", "10.0.0.1", "::",
		"0.0.0.1", "224.0.0.1", "ff02::1", "100.100.100.200", "fd00:ec2::254", "64:ff9b:1::7f00:1", "0x7f.1", "2130706433", "255.255.255.255",
	} {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			f.Add([]byte(nil), text)
			continue
		}
		f.Add(ip.AsSlice(), "")
		f.Add(ip.AsSlice(), text)
	}
	f.Fuzz(func(t *testing.T, raw []byte, text string) {
		ip, ok := netip.AddrFromSlice(raw)
		if !ok {
			var err error
			if ip, err = netip.ParseAddr(text); err != nil {
				return
			}
		}
		bare := ip.Unmap().WithZone("")
		if bare.Is4() {
			raw := bare.As4()
			mapped := netip.AddrFrom16([16]byte{10: 0xff, 11: 0xff, 12: raw[0], 13: raw[1], 14: raw[2], 15: raw[3]})
			nat64 := netip.AddrFrom16([16]byte{1: 0x64, 2: 0xff, 3: 0x9b, 12: raw[0], 13: raw[1], 14: raw[2], 15: raw[3]})
			if Forbidden(mapped) != Forbidden(bare) || Forbidden(bare) && !Forbidden(nat64) {
				t.Fatalf("%s is told from the same address in another form", ip)
			}
		}
		if !Forbidden(ip) && (bare.IsLinkLocalUnicast() || bare.IsMulticast() || bare.IsUnspecified()) {
			t.Fatalf("%s is permitted", ip)
		}
		at := netip.AddrPortFrom(ip, 443).String()
		if (permitted(at, false) == nil) != !Forbidden(ip) || permitted(at, true) == nil && !bare.IsLoopback() {
			t.Fatalf("%s: %v, %v", at, permitted(at, false), permitted(at, true))
		}
	})
}

// FuzzClient: whatever URL is asked for, the client for it follows nothing to another
// host or scheme.
func FuzzClient(f *testing.F) {
	f.Add("https://api.example.com/health", "https://api.example.com/other")
	f.Add("https://a:443/", "https://a/")
	f.Add("http://127.0.0.1/", "https://127.0.0.1/")
	f.Add("https://a@b/", "https://b@a/")
	f.Fuzz(func(t *testing.T, from, to string) {
		u, err := url.Parse(from)
		next, err2 := url.Parse(to)
		if err != nil || err2 != nil {
			return
		}
		client, done := Client(u, Options{Follow: true})
		defer done()
		follows := client.CheckRedirect(requestTo(next), nil) == nil
		if follows && (next.Host != u.Host || next.Scheme != u.Scheme) {
			t.Fatalf("%s leads to %s", from, to)
		}
	})
}
