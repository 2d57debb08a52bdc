// Package consumers_test brings rotated secrets to pods: a real Vault with the
// engine, a real API server with its controllers, the real External Secrets, real
// servers, and in every pod a client that logs in again and again with what it took
// when it started. Each test ends with a line that holds the figure.
package consumers_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// bed is what all scenarios share.
type bed struct {
	vault   *servers.Vault
	cluster *kube.Cluster
}

// TestMain: scenarios wait more than they work.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func newBed(t *testing.T) *bed {
	t.Helper()
	c := kube.ForTest(t)
	require.NoError(t, c.StartESO(t.Context()))
	return &bed{vault: servers.NewVault(t, servers.VaultOptions{NoMount: true}), cluster: c}
}

// scene is one scenario: a namespace, a mount, and the pods in it.
type scene struct {
	*bed
	t   *testing.T
	ctx context.Context
	ns  string
	c   *api.Client
	sim *kube.Simulator
}

func (b *bed) scene(t *testing.T, name string) *scene {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	t.Cleanup(cancel)
	s := &scene{bed: b, t: t, ctx: ctx, ns: name, c: b.vault.Client()}
	require.NoError(t, b.vault.Mount(ctx, s.ns))
	t.Cleanup(func() { _ = b.vault.Unmount(context.WithoutCancel(ctx), s.ns) })
	s.settle()
	s.must("connections/k8s", s.reaches(b.cluster))
	return s
}

// settle makes the namespace of a scenario in its cluster.
func (s *scene) settle() {
	s.t.Helper()
	require.NoError(s.t, s.cluster.Namespace(s.ctx, s.ns))
	s.sim = s.cluster.Simulate(kube.InNamespace(s.ns))
	s.t.Cleanup(s.sim.Stop)
	require.NoError(s.t, s.cluster.ApplyVaultStore(s.ctx, kube.VaultStore{
		Namespace: s.ns, Name: "harmonyflow", Address: s.vault.Address, Mount: s.ns, Token: s.vault.Token,
	}))
}

func (s *scene) reaches(c *kube.Cluster) map[string]any {
	return map[string]any{"type": "kubernetes", "host": c.Host, "ca_cert": c.CA, "token": c.Token, "allowed_roles": "*"}
}

func (s *scene) write(path string, data map[string]any) (map[string]any, error) {
	answer, err := s.c.Logical().WriteWithContext(s.ctx, s.ns+"/"+path, data)
	if err != nil || answer == nil {
		return nil, err
	}
	return answer.Data, nil
}

func (s *scene) must(path string, data map[string]any) map[string]any {
	s.t.Helper()
	out, err := s.write(path, data)
	require.NoError(s.t, err)
	return out
}

func (s *scene) read(path string) (map[string]any, error) {
	answer, err := s.c.Logical().ReadWithContext(s.ctx, s.ns+"/"+path)
	switch {
	case err != nil:
		return nil, err
	case answer == nil:
		return nil, errors.New("not found")
	}
	return answer.Data, nil
}

func (s *scene) rotation(id string) map[string]any {
	s.t.Helper()
	data, err := s.read("rotations/" + id)
	require.NoError(s.t, err)
	return data
}

// until waits until a rotation is in one of states.
func (s *scene) until(id string, states ...string) map[string]any {
	s.t.Helper()
	var data map[string]any
	err := kube.Until(s.ctx, func(context.Context) error {
		var err error
		if data, err = s.read("rotations/" + id); err != nil {
			return err
		}
		for _, state := range states {
			if data["state"] == state {
				return nil
			}
		}
		return fmt.Errorf("rotation %s is %v (%v): %v", id, data["state"], data["phase"], data["roles"])
	})
	require.NoError(s.t, err, "%v", data["timeline"])
	return data
}

// redis starts a server with user app, and makes a role of it that fills the
// document app.
func (s *scene) redis(role map[string]any) *servers.RedisNode {
	s.t.Helper()
	n := servers.Redis(s.t, servers.WithUsers("app on >the-first-password ~* +@all -@admin"))
	s.must("connections/cache", map[string]any{
		"type": "redis", "addresses": n.Addr, "username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "*",
	})
	data := map[string]any{
		"kind": "redis", "connection": "cache", "username": "app", "initial_password": "the-first-password",
		"document": "app", "field": "password", "username_field": "username", "grace_period": "1h",
	}
	for k, v := range role {
		data[k] = v
	}
	s.must("roles/app", data)
	return n
}

