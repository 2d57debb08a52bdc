package servers

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"
)

// The user that every server has beside those that were asked for; without a
// configuration file there is only a default user without a password.
const (
	RedisAdmin         = "admin"
	RedisAdminPassword = "admin-secret"
)

// RedisOption changes how a Redis is started.
type RedisOption func(*redisOptions)

type redisOptions struct {
	config       []string
	users        []string
	aclFile      bool
	noConfigFile bool
	cluster      bool
	tls          *redisTLS
	sentinel     bool
}

// redisTLS is what a server shows, and whose clients it takes.
type redisTLS struct {
	ca    *Authority
	names []string
}

// WithConfig adds lines to redis.conf.
func WithConfig(lines ...string) RedisOption {
	return func(o *redisOptions) { o.config = append(o.config, lines...) }
}

// WithUsers adds users, each written as after the word user in redis.conf:
// "app on >secret ~* +@all".
func WithUsers(users ...string) RedisOption {
	return func(o *redisOptions) { o.users = append(o.users, users...) }
}

// WithACLFile keeps users in a file of their own (the aclfile mode of Redis).
func WithACLFile() RedisOption { return func(o *redisOptions) { o.aclFile = true } }

// WithRequirePass protects the default user with password, as installations
// from before ACLs do, and uses it between replicas.
func WithRequirePass(password string) RedisOption {
	return WithConfig("requirepass "+password, "masterauth "+password)
}

// WithReplicationUser makes nodes log in to each other as user.
func WithReplicationUser(user, password string) RedisOption {
	return func(o *redisOptions) {
		o.config = append(o.config, "masteruser "+user, "masterauth "+password)
		o.users = append(o.users, user+" on >"+password+" resetkeys resetchannels -@all +psync +replconf +ping")
	}
}

// WithoutConfigFile starts the server with arguments alone: it cannot make
// anything durable.
func WithoutConfigFile() RedisOption { return func(o *redisOptions) { o.noConfigFile = true } }

// WithTLS makes the server speak TLS alone, also to its replicas and in a
// cluster. It has a certificate for names, and wants one of ca from its clients.
func WithTLS(ca *Authority, names ...string) RedisOption {
	return func(o *redisOptions) { o.tls = &redisTLS{ca: ca, names: names} }
}

// RedisNode is one Redis server.
type RedisNode struct {
	Addr string
	Dir  string

	options redisOptions
	port    int
	mu      sync.Mutex
	proc    *process
}

// StartRedis starts one server with its files below dir.
func StartRedis(ctx context.Context, dir string, opts ...RedisOption) (*RedisNode, error) {
	var o redisOptions
	for _, opt := range opts {
		opt(&o)
	}
	var lastErr error
	for range 3 { // a program that knows nothing of our ports may take this one
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		n := &RedisNode{
			Addr: loopback(port), Dir: filepath.Join(dir, fmt.Sprintf("redis-%d", port)),
			options: o, port: port,
		}
		if lastErr = n.writeFiles(); lastErr != nil {
			return nil, lastErr
		}
		if lastErr = n.start(ctx); lastErr == nil {
			return n, nil
		}
		_ = n.Kill()
	}
	return nil, lastErr
}

// Redis starts one server for the length of a test.
func Redis(t testing.TB, opts ...RedisOption) *RedisNode {
	t.Helper()
	n, err := StartRedis(context.Background(), t.TempDir(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanUp(t, n) })
	return n
}

func cleanUp(t testing.TB, nodes ...*RedisNode) {
	t.Helper()
	for _, n := range nodes {
		if err := n.Kill(); err != nil {
			t.Errorf("clean up: %v", err)
		}
	}
}

func (n *RedisNode) writeFiles() error {
	if err := os.MkdirAll(n.Dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of a redis: %w", err)
	}
	o := n.options
	users := append([]string{RedisAdmin + " on >" + RedisAdminPassword + " ~* &* +@all"}, o.users...)
	if o.aclFile && !slices.ContainsFunc(users, func(u string) bool { return strings.HasPrefix(u, "default ") }) {
		// Without this line the default user of an aclfile is open (redis#7883).
		users = append(users, "default off")
	}
	var conf, acl strings.Builder
	for _, line := range n.settings() {
		fmt.Fprintln(&conf, line)
	}
	into := &conf
	if o.aclFile {
		into = &acl
		fmt.Fprintf(&conf, "aclfile %s\n", n.file("users.acl"))
		if err := os.WriteFile(n.file("users.acl"), nil, 0o600); err != nil {
			return fmt.Errorf("write users.acl: %w", err)
		}
	}
	for _, u := range users {
		fmt.Fprintf(into, "user %s\n", u)
	}
	if o.aclFile {
		if err := os.WriteFile(n.file("users.acl"), []byte(acl.String()), 0o600); err != nil {
			return fmt.Errorf("write users.acl: %w", err)
		}
	}
	if err := os.WriteFile(n.file("redis.conf"), []byte(conf.String()), 0o600); err != nil {
		return fmt.Errorf("write redis.conf: %w", err)
	}
	return n.writeCertificates()
}

