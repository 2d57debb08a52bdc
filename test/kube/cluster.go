// Package kube starts private Kubernetes clusters for tests: the real control
// plane (etcd, API server, controllers, scheduler) with KWOK for its nodes, so
// that Deployments roll out, pods become ready and Secrets are read, and no
// container ever runs. What containers would do is told by annotations (see
// NeverReady and those beside it) or done by a Simulator, which logs in to a
// real server with what the pod would have read. External Secrets runs against
// a cluster with StartESO.
//
// Everything listens on free loopback ports and keeps its files below one
// directory, so clusters run side by side, and nothing outlives the program.
//
// The programs are not part of this repository: scripts/ensure-kube.sh and
// scripts/ensure-eso.sh build them and print their paths, which Program and
// ESOProgram name in the environment.
package kube

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	appsv1client "k8s.io/client-go/kubernetes/typed/apps/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// Program names the build of test/tools/kube in the environment.
const Program = "HARMONYFLOW_KUBE"

// What the cluster believes of its one node. Nobody has these addresses: what
// the API server sends to them reaches this program (see network).
const (
	nodeName    = "kwok-0"
	nodeAddress = "192.0.2.1" // RFC 5737
	podNetwork  = "10.244.0.0/16"
	apiServer   = "kube-apiserver" // the program
)

// patience bounds what waits for a cluster: a busy machine starts one slowly.
const patience = 2 * time.Minute

// Cluster is one control plane and one node.
type Cluster struct {
	Dir        string
	Host       string // https://127.0.0.1:PORT
	CA         string // PEM
	CAFile     string
	Token      string // of an administrator
	Kubeconfig string // the same as a file

	// Clients of the administrator, for what has no helper here.
	Core    corev1client.CoreV1Interface
	Apps    appsv1client.AppsV1Interface
	Dynamic dynamic.Interface
	Mapper  meta.ResettableRESTMapper

	program   string
	ports     ports
	authority *servers.Authority
	client    *http.Client
	network   *network
	mu        sync.Mutex
	running   map[string]*servers.Program
	order     []string // of running, as they were started
}

type ports struct{ etcd, peer, api, controllers, scheduler int }

