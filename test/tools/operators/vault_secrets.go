package main

import (
	"context"

	"github.com/hashicorp/vault-secrets-operator/controllers"
	"github.com/hashicorp/vault-secrets-operator/helpers"
	"github.com/hashicorp/vault-secrets-operator/vault"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/controller"
)

// vaultSecrets sets up the controllers of Vault Secrets Operator, as its main
// does.
func vaultSecrets(ctx context.Context, c *cluster) (map[string]reconciler, error) {
	config := vault.DefaultCachingClientFactoryConfig()
	config.Recorder = c.recorder
	factory, err := vault.InitCachingClientFactory(ctx, c.client, config)
	if err != nil {
		return nil, err
	}
	validator := helpers.NewHMACValidator(config.StorageConfig.HMACSecretObjKey)
	transformation := &helpers.GlobalTransformationOptions{}

	static := &controllers.VaultStaticSecretReconciler{
		Client: c.client, SecretsClient: c.client, Scheme: c.scheme, Recorder: c.recorder, ClientFactory: factory,
		SecretDataBuilder: helpers.NewSecretsDataBuilder(), HMACValidator: validator,
		BackOffRegistry: controllers.NewBackOffRegistry(), GlobalTransformationOptions: transformation,
	}
	if err := static.SetupWithManager(c.manager, controller.Options{}); err != nil {
		return nil, err
	}
	dynamic := &controllers.VaultDynamicSecretReconciler{
		Client: c.client, SecretsClient: c.client, Scheme: c.scheme, Recorder: c.recorder, ClientFactory: factory,
		HMACValidator: validator, SyncRegistry: controllers.NewSyncRegistry(),
		BackOffRegistry: controllers.NewBackOffRegistry(), GlobalTransformationOptions: transformation,
	}
	if err := dynamic.SetupWithManager(c.manager, controller.Options{}); err != nil {
		return nil, err
	}
	as := func(reconcile func(context.Context, ctrl.Request) (ctrl.Result, error)) reconciler {
		return func(ctx context.Context, key types.NamespacedName) error {
			_, err := reconcile(ctx, ctrl.Request{NamespacedName: key})
			return err
		}
	}
	return map[string]reconciler{"VaultStaticSecret": as(static.Reconcile), "VaultDynamicSecret": as(dynamic.Reconcile)}, nil
}
