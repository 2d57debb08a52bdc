package consumer

import (
	"context"
	"crypto/sha3"
	"fmt"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const externalGroup = "external-secrets.io"

var (
	externalSecrets        = schema.GroupVersionResource{Group: externalGroup, Version: "v1", Resource: "externalsecrets"}
	clusterExternalSecrets = schema.GroupVersionResource{Group: externalGroup, Version: "v1", Resource: "clusterexternalsecrets"}
)

// external is an ExternalSecret.
type external struct {
	object *unstructured.Unstructured
	// parent is the ClusterExternalSecret that it was made from, which mirrors
	// one annotation and prunes all others.
	parent *unstructured.Unstructured
}

func (e *external) name() string { return e.object.GetName() }

func (e *external) text(path ...string) string {
	text, _, _ := unstructured.NestedString(e.object.Object, path...)
	return text
}

// forceKey is any key, but for what a ClusterExternalSecret mirrors.
func (e *external) forceKey() string {
	if e.parent != nil {
		return externalGroup + "/force-sync"
	}
	return "force-sync"
}

// given is what was asked of the ExternalSecret, or of its parent.
func (e *external) given() string {
	if e.parent != nil {
		return e.parent.GetAnnotations()[e.forceKey()]
	}
	return e.object.GetAnnotations()[e.forceKey()]
}

func (e *external) forced(id string) bool { return isOf(e.given(), id) }

// isOf reports whether a value is the id of a delivery, with the number of a
// further try or without.
func isOf(value, id string) bool { return value == id || strings.HasPrefix(value, id+".") }

// tries is how often the ExternalSecret was forced for a delivery.
func (e *external) tries(id string) int {
	n, err := strconv.Atoi(strings.TrimPrefix(e.given(), id+"."))
	if err != nil {
		return 1
	}
	return n
}

// read reports whether External Secrets has read the ExternalSecret for this
// delivery, and done what it says.
//
// It compares status.syncedResourceVersion with what it makes of the object, and
// sets it when it has synced; so it is computed here as there, for the object as it
// is with the annotation of the delivery. Were it computed otherwise one day, a
// refreshTime of a later second than the delivery says as much: it is when the
// reading began. (Its seconds are why it says nothing within one.)
func (e *external) read(d Delivery) bool {
	if e.condition("Ready") != "True" {
		return false
	}
	if e.parent != nil && e.object.GetAnnotations()[e.forceKey()] != e.given() {
		return false // its parent has not handed it down
	}
	return e.text("status", "syncedResourceVersion") == e.resourceVersion() || e.refreshed().After(d.Since)
}

// resourceVersion is GetResourceVersion of External Secrets (pkg/controllers/util,
// the same in 0.20 and 2.9).
func (e *external) resourceVersion() string {
	meta := struct{ annotations, labels map[string]string }{e.object.GetAnnotations(), e.object.GetLabels()}
	return fmt.Sprintf("%d-%x", e.object.GetGeneration(), sha3.Sum224(fmt.Appendf(nil, "%+v", meta)))
}

func (e *external) refreshed() time.Time {
	at, err := time.Parse(time.RFC3339, e.text("status", "refreshTime"))
	if err != nil {
		return time.Time{}
	}
	return at
}

func (e *external) condition(of string) string { return condition(e.object, of, "status") }

func condition(o *unstructured.Unstructured, of, field string) string {
	all, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, one := range all {
		if c, ok := one.(map[string]any); ok && c["type"] == of {
			text, _ := c[field].(string)
			return text
		}
	}
	return ""
}

// failure is why External Secrets says that it could not sync; "" when it does not
// say so. What it says beyond the reason may be what a server answered.
func (e *external) failure() string {
	if e.condition("Ready") != "False" {
		return ""
	}
	return fmt.Sprintf("ExternalSecret %s cannot be synced (%s); look at its events (kubectl describe)", e.name(), word(condition(e.object, "Ready", "reason")))
}

// target is the Secret that is written; "" for none.
func (e *external) target() string {
	if e.text("spec", "target", "creationPolicy") == "None" {
		return ""
	}
	if name := e.text("spec", "target", "name"); name != "" {
		return name
	}
	return e.name()
}

// templated: values of the Secret are made of what is served, and need not be it.
func (e *external) templated() bool {
	template, ok, _ := unstructured.NestedMap(e.object.Object, "spec", "target", "template")
	return ok && (template["data"] != nil || template["templateFrom"] != nil)
}

// externals reads the ExternalSecrets of the consumer.
func (s *step) externals(ctx context.Context) ([]*external, error) {
	client := s.dynamic.Resource(externalSecrets).Namespace(s.c.Namespace)
	var out []*external
	known := map[string]bool{}
	add := func(o *unstructured.Unstructured) {
		if !known[o.GetName()] {
			known[o.GetName()] = true
			out = append(out, &external{object: o})
		}
	}
	for _, one := range s.c.ExternalSecrets {
		if !isSelector(one) {
			o, err := client.Get(ctx, one, metav1.GetOptions{})
			if err != nil {
				return nil, err
			}
			add(o)
			continue
		}
		all, err := listed(ctx, s.cluster, one, func(o metav1.ListOptions) ([]unstructured.Unstructured, string, error) {
			page, err := client.List(ctx, o)
			if err != nil {
				return nil, "", err
			}
			return page.Items, page.GetContinue(), nil
		})
		if err != nil {
			return nil, err
		}
		if len(all) == 0 {
			return nil, kind.Definitely("no ExternalSecret of namespace %q has the labels %s; check external_secrets of the consumer", s.c.Namespace, one)
		}
		for i := range all {
			add(&all[i])
		}
	}
	return out, s.parents(ctx, out)
}

// parents reads the ClusterExternalSecrets that ExternalSecrets were made from.
func (s *step) parents(ctx context.Context, externals []*external) error {
	known := map[string]*unstructured.Unstructured{}
	for _, e := range externals {
		name := parentOf(e.object)
		if name == "" {
			continue
		}
		if known[name] == nil {
			o, err := s.dynamic.Resource(clusterExternalSecrets).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			known[name] = o
		}
		e.parent = known[name]
	}
	return nil
}

func parentOf(o *unstructured.Unstructured) string {
	for _, owner := range o.GetOwnerReferences() {
		if owner.Kind == "ClusterExternalSecret" && strings.HasPrefix(owner.APIVersion, externalGroup+"/") {
			return owner.Name
		}
	}
	return ""
}

func isSelector(s string) bool { return strings.ContainsAny(s, "=!, ()") }

// isMissing reports whether err says that what was asked for is not there.
func isMissing(err error) bool { return apierrors.IsNotFound(err) }
