package harmonyflow

import (
	"context"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathRollback() []*framework.Path {
	return steer("rollback", "Put the earlier material back.",
		`Before the retire phase the running rotation is reversed: the previous material is served again, under a new
number, and the failed version is refused last of all. After it a new rotation puts the newest retired
material back, as a new version.`,
		map[string]*framework.FieldSchema{"reason": reasonField, "idempotency_key": idempotencyField}, b.rollback)
}

func (b *backend) rollback(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	if r.Run == nil {
		if err := b.notFrozen(ctx); err != nil {
			return nil, err
		}
		if err := b.reachable(ctx, r); err != nil {
			return nil, err
		}
	}
	id, err := b.engine.RollBack(ctx, r.Name, rotation.Request{
		Reason: d.Get("reason").(string), RequestedBy: requester(req), Keys: requestKeys(req, d),
	})
	if err != nil {
		return nil, err
	}
	if r.Run != nil {
		return b.answerOne(ctx, req, id, r.Name, rotation.Over, back)
	}
	return b.answerOne(ctx, req, id, r.Name, rotation.Settled, forward)
}
