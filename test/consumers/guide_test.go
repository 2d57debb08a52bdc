package consumers_test

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const guide = "docs/howto/pods.md"

// toPods types what the guide shows, in its order, at a cluster as the guide finds one:
// pods run already, with what the role is about to adopt.
func toPods(t *testing.T, b *bed) {
	t.Helper()
	const password = "the-first-password"
	s := &scene{bed: b, t: t, ctx: t.Context(), ns: "shop", c: b.vault.Client()}
	require.NoError(t, b.vault.Mount(s.ctx, "harmonyflow"))
	t.Cleanup(func() { _ = b.vault.Unmount(t.Context(), "harmonyflow") })
	n := servers.Redis(t, servers.WithUsers("app on >"+password+" ~* +@all -@admin"))
	_, err := s.c.Logical().WriteWithContext(s.ctx, "harmonyflow/connections/cache", map[string]any{
		"type": "redis", "addresses": n.Addr, "username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "app",
	})
	require.NoError(t, err)

	dir := t.TempDir()
	for name, content := range map[string]string{
		"app.password": password, "ca.crt": s.cluster.CA,
		"kubectl": fmt.Sprintf("#!/bin/sh\nKUBECONFIG=%s exec %s kubectl \"$@\"\n", s.cluster.Kubeconfig, os.Getenv(kube.Program)),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o700))
	}
	deploy, err := filepath.Abs("../../deploy")
	require.NoError(t, err)
	require.NoError(t, os.Symlink(deploy, filepath.Join(dir, "deploy")))
	out, err := exec.CommandContext(s.ctx, "go", "build", "-o", filepath.Join(dir, "harmonyflow"), "../../cmd/harmonyflow").CombinedOutput()
	require.NoError(t, err, "%s", out)
	text, err := os.ReadFile("../../" + guide)
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	require.Len(t, blocks, 4, "cluster, role, consumer, rotation")
	types := func(block []string) string {
		t.Helper()
		cmd := exec.CommandContext(s.ctx, "sh", "-ec", strings.ReplaceAll(block[1], "https://10.0.0.1:6443", s.cluster.Host))
		cmd.Dir, cmd.Env = dir, append(b.vault.Env(), "PATH="+dir+string(os.PathListSeparator)+filepath.Dir(b.vault.Binary())+string(os.PathListSeparator)+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s\n%s", block[1], out)
		return string(out)
	}

	require.NoError(t, s.cluster.Namespace(s.ctx, s.ns))
	types(blocks[0])
	types(blocks[1])
	s.sim = s.cluster.Simulate(kube.InNamespace(s.ns))
	t.Cleanup(s.sim.Stop)
	require.NoError(t, s.cluster.ApplyVaultStore(s.ctx, kube.VaultStore{
		Namespace: s.ns, Name: "harmonyflow", Address: s.vault.Address, Mount: "harmonyflow", Token: s.vault.Token,
	}))
	require.NoError(t, s.cluster.ApplyExternalSecret(s.ctx, kube.ExternalSecret{Namespace: s.ns, Name: "web", Store: "harmonyflow", Document: "shop/web"}))
	require.NoError(t, s.cluster.WaitExternalSecret(s.ctx, s.ns, "web"))
	asked := make(chan struct{}, 100)
	s.cluster.Serve(s.ns, "web", http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		select {
		case asked <- struct{}{}:
		default:
		}
	}))
	require.NoError(t, s.cluster.Apply(s.ctx, `
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 8080}]}
`))
	login := map[string]string{
		"sim/secret": "web", "sim/target": "redis", "sim/addr": n.Addr, "sim/every": "20ms", "sim/username": "app", "sim/password-key": "redis-password",
	}
	s.deploy(s.cluster, "Deployment", "canary", 1, login)
	s.deploy(s.cluster, "Deployment", "web", 3, login)

	types(blocks[2])
	said := types(blocks[3])
	require.Contains(t, said, "would make version 2 and retire 1", "the dry run")
	require.NotContains(t, said, "may not", "no right is missing")
	served, err := s.c.Logical().ReadWithContext(s.ctx, "harmonyflow/creds/app")
	require.NoError(t, err)
	require.NotEqual(t, password, served.Data["password"])
	for name, pods := range map[string]int{"canary": 1, "web": 3} {
		require.Equal(t, map[string]int{served.Data["password"].(string): pods}, s.running(name), name)
	}
	require.GreaterOrEqual(t, len(asked), 3, "the check asks three times")
	total := s.sim.Total()
	require.Zero(t, total.Refused)
	figure(t, "the guide to pods, typed: 4 pods of 2 workloads follow, %d logins, %d refused", total.Logins, total.Refused)
}
