package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// The names are those of deploy/kubernetes/role.yaml, which is applied as it is.
const (
	namespace  = "app"
	workload   = "web"
	secretName = "db-creds"
	replicas   = 4
)

// clusterStage is a stage with a Kubernetes cluster, and one Redis.
type clusterStage struct {
	*stage
	node    *servers.RedisNode
	cluster *kube.Cluster
	sim     *kube.Simulator

	redisVersion, kubeVersion string
}

// setUpCluster starts everything at once. What it started is stopped by close,
// also after an error.
func setUpCluster(ctx context.Context, s *screen) (*clusterStage, error) {
	dir, err := os.MkdirTemp("", "harmonyflow-demo-")
	if err != nil {
		return nil, err
	}
	st := &clusterStage{stage: &stage{screen: s, dir: dir}}
	if err := st.start(ctx); err != nil {
		return nil, errors.Join(err, st.close())
	}
	return st, nil
}

func (st *clusterStage) start(ctx context.Context) error {
	for _, name := range []string{"vault", "redis", "here"} {
		if err := os.Mkdir(filepath.Join(st.dir, name), 0o700); err != nil {
			return err
		}
	}
	password := rand.Text()
	for name, text := range map[string]string{adminFile: servers.RedisAdminPassword, appFile: password} {
		if err := os.WriteFile(st.here(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	var g errgroup.Group // without a context: each has to be there to be stopped
	g.Go(func() (err error) {
		st.vault, err = servers.StartVault(servers.VaultOptions{Dir: filepath.Join(st.dir, "vault")})
		return err
	})
	g.Go(func() (err error) {
		st.node, err = servers.StartRedis(ctx, filepath.Join(st.dir, "redis"),
			servers.WithUsers("default off", "app on >"+password+" ~app:* +@all -@admin -@dangerous"))
		return err
	})
	g.Go(func() (err error) {
		if st.cluster, err = kube.Start(ctx, filepath.Join(st.dir, "cluster")); err != nil {
			return err
		}
		return st.cluster.StartESO(ctx)
	})
	if err := g.Wait(); err != nil {
		return err
	}
	st.sim = st.cluster.Simulate(kube.InNamespace(namespace))
	return st.lookAround(ctx)
}

// lookAround asks what was started for its version, and lays out where the user
// types.
func (st *clusterStage) lookAround(ctx context.Context) error {
	if err := st.admit(ctx); err != nil {
		return err
	}
	info, err := st.node.Info(ctx, "server")
	if err != nil {
		return err
	}
	st.redisVersion = info["redis_version"]
	version, err := st.cluster.Core.RESTClient().Get().AbsPath("/version").DoRaw(ctx)
	if err != nil {
		return err
	}
	var kubernetes struct{ GitVersion string }
	if err := json.Unmarshal(version, &kubernetes); err != nil {
		return err
	}
	st.kubeVersion = strings.TrimPrefix(kubernetes.GitVersion, "v")
	root, err := repository()
	if err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join(root, "deploy"), st.here("deploy")); err != nil {
		return err
	}
	if err := os.WriteFile(st.here("ca.crt"), []byte(st.cluster.CA), 0o600); err != nil {
		return err
	}
	return st.writeManifest(ctx)
}

// repository is the folder of go.mod.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("start the demo inside its repository: it applies deploy/kubernetes")
}

// writeManifest writes app.yaml: what an application has already.
func (st *clusterStage) writeManifest(ctx context.Context) error {
	token, err := st.vault.TokenFor(ctx, "external-secrets",
		`path "harmonyflow/data/`+secretName+`" { capabilities = ["read"] }
path "auth/token/lookup-self" { capabilities = ["read"] }`)
	if err != nil {
		return err
	}
	text := strings.NewReplacer("ADDRESS", st.vault.Address, "TOKEN", token, "REDIS", st.node.Addr).Replace(manifest)
	return os.WriteFile(st.here(manifestFile), []byte(text), 0o600)
}

const manifestFile = "app.yaml"

const manifest = `apiVersion: v1
kind: Secret
metadata: {name: vault-token, namespace: app}
stringData: {token: TOKEN}
---
apiVersion: external-secrets.io/v1
kind: SecretStore
metadata: {name: harmonyflow, namespace: app}
spec:
  provider:
    vault:
      server: ADDRESS
      path: harmonyflow
      version: v2
      auth: {tokenSecretRef: {name: vault-token, key: token}}
---
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: db-creds, namespace: app}
spec:
  refreshInterval: 1h
  secretStoreRef: {kind: SecretStore, name: harmonyflow}
  target: {name: db-creds}
  dataFrom: [{extract: {key: db-creds}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: app}
spec:
  replicas: 4
  selector: {matchLabels: {app: web}}
  template:
    metadata:
      labels: {app: web}
      annotations: {sim/secret: db-creds, sim/target: redis, sim/addr: "REDIS", sim/every: 50ms}
    spec: {containers: [{name: main, image: example.com/web:1}]}
`

// close stops what was started and removes what was written.
func (st *clusterStage) close() error {
	if st.sim != nil {
		st.sim.Stop()
	}
	var err error
	if st.cluster != nil {
		err = st.cluster.Stop()
	}
	if st.node != nil {
		err = errors.Join(err, st.node.Kill())
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", errLeft, err)
	}
	return errors.Join(err, st.stage.close())
}

// kubectl shows and runs a kubectl command, where files are those of the user. What
// follows ">" is a file that takes what it prints.
func (st *clusterStage) kubectl(ctx context.Context, args ...string) error {
	st.command(append([]string{"kubectl"}, args...)...)
	words, into := args, ""
	if i := slices.Index(args, ">"); i >= 0 {
		words, into = args[:i], args[i+1]
	}
	located := slices.Clone(words)
	for i, word := range words {
		if i > 0 && words[i-1] == "-f" {
			located[i] = st.here(word)
		}
	}
	out, err := st.cluster.Kubectl(ctx, located...)
	if err == nil && into != "" {
		err = os.WriteFile(st.here(into), []byte(out), 0o600)
	}
	return err
}
