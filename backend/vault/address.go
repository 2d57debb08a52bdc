package vault

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"strings"
	"syscall"
	"unicode"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/outbound"
)

var (
	mountRegexp = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,126}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,126}){0,7}$`)
	// roleRegexp is what AppRole takes for a name.
	roleRegexp = regexp.MustCompile(`^\w(?:[\w.-]{0,254}\w)?$`)
	authMounts = map[string]string{connection.AuthToken: "", connection.AuthAppRole: "approle", connection.AuthKubernetes: "kubernetes"}
)

// CheckMount refuses what is no path of a mount.
func CheckMount(field, mount string) error {
	if !mountRegexp.MatchString(mount) || strings.Contains(mount, "..") {
		return fmt.Errorf("%s is %.80q; give the path of a mount, without slashes at its ends", field, mount)
	}
	return nil
}

// ValidateConfig fills defaults into the vault fields of a connection and
// refuses what cannot work, with one sentence that names the field.
func ValidateConfig(v *connection.Vault, t connection.TLS) error {
	v.Address = strings.TrimRight(v.Address, "/")
	v.Namespace = strings.Trim(v.Namespace, "/")
	if _, known := authMounts[v.Auth]; !known {
		return fmt.Errorf("auth is %.64q; allowed are token, approle and kubernetes", v.Auth)
	}
	if v.AuthMount == "" {
		v.AuthMount = authMounts[v.Auth]
	}
	if v.AuthMount != "" {
		if err := CheckMount("auth_mount", v.AuthMount); err != nil {
			return err
		}
	}
	if v.Namespace != "" {
		if err := CheckMount("namespace", v.Namespace); err != nil {
			return err
		}
	}
	if v.Role != "" && (!roleRegexp.MatchString(v.Role) || strings.Contains(v.Role, "..")) {
		return fmt.Errorf("role is %.80q; give the name of the AppRole, as in auth/%s/role/<name>", v.Role, v.AuthMount)
	}
	for _, p := range v.AllowedPublishPaths {
		if _, err := path.Match(p, ""); err != nil || strings.HasPrefix(p, "/") || !strings.Contains(p, "/") {
			return fmt.Errorf("allowed_publish_paths holds %.80q; give <mount>/<path>, such as secret/app/* (* stays within one part)", p)
		}
	}
	_, err := parseAddress(v.Address, t)
	return err
}

func parseAddress(address string, t connection.TLS) (*url.URL, error) {
	u, err := url.Parse(address)
	switch {
	case address == "":
		return nil, fmt.Errorf("address is missing; give the URL of the Vault, such as https://vault.example.com:8200")
	case err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.ContainsFunc(address, unicode.IsSpace):
		return nil, fmt.Errorf("address is no URL of a Vault; give scheme, host and port, such as https://vault.example.com:8200")
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("address begins with %.20q; allowed are https:// and, to this machine, http://", u.Scheme+"://")
	case strings.Trim(u.Path, "/") != "":
		return nil, fmt.Errorf("address has a path; give scheme, host and port alone") // which may be a part of a password
	case u.Scheme == "http" && !isLoopback(u.Hostname()) && !t.SkipVerify:
		return nil, fmt.Errorf("address is an http:// URL, and credentials would cross the network readable; use https://, or write tls_skip_verify=true where something else encrypts (a service mesh)")
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
		if err := checkIP(ip); err != nil {
			return nil, fmt.Errorf("address: %w", err)
		}
	}
	return u, nil
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

func checkIP(ip netip.Addr) error {
	if outbound.Forbidden(ip) {
		return fmt.Errorf("%s is link-local, a metadata service or no address of a server, and no Vault is asked there; give another address", ip)
	}
	return nil
}

// forbiddenIP is a name that led where the engine does not go.
type forbiddenIP struct{ error }

// dialer checks the address that a name has led to, at each connection: what a
// name stands for may change after the connection was written.
func dialer(onlyLoopback bool) *net.Dialer {
	return &net.Dialer{Control: func(_, address string, _ syscall.RawConn) error {
		at, err := netip.ParseAddrPort(address)
		if err != nil {
			return forbiddenIP{fmt.Errorf("the address it leads to cannot be read")}
		}
		if err := checkIP(at.Addr()); err != nil {
			return forbiddenIP{err}
		}
		if onlyLoopback && !at.Addr().Unmap().IsLoopback() {
			return forbiddenIP{fmt.Errorf("%s is not this machine; use https://", at.Addr())}
		}
		return nil
	}}
}
