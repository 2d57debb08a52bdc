package consumer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	appsv1 "k8s.io/client-go/kubernetes/typed/apps/v1"
	authenticationv1 "k8s.io/client-go/kubernetes/typed/authentication/v1"
	authorizationv1 "k8s.io/client-go/kubernetes/typed/authorization/v1"
	corev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/buildinfo"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Bounds on what one step asks of an API server, which others use too.
const (
	requestsPerSecond = 20
	requestsAtOnce    = 40
)

// podFolder is where a pod finds what its service account logs in with.
const podFolder = "/var/run/secrets/kubernetes.io/serviceaccount"

// cluster is a Kubernetes cluster for the length of one step: made anew each time,
// so that a token that was replaced meanwhile is the one that is used.
type cluster struct {
	name    string // of the connection
	host    string
	token   string // which no text may hold
	manager string
	clients
	// http sends what no client of client-go does, with the token, to host alone.
	http  *http.Client
	close func()
	lists *semaphore.Weighted
}

// clients are those of client-go that are needed: there are many more.
type clients struct {
	core    corev1.CoreV1Interface
	apps    appsv1.AppsV1Interface
	authn   authenticationv1.AuthenticationV1Interface
	authz   authorizationv1.AuthorizationV1Interface
	dynamic dynamic.Interface
}

func newClients(config *rest.Config, client *http.Client) (c clients, err error) {
	if c.core, err = corev1.NewForConfigAndClient(config, client); err != nil {
		return c, err
	}
	if c.apps, err = appsv1.NewForConfigAndClient(config, client); err != nil {
		return c, err
	}
	if c.authn, err = authenticationv1.NewForConfigAndClient(config, client); err != nil {
		return c, err
	}
	if c.authz, err = authorizationv1.NewForConfigAndClient(config, client); err != nil {
		return c, err
	}
	c.dynamic, err = dynamic.NewForConfigAndClient(config, client)
	return c, err
}

// login is what a request is made with.
type login struct {
	host, token string
	tls         connection.TLS
}

// loginOf reads what a connection says, or the pod that the engine runs in.
func loginOf(e *connection.Entry, folder string) (login, error) {
	if e.Kubernetes == nil {
		return login{}, kind.Definitely("connection %q is of type %s; a consumer needs one of type %s", e.Name, e.Type, connection.TypeKubernetes)
	}
	if e.Kubernetes.InCluster {
		return podLogin(e.Name, folder)
	}
	l := login{host: e.Kubernetes.Host, tls: e.TLS}
	if v := e.Admin.With(version.Current); v != nil {
		l.token = v.Material.Secret
	}
	return l, nil
}

func podLogin(name, folder string) (login, error) {
	read := func(file string) (string, error) {
		text, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			return "", fmt.Errorf("connection %q has in_cluster=true, and %s cannot be read: give the pod that Vault runs in a service account token", name, filepath.Join(folder, file))
		}
		return strings.TrimSpace(string(text)), nil
	}
	token, err := read("token")
	if err != nil {
		return login{}, err
	}
	ca, err := read("ca.crt")
	if err != nil {
		return login{}, err
	}
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		host, port = "kubernetes.default.svc", "443" // Vault passes its plugins no environment that it was not told to
	}
	return login{host: "https://" + net.JoinHostPort(host, port), token: token, tls: connection.TLS{CA: ca}}, nil
}

// Bounds on what an API server says: about an object, which etcd takes no more than a
// megabyte and a half of; in a page of a list; and in all of one step, which is kept. Objects
// are read several at a time, and lists one after another. A namespace that is as large as
// Kubernetes is made for has 3,000 pods, and room for 21 KiB of each.
const (
	maxObject = 4 << 20
	maxPage   = 8 << 20
	maxStep   = 64 << 20
)

// perPage is how much of a list is asked for at once, and a quarter of that where it has
// no room in a page.
const perPage = 250

// bearer shows the token to the API server, and to nobody else. Of its answers no more
// is read than is bounded: client-go reads them to their end.
type bearer struct {
	host, token string
	next        http.RoundTripper
	budget      *bounded.Budget
}

func (b *bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Host != b.host {
		return nil, errors.New("a request to another host was not sent")
	}
	r = r.Clone(r.Context())
	r.Header.Set("User-Agent", userAgent())
	if b.token != "" {
		r.Header.Set("Authorization", "Bearer "+b.token)
	}
	resp, err := b.next.RoundTrip(r)
	if err == nil {
		most, kept := int64(maxObject), b.budget
		switch {
		case r.URL.Query().Has("limit"):
			most = maxPage
		case strings.HasSuffix(r.URL.Path, "/log"): // which is read line by line
			kept = bounded.NewBudget(most)
		}
		resp.Body = bounded.Body(resp.Body, most, kept)
	}
	return resp, err
}

