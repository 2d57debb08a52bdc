package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	namespace = "bench"
	service   = "web"
)

// restarts counts how often a service that has many secrets is restarted when all of them
// are rotated: by the engine, by whatever restarts it when one of its Secrets changed, and by a
// runbook that restarts it after each.
func restarts(ctx context.Context, b *bench) (_ *result, err error) {
	r := &result{}
	if b.kube == "" || b.eso == "" {
		r.note("Left out: there is no Kubernetes, or no External Secrets.")
		r.targets = append(r.targets, target{what: "restarts of the service", goal: "at most 1", found: "not measured", unknown: true})
		return r, nil
	}
	s, err := b.startVault(servers.VaultOptions{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	c, err := kube.Start(ctx, filepath.Join(b.dir, "kube"))
	if err != nil {
		return nil, err
	}
	s.stops = append(s.stops, c.Stop)
	d := &delivery{bench: b, stage: s, cluster: c}
	if err := d.prepare(ctx); err != nil {
		return nil, err
	}
	ways := []struct {
		name   string
		rotate func(context.Context) error
		counts []int
	}{
		{name: "HarmonyFlow, `rotate/api-key`", rotate: d.together},
		{name: "a restart when a Secret changed", rotate: d.reloaded},
		{name: "a runbook: rotate, restart, next", rotate: d.oneByOne},
	}
	err = turns(b.deliveryRounds, len(ways), func(round, which int) error {
		before, err := d.generation(ctx)
		if err != nil {
			return err
		}
		if err := ways[which].rotate(ctx); err != nil {
			return fmt.Errorf("%s: %w", ways[which].name, err)
		}
		after, err := d.generation(ctx)
		ways[which].counts = append(ways[which].counts, int(after-before))
		b.say("round %d: %s, %d restarts", round+1, ways[which].name, after-before)
		return err
	})
	if err != nil {
		return nil, err
	}
	t := table{head: []string{fmt.Sprintf("%d secrets of one service are rotated", b.secrets), "restarts of the service"}}
	p := plot{Name: "restarts", Title: fmt.Sprintf("Restarts of a service with %d secrets", b.secrets), Y: "restarts", Lines: []line{{}}}
	for i, way := range ways {
		var counts series
		for _, n := range way.counts {
			counts = append(counts, float64(n))
		}
		t.add(way.name, counts.String())
		p.Labels = append(p.Labels, way.name)
		p.Lines[0].add(counts)
		if i == 0 {
			r.most("restarts of the service", counts, 1)
		}
	}
	r.tables, r.plots = []table{t}, []plot{p}
	return r, nil
}

// delivery is a service whose secrets come out of the engine through External Secrets,
// each in a Secret of its own.
type delivery struct {
	*bench
	stage   *stage
	cluster *kube.Cluster
}

func secretName(i int) string { return fmt.Sprintf("token-%d", i) }

func (d *delivery) prepare(ctx context.Context) error {
	c, s := d.cluster, d.stage
	if err := c.StartESO(ctx); err != nil {
		return err
	}
	if err := c.Namespace(ctx, namespace); err != nil {
		return err
	}
	if err := c.ApplyVaultStore(ctx, kube.VaultStore{
		Namespace: namespace, Name: "harmonyflow", Address: s.vault.Address, Mount: "harmonyflow", Token: s.vault.Token,
	}); err != nil {
		return err
	}
	if _, err := s.write(ctx, "harmonyflow/connections/k8s", fields{
		"type": "kubernetes", "host": c.Host, "ca_cert": c.CA, "token": c.Token, "allowed_roles": "*",
	}); err != nil {
		return err
	}
	if err := c.Apply(ctx, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  replicas: 3
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec: {containers: [{name: main, image: example.com/web:1}]}
`, service, namespace)); err != nil {
		return err
	}
	if err := c.WaitRollout(ctx, "deployment", namespace, service); err != nil {
		return err
	}
	var names []string
	for i := range d.secrets {
		names = append(names, secretName(i))
		if _, err := s.write(ctx, "harmonyflow/roles/"+secretName(i), fields{
			"kind": "api-key", "document": secretName(i), "field": "token", "previous_field": "old", "grace_period": "1h",
		}); err != nil {
			return err
		}
		if err := c.ApplyExternalSecret(ctx, kube.ExternalSecret{Namespace: namespace, Name: secretName(i), Store: "harmonyflow", Document: secretName(i)}); err != nil {
			return err
		}
		if err := c.WaitExternalSecret(ctx, namespace, secretName(i)); err != nil {
			return err
		}
	}
	_, err := s.write(ctx, "harmonyflow/consumers/"+service, fields{
		"connection": "k8s", "namespace": namespace, "allowed_roles": "*", "external_secrets": strings.Join(names, ","),
		"workloads": fmt.Sprintf(`[[{"kind":"Deployment","name":%q}]]`, service), "stabilization": "1s", "rollout_timeout": "5m",
	})
	return err
}

// generation counts changes of what the service's pods are made of.
func (d *delivery) generation(ctx context.Context) (int64, error) {
	w, err := d.cluster.Apps.Deployments(namespace).Get(ctx, service, metav1.GetOptions{})
	if err != nil {
		return 0, err
	}
	return w.Generation, nil
}

// consumedBy says who has the service restarted: the engine, or nobody.
func (d *delivery) consumedBy(ctx context.Context, consumer string) error {
	for i := range d.secrets {
		if _, err := d.stage.write(ctx, "harmonyflow/roles/"+secretName(i), fields{"consumers": consumer}); err != nil {
			return err
		}
	}
	return nil
}

// together has the engine rotate all secrets and bring them to the service's pods.
func (d *delivery) together(ctx context.Context) error {
	if err := d.consumedBy(ctx, service); err != nil {
		return err
	}
	data, err := d.stage.write(ctx, "harmonyflow/rotate/api-key", fields{})
	if err != nil {
		return err
	}
	id := fmt.Sprint(data["rotation_id"])
	if err := await(ctx, "grace", 10*time.Minute, func() (bool, error) {
		told, err := d.stage.read(ctx, "harmonyflow/rotations/"+id)
		if err == nil && told["state"] != "grace" {
			err = fmt.Errorf("the rotation is %v (%v)", told["state"], told["summary"])
		}
		return err == nil, err
	}); err != nil {
		return err
	}
	return d.retire(ctx)
}

// retire ends what the rotations left open, so that the next may begin.
func (d *delivery) retire(ctx context.Context) error {
	for i := range d.secrets {
		if _, err := d.stage.write(ctx, "harmonyflow/retire/api-key/"+secretName(i), fields{}); err != nil {
			return err
		}
	}
	return d.stage.calm(ctx)
}

// reloaded rotates all secrets, which nobody delivers, while a loop does what Reloader and
// the rollout targets of Vault Secrets Operator do: it restarts the service when one of its
// Secrets has changed.
func (d *delivery) reloaded(ctx context.Context) error {
	if err := d.consumedBy(ctx, ""); err != nil {
		return err
	}
	known, err := d.hashes(ctx)
	if err != nil {
		return err
	}
	if _, err := d.stage.write(ctx, "harmonyflow/rotate/api-key", fields{}); err != nil {
		return err
	}
	changed := map[string]bool{}
	for i := range d.secrets {
		if err := d.cluster.ForceSync(ctx, namespace, secretName(i)); err != nil {
			return err
		}
	}
	if err := await(ctx, "the change of every Secret", 5*time.Minute, func() (bool, error) {
		now, err := d.hashes(ctx)
		if err != nil {
			return false, err
		}
		for name, hash := range now {
			if hash != known[name] {
				known[name], changed[name] = hash, true
				if err := d.annotate(ctx, name, hash); err != nil {
					return false, err
				}
			}
		}
		return len(changed) == d.secrets, nil
	}); err != nil {
		return err
	}
	if err := d.cluster.WaitRollout(ctx, "deployment", namespace, service); err != nil {
		return err
	}
	return d.retire(ctx)
}

// hashes are what the service's Secrets hold.
func (d *delivery) hashes(ctx context.Context) (map[string]string, error) {
	out := map[string]string{}
	for i := range d.secrets {
		data, err := d.cluster.Secret(ctx, namespace, secretName(i))
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256([]byte(data["token"]))
		out[secretName(i)] = hex.EncodeToString(sum[:])
	}
	return out, nil
}

// annotate changes the service's pods, as Reloader does.
func (d *delivery) annotate(ctx context.Context, name, hash string) error {
	patch, err := json.Marshal(fields{"spec": fields{"template": fields{"metadata": fields{"annotations": fields{"bench/" + name: hash}}}}})
	if err != nil {
		return err
	}
	_, err = d.cluster.Apps.Deployments(namespace).Patch(ctx, service, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	return err
}

// oneByOne is the runbook: rotate a secret, bring it over, restart, wait, next.
func (d *delivery) oneByOne(ctx context.Context) error {
	if err := d.consumedBy(ctx, ""); err != nil {
		return err
	}
	for i := range d.secrets {
		if _, err := d.stage.write(ctx, "harmonyflow/rotate/api-key/"+secretName(i), fields{}); err != nil {
			return err
		}
		if err := d.cluster.ForceSync(ctx, namespace, secretName(i)); err != nil {
			return err
		}
		if err := d.cluster.Restart(ctx, "deployment", namespace, service); err != nil {
			return err
		}
		if err := d.cluster.WaitRollout(ctx, "deployment", namespace, service); err != nil {
			return err
		}
	}
	return d.retire(ctx)
}