func (n *RedisNode) writeCertificates() error {
	if n.options.tls == nil {
		return nil
	}
	cert, key, err := n.options.tls.ca.Issue(n.options.tls.names...)
	if err != nil {
		return err
	}
	for name, content := range map[string]string{"ca.pem": n.options.tls.ca.PEM, "cert.pem": cert, "key.pem": key} {
		if err := os.WriteFile(n.file(name), []byte(content), 0o600); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

func (n *RedisNode) settings() []string {
	lines := []string{fmt.Sprintf("port %d", n.port), "bind 127.0.0.1", "dir " + n.Dir}
	if n.options.tls != nil {
		lines[0] = fmt.Sprintf("tls-port %d", n.port)
		lines = append(lines, "port 0", "tls-replication yes", "tls-auth-clients yes",
			"tls-cert-file "+n.file("cert.pem"), "tls-key-file "+n.file("key.pem"), "tls-ca-cert-file "+n.file("ca.pem"))
	}
	if n.options.sentinel {
		return append(lines, n.options.config...)
	}
	lines = append(lines, `save ""`, "appendonly no", "repl-diskless-sync-delay 0", "repl-ping-replica-period 1")
	if n.options.cluster && n.options.tls != nil {
		lines = append(lines, "tls-cluster yes")
	}
	if n.options.cluster {
		// Nobody waits for a failover, and a machine that stands still for a
		// moment must not cause one.
		lines = append(lines, "cluster-enabled yes", "cluster-node-timeout 5000", "cluster-config-file nodes.conf")
	}
	return append(lines, n.options.config...)
}

func (n *RedisNode) file(name string) string { return filepath.Join(n.Dir, name) }

// Start starts the server again after Stop or Kill, on the same port and with
// the same files, and waits until it answers. Where the kernel lent the port to
// an outgoing connection meanwhile, it waits for that to end.
func (n *RedisNode) Start(ctx context.Context) error {
	return poll(ctx, func(ctx context.Context) error {
		err := n.start(ctx)
		if err != nil && !strings.Contains(n.lastLog(), "Address already in use") {
			return &fatalError{err}
		}
		return err
	})
}

func (n *RedisNode) start(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc != nil && n.proc.running() {
		return nil
	}
	args := []string{n.file("redis.conf")}
	if n.options.sentinel {
		args = append(args, "--sentinel")
	}
	if n.options.noConfigFile {
		args = nil
		for _, line := range n.settings() {
			name, value, _ := strings.Cut(line, " ")
			args = append(args, "--"+name, strings.Trim(value, `"`))
		}
	}
	proc, err := start(n.Dir, "redis-server", args...)
	if err != nil {
		return err
	}
	n.proc = proc
	return poll(ctx, func(ctx context.Context) error {
		if !proc.running() {
			return &fatalError{fmt.Errorf("redis at %s ended while starting: %s", n.Addr, n.lastLog())}
		}
		info, err := n.Info(ctx, "server")
		if err != nil {
			return fmt.Errorf("redis at %s does not answer: %w", n.Addr, err)
		}
		if info["process_id"] != fmt.Sprint(proc.cmd.Process.Pid) {
			return &fatalError{fmt.Errorf("another redis answers at %s", n.Addr)}
		}
		return nil
	})
}

func (n *RedisNode) lastLog() string {
	data, _ := os.ReadFile(n.file("output.log"))
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], " / ")
}

// Stop ends the server in order.
func (n *RedisNode) Stop() error { return n.end(syscall.SIGTERM) }

// Kill ends the server at once (SIGKILL).
func (n *RedisNode) Kill() error { return n.end(syscall.SIGKILL) }

func (n *RedisNode) end(s syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil {
		return nil
	}
	return n.proc.end(s)
}

// Restart kills the server and starts it again.
func (n *RedisNode) Restart(ctx context.Context) error {
	if err := n.Kill(); err != nil {
		return err
	}
	return n.Start(ctx)
}

