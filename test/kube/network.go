package kube

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

// network is what the API server finds at the addresses of the node and of
// pods. Nobody has those: the API server asks a proxy for connections into the
// cluster (an egress selector), and the proxy is this one.
type network struct {
	cluster *Cluster
	server  *http.Server // the proxy
	address string
	kubelet *inside // TLS
	pods    *inside
	logs    logs
	done    sync.WaitGroup

	mu       sync.Mutex
	handlers map[workload]http.Handler
}

// workload is what pods belong to: a Deployment, a StatefulSet, …
type workload struct{ namespace, name string }

func newNetwork(c *Cluster) (*network, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the API server: %w", err)
	}
	// One certificate for the proxy, the API server in front of it, and the node.
	cert, key, err := c.authority.Issue("127.0.0.1", nodeAddress)
	if err != nil {
		return nil, err
	}
	for name, content := range map[string]string{"egress.crt": cert, "egress.key": key} {
		if err := os.WriteFile(c.file(name), []byte(content), 0o600); err != nil {
			return nil, fmt.Errorf("write the certificate of a node: %w", err)
		}
	}
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		return nil, fmt.Errorf("read the certificate of a node: %w", err)
	}
	n := &network{cluster: c, address: l.Addr().String(), handlers: map[workload]http.Handler{}, logs: newLogs()}
	config := &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	n.server = &http.Server{Handler: n, TLSConfig: config.Clone()}
	// Connections are taken over, which HTTP/2 does not let.
	n.server.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	kubelet := http.NewServeMux()
	kubelet.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", n.serveLog)
	n.kubelet = newInside(kubelet)
	n.kubelet.server.TLSConfig = config.Clone()
	n.pods = newInside(http.HandlerFunc(n.servePod))
	n.done.Go(func() { _ = n.server.ServeTLS(l, "", "") })
	n.done.Go(func() { _ = n.kubelet.server.ServeTLS(n.kubelet, "", "") })
	n.done.Go(func() { _ = n.pods.server.Serve(n.pods) })
	return n, nil
}

// egress tells the API server of the proxy. It speaks TLS to one even where
// the address says http.
func (n *network) egress() string {
	return fmt.Sprintf(`apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
- name: cluster
  connection:
    proxyProtocol: HTTPConnect
    transport: {tcp: {url: "https://%s", tlsConfig: {caBundle: %q, clientCert: %q, clientKey: %q}}}
`, n.address, n.cluster.CAFile, n.cluster.file("egress.crt"), n.cluster.file("egress.key"))
}

func (n *network) stop() error {
	n.logs.end()
	err := errors.Join(n.server.Close(), n.kubelet.server.Close(), n.pods.server.Close())
	n.done.Wait()
	return err
}

// ServeHTTP takes a CONNECT to host:port and hands the connection to whoever
// stands for that address.
func (n *network) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	host, _, err := net.SplitHostPort(r.URL.Host)
	if r.Method != http.MethodConnect || err != nil {
		http.Error(w, "this is a proxy for CONNECT", http.StatusBadRequest)
		return
	}
	to := n.pods
	if host == nodeAddress {
		to = n.kubelet
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if _, err := conn.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n")); err != nil {
		_ = conn.Close()
		return
	}
	to.give(&toHost{Conn: conn, host: host})
}

// Serve makes h answer for the pods of a workload: requests through the API
// server (services/proxy, pods/proxy) reach it, whatever the port. PodOf tells
// which pod was asked.
func (c *Cluster) Serve(namespace, name string, h http.Handler) {
	c.network.mu.Lock()
	defer c.network.mu.Unlock()
	c.network.handlers[workload{namespace, name}] = h
}

type podKey struct{}

// PodOf is the pod that a request was sent to.
func PodOf(r *http.Request) *corev1.Pod {
	pod, _ := r.Context().Value(podKey{}).(*corev1.Pod)
	return pod
}

func (n *network) servePod(w http.ResponseWriter, r *http.Request) {
	host, _ := r.Context().Value(hostKey{}).(string)
	pods, err := n.cluster.Core.Pods("").List(r.Context(), metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("status.podIP", host).String(),
	})
	if err != nil || len(pods.Items) == 0 {
		http.Error(w, fmt.Sprintf("no pod has the address %s", host), http.StatusBadGateway)
		return
	}
	pod := &pods.Items[0]
	n.mu.Lock()
	h := n.handlers[workloadOf(pod)]
	n.mu.Unlock()
	if h == nil {
		http.Error(w, fmt.Sprintf("pod %s serves nothing", pod.Name), http.StatusBadGateway)
		return
	}
	h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), podKey{}, pod)))
}

type hostKey struct{}

// toHost is a connection to a host that is not there.
type toHost struct {
	net.Conn
	host string
}

// inside is a server that is given its connections.
type inside struct {
	server *http.Server
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func newInside(h http.Handler) *inside {
	i := &inside{conns: make(chan net.Conn), closed: make(chan struct{})}
	i.server = &http.Server{Handler: h, ConnContext: func(ctx context.Context, c net.Conn) context.Context {
		if to, ok := c.(*toHost); ok {
			ctx = context.WithValue(ctx, hostKey{}, to.host)
		}
		return ctx
	}}
	return i
}

func (i *inside) give(conn net.Conn) {
	select {
	case i.conns <- conn:
	case <-i.closed:
		_ = conn.Close()
	}
}

// Accept, Close and Addr make i the listener of its server.
func (i *inside) Accept() (net.Conn, error) {
	select {
	case conn := <-i.conns:
		return conn, nil
	case <-i.closed:
		return nil, net.ErrClosed
	}
}

// Close lets Accept fail.
func (i *inside) Close() error {
	i.once.Do(func() { close(i.closed) })
	return nil
}

// Addr says that there is no address.
func (i *inside) Addr() net.Addr { return &net.UnixAddr{Name: "inside", Net: "unix"} }
