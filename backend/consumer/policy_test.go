package consumer

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
)

// testPolicy applies what deploy/kubernetes has, delivers with it, and tries to do
// more.
func testPolicy(t *testing.T, w *world) {
	require.NoError(t, w.Namespace(w.ctx, "vault"))
	for _, file := range []string{"serviceaccount", "role", "emergency", "policy", "clusterexternalsecrets"} {
		text, err := os.ReadFile("../../deploy/kubernetes/" + file + ".yaml")
		require.NoError(t, err)
		require.NoError(t, w.Apply(w.ctx, strings.NewReplacer("namespace: app", "namespace: "+w.ns).Replace(string(text))))
	}
	w.store(t)
	w.external(t, kube.ExternalSecret{Name: "db-creds"})
	w.deploy(t, deployment, "web", 1, map[string]string{"keep": "me"})
	w.deploy(t, statefulSet, "db", 1, nil)
	w.deploy(t, daemonSet, "agent", 1, nil)
	w.rolledOut(t, deployment, "web")
	w.rolledOut(t, statefulSet, "db")
	w.rolledOut(t, daemonSet, "agent")
	token, err := w.ServiceAccountToken(w.ctx, "vault", "harmonyflow")
	require.NoError(t, err)
	w.token = token
	e, err := w.entry(w.ctx, "prod")
	require.NoError(t, err)
	c, err := dial(e, podFolder)
	require.NoError(t, err)
	t.Cleanup(c.close)
	w.denied(t, c)

	consumer := w.consumer(func(c *Consumer) {
		c.Workloads = [][]Workload{{{Kind: deployment, Name: "web"}, {Kind: statefulSet, Name: "db"}, {Kind: daemonSet, Selector: "app=agent"}}}
	})
	f := w.k.Preflight(w.ctx, consumer)
	require.NoError(t, f.Err)
	require.Empty(t, f.Problems)
	w.serve(map[string]string{"pass": "second-value"})
	d := delivery("r1", "second-value")
	w.until(t, w.k.Sync, consumer, d)
	w.until(t, w.k.Restart, consumer, d)
	w.until(t, w.k.Check, consumer, d)
	w.flags(t, c, consumer)

	_, err = c.core.Secrets(w.ns).List(w.ctx, metav1.ListOptions{})
	require.True(t, apierrors.IsForbidden(err), "%v", err)
	require.True(t, apierrors.IsForbidden(c.apps.Deployments(w.ns).Delete(w.ctx, "web", metav1.DeleteOptions{})))
	_, err = c.apps.Deployments("default").Get(w.ctx, "web", metav1.GetOptions{})
	require.True(t, apierrors.IsForbidden(err), "%v", err)
}

// flags has an emergency flag pods, and tries what else could be done to them.
func (w *world) flags(t *testing.T, c *cluster, consumer *Consumer) {
	t.Helper()
	d := delivery("r2-e1001", "second-value")
	d.Emergency = &Emergency{Whole: true}
	w.until(t, w.k.Restart, consumer, d)
	w.until(t, w.k.Check, consumer, d)
	pods, err := c.core.Pods(w.ns).List(w.ctx, metav1.ListOptions{})
	require.NoError(t, err)
	require.Len(t, living(pods.Items), 3)
	for _, p := range living(pods.Items) {
		require.Equal(t, "r2", p.Annotations[SecurityAlert], p.Name)
	}
	name := living(pods.Items)[0].Name
	for _, text := range []string{
		`{"metadata":{"annotations":{"more":"x"}}}`, `{"metadata":{"labels":{"more":"x"}}}`, `{"metadata":{"finalizers":["attacker/stays"]}}`,
		`{"metadata":{"ownerReferences":null}}`, `{"spec":{"activeDeadlineSeconds":1}}`,
	} {
		_, err := c.core.Pods(w.ns).Patch(w.ctx, name, types.MergePatchType, []byte(text), metav1.PatchOptions{})
		require.ErrorContains(t, err, "harmonyflow-pods", text)
	}
	require.True(t, apierrors.IsForbidden(c.core.Pods(w.ns).Delete(w.ctx, name, metav1.DeleteOptions{})))
}

