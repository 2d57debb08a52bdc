package servers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The user that every broker has beside those that were asked for.
const (
	RabbitMQAdmin         = "admin"
	RabbitMQAdminPassword = "rabbit-admin-secret"
)

// brokerReadyWithin bounds how long a broker may take until it answers: some
// seconds where nothing else runs, and much longer beside a build.
const brokerReadyWithin = 2 * time.Minute

// rabbitmqServer is the program itself. The one on the PATH of Debian is a
// wrapper that becomes another user.
const rabbitmqServer = "/usr/lib/rabbitmq/bin/rabbitmq-server"

// RabbitMQOption changes how a broker is started.
type RabbitMQOption func(*rabbitmqOptions)

type rabbitmqOptions struct {
	config  []string
	plugins []string
	tls     *Authority
	joins   *RabbitMQNode
}

// WithRabbitMQConfig adds lines to rabbitmq.conf.
func WithRabbitMQConfig(lines ...string) RabbitMQOption {
	return func(o *rabbitmqOptions) { o.config = append(o.config, lines...) }
}

// WithRabbitMQPlugins enables plugins beside the management API.
func WithRabbitMQPlugins(names ...string) RabbitMQOption {
	return func(o *rabbitmqOptions) { o.plugins = append(o.plugins, names...) }
}

// WithRabbitMQTLS makes the broker listen with TLS, too, for both protocols, and
// take only clients there that a has signed.
func WithRabbitMQTLS(a *Authority) RabbitMQOption {
	return func(o *rabbitmqOptions) { o.tls = a }
}

// WithRabbitMQCluster makes the broker join the cluster of n when it is started
// first.
func WithRabbitMQCluster(n *RabbitMQNode) RabbitMQOption {
	return func(o *rabbitmqOptions) { o.joins = n }
}

// RabbitMQNode is one broker: a node of RabbitMQ with its management API.
type RabbitMQNode struct {
	Name           string // as the cluster knows it
	Addr           string // AMQP
	ManagementAddr string // HTTP
	TLSAddr        string // AMQP over TLS, with WithRabbitMQTLS
	HTTPSAddr      string // HTTPS, with WithRabbitMQTLS
	Dir            string

	options rabbitmqOptions
	ports   map[string]int
	mapper  *portMapper
	mu      sync.Mutex
	proc    *process
}

// portMapper is the epmd of brokers that belong together, which would outlive
// them.
type portMapper struct {
	dir  string
	port int

	mu   sync.Mutex
	proc *process
}

func (p *portMapper) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.proc != nil && p.proc.running() {
		return nil
	}
	proc, err := start(p.dir, "epmd", "-port", fmt.Sprint(p.port), "-address", "127.0.0.1")
	if err != nil {
		return fmt.Errorf("%w: install the Debian package rabbitmq-server", err)
	}
	p.proc = proc
	return nil
}

func (p *portMapper) end() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.proc == nil {
		return nil
	}
	return p.proc.end(syscall.SIGKILL)
}

// StartRabbitMQ starts one broker with its files below dir.
func StartRabbitMQ(ctx context.Context, dir string, opts ...RabbitMQOption) (*RabbitMQNode, error) {
	n, err := newRabbitMQ(dir, opts)
	if err != nil {
		return nil, err
	}
	if err := n.Start(ctx); err != nil {
		return nil, errors.Join(err, n.End())
	}
	return n, nil
}

