package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	esv1 "github.com/external-secrets/external-secrets/apis/externalsecrets/v1"
	genv1alpha1 "github.com/external-secrets/external-secrets/apis/generators/v1alpha1"
	secretsv1beta1 "github.com/hashicorp/vault-secrets-operator/api/v1beta1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/meta/testrestmapper"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/uuid"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	"k8s.io/utils/ptr"
	"net/http"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache/informertest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

// namespace holds every object.
const namespace = "default"

// cluster is a Kubernetes API in memory. It gives new objects a UID and counts
// generations as an API server does, refuses fields that a kind does not have,
// and sets the defaults of the kinds' definitions that matter here.
type cluster struct {
	client   client.WithWatch
	scheme   *runtime.Scheme
	decoder  runtime.Decoder
	recorder *record.FakeRecorder
	manager  ctrl.Manager
}

func newCluster(dir string) (*cluster, error) {
	c := &cluster{scheme: runtime.NewScheme(), recorder: record.NewFakeRecorder(1000)}
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, esv1.AddToScheme, genv1alpha1.AddToScheme, secretsv1beta1.AddToScheme,
	} {
		if err := add(c.scheme); err != nil {
			return nil, err
		}
	}
	c.decoder = serializer.NewCodecFactory(c.scheme, serializer.EnableStrict).UniversalDeserializer()
	c.client = fake.NewClientBuilder().WithScheme(c.scheme).
		WithStatusSubresource(&esv1.SecretStore{}, &esv1.ExternalSecret{}, &secretsv1beta1.VaultStaticSecret{}, &secretsv1beta1.VaultDynamicSecret{}).
		WithInterceptorFuncs(interceptor.Funcs{
			Create: func(ctx context.Context, c client.WithWatch, o client.Object, options ...client.CreateOption) error {
				o.SetUID(uuid.NewUUID())
				o.SetGeneration(1)
				return c.Create(ctx, o, options...)
			},
		}).Build()

	// Both operators make clients for tokens of service accounts, which nothing
	// here uses; they are never connected.
	config := &rest.Config{Host: "https://127.0.0.1:1"}
	kubeconfig := filepath.Join(dir, "kubeconfig")
	err := os.WriteFile(kubeconfig, []byte(`apiVersion: v1
kind: Config
clusters: [{name: none, cluster: {server: "`+config.Host+`"}}]
contexts: [{name: none, context: {cluster: none}}]
current-context: none
`), 0o600)
	if err != nil {
		return nil, err
	}
	if err := os.Setenv("KUBECONFIG", kubeconfig); err != nil {
		return nil, err
	}

	// A manager that is never started: controllers are set up with it, and
	// reconcile when they are told to.
	c.manager, err = ctrl.NewManager(config, ctrl.Options{
		Scheme: c.scheme,
		MapperProvider: func(*rest.Config, *http.Client) (meta.RESTMapper, error) {
			return testrestmapper.TestOnlyStaticRESTMapper(c.scheme), nil
		},
		NewClient: func(*rest.Config, client.Options) (client.Client, error) { return c.client, nil },
		NewCache: func(*rest.Config, cache.Options) (cache.Cache, error) {
			return &informertest.FakeInformers{Scheme: c.scheme}, nil
		},
		Metrics:                metricsserver.Options{BindAddress: "0"},
		HealthProbeBindAddress: "0",
	})
	return c, err
}

// apply creates the objects of a stream of YAML documents, or replaces what they
// specify.
func (c *cluster) apply(ctx context.Context, manifests string) error {
	documents := utilyaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(manifests)))
	for {
		buffer := make([]byte, len(manifests)+1)
		n, err := documents.Read(buffer)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(bytes.TrimSpace(buffer[:n])) == 0 {
			continue
		}
		decoded, _, err := c.decoder.Decode(buffer[:n], nil, nil)
		if err != nil {
			return err
		}
		o, ok := decoded.(client.Object)
		if !ok {
			return fmt.Errorf("%T is no object", decoded)
		}
		o.SetNamespace(namespace)
		setDefaults(o)
		if err := c.put(ctx, o); err != nil {
			return err
		}
	}
}

func (c *cluster) put(ctx context.Context, o client.Object) error {
	old, ok := o.DeepCopyObject().(client.Object)
	if !ok {
		return fmt.Errorf("%T is no object", o)
	}
	err := c.client.Get(ctx, client.ObjectKeyFromObject(o), old)
	if apierrors.IsNotFound(err) {
		return c.client.Create(ctx, o)
	}
	if err != nil {
		return err
	}
	o.SetUID(old.GetUID())
	o.SetResourceVersion(old.GetResourceVersion())
	o.SetFinalizers(old.GetFinalizers())
	o.SetGeneration(old.GetGeneration() + 1)
	return c.client.Update(ctx, o)
}

func setDefaults(o client.Object) {
	switch o := o.(type) {
	case *corev1.Secret:
		for k, v := range o.StringData {
			if o.Data == nil {
				o.Data = map[string][]byte{}
			}
			o.Data[k] = []byte(v)
		}
		o.StringData = nil
	case *secretsv1beta1.VaultStaticSecret:
		if o.Spec.HMACSecretData == nil {
			o.Spec.HMACSecretData = ptr.To(true)
		}
	case *esv1.ExternalSecret:
		if o.Spec.Target.DeletionPolicy == "" {
			o.Spec.Target.DeletionPolicy = esv1.DeletionPolicyRetain
		}
		for i := range o.Spec.DataFrom {
			if extract := o.Spec.DataFrom[i].Extract; extract != nil && extract.ConversionStrategy == "" {
				extract.ConversionStrategy = esv1.ExternalSecretConversionDefault
			}
			if find := o.Spec.DataFrom[i].Find; find != nil && find.ConversionStrategy == "" {
				find.ConversionStrategy = esv1.ExternalSecretConversionDefault
			}
		}
	}
}

func (c *cluster) get(ctx context.Context, ref objectRef) (client.Object, error) {
	for _, version := range []schema.GroupVersion{corev1.SchemeGroupVersion, appsv1.SchemeGroupVersion, esv1.SchemeGroupVersion, secretsv1beta1.GroupVersion} {
		made, err := c.scheme.New(version.WithKind(ref.Kind))
		if runtime.IsNotRegisteredError(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		o, ok := made.(client.Object)
		if !ok {
			return nil, fmt.Errorf("%T is no object", made)
		}
		return o, c.client.Get(ctx, key(ref.Name), o)
	}
	return nil, fmt.Errorf("there is no kind %s", ref.Kind)
}

// events returns what was recorded since it was last asked.
func (c *cluster) events() []string {
	var events []string
	for {
		select {
		case e := <-c.recorder.Events:
			events = append(events, e)
		default:
			return events
		}
	}
}
