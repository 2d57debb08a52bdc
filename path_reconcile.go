package harmonyflow

import (
	"context"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathReconcile() []*framework.Path {
	return steer("reconcile", "Apply the served version again where a target or a node drifted.",
		`Makes every node accept the current version (during grace the previous one as well) and refuse everything else
for the user, with the connection's admin rights, and proves it by logins. A rotation that waits because of what its
target accepts since Vault was started, as after a restored snapshot, goes on.`,
		map[string]*framework.FieldSchema{"reason": reasonField, "idempotency_key": idempotencyField}, b.reconcile)
}

func (b *backend) reconcile(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	if isKept(r) {
		return nil, refuseKept(r, "there is nothing to apply again")
	}
	if r.Connection == "" {
		return refuse("roles of kind %s have no target to reconcile", r.Kind)
	}
	asked := rotation.Request{Reason: d.Get("reason").(string), RequestedBy: requester(req), Keys: requestKeys(req, d)}
	again, err := b.repeated(ctx, asked)
	if err == nil && !again {
		err = b.reachable(ctx, r)
	}
	if err != nil {
		return nil, err
	}
	id, err := b.engine.ReconcileRole(ctx, r.Name, asked)
	if err != nil {
		return nil, err
	}
	until := rotation.Over
	if r.Run != nil {
		until = rotation.Settled
	}
	return b.answerOne(ctx, req, id, r.Name, until, forward)
}