// RabbitMQ starts one broker for the length of a test. It takes seconds: one is
// enough for the tests of a package.
func RabbitMQ(t testing.TB, opts ...RabbitMQOption) *RabbitMQNode {
	t.Helper()
	n, err := StartRabbitMQ(context.Background(), t.TempDir(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.End(); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return n
}

func newRabbitMQ(dir string, opts []RabbitMQOption) (*RabbitMQNode, error) {
	n := &RabbitMQNode{ports: map[string]int{}}
	for _, opt := range opts {
		opt(&n.options)
	}
	for _, use := range []string{"amqp", "http", "amqps", "https", "erlang", "epmd"} {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		n.ports[use] = port
	}
	n.Addr, n.ManagementAddr = loopback(n.ports["amqp"]), loopback(n.ports["http"])
	if n.options.tls != nil {
		n.TLSAddr, n.HTTPSAddr = loopback(n.ports["amqps"]), loopback(n.ports["https"])
	}
	n.Name = fmt.Sprintf("broker-%d@localhost", n.ports["amqp"])
	n.Dir = filepath.Join(dir, fmt.Sprintf("rabbitmq-%d", n.ports["amqp"]))
	n.mapper = &portMapper{dir: n.Dir, port: n.ports["epmd"]}
	if joins := n.options.joins; joins != nil {
		n.mapper = joins.mapper
		n.options.config = append(slices.Clone(n.options.config), "cluster_formation.peer_discovery_backend = classic_config",
			"cluster_formation.classic_config.nodes.1 = "+joins.Name, "cluster_formation.classic_config.nodes.2 = "+n.Name)
	}
	return n, n.writeFiles()
}

func (n *RabbitMQNode) file(name string) string { return filepath.Join(n.Dir, name) }

func (n *RabbitMQNode) writeFiles() error {
	if err := os.MkdirAll(n.Dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of a broker: %w", err)
	}
	conf := append([]string{
		"listeners.tcp.1 = " + n.Addr, "management.tcp.ip = 127.0.0.1", fmt.Sprintf("management.tcp.port = %d", n.ports["http"]),
		"default_user = " + RabbitMQAdmin, "default_pass = " + RabbitMQAdminPassword,
		"log.console = true", "log.console.level = info", "log.file = false",
	}, n.options.config...)
	files := map[string]string{
		".erlang.cookie":  fmt.Sprintf("cookie-of-%d", n.mapper.port),
		"enabled_plugins": "[" + strings.Join(append([]string{"rabbitmq_management"}, n.options.plugins...), ",") + "].",
		"advanced.config": "[].",
	}
	if a := n.options.tls; a != nil {
		cert, key, err := a.Issue("localhost", "127.0.0.1", "rabbitmq.example.com")
		if err != nil {
			return err
		}
		files["ca.pem"], files["cert.pem"], files["key.pem"] = a.PEM, cert, key
		conf = append(conf, "listeners.ssl.1 = "+n.TLSAddr, "management.ssl.ip = 127.0.0.1", fmt.Sprintf("management.ssl.port = %d", n.ports["https"]))
		for _, of := range []string{"ssl_options.", "management.ssl."} {
			conf = append(conf, of+"cacertfile = "+n.file("ca.pem"), of+"certfile = "+n.file("cert.pem"), of+"keyfile = "+n.file("key.pem"),
				of+"verify = verify_peer", of+"fail_if_no_peer_cert = true")
		}
	}
	files["rabbitmq.conf"] = strings.Join(conf, "\n") + "\n"
	for name, content := range files {
		if err := os.WriteFile(n.file(name), []byte(content), 0o400); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

// environment is all that the broker gets to know: nothing of a RabbitMQ that
// the machine may run.
func (n *RabbitMQNode) environment() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + n.Dir, "LANG=C.UTF-8",
		"RABBITMQ_NODENAME=" + n.Name, "RABBITMQ_NODE_IP_ADDRESS=127.0.0.1", fmt.Sprintf("RABBITMQ_NODE_PORT=%d", n.ports["amqp"]),
		fmt.Sprintf("RABBITMQ_DIST_PORT=%d", n.ports["erlang"]), fmt.Sprintf("ERL_EPMD_PORT=%d", n.mapper.port), "ERL_EPMD_ADDRESS=127.0.0.1",
		"RABBITMQ_MNESIA_BASE=" + n.file("mnesia"), "RABBITMQ_LOG_BASE=" + n.file("log"), "RABBITMQ_GENERATED_CONFIG_DIR=" + n.file("generated"),
		"RABBITMQ_CONFIG_FILE=" + n.file("rabbitmq.conf"), "RABBITMQ_ADVANCED_CONFIG_FILE=" + n.file("advanced.config"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + n.file("enabled_plugins"), "RABBITMQ_PID_FILE=" + n.file("pid"), "RABBITMQ_CONF_ENV_FILE=/dev/null",
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1} +S 2:2",
		"RUNNING_UNDER_SYSTEMD=true", // the script becomes the broker, and is not its parent
	}
}

// Start starts the broker again after Stop or Kill, on the same ports and with
// the same files, and waits until it answers.
func (n *RabbitMQNode) Start(ctx context.Context) error {
	if err := n.Launch(); err != nil {
		return err
	}
	return n.WaitReady(ctx)
}

// Launch is Start without waiting: the members of a cluster that were all down
// wait for each other.
func (n *RabbitMQNode) Launch() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc != nil && n.proc.running() {
		return nil
	}
	if err := n.mapper.start(); err != nil {
		return err
	}
	program := rabbitmqServer
	if _, err := os.Stat(program); err != nil {
		if program, err = exec.LookPath("rabbitmq-server"); err != nil {
			return fmt.Errorf("find rabbitmq: %w: install the Debian package rabbitmq-server", err)
		}
	}
	proc, err := startAs(dieWithParent(), n.environment(), n.Dir, program)
	if err != nil {
		return err
	}
	n.proc = proc
	return nil
}

// WaitReady waits until the broker answers: one that was launched, or paused.
func (n *RabbitMQNode) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, brokerReadyWithin)
	defer cancel()
	for {
		n.mu.Lock()
		proc := n.proc
		n.mu.Unlock()
		err := poll(ctx, func(ctx context.Context) error { return n.answers(ctx, proc) })
		var fatal *fatalError
		switch {
		case err == nil || ctx.Err() != nil:
			return err
		case !errors.As(err, &fatal):
			continue
		case proc.running() || !n.metAnother():
			return err
		}
		if err := n.Launch(); err != nil {
			return err
		}
	}
}

