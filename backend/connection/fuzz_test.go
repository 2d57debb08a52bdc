package connection

import (
	"net/netip"
	"strings"
	"testing"
)

// FuzzKubeconfig: whatever is given is refused with one sentence that repeats none of
// it, or gives data and nothing that would have to be read or run.
func FuzzKubeconfig(f *testing.F) {
	const token = "token: a-secret-token"
	for _, text := range []string{
		kubeconfig("", token), kubeconfig("proxy-url: http://a", token), kubeconfig("", token+"\nexec: {command: sh}"), kubeconfig("", "tokenFile: /etc/shadow"), "a: &a [*a, *a]", "{}", "[]", "\t",
		"a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]", "apiVersion: v1\nkind: Config\nclusters: null", "!!binary x", "- 1\n- a-secret-token",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 32<<10 {
			return
		}
		k, err := ParseKubeconfig(text)
		if err != nil {
			if strings.Contains(err.Error(), "a-secret-token") || strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Fatalf("%q", err)
			}
			return
		}
		_, err = k.TLS.Config("host")
		if err != nil && strings.Contains(err.Error(), "a-secret-token") {
			t.Fatalf("%q", err)
		}
		if k.Host == "" || k.Token == "" && k.TLS.Cert == "" || k.TLS.SkipVerify {
			t.Fatalf("%+v is taken", k)
		}
	})
}

// FuzzDiscovered: a node outside the networks that are allowed is not asked, however its
// address is written.
func FuzzDiscovered(f *testing.F) {
	f.Add("10.0.0.5", "10.0.0.1", "")
	f.Add("::ffff:10.0.0.5", "10.0.0.1", "10.0.0.0/24")
	f.Add("fe80::1%eth0", "::1", "::/0")
	f.Add("169.254.169.254", "10.0.0.1", "0.0.0.0/0")
	f.Add("1.2.3.4", "x", "not a network")
	f.Fuzz(func(t *testing.T, node, seed, cidr string) {
		ip, err := netip.ParseAddr(node)
		if err != nil {
			return
		}
		var seeds []netip.Addr
		if s, err := netip.ParseAddr(seed); err == nil {
			seeds = append(seeds, s)
		}
		e := &Entry{Name: "cache", Redis: &Redis{}}
		if cidr != "" {
			e.Redis.AllowedCIDRs = []string{cidr}
		}
		permitted := e.CheckDiscovered(ip, seeds) == nil
		mapped := ip.Unmap()
		if mapped.Is4() {
			raw := mapped.As4()
			other := netip.AddrFrom16([16]byte{10: 0xff, 11: 0xff, 12: raw[0], 13: raw[1], 14: raw[2], 15: raw[3]})
			if (e.CheckDiscovered(other, seeds) == nil) != permitted {
				t.Fatalf("%s is told from %s", ip, other)
			}
		}
		if p, err := netip.ParsePrefix(cidr); permitted && (cidr != "" && (err != nil || !p.Contains(mapped)) || cidr == "" && len(seeds) == 0) {
			t.Fatalf("%s is permitted by %q and %v", ip, cidr, seeds)
		}
	})
}

// FuzzTLS: certificates are taken or refused, and never repeated.
func FuzzTLS(f *testing.F) {
	f.Add("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "x", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----")
	f.Add("", "", "")
	f.Add("a-secret-in-ca", "a-secret-in-cert", "a-secret-in-key")
	f.Fuzz(func(t *testing.T, ca, cert, key string) {
		_, err := TLS{CA: ca, Cert: cert, Key: key}.Config("host")
		if err != nil && len(key) > 20 && strings.Contains(err.Error(), key) {
			t.Fatalf("%q", err)
		}
	})
}
