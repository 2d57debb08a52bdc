// Command vault-plugin-secrets-harmonyflow is the HarmonyFlow secrets engine
// as an external plugin of Vault. Vault starts it; people only ask it for its
// version.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	harmonyflow "github.com/harmonyflow/vault-plugin-secrets-harmonyflow"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/buildinfo"
)

func main() {
	meta := &api.PluginAPIClientMeta{}
	flags := meta.FlagSet()
	version := flags.Bool("version", false, "print the version and exit")
	switch err := flags.Parse(os.Args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(0)
	case err != nil:
		os.Exit(2)
	case *version:
		fmt.Printf("vault-plugin-secrets-harmonyflow %s %s %s/%s\n",
			buildinfo.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return
	}

	logger := hclog.New(&hclog.LoggerOptions{JSONFormat: true})
	go exitWithParent(logger)
	err := plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: harmonyflow.Factory,
		TLSProviderFunc:    api.VaultPluginTLSProvider(meta.GetTLSConfig()),
		Logger:             logger,
	})
	if err != nil {
		logger.Error("plugin shutting down", "error", err)
		os.Exit(1)
	}
}

// exitWithParent ends the process when the Vault that started it is gone.
// go-plugin leaves a plugin running when its host was killed; without storage
// it could decide nothing any more, and its open calls to targets would
// overlap with those of the next Vault.
func exitWithParent(logger hclog.Logger) {
	parent := os.Getppid()
	for os.Getppid() == parent {
		time.Sleep(time.Second)
	}
	logger.Error("vault is gone: exiting", "vault_pid", parent)
	os.Exit(1)
}
