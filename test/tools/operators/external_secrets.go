package main

import (
	"context"
	"errors"
	"fmt"

	esv1 "github.com/external-secrets/external-secrets/apis/externalsecrets/v1"
	"github.com/external-secrets/external-secrets/pkg/esutils"
	"github.com/external-secrets/external-secrets/pkg/esutils/resolvers"
	_ "github.com/external-secrets/external-secrets/pkg/generator/vault"
	_ "github.com/external-secrets/external-secrets/pkg/provider/vault"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// externalSecrets fills Secrets with the Vault provider and the Vault generator
// of External Secrets, which read and decode everything. The order in which they
// are asked is that of its controller; the controller itself links the clients
// of forty other stores, so it is not built here.
type externalSecrets struct{ cluster *cluster }

func (e *externalSecrets) store(ctx context.Context, name string) (esv1.Provider, *esv1.SecretStore, error) {
	store := &esv1.SecretStore{}
	if err := e.cluster.client.Get(ctx, key(name), store); err != nil {
		return nil, nil, err
	}
	store.TypeMeta = metav1.TypeMeta{Kind: esv1.SecretStoreKind, APIVersion: esv1.SchemeGroupVersion.String()}
	provider, err := esv1.GetProvider(store)
	return provider, store, err
}

func (e *externalSecrets) open(ctx context.Context, name string) (esv1.SecretsClient, error) {
	provider, store, err := e.store(ctx, name)
	if err != nil {
		return nil, err
	}
	return provider.NewClient(ctx, store, e.cluster.client, namespace)
}

// validate is what makes a SecretStore Ready.
func (e *externalSecrets) validate(ctx context.Context, name types.NamespacedName) error {
	provider, store, err := e.store(ctx, name.Name)
	if err != nil {
		return err
	}
	if _, err := provider.ValidateStore(store); err != nil {
		return err
	}
	client, err := provider.NewClient(ctx, store, e.cluster.client, namespace)
	if err != nil {
		return err
	}
	result, err := client.Validate()
	if err == nil && result != esv1.ValidationResultReady {
		err = fmt.Errorf("the store is not ready: %s", result)
	}
	return errors.Join(err, client.Close(ctx))
}

func (e *externalSecrets) reconcile(ctx context.Context, name types.NamespacedName) error {
	es := &esv1.ExternalSecret{}
	if err := e.cluster.client.Get(ctx, name, es); err != nil {
		return err
	}
	data, err := e.read(ctx, es)
	if err != nil {
		return err
	}
	target := es.Spec.Target.Name
	if target == "" {
		target = es.Name
	}
	return e.cluster.put(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: target}, Data: data})
}

func (e *externalSecrets) read(ctx context.Context, es *esv1.ExternalSecret) (data map[string][]byte, err error) {
	clients := map[string]esv1.SecretsClient{}
	defer func() {
		for _, client := range clients {
			err = errors.Join(err, client.Close(ctx))
		}
	}()
	client := func() (esv1.SecretsClient, error) {
		name := es.Spec.SecretStoreRef.Name
		if clients[name] == nil {
			opened, err := e.open(ctx, name)
			if err != nil {
				return nil, err
			}
			clients[name] = opened
		}
		return clients[name], nil
	}
	missing := func(err error) bool {
		return errors.Is(err, esv1.NoSecretErr) && es.Spec.Target.DeletionPolicy != esv1.DeletionPolicyRetain
	}

	data = map[string][]byte{}
	for i, from := range es.Spec.DataFrom {
		var found map[string][]byte
		var err error
		if from.SourceRef != nil && from.SourceRef.GeneratorRef != nil {
			found, err = e.generate(ctx, from)
		} else {
			found, err = readMap(ctx, client, from)
		}
		if missing(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("spec.dataFrom[%d]: %w", i, err)
		}
		data = esutils.MergeByteMap(data, found)
	}
	for i, one := range es.Spec.Data {
		c, err := client()
		if err != nil {
			return nil, err
		}
		value, err := c.GetSecret(ctx, one.RemoteRef)
		if missing(err) {
			continue
		}
		if err == nil {
			value, err = esutils.Decode(one.RemoteRef.DecodingStrategy, value)
		}
		if err != nil {
			return nil, fmt.Errorf("spec.data[%d]: %w", i, err)
		}
		data[one.SecretKey] = value
	}
	return data, nil
}

func readMap(ctx context.Context, client func() (esv1.SecretsClient, error), from esv1.ExternalSecretDataFromRemoteRef) (map[string][]byte, error) {
	c, err := client()
	if err != nil {
		return nil, err
	}
	var found map[string][]byte
	var conversion esv1.ExternalSecretConversionStrategy
	switch {
	case from.Extract != nil:
		found, err = c.GetSecretMap(ctx, *from.Extract)
		conversion = from.Extract.ConversionStrategy
	case from.Find != nil:
		found, err = c.GetAllSecrets(ctx, *from.Find)
		conversion = from.Find.ConversionStrategy
	default:
		err = errors.New("there is nothing to read")
	}
	if err != nil {
		return nil, err
	}
	if len(from.Rewrite) > 0 {
		return esutils.RewriteMap(from.Rewrite, found)
	}
	return esutils.ConvertKeys(conversion, found)
}

func (e *externalSecrets) generate(ctx context.Context, from esv1.ExternalSecretDataFromRemoteRef) (map[string][]byte, error) {
	generator, spec, err := resolvers.GeneratorRef(ctx, e.cluster.client, e.cluster.scheme, namespace, from.SourceRef.GeneratorRef)
	if err != nil {
		return nil, err
	}
	found, _, err := generator.Generate(ctx, spec, e.cluster.client, namespace)
	return found, err
}
