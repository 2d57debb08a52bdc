package rabbitmq

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"syscall"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	// maxAnswer is far more than the largest answer that is asked for.
	maxAnswer = 4 << 20
	// maxRequests bounds what is asked of one management API at once.
	maxRequests = 8
	tagAdmin    = "administrator"
)

// management is the management API at one of the connection's URLs, for the
// length of one call. Requests are sent once or not at all.
type management struct {
	name   string // how errors name it
	base   string
	client *http.Client
	login  kind.Material
}

// dialer connects for as long as ctx lives: with ctx dies the connection, and
// with it everything that the kernel has not sent yet.
func dialer(ctx context.Context) func(connectCtx context.Context, network, addr string) (net.Conn, error) {
	return func(connectCtx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(connectCtx, network, addr)
		if err != nil {
			return nil, err
		}
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // close means gone, not "still trying to deliver"
		}
		context.AfterFunc(ctx, func() { _ = c.Close() })
		return c, nil
	}
}

// manage prepares the API at address. No proxy of the environment is used, and
// no redirection followed: both would take the credentials elsewhere.
func manage(ctx context.Context, address string, trust connection.TLS) (*management, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, kind.Definitely("management_urls holds what is no URL: write the connection again")
	}
	config, err := trust.Config(u.Hostname())
	if err != nil {
		return nil, kind.Definitely("%w", err)
	}
	return &management{
		name: u.Host, base: strings.TrimRight(address, "/") + "/api/",
		client: &http.Client{
			Transport: &http.Transport{
				DialContext: dialer(ctx), TLSClientConfig: config,
				MaxConnsPerHost: maxRequests, MaxIdleConnsPerHost: maxRequests, DisableCompression: true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

func (m *management) close() { m.client.CloseIdleConnections() }

// refusal is an answer that is no success.
type refusal struct {
	status int
	reason string // never shown: it may repeat what was sent
}

func (r *refusal) Error() string { return fmt.Sprintf("the answer is %d", r.status) }

// errForeign: what answers is no management API.
var errForeign = errors.New("the answer is not that of a management API")

// do sends one request as login. Body and answer are JSON, nil for none.
func (m *management) do(ctx context.Context, login kind.Material, method, path string, body, answer any) error {
	var sent io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encode a request: %w", err)
		}
		sent = bytes.NewReader(data)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, m.base+path, sent)
	if err != nil {
		return fmt.Errorf("make a request: %w", err)
	}
	req.SetBasicAuth(login.Username, login.Secret)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if method == http.MethodDelete {
		req.Header.Set("X-Reason", closeReason) // read where a connection is closed
	}
	resp, err := m.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	said, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode >= http.StatusMultipleChoices {
		why := struct{ Reason any }{}
		_ = json.Unmarshal(said, &why)
		reason, _ := why.Reason.(string)
		return &refusal{resp.StatusCode, reason}
	}
	if answer == nil {
		return nil
	}
	if json.Unmarshal(said, answer) != nil {
		return errForeign
	}
	return nil
}

// get asks as the administrator.
func (m *management) get(ctx context.Context, path string, answer any) error {
	return m.do(ctx, m.login, http.MethodGet, path, nil, answer)
}

// authenticate finds which of the admin's credentials is accepted. More than
// one exists only while the admin credential itself is being rotated.
func (m *management) authenticate(ctx context.Context, logins []kind.Material) error {
	if len(logins) == 0 {
		return kind.Definitely("the connection has no admin credential: write its username and password")
	}
	var err error
	for _, login := range logins {
		var me user
		if err = m.do(ctx, login, http.MethodGet, "whoami", nil, &me); err == nil {
			if me.Name == "" {
				return m.explain(errForeign, "say who is logged in", login.Username)
			}
			if !slices.Contains(me.Tags, tagAdmin) {
				return m.lacksTag(login.Username)
			}
			m.login = login
			return nil
		}
		if _, wrong := unauthorized(err); !wrong {
			break
		}
	}
	return m.explain(err, "log in as admin", logins[0].Username)
}

func (m *management) lacksTag(username string) error {
	return kind.Definitely("user %q may not change users at management API %s: give it the tag administrator with rabbitmqctl set_user_tags", username, m.name)
}

// unauthorized takes a 401 apart: a login was accepted and may not do this, or
// it was refused. A broker that knows the user and the password, but no tag for
// the management API, says "Not management user".
func unauthorized(err error) (barred, refused bool) {
	var r *refusal
	if !errors.As(err, &r) || r.status != http.StatusUnauthorized {
		return false, false
	}
	barred = strings.HasPrefix(r.reason, "Not ") && strings.HasSuffix(r.reason, " user")
	return barred, !barred
}

func notFound(err error) bool {
	var r *refusal
	return errors.As(err, &r) && r.status == http.StatusNotFound
}

// user reads the record of one user.
func (m *management) user(ctx context.Context, name string) (user, error) {
	var u user
	err := m.get(ctx, "users/"+url.PathEscape(name), &u)
	switch {
	case notFound(err):
		return user{}, nil
	case err != nil:
		return user{}, m.explain(err, "show user "+name, m.login.Username)
	case u.Name != name:
		return user{}, m.explain(errForeign, "show user "+name, m.login.Username)
	}
	u.exists = true
	return u, nil
}

// permissions are those of a user, none where there is no such user.
func (m *management) permissions(ctx context.Context, name string) ([]permission, error) {
	var out []permission
	err := m.get(ctx, "users/"+url.PathEscape(name)+"/permissions", &out)
	if err != nil && !notFound(err) {
		return nil, m.explain(err, "list the permissions of user "+name, m.login.Username)
	}
	return out, nil
}

// topics are the topic permissions of a user, none where there is no such user.
func (m *management) topics(ctx context.Context, name string) ([]topic, error) {
	var out []topic
	err := m.get(ctx, "users/"+url.PathEscape(name)+"/topic-permissions", &out)
	if err != nil && !notFound(err) {
		return nil, m.explain(err, "list the topic permissions of user "+name, m.login.Username)
	}
	return out, nil
}

// put gives a user another password hash, "" for no password at all, and tags:
// a request without them is refused, and one without a hash would take the
// password away. It creates a user that does not exist.
func (m *management) put(ctx context.Context, u user, algorithm, hash string) error {
	body := map[string]any{"password_hash": hash, "hashing_algorithm": algorithm, "tags": u.Tags.sent()}
	err := m.do(ctx, m.login, http.MethodPut, "users/"+url.PathEscape(u.Name), body, nil)
	if err != nil {
		return m.explain(err, "change user "+u.Name, m.login.Username)
	}
	return nil
}

// tags are a list, or up to RabbitMQ 3.8 names separated by commas.
type tags []string

func (t *tags) UnmarshalJSON(data []byte) error {
	var list []string
	if json.Unmarshal(data, &list) == nil {
		*t = list
		return nil
	}
	var joined string
	if err := json.Unmarshal(data, &joined); err != nil {
		return err
	}
	*t = strings.FieldsFunc(joined, func(r rune) bool { return r == ',' || r == ' ' })
	return nil
}

// sent is how tags are sent: joined, which every version understands, unless that
// would make two of one.
func (t tags) sent() any {
	if slices.ContainsFunc(t, func(tag string) bool { return strings.ContainsRune(tag, ',') }) {
		return []string(t)
	}
	return strings.Join(t, ",")
}

// manages reports whether the tags let a user log in to the management API.
func (t tags) manages() bool {
	return slices.ContainsFunc(t, func(tag string) bool {
		return slices.Contains([]string{tagAdmin, "monitoring", "policymaker", "management"}, tag)
	})
}

// explain turns what happened to a request into a sentence with a class. what
// says what was tried, in words that hold no secret.
func (m *management) explain(err error, what, login string) error {
	if why := connection.Distrust(err); why != "" {
		return fmt.Errorf("management API %s cannot be asked to %s, %s", m.name, what, why)
	}
	if silent(err) {
		return kind.CannotReach(fmt.Errorf("management API %s did not answer when asked to %s, check that it runs and is not overloaded: %w", m.name, what, plain(err)))
	}
	barred, refused := unauthorized(err)
	var r *refusal
	switch {
	case barred:
		return m.lacksTag(login)
	case refused:
		return fmt.Errorf("management API %s refuses the login of %q when asked to %s: write the connection with the right password", m.name, login, what)
	case !errors.As(err, &r):
		return fmt.Errorf("what answers at %s when asked to %s is no management API of RabbitMQ: check management_urls", m.name, what)
	case r.status < http.StatusBadRequest:
		return fmt.Errorf("management API %s sends elsewhere when asked to %s (%d): give in management_urls where it really is", m.name, what, r.status)
	case r.status == http.StatusBadRequest:
		return kind.Definitely("management API %s refuses to %s (400): look at the log of its broker", m.name, what)
	}
	return fmt.Errorf("management API %s cannot %s now and answers %d: wait, or look at the log of its broker", m.name, what, r.status)
}

// plain keeps of a network error what helps, and no URL.
func plain(err error) error {
	var e *url.Error
	if errors.As(err, &e) {
		err = e.Err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded) || isTimeout(err):
		return context.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case errors.Is(err, net.ErrClosed), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the connection was lost")
	}
	return err
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// silent reports whether err is the lack of any answer: no connection, one that
// was lost, or time that ran out.
func silent(err error) bool {
	for _, lost := range []error{context.DeadlineExceeded, context.Canceled, net.ErrClosed, io.EOF, io.ErrUnexpectedEOF} {
		if errors.Is(err, lost) {
			return true
		}
	}
	var system syscall.Errno // reset, refused, no route
	var name *net.DNSError
	return errors.As(err, &system) || errors.As(err, &name) || isTimeout(err)
}
