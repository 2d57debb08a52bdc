package rabbitmq

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	connectTimeout = 3 * time.Second
	// maxNodes is far more than a cluster of any use has.
	maxNodes = 100
	// clusterIDPrefix is what the ids begin with that clusters give themselves.
	clusterIDPrefix = "rabbitmq-cluster-id-"
)

// node is one broker, or one of amqp_urls, during one call.
type node struct {
	name string // rabbit@host, or host:port of amqp_urls
	endpoint
	err error // why it cannot be asked
}

// cluster is what one management API says about itself and its peers.
type cluster struct {
	*management
	entry    *connection.Entry
	id       string
	version  string
	members  []string
	nodes    []*node
	split    []string // members that have lost sight of others
	down     []string // members that do not run
	hanging  bool     // a member does not answer the others, and they wait for it
	apiErrs  []error  // of management URLs that did not answer
	cancel   context.CancelFunc
	sessions []*management
	ghosts   *ghosts
}

func (c *cluster) close() {
	c.cancel()
	for _, m := range c.sessions {
		m.close()
	}
}

// within returns a context for a part of a call: a share of what is left, and at
// most limit.
func within(ctx context.Context, share int, limit time.Duration) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline)/time.Duration(share))
	}
	return context.WithTimeout(ctx, limit)
}