// synced makes an ExternalSecret of a document, and waits for its Secret.
func (s *scene) synced(document string) {
	s.t.Helper()
	require.NoError(s.t, s.cluster.ApplyExternalSecret(s.ctx, kube.ExternalSecret{
		Namespace: s.ns, Name: document, Store: "harmonyflow", Document: document,
	}))
	require.NoError(s.t, s.cluster.WaitExternalSecret(s.ctx, s.ns, document))
}

// deploy makes a workload whose pods log in to a server with a Secret.
func (s *scene) deploy(c *kube.Cluster, kindOf, name string, replicas int, annotations map[string]string) {
	s.t.Helper()
	text, err := json.Marshal(annotations)
	require.NoError(s.t, err)
	extra := map[string]string{
		"Deployment":  fmt.Sprintf("replicas: %d", replicas),
		"StatefulSet": fmt.Sprintf("replicas: %d\n  serviceName: %s", replicas, name),
	}[kindOf]
	require.NoError(s.t, c.Apply(s.ctx, fmt.Sprintf(`
apiVersion: apps/v1
kind: %s
metadata: {name: %s, namespace: %s}
spec:
  %s
  selector: {matchLabels: {app: %s}}
  template:
    metadata: {labels: {app: %s}, annotations: %s}
    spec: {containers: [{name: main, image: example.com/web:1, ports: [{containerPort: 8080}]}]}
`, kindOf, name, s.ns, extra, name, name, text)))
	require.NoError(s.t, c.WaitRollout(s.ctx, strings.ToLower(kindOf), s.ns, name))
}

func toRedis(n *servers.RedisNode) map[string]string {
	return map[string]string{"sim/secret": "app", "sim/target": "redis", "sim/addr": n.Addr, "sim/every": "20ms"}
}

// consumer writes consumer web, of one wave of Deployments.
func (s *scene) consumer(more map[string]any, waves ...[]string) {
	s.t.Helper()
	s.consumerAt("web", more, waves...)
}

func (s *scene) consumerAt(name string, more map[string]any, waves ...[]string) {
	s.t.Helper()
	var workloads [][]map[string]string
	for _, wave := range waves {
		var list []map[string]string
		for _, name := range wave {
			kindOf, name, ok := strings.Cut(name, "/")
			if !ok {
				kindOf, name = "Deployment", kindOf
			}
			list = append(list, map[string]string{"kind": kindOf, "name": name})
		}
		workloads = append(workloads, list)
	}
	text, err := json.Marshal(workloads)
	require.NoError(s.t, err)
	data := map[string]any{
		"connection": "k8s", "namespace": s.ns, "allowed_roles": "*", "external_secrets": "app",
		"workloads": string(text), "stabilization": "2s", "rollout_timeout": "1m",
	}
	for k, v := range more {
		data[k] = v
	}
	s.must("consumers/"+name, data)
}

// running are the passwords that the living pods of a workload run with.
func (s *scene) running(name string) map[string]int {
	out := map[string]int{}
	for _, p := range s.sim.Pods(s.ns, name) {
		if !p.Gone {
			out[p.Password]++
		}
	}
	return out
}

func (s *scene) served() string {
	s.t.Helper()
	data, err := s.read("creds/app")
	require.NoError(s.t, err)
	return data["password"].(string)
}

// restarts is how often a workload was restarted.
func (s *scene) revision(kindOf, name string) string {
	s.t.Helper()
	out, err := s.cluster.Kubectl(s.ctx, "get", kindOf, name, "-n", s.ns, "-o", `jsonpath={.metadata.generation}`)
	require.NoError(s.t, err)
	return strings.TrimSpace(out)
}

// accepts reports whether a Redis takes a password of app.
func accepts(t *testing.T, n *servers.RedisNode, password string) bool {
	t.Helper()
	c := n.Client()
	defer func() { _ = c.Close() }()
	return c.Do(t.Context(), "AUTH", "app", password).Err() == nil
}

func figure(t *testing.T, format string, args ...any) {
	t.Helper()
	report.Figure(t, "CONSUMERS_FILE", format, args...)
}