// ForTest starts a cluster for the length of a test, and skips the test where
// there is no program for it.
func ForTest(t testing.TB) *Cluster {
	t.Helper()
	if os.Getenv(Program) == "" {
		t.Skip(Program + " is not set; make e2e builds Kubernetes and sets it")
	}
	c, err := Start(context.Background(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return c
}

// Start starts a cluster with its files below dir. It returns when the API is
// ready, pods can be created in the namespace default, and the node takes them.
func Start(ctx context.Context, dir string) (*Cluster, error) {
	program := os.Getenv(Program)
	if program == "" {
		return nil, errors.New(Program + " is not set: it is the path that scripts/ensure-kube.sh prints")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Dir: dir, program: program, running: map[string]*servers.Program{}, Token: rand.Text()}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	if err := c.prepare(); err != nil {
		return err
	}
	if err := c.run("etcd", c.etcdFlags()); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	if err := c.Apply(ctx, node); err != nil {
		return err
	}
	return c.until(ctx, func(ctx context.Context) error {
		if _, err := c.Core.ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{}); err != nil {
			return fmt.Errorf("the namespace default is not ready: %w", err)
		}
		n, err := c.Core.Nodes().Get(ctx, nodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		ready := func(condition corev1.NodeCondition) bool {
			return condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue
		}
		if !slices.ContainsFunc(n.Status.Conditions, ready) {
			return fmt.Errorf("node %s is not ready", nodeName)
		}
		return nil
	})
}

const node = `
apiVersion: v1
kind: Node
metadata:
  name: ` + nodeName + `
  annotations: {kwok.x-k8s.io/node: fake, node.alpha.kubernetes.io/ttl: "0"}
  labels: {kubernetes.io/arch: amd64, kubernetes.io/os: linux, kubernetes.io/hostname: ` + nodeName + `}
status:
  allocatable: {cpu: "32", memory: 256Gi, pods: "500"}
  capacity: {cpu: "32", memory: 256Gi, pods: "500"}
`

// prepare takes ports and writes what the programs read.
func (c *Cluster) prepare() error {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of a cluster: %w", err)
	}
	for _, port := range []*int{&c.ports.etcd, &c.ports.peer, &c.ports.api, &c.ports.controllers, &c.ports.scheduler} {
		free, err := servers.FreePort()
		if err != nil {
			return err
		}
		*port = free
	}
	authority, err := servers.NewAuthority()
	if err != nil {
		return err
	}
	c.authority, c.CA = authority, authority.PEM
	c.Host, c.CAFile, c.Kubeconfig = fmt.Sprintf("https://127.0.0.1:%d", c.ports.api), c.file("ca.crt"), c.file("admin.kubeconfig")
	cert, key, err := authority.Issue("127.0.0.1", "localhost", "kubernetes.default.svc")
	if err != nil {
		return err
	}
	signer, err := serviceAccountKey()
	if err != nil {
		return err
	}
	if c.network, err = newNetwork(c); err != nil {
		return err
	}
	scheduler := rand.Text()
	for name, content := range map[string]string{
		"ca.crt": c.CA, "apiserver.crt": cert, "apiserver.key": key, "serviceaccounts.key": signer,
		"tokens.csv": c.Token + ",admin,admin,\"system:masters\"\n" +
			scheduler + ",system:kube-scheduler,scheduler\n",
		"egress.yaml":          c.network.egress(),
		"audit.yaml":           auditPolicy,
		"admin.kubeconfig":     c.kubeconfig(c.Token),
		"scheduler.kubeconfig": c.kubeconfig(scheduler),
	} {
		if err := os.WriteFile(c.file(name), []byte(content), 0o600); err != nil {
			return fmt.Errorf("write a file of a cluster: %w", err)
		}
	}
	if err := writeStages(c.program, c.file("kwok.yaml")); err != nil {
		return err
	}
	return c.connect()
}

// serviceAccountKey signs the tokens of ServiceAccounts.
func serviceAccountKey() (string, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return "", fmt.Errorf("make the key of service accounts: %w", err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})), nil
}

// connect makes the clients of the administrator.
func (c *Cluster) connect() error {
	config := c.Config(c.Token)
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return fmt.Errorf("make a client of a cluster: %w", err)
	}
	c.client = client
	if c.Core, err = corev1client.NewForConfigAndClient(config, client); err != nil {
		return fmt.Errorf("make a client of a cluster: %w", err)
	}
	if c.Apps, err = appsv1client.NewForConfigAndClient(config, client); err != nil {
		return fmt.Errorf("make a client of a cluster: %w", err)
	}
	if c.Dynamic, err = dynamic.NewForConfigAndClient(config, client); err != nil {
		return fmt.Errorf("make a client of a cluster: %w", err)
	}
	kinds, err := discovery.NewDiscoveryClientForConfigAndClient(config, client)
	if err != nil {
		return fmt.Errorf("make a client of a cluster: %w", err)
	}
	c.Mapper = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(kinds))
	return nil
}

// Config is what a client-go client of whoever has token is made from.
func (c *Cluster) Config(token string) *rest.Config {
	return &rest.Config{
		Host: c.Host, BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAData: []byte(c.CA)},
		QPS: -1, Timeout: patience,
		// Warnings are for people.
		WarningHandler: rest.NoWarnings{},
	}
}

// WriteKubeconfig writes a kubeconfig for whoever has token and returns its path.
func (c *Cluster) WriteKubeconfig(name, token string) (string, error) {
	path := c.file(name + ".kubeconfig")
	if err := os.WriteFile(path, []byte(c.kubeconfig(token)), 0o600); err != nil {
		return "", fmt.Errorf("write a kubeconfig: %w", err)
	}
	return path, nil
}

