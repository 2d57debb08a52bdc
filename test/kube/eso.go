package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// ESOProgram names the build of test/tools/eso in the environment.
const ESOProgram = "HARMONYFLOW_ESO"

const externalSecrets = "external-secrets"

// Kinds of External Secrets, for the dynamic client.
var (
	ExternalSecrets = schema.GroupVersionResource{Group: "external-secrets.io", Version: "v1", Resource: "externalsecrets"}
	SecretStores    = schema.GroupVersionResource{Group: "external-secrets.io", Version: "v1", Resource: "secretstores"}
)

var definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// StartESO runs the controller of External Secrets against the cluster, with
// all its kinds, and returns when it is well. Stopping the cluster ends it.
func (c *Cluster) StartESO(ctx context.Context) error {
	program := os.Getenv(ESOProgram)
	if program == "" {
		return errors.New(ESOProgram + " is not set: it is the path that scripts/ensure-eso.sh prints")
	}
	if err := c.defineKinds(ctx, filepath.Join(filepath.Dir(program), "crds")); err != nil {
		return err
	}
	metrics, err := servers.FreePort()
	if err != nil {
		return err
	}
	live, err := servers.FreePort()
	if err != nil {
		return err
	}
	// Out of the cluster it finds the API by this variable alone.
	env := append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	if err := c.launch(externalSecrets, env, program, "--concurrent=2", "--loglevel=info",
		fmt.Sprintf("--metrics-addr=127.0.0.1:%d", metrics), fmt.Sprintf("--live-addr=127.0.0.1:%d", live)); err != nil {
		return err
	}
	return c.until(ctx, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/healthz", live), nil)
		if err != nil {
			return err
		}
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		_ = answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("external secrets is not well: %s", answer.Status)
		}
		return nil
	})
}

// StopESO ends the controller of External Secrets. StartESO starts it again.
func (c *Cluster) StopESO() error { return c.end(externalSecrets, syscall.SIGTERM) }

