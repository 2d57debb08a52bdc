package consumer

import (
	"context"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

var (
	secretStores        = schema.GroupVersionResource{Group: externalGroup, Version: "v1", Resource: "secretstores"}
	clusterSecretStores = schema.GroupVersionResource{Group: externalGroup, Version: "v1", Resource: "clustersecretstores"}
)

// lintStores looks at the stores that ExternalSecrets read from, where that is
// permitted: no delivery needs it.
func (s *step) lintStores(ctx context.Context, externals []*external, f *Finding) error {
	known := map[string]bool{}
	for _, e := range externals {
		of, name := e.text("spec", "secretStoreRef", "kind"), e.text("spec", "secretStoreRef", "name")
		if of == "" {
			of = "SecretStore"
		}
		if name == "" || known[of+"/"+name] {
			continue
		}
		known[of+"/"+name] = true
		o, err := s.store(ctx, of, name)
		switch {
		case apierrors.IsForbidden(err):
			f.note("%s %s is not looked at: reading it is not permitted", of, name)
		case apierrors.IsNotFound(err):
			f.problem("%s %s, which ExternalSecret %s reads from, does not exist", of, name, e.name())
		case err != nil:
			return err
		case condition(o, "Ready", "status") != "True":
			f.problem("%s %s, which ExternalSecret %s reads from, is not ready%s; look at its status", of, name, e.name(), because(o))
		}
	}
	return nil
}

func because(o *unstructured.Unstructured) string {
	if reason := condition(o, "Ready", "reason"); reason != "" {
		return " (" + word(reason) + ")"
	}
	return ""
}

func (s *step) store(ctx context.Context, of, name string) (*unstructured.Unstructured, error) {
	if of == "ClusterSecretStore" {
		return s.dynamic.Resource(clusterSecretStores).Get(ctx, name, metav1.GetOptions{})
	}
	return s.dynamic.Resource(secretStores).Namespace(s.c.Namespace).Get(ctx, name, metav1.GetOptions{})
}

func immutable(e *external) bool {
	is, _, _ := unstructured.NestedBool(e.object.Object, "spec", "target", "immutable")
	return is
}

// pinned are the keys whose version the ExternalSecret has fixed.
func (e *external) pinned() []string {
	var out []string
	add := func(ref map[string]any) {
		version, _ := ref["version"].(string)
		key, _ := ref["key"].(string)
		if version != "" && version != "latest" {
			out = append(out, key)
		}
	}
	data, _, _ := unstructured.NestedSlice(e.object.Object, "spec", "data")
	for _, one := range data {
		if m, ok := one.(map[string]any); ok {
			if ref, ok := m["remoteRef"].(map[string]any); ok {
				add(ref)
			}
		}
	}
	from, _, _ := unstructured.NestedSlice(e.object.Object, "spec", "dataFrom")
	for _, one := range from {
		if m, ok := one.(map[string]any); ok {
			if ref, ok := m["extract"].(map[string]any); ok {
				add(ref)
			}
		}
	}
	return out
}