// discover logs in to a management API and learns which brokers there are. What
// it returns lives as long as ctx, or until it is closed. known are nodes that
// roles remember: they count where the members cannot be listed.
func discover(ctx context.Context, entry *connection.Entry, known []string) (*cluster, error) {
	if entry == nil || entry.RabbitMQ == nil || len(entry.RabbitMQ.ManagementURLs) == 0 {
		return nil, kind.Definitely("the connection has no management_urls: write it again")
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &cluster{entry: entry, cancel: cancel}
	connectCtx, stop := within(ctx, 2, connectTimeout)
	defer stop()
	err := c.connect(ctx, connectCtx)
	if err == nil {
		err = c.learn(connectCtx, known)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// connect logs in at all management URLs at once, and keeps to the first that
// answers. Where none does, a refusal tells more than silence.
func (c *cluster) connect(ctx, connectCtx context.Context) error {
	type attempt struct {
		m   *management
		err error
	}
	urls := c.entry.RabbitMQ.ManagementURLs
	attempts := make(chan attempt, len(urls))
	for _, u := range urls {
		m, err := manage(ctx, u, c.entry.TLS)
		if err != nil {
			return err
		}
		c.sessions = append(c.sessions, m)
		go func() { attempts <- attempt{m, m.authenticate(connectCtx, c.entry.Admin.Logins())} }()
	}
	for range urls {
		a := <-attempts
		if a.err == nil {
			c.management = a.m
			return nil
		}
		c.apiErrs = append(c.apiErrs, a.err)
	}
	for _, err := range c.apiErrs {
		if !kind.IsUnreachable(err) {
			return err
		}
	}
	return c.apiErrs[0]
}

type member struct {
	Name       string
	Running    bool
	Partitions []string
}

type listener struct {
	Node, Protocol string
	Port           int
}

// learn asks for the members of the cluster and where they listen. A broker asks
// its peers for most of that, and waits for one that hangs; what it knows itself
// it says at once.
func (c *cluster) learn(ctx context.Context, known []string) error {
	var (
		members []member
		self    struct {
			Node    string
			Version string `json:"rabbitmq_version"`
		}
		overview struct{ Listeners []listener }
		named    struct{ Name string }
		id       struct{ Value any }
		silence  [2]bool
		g        errgroup.Group
	)
	ask := func(path string, answer any, what string, accept func(error) bool) {
		g.Go(func() error {
			err := c.get(ctx, path, answer)
			if err == nil || accept(err) {
				return nil
			}
			return c.explain(err, what, c.login.Username)
		})
	}
	never := func(error) bool { return false }
	note := func(i int) func(error) bool {
		return func(err error) bool { silence[i] = silent(err); return silence[i] }
	}
	ask("overview?disable_stats=true&columns=node,rabbitmq_version", &self, "say which broker it belongs to", never)
	ask("cluster-name", &named, "say the name of its cluster", never)
	ask("global-parameters/internal_cluster_id", &id, "say the id of its cluster", notFound)
	ask("nodes?disable_stats=true&columns=name,running,partitions", &members, "list its nodes", note(0))
	if len(c.entry.RabbitMQ.AMQPURLs) == 0 {
		ask("overview?columns=listeners", &overview, "list its listeners", note(1))
	}
	if err := g.Wait(); err != nil {
		return err
	}
	c.hanging = silence[0]
	if silence[1] && !c.hanging {
		return kind.CannotReach(fmt.Errorf("management API %s did not say in time where its brokers take AMQP connections: give amqp_urls", c.name))
	}
	if c.hanging {
		members = c.presumed(self.Node, known)
		if len(members) == 0 {
			return kind.CannotReach(fmt.Errorf("a broker of the cluster of %s hangs, so that its members cannot be listed: start it again, or stop it", c.name))
		}
	}
	if len(members) == 0 || len(members) > maxNodes || self.Node == "" {
		return c.explain(errForeign, "list its nodes", c.login.Username)
	}
	c.version = self.Version
	for _, m := range members {
		c.members = append(c.members, m.Name)
		if len(m.Partitions) > 0 {
			c.split = append(c.split, m.Name)
		}
		if !m.Running {
			c.down = append(c.down, m.Name)
		}
	}
	if c.id, _ = id.Value.(string); c.id == "" {
		sum := sha256.Sum256([]byte(named.Name))
		c.id = clusterIDPrefix + hex.EncodeToString(sum[:16])
	}
	if err := c.checkID(); err != nil {
		return err
	}
	c.locate(members, overview.Listeners)
	return nil
}

// presumed are the members of a cluster of which one hangs: those that there
// were when a role was last proven, and the one that answers. Which of them
// hangs shows when it is logged in to.
func (c *cluster) presumed(self string, known []string) []member {
	out := []member{{Name: self, Running: true}}
	for _, name := range slices.Compact(slices.Sorted(slices.Values(known))) {
		if strings.Contains(name, "@") && name != self {
			out = append(out, member{Name: name, Running: true})
		}
	}
	if len(out) == 1 && len(c.entry.RabbitMQ.AMQPURLs) == 0 {
		return nil
	}
	return out
}

// checkID refuses a cluster that is not the one that the connection was verified
// with: a broker that lost its disk comes back as a cluster of its own.
func (c *cluster) checkID() error {
	known := slices.DeleteFunc(slices.Clone(c.entry.Members), func(m string) bool { return !strings.HasPrefix(m, clusterIDPrefix) })
	if len(known) == 0 || slices.Contains(known, c.id) {
		return nil
	}
	return fmt.Errorf("management API %s belongs to another cluster than the one that connection %q was written for: "+
		"bring its broker back into the cluster, or write the connection again", c.name, c.entry.Name)
}

// locate makes nodes: of amqp_urls where there are any, of the members
// otherwise. A member that does not run is one in any case, because it counts:
// only rabbitmqctl forget_cluster_node says that it will not come back.
func (c *cluster) locate(members []member, listeners []listener) {
	for _, u := range c.entry.RabbitMQ.AMQPURLs {
		e, err := parseAMQP(u)
		name := e.addr
		e.addr = c.entry.Reach(name)
		c.nodes = append(c.nodes, &node{name: name, endpoint: e, err: err})
	}
	for _, m := range members {
		switch {
		case !m.Running:
			c.nodes = append(c.nodes, &node{name: m.Name, err: kind.CannotReach(fmt.Errorf(
				"broker %s does not run: start it, or remove it from the cluster with rabbitmqctl forget_cluster_node", m.Name))})
		case len(c.entry.RabbitMQ.AMQPURLs) == 0:
			n := &node{name: m.Name}
			n.endpoint, n.err = c.endpointOf(m.Name, listeners)
			c.nodes = append(c.nodes, n)
		}
	}
	slices.SortFunc(c.nodes, func(a, b *node) int { return strings.Compare(a.name, b.name) })
}

// endpointOf finds where a member takes AMQP connections, with TLS where the
// management API is asked with TLS.
func (c *cluster) endpointOf(member string, listeners []listener) (endpoint, error) {
	secure := strings.HasPrefix(c.base, "https:")
	wanted := []listener{{member, "amqp", 5672}, {member, "amqp/ssl", 5671}}
	if secure {
		wanted = wanted[1:]
	}
	if c.hanging { // it cannot be asked: where brokers usually are
		return c.reach(wanted[0]), nil
	}
	for _, w := range wanted {
		for _, l := range listeners {
			if l.Node == member && l.Protocol == w.Protocol {
				return c.reach(l), nil
			}
		}
	}
	if secure {
		return endpoint{}, kind.Definitely("broker %s does not take AMQP connections with TLS, and its management API is asked with TLS: configure listeners.ssl, or give amqp_urls", member)
	}
	return endpoint{}, fmt.Errorf("broker %s does not say where it takes AMQP connections: give amqp_urls", member)
}

// reach is where a listener is dialled: at the host of its node name, unless
// address_map says otherwise.
func (c *cluster) reach(l listener) endpoint {
	_, host, _ := strings.Cut(l.Node, "@")
	e := endpoint{addr: c.entry.Reach(l.Node), host: host, tls: l.Protocol == "amqp/ssl"}
	if e.addr == l.Node {
		e.addr = c.entry.Reach(net.JoinHostPort(host, strconv.Itoa(l.Port)))
	}
	return e
}

// parseAMQP reads one of amqp_urls: where, and whether with TLS.
func parseAMQP(text string) (endpoint, error) {
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" {
		return endpoint{}, kind.Definitely("amqp_urls holds what is no URL: write the connection again")
	}
	port := u.Port()
	switch {
	case port != "":
	case u.Scheme == "amqps":
		port = "5671"
	default:
		port = "5672"
	}
	return endpoint{addr: net.JoinHostPort(u.Hostname(), port), host: u.Hostname(), tls: u.Scheme == "amqps"}, nil
}

// limiter bounds how much is under way at once.
type limiter chan struct{}

func (l limiter) run(wg *sync.WaitGroup, do func()) {
	wg.Go(func() {
		l <- struct{}{}
		defer func() { <-l }()
		do()
	})
}

// each runs do for 0…count-1, as many at once as a management API is asked.
func each(count int, do func(i int)) {
	var wg sync.WaitGroup
	l := make(limiter, maxRequests)
	for i := range count {
		l.run(&wg, func() { do(i) })
	}
	wg.Wait()
}

// target is the brokers of one connection. Of calls it remembers nothing but ghosts.
type target struct {
	entry  func(context.Context) (*connection.Entry, error)
	ghosts *ghosts
}

// Opener returns what returns the Target behind a connection. entry is called at every
// call, so that addresses and the admin credential are those that are stored now. What
// brokers were seen to list wrongly is remembered by all its targets.
func Opener() func(entry func(context.Context) (*connection.Entry, error)) kind.Target {
	var shared ghosts
	return func(entry func(context.Context) (*connection.Entry, error)) kind.Target {
		return &target{entry: entry, ghosts: &shared}
	}
}

func (t *target) discover(ctx context.Context, users []kind.User) (*cluster, error) {
	entry, err := t.entry(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the rabbitmq connection: %w", err)
	}
	var known []string
	for _, u := range users {
		known = append(known, u.Known...)
	}
	c, err := discover(ctx, entry, known)
	if err != nil {
		return nil, err
	}
	c.ghosts = t.ghosts
	return c, nil
}

// errNobody is about a user that the brokers do not keep themselves.
func errNobody(name string) string {
	return fmt.Sprintf("user %s is not in the database of the brokers: create it with rabbitmqctl add_user (a user of LDAP, HTTP or OAuth 2 has its password elsewhere)", name)
}

var errNoPassword = errors.New("a password is empty: nothing was changed")
