package postgresql

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
)

const (
	defaultPort     = "5432"
	defaultDatabase = "postgres"
	maxHosts        = 16

	usernamePlace = "{{username}}"
	passwordPlace = "{{password}}"
)

// settings is what a connection_url says.
type settings struct {
	hosts       []string // host:port
	database    string
	tls         bool
	application string
}

// ofFiles are parameters that would make the engine read files.
var ofFiles = []string{
	"sslcert", "sslkey", "sslrootcert", "sslcrl", "sslcrldir", "sslpassword", "sslcertmode", "passfile", "service", "servicefile",
}

var hostPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?$`)

// ValidateConfig fills in what follows from the postgresql fields of a
// connection and refuses what cannot work, with one sentence that names the
// field.
func ValidateConfig(c *connection.PostgreSQL, t connection.TLS) error {
	if c == nil || c.URL == "" {
		return errors.New("connection_url is missing: give one such as postgresql://{{username}}:{{password}}@host:5432/postgres")
	}
	s, err := parse(c.URL)
	if err != nil {
		return err
	}
	if !s.tls && t != (connection.TLS{}) {
		return errors.New("connection_url says sslmode=disable, and tls_ca, tls_cert, tls_server_name or tls_skip_verify are set: leave out one or the other")
	}
	c.Hosts = s.hosts
	return nil
}

// parameters are those of PostgreSQL's own library that people try here.
var parameters = []string{
	"application_name", "channel_binding", "client_encoding", "connect_timeout", "dbname", "fallback_application_name", "gssencmode", "host", "hostaddr",
	"keepalives", "krbsrvname", "load_balance_hosts", "options", "password", "pool_max_conns", "port", "replication", "require_auth", "search_path",
	"sslcertmode", "ssl_min_protocol_version", "sslmode", "sslnegotiation", "sslsni", "statement_timeout", "target_session_attrs", "user",
}

// shown is the name of a parameter, where it is one: a password with a blank and an equals
// sign in it looks like one, too.
func shown(name string) string {
	if slices.Contains(parameters, name) || slices.Contains(ofFiles, name) {
		return strconv.Quote(name)
	}
	return "a parameter"
}

// parse reads a connection_url. Nothing of it is quoted in errors but names of
// parameters: a password that was put into it may stand anywhere.
//
// pgconn has a parser, which fills what is missing from the environment of the
// process and from files in its home directory.
func parse(text string) (settings, error) {
	read := parseWords
	for _, scheme := range []string{"postgresql://", "postgres://"} {
		if rest, ok := strings.CutPrefix(text, scheme); ok {
			read, text = parseURL, rest
		}
	}
	params, err := read(text)
	if err != nil {
		return settings{}, err
	}
	return settle(params)
}

// parseURL reads what follows the scheme of a URL. A URL of PostgreSQL may hold
// several hosts, so net/url does not read it as a whole.
func parseURL(text string) (map[string]string, error) {
	authority, tail := text, ""
	if i := strings.IndexAny(text, "/?"); i >= 0 {
		authority, tail = text[:i], text[i:]
	}
	params := map[string]string{}
	if i := strings.LastIndexByte(authority, '@'); i >= 0 {
		params["user"], params["password"], _ = strings.Cut(authority[:i], ":")
		authority = authority[i+1:]
	}
	var hosts, ports []string
	for _, element := range strings.Split(authority, ",") {
		host, port := element, ""
		if h, p, err := net.SplitHostPort(element); err == nil {
			host, port = h, p
		}
		host, err := url.PathUnescape(strings.Trim(host, "[]"))
		if err != nil {
			return nil, errors.New("connection_url holds a host with a % that is no escape: correct it")
		}
		hosts, ports = append(hosts, host), append(ports, port)
	}
	params["host"], params["port"] = strings.Join(hosts, ","), strings.Join(ports, ",")
	path, query, _ := strings.Cut(tail, "?")
	database, err := url.PathUnescape(strings.TrimPrefix(path, "/"))
	if err != nil {
		return nil, errors.New("connection_url holds a database with a % that is no escape: correct it")
	}
	params["dbname"] = database
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, errors.New("connection_url holds parameters after ? that cannot be read: write them as name=value&name=value")
	}
	for name, v := range values {
		if _, twice := params[name]; twice || len(v) > 1 {
			return nil, fmt.Errorf("connection_url gives %s twice, or after ? instead of before it: give it once", shown(name))
		}
		params[name] = v[0]
	}
	return params, nil
}

// parseWords reads keywords and values: host=db port=5432 dbname='a b'.
func parseWords(text string) (map[string]string, error) {
	unreadable := errors.New("connection_url cannot be read: write it as postgresql://{{username}}:{{password}}@host:5432/database, or as host=… port=… dbname=… user={{username}} password={{password}}")
	params := map[string]string{}
	for text = strings.TrimSpace(text); text != ""; text = strings.TrimSpace(text) {
		name, rest, ok := strings.Cut(text, "=")
		name, rest = strings.TrimSpace(name), strings.TrimLeft(rest, " \t")
		if _, twice := params[name]; !ok || twice || name == "" || strings.ContainsAny(name, " \t'") {
			return nil, unreadable
		}
		var value strings.Builder
		quoted := strings.HasPrefix(rest, "'")
		i, closed := 0, !quoted
		if quoted {
			i = 1
		}
		for ; i < len(rest); i++ {
			c := rest[i]
			if quoted && c == '\'' {
				closed = true
				i++
				break
			}
			if !quoted && (c == ' ' || c == '\t' || c == '\n') {
				break
			}
			if c == '\\' {
				if i++; i == len(rest) {
					return nil, unreadable
				}
				c = rest[i]
			}
			value.WriteByte(c)
		}
		if !closed {
			return nil, unreadable
		}
		params[name], text = value.String(), rest[i:]
	}
	return params, nil
}

// settle checks every parameter. What is not known is refused: a later version
// of a library must not learn to read a file by it.
func settle(params map[string]string) (settings, error) {
	s := settings{database: params["dbname"], tls: true, application: params["application_name"]}
	if s.database == "" {
		s.database = defaultDatabase
	}
	if s.application == "" {
		s.application = "vault-plugin-secrets-harmonyflow"
	}
	for _, name := range slices.Sorted(maps.Keys(params)) {
		switch {
		case slices.Contains([]string{"host", "port", "dbname", "user", "password", "application_name", "sslmode", "target_session_attrs"}, name):
		case slices.Contains(ofFiles, name):
			return s, fmt.Errorf("connection_url holds %q: the engine reads no files, so give certificates as tls_ca, tls_cert and tls_key", name)
		default:
			return s, fmt.Errorf("connection_url holds %s, which is not supported: it may have sslmode, target_session_attrs and application_name", shown(name))
		}
	}
	if user := params["user"]; user != "" && user != usernamePlace {
		return s, errors.New("connection_url holds a user: write {{username}} there, and give its name as username")
	}
	if password := params["password"]; password != "" && password != passwordPlace {
		return s, errors.New("connection_url holds a password: write {{password}} there, and give it as password")
	}
	switch params["sslmode"] {
	case "", "require", "verify-ca", "verify-full":
	case "disable":
		s.tls = false
	default:
		return s, errors.New("connection_url holds an sslmode that is not disable, require, verify-ca or verify-full: the others fall back to plaintext when somebody on the way asks for it")
	}
	switch params["target_session_attrs"] {
	case "", "any", "read-write", "primary":
	default:
		return s, errors.New("connection_url holds a target_session_attrs that is not read-write: passwords are changed at the primary, which is found among the hosts")
	}
	var err error
	s.hosts, err = hosts(params["host"], params["port"])
	return s, err
}

func hosts(host, port string) ([]string, error) {
	names, ports := strings.Split(host, ","), strings.Split(port, ",")
	if len(ports) == 1 {
		ports = slices.Repeat(ports, len(names))
	}
	if len(ports) != len(names) {
		return nil, errors.New("connection_url gives more or fewer ports than hosts: give one port, or one for each host")
	}
	if len(names) > maxHosts {
		return nil, fmt.Errorf("connection_url names more than %d hosts: name the primary and its standbys", maxHosts)
	}
	var out []string
	for i, name := range names {
		if _, err := netip.ParseAddr(name); err != nil && (!hostPattern.MatchString(name) || len(name) > 253) {
			return nil, errors.New("connection_url has no host, or one that is no name or address (a socket of the machine will not do): write host:port, several with commas between them")
		}
		p := ports[i]
		if p == "" {
			p = defaultPort
		}
		if _, err := netip.ParseAddrPort("127.0.0.1:" + p); err != nil || p == "0" {
			return nil, errors.New("connection_url has a port that is not a number from 1 to 65535: correct it")
		}
		address := net.JoinHostPort(name, p)
		if slices.Contains(out, address) {
			return nil, errors.New("connection_url names one host twice: name each once")
		}
		out = append(out, address)
	}
	return out, nil
}