// dial makes the clients of a connection. It sends nothing.
func dial(e *connection.Entry, folder string) (*cluster, error) {
	l, err := loginOf(e, folder)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(l.host)
	if err != nil || u.Host == "" {
		return nil, kind.Definitely("the host of connection %q is no URL; write connections/%s again", e.Name, e.Name)
	}
	conf, err := l.tls.Config(u.Hostname())
	if err != nil {
		return nil, kind.Definitely("connection %q: %w", e.Name, err)
	}
	transport := &http.Transport{
		TLSClientConfig: conf, TLSHandshakeTimeout: kind.CallTimeout, ForceAttemptHTTP2: true,
		Proxy:               nil, // not even that of the environment: it would see who talks to whom
		MaxIdleConnsPerHost: 4, MaxResponseHeaderBytes: 64 << 10,
	}
	client := &http.Client{
		Transport: &bearer{host: u.Host, token: l.token, next: transport, budget: bounded.NewBudget(maxStep)}, Timeout: kind.CallTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	config := &rest.Config{
		Host: l.host, Timeout: kind.CallTimeout,
		RateLimiter:    flowcontrol.NewTokenBucketRateLimiter(requestsPerSecond, requestsAtOnce),
		WarningHandler: rest.NoWarnings{},
	}
	c := &cluster{name: e.Name, host: l.host, token: l.token, manager: managerOf(e), http: client, close: transport.CloseIdleConnections, lists: semaphore.NewWeighted(1)}
	if c.clients, err = newClients(config, client); err != nil {
		return nil, kind.Definitely("connection %q cannot be used; write connections/%s again", e.Name, e.Name)
	}
	return c, nil
}

// listed reads all pages of a list of what has the labels of a selector; "": all.
func listed[T any](ctx context.Context, c *cluster, selector string, page func(metav1.ListOptions) ([]T, string, error)) (out []T, err error) {
	o := metav1.ListOptions{LabelSelector: selector, Limit: perPage}
	for {
		if err := c.lists.Acquire(ctx, 1); err != nil {
			return nil, err
		}
		items, next, err := page(o)
		c.lists.Release(1)
		if errors.Is(err, bounded.ErrTooMuch) && o.Limit > 1 {
			o.Limit = max(1, o.Limit/4)
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, items...)
		if o.Continue = next; next == "" {
			return out, nil
		}
	}
}

func userAgent() string { return "vault-plugin-secrets-harmonyflow/" + buildinfo.Version }

func managerOf(e *connection.Entry) string {
	if e.Kubernetes != nil && e.Kubernetes.FieldManager != "" {
		return e.Kubernetes.FieldManager
	}
	return connection.FieldManager
}

// Options is what the driver of consumers needs.
type Options struct {
	// Entry reads a connection; that there is none is an error.
	Entry func(ctx context.Context, name string) (*connection.Entry, error)
	// MayCall says which hosts (names or addresses, without port) checks may send
	// requests to; nil: none. Services of the cluster are no such hosts.
	MayCall func(host string) bool
	// Sources finds the roles that checks name in templates; nil: none.
	Sources Sources
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// clusters implements Clusters.
type clusters struct {
	Options
	dial func(e *connection.Entry) (*cluster, error)
	// settle is how long after a Secret has changed pods that start are sure to
	// read the change: kubelets keep Secrets for a moment (kubernetes#129645).
	settle   time.Duration
	memories memories
}

var _ Clusters = (*clusters)(nil)

// New returns the steps for consumers in Kubernetes.
func New(o Options) Clusters { return newClusters(o) }

func newClusters(o Options) *clusters {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MayCall == nil {
		o.MayCall = func(string) bool { return false }
	}
	if o.Sources == nil {
		o.Sources = func(context.Context, string) (*Source, error) { return nil, nil } //nolint:nilnil // there is none
	}
	return &clusters{Options: o, settle: 3 * time.Second, dial: func(e *connection.Entry) (*cluster, error) { return dial(e, podFolder) }}
}

// step is one call of one step.
type step struct {
	*cluster
	k    *clusters
	c    *Consumer
	d    Delivery
	now  time.Time
	told []string
	name string // of the step
	view *view
	// memory is of the delivery; what it lacks is read.
	memory *memory
	// looked is what was read, and tries, inRow and result are of the last check.
	looked       looked
	tries, inRow int
	result       string
	// lacks: rights are missing, and so errors say nothing new.
	lacks bool
	bad   *spoilt
	hides *strings.Replacer
}

func (k *clusters) step(ctx context.Context, c *Consumer, d Delivery) (*step, error) {
	e, err := k.Entry(ctx, c.Connection)
	if err != nil {
		return nil, err
	}
	at, err := k.dial(e)
	if err != nil {
		return nil, err
	}
	now := k.Now()
	if d.whole() && c.Mode != Restart { // it was asked for
		all := *c
		all.Mode = Restart
		c = &all
	}
	return &step{
		cluster: at, k: k, c: c, d: d, now: now,
		bad: &spoilt{of: map[ref]string{}}, view: newView(), memory: k.memories.recall(c, d.ID, now), hides: hiding(at.token, d),
	}, nil
}

func (s *step) tell(format string, args ...any) {
	if len(s.told) < maxTold {
		s.told = append(s.told, s.clean(fmt.Sprintf(format, args...)))
	}
}

func (s *step) done() Progress {
	return Progress{Done: true, Told: s.told, Seen: s.evidence(true, "")}
}

func (s *step) waits(format string, args ...any) Progress {
	waits := s.clean(fmt.Sprintf(format, args...))
	return Progress{Waits: waits, Told: s.told, Seen: s.evidence(false, waits)}
}

func (s *step) failed(err error) Progress {
	err = s.cleaned(s.explain(err))
	return Progress{Err: err, Told: s.told, Seen: s.evidence(false, err.Error())}
}

// failedBefore is the progress of a step that could not begin.
func failedBefore(err error) Progress { return Progress{Err: err} }

// unsure makes an error that waiting may mend.
func unsure(format string, args ...any) error {
	return &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf(format, args...)}
}
