// Command operators runs what External Secrets and Vault Secrets Operator run
// when they read a Vault, without a Kubernetes cluster: their own code, against
// the objects of a Kubernetes API that is a map in memory.
//
// It takes one request per line, as JSON, and answers each with one line:
//
//	{"apply": "manifests, as YAML"}
//	{"reconcile": {"kind": "VaultStaticSecret", "name": "web"}}
//	{"get": {"kind": "Secret", "name": "web"}}
//	{"validate": {"kind": "SecretStore", "name": "vault"}}
//
// It ends with its input.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
)

type objectRef struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

type request struct {
	Apply     string     `json:"apply,omitempty"`
	Reconcile *objectRef `json:"reconcile,omitempty"`
	Get       *objectRef `json:"get,omitempty"`
	Validate  *objectRef `json:"validate,omitempty"`
}

type answer struct {
	Object client.Object `json:"object,omitempty"`
	Events []string      `json:"events,omitempty"`
	Error  string        `json:"error,omitempty"`
}

// reconciler brings one object to where its manifest wants it.
type reconciler func(ctx context.Context, key types.NamespacedName) error

func main() {
	if err := run(ctrl.SetupSignalHandler(), os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, in io.Reader, out io.Writer) error {
	ctrl.SetLogger(zap.New(zap.WriteTo(os.Stderr)))
	dir, err := os.MkdirTemp("", "operators-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	cluster, err := newCluster(dir)
	if err != nil {
		return err
	}
	reconcilers, err := vaultSecrets(ctx, cluster)
	if err != nil {
		return err
	}
	external := &externalSecrets{cluster: cluster}
	reconcilers["ExternalSecret"] = external.reconcile

	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	encoder := json.NewEncoder(out)
	for lines.Scan() {
		var r request
		var a answer
		err := json.Unmarshal(lines.Bytes(), &r)
		switch {
		case err != nil:
		case r.Apply != "":
			err = cluster.apply(ctx, r.Apply)
		case r.Reconcile != nil:
			if reconcile := reconcilers[r.Reconcile.Kind]; reconcile != nil {
				err = reconcile(ctx, key(r.Reconcile.Name))
			} else {
				err = fmt.Errorf("nothing reconciles a %s", r.Reconcile.Kind)
			}
		case r.Validate != nil:
			err = external.validate(ctx, key(r.Validate.Name))
		case r.Get != nil:
			a.Object, err = cluster.get(ctx, *r.Get)
		default:
			err = errors.New("nothing was asked")
		}
		if err != nil {
			a.Error = err.Error()
		}
		a.Events = cluster.events()
		if err := encoder.Encode(a); err != nil {
			return err
		}
	}
	return lines.Err()
}

func key(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: namespace, Name: name}
}
