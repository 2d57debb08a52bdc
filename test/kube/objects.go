package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// manager owns the fields of what tests apply.
const manager = "test"

// Apply makes or changes what the documents of a YAML text say (server-side
// apply), in the namespace default where they name none.
func (c *Cluster) Apply(ctx context.Context, documents string) error {
	objects, err := decode([]byte(documents))
	if err != nil {
		return err
	}
	for i := range objects {
		if err := c.applyObject(ctx, &objects[i]); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) applyObject(ctx context.Context, object *unstructured.Unstructured) error {
	client, err := c.clientOf(object)
	if err != nil {
		return err
	}
	if _, err := client.Apply(ctx, object.GetName(), object, metav1.ApplyOptions{FieldManager: manager, Force: true}); err != nil {
		return fmt.Errorf("apply %s %s: %w", object.GetKind(), object.GetName(), err)
	}
	return nil
}

// Delete deletes what the documents of a YAML text name, where it is there.
func (c *Cluster) Delete(ctx context.Context, documents string) error {
	objects, err := decode([]byte(documents))
	if err != nil {
		return err
	}
	for i := range objects {
		client, err := c.clientOf(&objects[i])
		if err != nil {
			return err
		}
		if err := client.Delete(ctx, objects[i].GetName(), metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("delete %s %s: %w", objects[i].GetKind(), objects[i].GetName(), err)
		}
	}
	return nil
}

// clientOf returns the client for an object, and puts one that needs a
// namespace and has none into default.
func (c *Cluster) clientOf(object *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	kind := object.GroupVersionKind()
	mapping, err := c.mapping(kind)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", object.GetKind(), object.GetName(), err)
	}
	client := c.Dynamic.Resource(mapping.Resource)
	if mapping.Scope.Name() != meta.RESTScopeNameNamespace {
		return client, nil
	}
	if object.GetNamespace() == "" {
		object.SetNamespace("default")
	}
	return client.Namespace(object.GetNamespace()), nil
}

// mapping asks the API server again about a kind that was not there.
func (c *Cluster) mapping(kind schema.GroupVersionKind) (*meta.RESTMapping, error) {
	mapping, err := c.Mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if meta.IsNoMatchError(err) {
		c.Mapper.Reset()
		mapping, err = c.Mapper.RESTMapping(kind.GroupKind(), kind.Version)
	}
	return mapping, err
}

// ServiceAccount makes a ServiceAccount that may do what rules say in its
// namespace, and nothing else, and returns a token of it that lasts for a day.
func (c *Cluster) ServiceAccount(ctx context.Context, namespace, name string, rules ...rbacv1.PolicyRule) (string, error) {
	metadata := map[string]any{"name": name, "namespace": namespace}
	objects := []map[string]any{
		{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata, "rules": rules},
		{
			"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": metadata,
			"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
			"subjects": []any{map[string]any{"kind": "ServiceAccount", "name": name, "namespace": namespace}},
		},
	}
	if err := c.applyAll(ctx, objects); err != nil {
		return "", err
	}
	return c.ServiceAccountToken(ctx, namespace, name)
}

// ServiceAccountToken asks for a token of a ServiceAccount that lasts for a day;
// audiences are those of the API server where none are given.
func (c *Cluster) ServiceAccountToken(ctx context.Context, namespace, name string, audiences ...string) (string, error) {
	seconds := int64((24 * time.Hour).Seconds())
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: audiences, ExpirationSeconds: &seconds}}
	answer, err := c.Core.ServiceAccounts(namespace).CreateToken(ctx, name, request, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("token of the service account %s: %w", name, err)
	}
	return answer.Status.Token, nil
}

// applyAll applies objects that were not written as YAML.
func (c *Cluster) applyAll(ctx context.Context, objects []map[string]any) error {
	var documents strings.Builder
	for _, object := range objects {
		data, err := json.Marshal(object)
		if err != nil {
			return err
		}
		fmt.Fprintf(&documents, "---\n%s\n", data)
	}
	return c.Apply(ctx, documents.String())
}

// Namespace makes a namespace and returns when pods can be created in it.
func (c *Cluster) Namespace(ctx context.Context, name string) error {
	if err := c.applyAll(ctx, []map[string]any{{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name}}}); err != nil {
		return err
	}
	return Until(ctx, func(ctx context.Context) error {
		_, err := c.Core.ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// PutSecret makes a Secret, or replaces everything in it.
func (c *Cluster) PutSecret(ctx context.Context, namespace, name string, data map[string]string) error {
	return c.applyAll(ctx, []map[string]any{{
		"apiVersion": "v1", "kind": "Secret", "metadata": map[string]any{"name": name, "namespace": namespace}, "stringData": data,
	}})
}

// PatchSecret changes some keys of a Secret.
func (c *Cluster) PatchSecret(ctx context.Context, namespace, name string, data map[string]string) error {
	patch, err := json.Marshal(map[string]any{"stringData": data})
	if err != nil {
		return err
	}
	if _, err := c.Core.Secrets(namespace).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("patch the secret %s: %w", name, err)
	}
	return nil
}

// Secret returns what is in a Secret.
func (c *Cluster) Secret(ctx context.Context, namespace, name string) (map[string]string, error) {
	secret, err := c.Core.Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return textOf(secret), nil
}

func textOf(secret *corev1.Secret) map[string]string {
	data := map[string]string{}
	for key, value := range secret.Data {
		data[key] = string(value)
	}
	return data
}

// Kubectl runs kubectl as the administrator and returns what it prints.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.program, append([]string{"kubectl"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig, "KUBECACHEDIR="+c.file("kubectl"))
	out, err := cmd.Output()
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, failed.Stderr)
	}
	return string(out), err
}
