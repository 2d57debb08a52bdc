package vault

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/outbound"
)

// FuzzAddress: what is taken for the address of a Vault is one that may be asked, and
// what is refused is not repeated where it may hold a password.
func FuzzAddress(f *testing.F) {
	for _, text := range []string{
		"https://vault.example.com:8200", "http://127.0.0.1:8200", "http://localhost", "https://u:planted@h", "https://169.254.169.254", "https://[::ffff:a9fe:a9fe]:1", "https://h/v1", "https://h?planted",
		"https://h#planted", "//h", "h:8200", "https://h\n", "unix:///run/vault", "https://[fe80::1%25eth0]", "https://[64:ff9b::a9fe:a9fe]",
	} {
		f.Add(text, "a/b", "role")
	}
	f.Fuzz(func(t *testing.T, address, namespace, role string) {
		v := &connection.Vault{Address: address, Namespace: namespace, Role: role, Auth: connection.AuthAppRole, AllowedPublishPaths: []string{namespace}}
		if err := ValidateConfig(v, connection.TLS{}); err != nil {
			if strings.ContainsAny(err.Error(), "\n\x1b") || strings.Contains(err.Error(), "planted@") {
				t.Fatalf("%q: %q", address, err)
			}
			return
		}
		u, err := parseAddress(v.Address, connection.TLS{})
		if err != nil || u.User != nil || u.Scheme != "https" && !isLoopback(u.Hostname()) {
			t.Fatalf("%q is taken (%v)", address, err)
		}
		if ip, err := netip.ParseAddr(u.Hostname()); err == nil && outbound.Forbidden(ip) {
			t.Fatalf("%q is taken", address)
		}
		if strings.Contains("/"+v.Namespace+"/"+v.AuthMount+"/"+v.Role+"/", "/../") {
			t.Fatalf("%+v is taken", v)
		}
	})
}
