package consumer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Templates. A check may show a secret to a server, to prove that it works there: in
// a header, as {{role.value}}, or as basic_auth. Three people have to agree to that:
// who writes the consumer says which secret, who writes the role that it may be used
// by this consumer and at which hosts (secret_hosts), and who writes config that
// checks may send there at all. All of it is looked at again before each request.

// Source is a role as templates see it. It prints as its name alone.
type Source struct {
	Role string
	// Consumers are those that the role names, and Hosts its secret_hosts.
	Consumers, Hosts []string
	// Fields is what it serves now: username and password, or value. A role whose
	// secret is sent to nobody has none.
	Fields map[string]string
}

// Format implements fmt.Formatter for every verb.
func (s Source) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.Role+": (secret)") }

// Sources finds a role; nil when there is none.
type Sources func(ctx context.Context, role string) (*Source, error)

// placeholder is {{role.field}}; the last dot is the one between them.
var placeholder = regexp.MustCompile(`\{\{ *([A-Za-z0-9][A-Za-z0-9_.-]{0,127})\.(username|password|value) *\}\}`)

var roleRegexp = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// fields are what basic authentication is made of.
var basicFields = []string{"username", "password"}

// uses are the roles whose secret the check sends, each with the fields.
func (c *Check) uses() map[string][]string {
	out := map[string][]string{}
	if c.BasicAuth != "" {
		out[c.BasicAuth] = slices.Clone(basicFields)
	}
	for _, value := range c.Headers {
		for _, m := range placeholder.FindAllStringSubmatch(value, -1) {
			out[m[1]] = append(out[m[1]], m[2])
		}
	}
	return out
}

// validateTemplates refuses what is meant as a template and is none, and a way on
// which a secret would be seen by others than the host.
func (c *Check) validateTemplates() error {
	for field, text := range map[string]string{"url": c.URL, "path": c.Path, "body": c.Body, "query": c.Query, "service": c.Service} {
		if strings.Contains(text, "{{") {
			return fmt.Errorf("%s holds {{, and templates stand in headers alone; take it out", field)
		}
	}
	for name, value := range c.Headers {
		if rest := placeholder.ReplaceAllString(value, ""); strings.Contains(rest, "{{") || strings.Contains(rest, "}}") {
			return fmt.Errorf("headers has %s with a template that is none; write {{role.value}}, {{role.username}} or {{role.password}}", name)
		}
	}
	switch {
	case c.BasicAuth != "" && !roleRegexp.MatchString(c.BasicAuth):
		return fmt.Errorf("basic_auth is %.80q, which is no name of a role; give the role whose username and password are sent", c.BasicAuth)
	case c.BasicAuth != "" && c.header("Authorization"):
		return fmt.Errorf("basic_auth and the header Authorization are one and the same; give one of them")
	case c.Service != "" && len(c.uses()) > 0:
		return fmt.Errorf("a secret is not sent through the API server, which would see it and drops Authorization; give url for service")
	}
	return c.validateCA()
}

func (c *Check) validateCA() error {
	switch {
	case c.CACert == "":
		return nil
	case !strings.HasPrefix(c.URL, "https://"):
		return fmt.Errorf("ca_cert is for a url with https://; leave it out")
	}
	if _, err := (connection.TLS{CA: c.CACert}).Config(""); err != nil {
		return fmt.Errorf("ca_cert holds no certificate; give the text of one or more in PEM form, not the name of a file")
	}
	return nil
}

func (c *Check) header(name string) bool {
	for given := range c.Headers {
		if strings.EqualFold(given, name) {
			return true
		}
	}
	return false
}

// CheckTemplates refuses templates that would not be permitted now.
func (c *Consumer) CheckTemplates(ctx context.Context, find Sources) error {
	for i := range c.Checks {
		if _, err := c.Checks[i].permitted(ctx, c.Name, find); err != nil {
			return fmt.Errorf("check %d of checks: %w", i+1, err)
		}
	}
	for i := range c.Hooks {
		if _, err := c.Hooks[i].request().permitted(ctx, c.Name, find); err != nil {
			return fmt.Errorf("hook %q: %w", c.Hooks[i].Name, err)
		}
	}
	return nil
}

