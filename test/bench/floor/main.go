// Command floor is the least that an external plugin of Vault can do: it answers
// from nothing, answers from one entry, and writes entries. Benchmarks hold the
// engine against it.
package main

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
	"golang.org/x/sync/errgroup"
)

func main() {
	meta := &api.PluginAPIClientMeta{}
	if err := meta.FlagSet().Parse(os.Args[1:]); err != nil {
		os.Exit(2)
	}
	err := plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: factory,
		TLSProviderFunc:    api.VaultPluginTLSProvider(meta.GetTLSConfig()),
	})
	if err != nil {
		log.Fatal(err)
	}
}

func factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := &framework.Backend{
		BackendType: logical.TypeLogical,
		Paths: []*framework.Path{
			{
				Pattern:    "nothing",
				Operations: map[logical.Operation]framework.OperationHandler{logical.ReadOperation: &framework.PathOperation{Callback: nothing}},
			},
			{
				Pattern: "entry",
				Fields:  map[string]*framework.FieldSchema{"username": {Type: framework.TypeString}, "password": {Type: framework.TypeString}},
				Operations: map[logical.Operation]framework.OperationHandler{
					logical.ReadOperation:   &framework.PathOperation{Callback: readEntry},
					logical.UpdateOperation: &framework.PathOperation{Callback: writeEntry},
				},
			},
			{
				Pattern: "puts",
				Fields: map[string]*framework.FieldSchema{
					"count": {Type: framework.TypeInt}, "size": {Type: framework.TypeInt}, "parallel": {Type: framework.TypeInt, Default: 1},
				},
				Operations: map[logical.Operation]framework.OperationHandler{logical.UpdateOperation: &framework.PathOperation{Callback: puts}},
			},
		},
	}
	return b, b.Setup(ctx, conf)
}

func nothing(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
	return &logical.Response{Data: map[string]any{"username": "app", "password": "from nowhere"}}, nil
}

func readEntry(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	entry, err := req.Storage.Get(ctx, "entry")
	if err != nil || entry == nil {
		return nil, err
	}
	var data map[string]any
	if err := entry.DecodeJSON(&data); err != nil {
		return nil, err
	}
	return &logical.Response{Data: data}, nil
}

func writeEntry(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	entry, err := logical.StorageEntryJSON("entry", map[string]any{"username": d.Get("username"), "password": d.Get("password")})
	if err != nil {
		return nil, err
	}
	return nil, req.Storage.Put(ctx, entry)
}

// puts writes count entries of size bytes, several at a time, and tells how long that took.
func puts(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	value := bytes.Repeat([]byte("x"), d.Get("size").(int))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, d.Get("parallel").(int)))
	began := time.Now()
	for i := range d.Get("count").(int) {
		g.Go(func() error {
			return req.Storage.Put(ctx, &logical.StorageEntry{Key: fmt.Sprintf("put/%06d", i), Value: value})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{"nanoseconds": time.Since(began).Nanoseconds()}}, nil
}