func (c *Cluster) kubeconfig(token string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: test, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: test, namespace: default}}]
current-context: test
`, c.Host, c.CAFile, token)
}

func (c *Cluster) file(name string) string { return filepath.Join(c.Dir, name) }

// run starts one of the programs; c stops it.
func (c *Cluster) run(name string, flags []string) error {
	return c.launch(name, nil, c.program, append([]string{name}, flags...)...)
}

func (c *Cluster) launch(name string, env []string, program string, args ...string) error {
	p, err := servers.StartProgram(c.file(name), env, program, args...)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running[name] = p
	c.order = append(slices.DeleteFunc(c.order, func(n string) bool { return n == name }), name)
	return nil
}

// end sends s to one of the programs and returns when it is gone.
func (c *Cluster) end(name string, s syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.running[name]
	if p == nil {
		return nil
	}
	delete(c.running, name)
	return p.End(s)
}

// Stop ends the cluster and everything that was started in it. It may be called
// again.
func (c *Cluster) Stop() error {
	c.mu.Lock()
	names := slices.Clone(c.order)
	c.mu.Unlock()
	var errs []error
	for _, name := range slices.Backward(names) {
		errs = append(errs, c.end(name, syscall.SIGKILL)) // nothing it could write is read again
	}
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	if c.network != nil {
		errs = append(errs, c.network.stop())
	}
	return errors.Join(errs...)
}

// KillAPIServer ends the API server as a crash does. Everything else goes on.
func (c *Cluster) KillAPIServer() error { return c.end(apiServer, syscall.SIGKILL) }

// StartAPIServer starts the API server again on the same port and waits until it
// is ready. The controllers, the scheduler and the node start afresh then: after
// an outage of minutes they would look for it only every half a minute.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	c.mu.Lock()
	runs := c.running[apiServer] != nil
	c.mu.Unlock()
	if !runs {
		if err := c.run(apiServer, c.apiServerFlags()); err != nil {
			return err
		}
	}
	if err := c.until(ctx, func(ctx context.Context) error {
		_, err := c.Core.RESTClient().Get().AbsPath("/readyz").Timeout(5 * time.Second).DoRaw(ctx)
		return err
	}); err != nil || runs {
		return err
	}
	for name, flags := range map[string][]string{
		"kube-controller-manager": c.controllerFlags(), "kube-scheduler": c.schedulerFlags(), "kwok": c.kwokFlags(),
	} {
		if err := errors.Join(c.end(name, syscall.SIGKILL), c.run(name, flags)); err != nil {
			return err
		}
	}
	return nil
}

// PauseAPIServer stops the API server from doing anything (SIGSTOP): requests
// to it hang. ResumeAPIServer ends that.
func (c *Cluster) PauseAPIServer() error { return c.signal(apiServer, syscall.SIGSTOP) }

// ResumeAPIServer ends PauseAPIServer.
func (c *Cluster) ResumeAPIServer() error { return c.signal(apiServer, syscall.SIGCONT) }

func (c *Cluster) signal(name string, s syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.running[name]; p != nil {
		return p.Signal(s)
	}
	return fmt.Errorf("%s does not run", name)
}

// until is Until for as long as every program of the cluster runs.
func (c *Cluster) until(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := Until(ctx, func(ctx context.Context) error {
		if err := c.ended(); err != nil {
			cancel(err)
			return err
		}
		return try(ctx)
	})
	return err
}

// ended tells of a program that should run, and does not.
func (c *Cluster) ended() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, p := range c.running {
		if !p.Running() {
			return fmt.Errorf("%s has ended: %s", name, p.LastOutput())
		}
	}
	return nil
}

// Until calls try until it succeeds or ctx ends, but no longer than two minutes
// where ctx has no deadline, and returns its last error.
func Until(ctx context.Context, try func(context.Context) error) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	var last error
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil { // what time itself caused tells nothing
			last = err
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(50 * time.Millisecond):
		}
	}
}