// permitted finds the roles of a check, all of which agree that it sends their
// secret to where it goes.
func (c *Check) permitted(ctx context.Context, consumer string, find Sources) (map[string]*Source, error) {
	uses := c.uses()
	if len(uses) == 0 {
		return nil, nil //nolint:nilnil // it sends none
	}
	to, err := destination(c.URL)
	if err != nil {
		return nil, kind.Definitely("%w", err)
	}
	out := map[string]*Source{}
	for role, fields := range uses {
		s, err := find(ctx, role)
		if err != nil {
			return nil, err
		}
		if s == nil || !slices.Contains(s.Consumers, consumer) {
			return nil, kind.Definitely("there is no role %q that has consumer %q; add %s to the consumers of roles/%s first", role, consumer, consumer, role)
		}
		if !s.allows(to) {
			return nil, kind.Definitely("role %q does not let its secret be sent to %s; add %s to its secret_hosts if it may", role, to, to)
		}
		for _, f := range fields {
			if _, ok := s.Fields[f]; !ok {
				return nil, kind.Definitely("role %q has no %s that a check may send; a role of a user has username and password, an api-key value, and keys are sent to nobody", role, f)
			}
		}
		out[role] = s
	}
	return out, nil
}

// SecretHost is a server that a secret may be sent to: exactly this name or address,
// and this port.
type SecretHost struct {
	host string
	port int
}

// String is the host, with its port where it is not that of https.
func (h SecretHost) String() string {
	name := h.host
	if strings.Contains(name, ":") {
		name = "[" + name + "]"
	}
	if h.port == httpsPort {
		return name
	}
	return name + ":" + strconv.Itoa(h.port)
}

const (
	httpPort  = 80
	httpsPort = 443
)

var hostRegexp = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)

var errHost = errors.New("give a name or an address, and :port where it is not 443; no scheme, path or wildcard")

// ParseSecretHost reads an entry of secret_hosts.
func ParseSecretHost(text string) (SecretHost, error) {
	if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
		return SecretHost{ip.String(), httpsPort}, nil
	}
	u, err := url.Parse("https://" + text)
	if err != nil || u.Host != text || strings.HasSuffix(text, ":") {
		return SecretHost{}, errHost
	}
	return hostOfURL(u)
}

// destination is where the request of a check with a secret goes.
func destination(address string) (SecretHost, error) {
	u, err := url.Parse(address)
	if err != nil || u.User != nil || u.Scheme != "https" && !(u.Scheme == "http" && isLoopback(u.Hostname())) {
		return SecretHost{}, errors.New("a secret is sent over https:// alone, or over http:// to this machine; change url")
	}
	h, err := hostOfURL(u)
	if err != nil {
		return h, errors.New("a secret is sent to a host that is written as it is: in ASCII, without a dot at its end; change url")
	}
	return h, nil
}

// hostOfURL takes hosts in one spelling: what is written in another, or means
// another host to whoever resolves it, is none.
func hostOfURL(u *url.URL) (SecretHost, error) {
	h := SecretHost{port: httpsPort}
	if u.Scheme == "http" {
		h.port = httpPort
	}
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 || strconv.FormatUint(n, 10) != p {
			return SecretHost{}, errHost
		}
		h.port = int(n)
	}
	name := u.Hostname()
	ip, err := netip.ParseAddr(name)
	switch {
	case err == nil && ip.Zone() == "" && (ip.Is4() || strings.HasPrefix(u.Host, "[")):
		h.host = ip.String()
		return h, nil
	case isASCII(name) && hostRegexp.MatchString(strings.ToLower(name)) && len(name) <= 253:
		h.host = strings.ToLower(name)
		return h, nil
	}
	return SecretHost{}, errHost
}

func isASCII(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return r > '~' })
}

func (s *Source) allows(to SecretHost) bool {
	return slices.ContainsFunc(s.Hosts, func(text string) bool {
		h, err := ParseSecretHost(text)
		return err == nil && h == to
	})
}

// fill puts the secrets of roles into a request. It has no error that holds one.
func (c *Check) fill(r *http.Request, from map[string]*Source) error {
	for name, value := range c.Headers {
		filled := placeholder.ReplaceAllStringFunc(value, func(p string) string {
			m := placeholder.FindStringSubmatch(p)
			return from[m[1]].Fields[m[2]]
		})
		if filled != value && !sendable(filled) {
			return kind.Definitely("the secret for header %s has characters that no header may have; use one of letters and digits", name)
		}
		r.Header.Set(name, filled)
	}
	if c.BasicAuth != "" {
		user, password := from[c.BasicAuth].Fields["username"], from[c.BasicAuth].Fields["password"]
		if strings.Contains(user, ":") {
			return kind.Definitely("the user of role %q has a colon, and basic authentication knows none; take basic_auth out", c.BasicAuth)
		}
		r.SetBasicAuth(user, password)
	}
	return nil
}

// sendable: visible characters, and blanks between them.
func sendable(text string) bool {
	return strings.TrimSpace(text) == text && !strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' })
}

// trusts is what a check trusts servers by: its own certificates, or the system's.
func (c *Check) trusts(u *url.URL) (*tls.Config, error) {
	conf, err := connection.TLS{CA: c.CACert}.Config(u.Hostname())
	if err != nil {
		return nil, kind.Definitely("ca_cert of the check holds no certificate; write the consumer again")
	}
	return conf, nil
}