// Pause stops the server from doing anything (SIGSTOP); connections to it hang.
func (n *RedisNode) Pause() error { return n.signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (n *RedisNode) Resume() error { return n.signal(syscall.SIGCONT) }

func (n *RedisNode) signal(s syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil {
		return nil
	}
	return n.proc.signal(s)
}

// Client returns a client that is logged in as the administrator.
func (n *RedisNode) Client() *redis.Client {
	return redis.NewClient(n.clientOptions())
}

func (n *RedisNode) clientOptions() *redis.Options {
	o := &redis.Options{
		Addr: n.Addr, Protocol: 2, MaxRetries: -1, PoolSize: 1, DialerRetries: 1,
		DisableIdentity: true, ContextTimeoutEnabled: true,
	}
	if !n.options.noConfigFile {
		o.Username, o.Password = RedisAdmin, RedisAdminPassword
	}
	if n.options.tls != nil {
		o.TLSConfig = n.clientTLS()
	}
	return o
}

// clientTLS shows the server its own certificate, which its authority has signed.
func (n *RedisNode) clientTLS() *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool(), ServerName: n.options.tls.names[0]}
	c.RootCAs.AppendCertsFromPEM([]byte(n.options.tls.ca.PEM))
	if pair, err := tls.LoadX509KeyPair(n.file("cert.pem"), n.file("key.pem")); err == nil {
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

// Do sends one command as the administrator. It dials by itself, because
// go-redis logs every attempt that fails, and polling has many.
func (n *RedisNode) Do(ctx context.Context, args ...any) (any, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", n.Addr)
	if err != nil {
		return nil, err
	}
	o := n.clientOptions()
	if o.TLSConfig != nil {
		conn = tls.Client(conn, o.TLSConfig)
	}
	o.Dialer = func(context.Context, string, string) (net.Conn, error) { return conn, nil }
	c := redis.NewClient(o)
	defer func() { _ = c.Close() }()
	return c.Do(ctx, args...).Result()
}

// Info returns the fields of one section of INFO.
func (n *RedisNode) Info(ctx context.Context, section string) (map[string]string, error) {
	text, err := n.Do(ctx, "INFO", section)
	if err != nil {
		return nil, err
	}
	fields := map[string]string{}
	for line := range strings.Lines(fmt.Sprint(text)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			fields[name] = value
		}
	}
	return fields, nil
}

// RedisSet is several servers that hold the same users. The first is a
// primary, the last a replica.
type RedisSet struct{ Nodes []*RedisNode }

// Addrs returns the addresses of all nodes.
func (s *RedisSet) Addrs() []string {
	out := make([]string, len(s.Nodes))
	for i, n := range s.Nodes {
		out[i] = n.Addr
	}
	return out
}

// Kill ends every node.
func (s *RedisSet) Kill() error {
	var errs []error
	for _, n := range s.Nodes {
		errs = append(errs, n.Kill())
	}
	return errors.Join(errs...)
}

func startSet(ctx context.Context, dir string, count int, opts ...RedisOption) (*RedisSet, error) {
	set := &RedisSet{Nodes: make([]*RedisNode, count)}
	g, ctx := errgroup.WithContext(ctx)
	for i := range set.Nodes {
		g.Go(func() (err error) {
			set.Nodes[i], err = StartRedis(ctx, dir, opts...)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		set.Nodes = slices.DeleteFunc(set.Nodes, func(n *RedisNode) bool { return n == nil })
		return nil, errors.Join(err, set.Kill())
	}
	return set, nil
}

// StartReplicated starts a primary and a number of replicas, and waits until
// they replicate.
func StartReplicated(ctx context.Context, dir string, replicas int, opts ...RedisOption) (*RedisSet, error) {
	set, err := startSet(ctx, dir, 1, opts...)
	if err != nil {
		return nil, err
	}
	opts = append(slices.Clone(opts), WithConfig(fmt.Sprintf("replicaof 127.0.0.1 %d", set.Nodes[0].port)))
	more, err := startSet(ctx, dir, replicas, opts...)
	if err != nil {
		return nil, errors.Join(err, set.Kill())
	}
	set.Nodes = append(set.Nodes, more.Nodes...)
	if err := set.WaitReplicating(ctx); err != nil {
		return nil, errors.Join(err, set.Kill())
	}
	return set, nil
}

// RedisReplicated starts a primary and replicas for the length of a test.
func RedisReplicated(t testing.TB, replicas int, opts ...RedisOption) *RedisSet {
	t.Helper()
	set, err := StartReplicated(context.Background(), t.TempDir(), replicas, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanUp(t, set.Nodes...) })
	return set
}

// WaitReplicating waits until every replica has a link to its primary.
func (s *RedisSet) WaitReplicating(ctx context.Context) error {
	return poll(ctx, func(ctx context.Context) error {
		for _, n := range s.Nodes {
			info, err := n.Info(ctx, "replication")
			if err != nil {
				return fmt.Errorf("replica %s: %w", n.Addr, err)
			}
			if info["role"] == "slave" && info["master_link_status"] != "up" {
				return fmt.Errorf("replica %s has no link to its primary", n.Addr)
			}
		}
		return nil
	})
}