// denied tries each change that a stolen token would be used for.
func (w *world) denied(t *testing.T, c *cluster) {
	t.Helper()
	patch := func(of, name, text string) error {
		var err error
		how, body, o := types.MergePatchType, []byte(text), metav1.PatchOptions{}
		if strings.HasPrefix(text, `{"spec":{"template":{"spec"`) {
			how = types.StrategicMergePatchType
		}
		switch of {
		case deployment:
			_, err = c.apps.Deployments(w.ns).Patch(w.ctx, name, how, body, o)
		case statefulSet:
			_, err = c.apps.StatefulSets(w.ns).Patch(w.ctx, name, how, body, o)
		case daemonSet:
			_, err = c.apps.DaemonSets(w.ns).Patch(w.ctx, name, how, body, o)
		default:
			_, err = c.dynamic.Resource(externalSecrets).Namespace(w.ns).Patch(w.ctx, name, types.MergePatchType, body, o)
		}
		return err
	}
	// A policy holds a moment after it was made.
	for _, of := range [][2]string{{deployment, "web"}, {"ExternalSecret", "db-creds"}} {
		require.Eventually(t, func() bool {
			return patch(of[0], of[1], fmt.Sprintf(`{"metadata":{"labels":{"probe":"x%d"}}}`, time.Now().UnixNano())) != nil
		}, 30*time.Second, 200*time.Millisecond)
	}
	everywhere := []string{
		`{"spec":{"template":{"spec":{"containers":[{"name":"main","image":"attacker/miner:1"}]}}}}`,
		`{"spec":{"template":{"spec":{"containers":[{"name":"more","image":"attacker/miner:1"}]}}}}`,
		`{"spec":{"template":{"spec":{"serviceAccountName":"cluster-admin"}}}}`,
		`{"spec":{"template":{"spec":{"hostNetwork":true}}}}`,
		`{"spec":{"template":{"spec":{"volumes":[{"name":"s","secret":{"secretName":"other"}}]}}}}`,
		`{"spec":{"template":{"metadata":{"annotations":{"sidecar.istio.io/inject":"true"}}}}}`,
		`{"spec":{"template":{"metadata":{"labels":{"more":"x"}}}}}`,
		`{"spec":{"minReadySeconds":3}}`,
		`{"spec":{"revisionHistoryLimit":1}}`,
		`{"metadata":{"labels":{"more":"x"}}}`,
		`{"metadata":{"annotations":{"more":"x"}}}`,
		`{"metadata":{"finalizers":["attacker/stays"]}}`,
	}
	for of, own := range map[string][]string{
		deployment: {
			`{"spec":{"replicas":0}}`, `{"spec":{"paused":true}}`, `{"spec":{"strategy":{"type":"Recreate","rollingUpdate":null}}}`,
			`{"spec":{"progressDeadlineSeconds":5}}`, `{"spec":{"template":{"metadata":{"annotations":{"keep":null}}}}}`,
			`{"spec":{"template":{"metadata":{"annotations":{"keep":"other"}}}}}`,
		},
		statefulSet: {`{"spec":{"replicas":3}}`, `{"spec":{"updateStrategy":{"type":"OnDelete","rollingUpdate":null}}}`, `{"spec":{"podManagementPolicy":"Parallel"}}`, `{"spec":{"persistentVolumeClaimRetentionPolicy":{"whenDeleted":"Delete"}}}`, `{"spec":{"ordinals":{"start":1}}}`},
		daemonSet:   {`{"spec":{"updateStrategy":{"type":"OnDelete","rollingUpdate":null}}}`},
	} {
		name := map[string]string{deployment: "web", statefulSet: "db", daemonSet: "agent"}[of]
		for _, text := range append(own, everywhere...) {
			err := patch(of, name, text)
			require.Error(t, err, "%s: %s", of, text)
			if !strings.Contains(text, "podManagementPolicy") { // which nobody may change
				require.Contains(t, err.Error(), "harmonyflow-workloads", "%s: %s", of, text)
			}
		}
	}
	_, err := c.apps.Deployments(w.ns).Patch(w.ctx, "web", types.MergePatchType, []byte(`{"spec":{"replicas":0}}`), metav1.PatchOptions{}, "scale")
	require.Error(t, err)
	for _, text := range []string{
		`{"spec":{"refreshInterval":"1s"}}`, `{"spec":{"dataFrom":[{"extract":{"key":"other"}}]}}`, `{"metadata":{"annotations":{"more":"x"}}}`,
		`{"metadata":{"labels":{"more":"x"}}}`, `{"spec":{"target":{"name":"other"}}}`,
	} {
		require.ErrorContains(t, patch("ExternalSecret", "db-creds", text), "harmonyflow-externalsecrets", text)
	}
	// And says so in a sentence that names the policy.
	require.ErrorContains(t, c.explain(patch(deployment, "web", everywhere[0])), "policy harmonyflow-workloads refuses the change of deployments web")
}