// metAnother reports whether the broker ended because it asked another of its
// cluster, which was starting as well, about features that it did not know of yet.
// Whoever runs brokers starts such a one again.
func (n *RabbitMQNode) metAnother() bool {
	return strings.Contains(n.lastLog(), "incompatible_feature_flags")
}

// answers reports whether the broker, and not another that has its port, is up.
func (n *RabbitMQNode) answers(ctx context.Context, proc *process) error {
	if !proc.running() {
		return &fatalError{fmt.Errorf("rabbitmq at %s ended while starting: %s", n.Addr, n.lastLog())}
	}
	var about struct{ Node string }
	if err := n.Do(ctx, http.MethodGet, "overview?columns=node", nil, &about); err != nil {
		return fmt.Errorf("rabbitmq at %s does not answer: %w", n.ManagementAddr, err)
	}
	if about.Node != n.Name {
		return &fatalError{fmt.Errorf("another rabbitmq answers at %s", n.ManagementAddr)}
	}
	// Its listeners for clients come up last.
	return n.Do(ctx, http.MethodGet, "health/checks/protocol-listener/amqp", nil, nil)
}

func (n *RabbitMQNode) lastLog() string {
	data, _ := os.ReadFile(n.file("output.log"))
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], " / ")
}

// Log is all that the broker has logged.
func (n *RabbitMQNode) Log() ([]byte, error) { return os.ReadFile(n.file("output.log")) }

// Kill ends the broker at once (SIGKILL).
func (n *RabbitMQNode) Kill() error { return n.end(syscall.SIGKILL) }

// End kills the broker and the port mapper of its cluster: it will not be
// started again.
func (n *RabbitMQNode) End() error { return errors.Join(n.Kill(), n.mapper.end()) }

func (n *RabbitMQNode) end(s syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil {
		return nil
	}
	return n.proc.end(s)
}

// Restart kills the broker and starts it again.
func (n *RabbitMQNode) Restart(ctx context.Context) error {
	if err := n.Kill(); err != nil {
		return err
	}
	return n.Start(ctx)
}

// Pause stops the broker from doing anything (SIGSTOP); connections to it hang.
func (n *RabbitMQNode) Pause() error { return n.signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (n *RabbitMQNode) Resume() error { return n.signal(syscall.SIGCONT) }

func (n *RabbitMQNode) signal(s syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil {
		return nil
	}
	return n.proc.signal(s)
}

// Do sends one request to the management API as the administrator: path is what
// follows /api/, body and answer are JSON, nil for none.
func (n *RabbitMQNode) Do(ctx context.Context, method, path string, body, answer any) error {
	sent, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("encode a request to rabbitmq: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+n.ManagementAddr+"/api/"+path, bytes.NewReader(sent))
	if err != nil {
		return fmt.Errorf("make a request to rabbitmq: %w", err)
	}
	req.SetBasicAuth(RabbitMQAdmin, RabbitMQAdminPassword)
	req.Header.Set("Content-Type", "application/json")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	said, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("read the answer of rabbitmq: %w", err)
	}
	if resp.StatusCode >= http.StatusMultipleChoices {
		return fmt.Errorf("rabbitmq answers %s %s with %d: %s", method, path, resp.StatusCode, said)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(said, answer)
}

// SetUser creates a user, or changes it, with every permission in the vhost "/".
// tags are separated by commas.
func (n *RabbitMQNode) SetUser(ctx context.Context, name, password, tags string) error {
	err := n.Do(ctx, http.MethodPut, "users/"+url.PathEscape(name), map[string]string{"password": password, "tags": tags}, nil)
	if err != nil {
		return err
	}
	return n.Permit(ctx, name, "/")
}

// Permit gives a user every permission in a vhost.
func (n *RabbitMQNode) Permit(ctx context.Context, user, vhost string) error {
	return n.Do(ctx, http.MethodPut, "permissions/"+url.PathEscape(vhost)+"/"+url.PathEscape(user),
		map[string]string{"configure": ".*", "write": ".*", "read": ".*"}, nil)
}
