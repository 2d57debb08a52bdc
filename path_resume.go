package harmonyflow

import (
	"context"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathResume() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"id": {Type: framework.TypeString, Required: true, Description: "Id of a rotation."},
	}
	return []*framework.Path{{
		Pattern: "resume/(?P<id>[^/]+)",
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: operation{
				call: b.resume, summary: "Go on with a rotation that is held.", verb: "resume", suffix: "rotation",
				fields: rotationAnswer(), errors: []int{404, 409}, mutating: true,
			}.handler(fields),
		},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis: "Go on with a rotation that is held.",
		HelpDescription: `A rotation is held when a consumer failed and its role has on_failure=hold: both versions stay accepted, and its
consumers reserved. Resume tries the step again; cancel/ goes back.`,
	}}
}

func (b *backend) resume(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	id, err := rotationID(d)
	if err != nil {
		return nil, err
	}
	h, err := b.engine.Resume(ctx, id)
	if err != nil {
		return nil, err
	}
	wait, cancel := b.waiting(ctx)
	defer cancel()
	b.engine.WaitAll(wait, h, rotation.Settled)
	return b.answerMany(ctx, req, h.ID, forward)
}