// defineKinds applies the definitions in a folder and waits until objects of
// all of them can be made.
func (c *Cluster) defineKinds(ctx context.Context, dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("there are no definitions in %s: build them with scripts/ensure-eso.sh", dir)
	}
	var all errgroup.Group
	all.SetLimit(4)
	for _, file := range files {
		if filepath.Base(file) == "kustomization.yaml" {
			continue
		}
		all.Go(func() error {
			data, err := os.ReadFile(file)
			if err != nil {
				return fmt.Errorf("read a definition: %w", err)
			}
			objects, err := decode(data)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			for _, object := range objects {
				if err := c.define(ctx, object); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := all.Wait(); err != nil {
		return err
	}
	// The list of kinds follows a moment after.
	return Until(ctx, func(context.Context) error {
		for _, kind := range []string{"SecretStore", "ExternalSecret"} {
			if _, err := c.mapping(schema.GroupVersionKind{Group: ExternalSecrets.Group, Version: ExternalSecrets.Version, Kind: kind}); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *Cluster) define(ctx context.Context, object unstructured.Unstructured) error {
	client := c.Dynamic.Resource(definitions)
	if _, err := client.Apply(ctx, object.GetName(), &object, metav1.ApplyOptions{FieldManager: manager, Force: true}); err != nil {
		return fmt.Errorf("apply the definition of %s: %w", object.GetName(), err)
	}
	return Until(ctx, func(ctx context.Context) error {
		defined, err := client.Get(ctx, object.GetName(), metav1.GetOptions{})
		if err != nil {
			return err
		}
		if status, _ := condition(defined, "Established"); status != "True" {
			return fmt.Errorf("%s is not established", object.GetName())
		}
		return nil
	})
}

// condition reads a condition of any object.
func condition(object *unstructured.Unstructured, kind string) (status, message string) {
	all, _, _ := unstructured.NestedSlice(object.Object, "status", "conditions")
	for _, entry := range all {
		if of, ok := entry.(map[string]any); ok && of["type"] == kind {
			status, _ = of["status"].(string)
			message, _ = of["message"].(string)
		}
	}
	return status, message
}

// VaultStore is a SecretStore that reads a mount of a Vault as KV version 2. Its
// token lies in a Secret, NAME-token.
type VaultStore struct {
	Namespace, Name string
	Address         string // of Vault
	Mount           string
	Token           string
}

// ApplyVaultStore makes or changes a SecretStore and waits until it is valid.
func (c *Cluster) ApplyVaultStore(ctx context.Context, s VaultStore) error {
	token := s.Name + "-token"
	if err := c.PutSecret(ctx, s.Namespace, token, map[string]string{"token": s.Token}); err != nil {
		return err
	}
	if err := c.applyAll(ctx, []map[string]any{{
		"apiVersion": "external-secrets.io/v1", "kind": "SecretStore",
		"metadata": map[string]any{"name": s.Name, "namespace": s.Namespace},
		"spec": map[string]any{"provider": map[string]any{"vault": map[string]any{
			"server": s.Address, "path": s.Mount, "version": "v2",
			"auth": map[string]any{"tokenSecretRef": map[string]any{"name": token, "key": "token"}},
		}}},
	}}); err != nil {
		return err
	}
	return c.waitReady(ctx, SecretStores, s.Namespace, s.Name)
}

// ExternalSecret is an ExternalSecret whose target is a Secret of its name.
type ExternalSecret struct {
	Namespace, Name string
	Store           string
	Refresh         string            // "1h" where it is empty
	Policy          string            // refreshPolicy, Periodic where it is empty
	Document        string            // a path of the store, of which…
	Fields          map[string]string // … fields are read: key of the Secret → field, all of them where it is nil
}

// ApplyExternalSecret makes or changes an ExternalSecret. WaitExternalSecret
// waits for it.
func (c *Cluster) ApplyExternalSecret(ctx context.Context, e ExternalSecret) error {
	spec := map[string]any{
		"refreshInterval": "1h", "secretStoreRef": map[string]any{"kind": "SecretStore", "name": e.Store},
		"target": map[string]any{"name": e.Name},
	}
	if e.Refresh != "" {
		spec["refreshInterval"] = e.Refresh
	}
	if e.Policy != "" {
		spec["refreshPolicy"] = e.Policy
	}
	if e.Fields == nil {
		spec["dataFrom"] = []any{map[string]any{"extract": map[string]any{"key": e.Document}}}
	} else {
		var data []any
		for key, field := range e.Fields {
			data = append(data, map[string]any{"secretKey": key, "remoteRef": map[string]any{"key": e.Document, "property": field}})
		}
		spec["data"] = data
	}
	return c.applyAll(ctx, []map[string]any{{
		"apiVersion": "external-secrets.io/v1", "kind": "ExternalSecret",
		"metadata": map[string]any{"name": e.Name, "namespace": e.Namespace}, "spec": spec,
	}})
}

// WaitExternalSecret waits until an ExternalSecret is synced.
func (c *Cluster) WaitExternalSecret(ctx context.Context, namespace, name string) error {
	return c.waitReady(ctx, ExternalSecrets, namespace, name)
}

// WaitUnsynced waits until an ExternalSecret is not synced any more, and its last
// event says why.
func (c *Cluster) WaitUnsynced(ctx context.Context, namespace, name, why string) error {
	return Until(ctx, func(ctx context.Context) error {
		object, err := c.Dynamic.Resource(ExternalSecrets).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		status, message := condition(object, "Ready")
		if event := c.lastEvent(ctx, object); status == "True" || !strings.Contains(event, why) {
			return fmt.Errorf("%s is ready: %s (%s%s)", name, status, message, event)
		}
		return nil
	})
}

// ForceSync makes External Secrets read an ExternalSecret now, and waits until
// it has.
func (c *Cluster) ForceSync(ctx context.Context, namespace, name string) error {
	client := c.Dynamic.Resource(ExternalSecrets).Namespace(namespace)
	before, err := client.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	patch := fmt.Sprintf(`{"metadata":{"annotations":{"force-sync":%q}}}`, time.Now().Format(time.RFC3339Nano))
	if _, err := client.Patch(ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("force a sync of %s: %w", name, err)
	}
	// refreshTime has seconds: two syncs in one of them look alike.
	old, _, _ := unstructured.NestedString(before.Object, "status", "syncedResourceVersion")
	return Until(ctx, func(ctx context.Context) error {
		now, err := client.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		status, message := condition(now, "Ready")
		synced, _, _ := unstructured.NestedString(now.Object, "status", "syncedResourceVersion")
		if status != "True" || synced == old {
			return fmt.Errorf("external secret %s is not synced: %s", name, strings.TrimSpace(message))
		}
		return nil
	})
}

func (c *Cluster) waitReady(ctx context.Context, kind schema.GroupVersionResource, namespace, name string) error {
	return Until(ctx, func(ctx context.Context) error {
		object, err := c.Dynamic.Resource(kind).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if status, message := condition(object, "Ready"); status != "True" {
			return fmt.Errorf("%s %s is not ready: %s%s", object.GetKind(), name, message, c.lastEvent(ctx, object))
		}
		return nil
	})
}

// lastEvent is the newest warning of an object, which says what a condition
// does not.
func (c *Cluster) lastEvent(ctx context.Context, object *unstructured.Unstructured) string {
	events, err := c.Core.Events(object.GetNamespace()).List(ctx, metav1.ListOptions{FieldSelector: fields.SelectorFromSet(fields.Set{
		"involvedObject.uid": string(object.GetUID()), "type": corev1.EventTypeWarning,
	}).String()})
	if err != nil || len(events.Items) == 0 {
		return ""
	}
	last := slices.MaxFunc(events.Items, func(a, b corev1.Event) int { return a.LastTimestamp.Compare(b.LastTimestamp.Time) })
	return ": " + last.Message
}
