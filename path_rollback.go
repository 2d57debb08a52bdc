package harmonyflow

import (
	"context"
	"fmt"

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
	if isKept(r) {
		return nil, refuseKept(r, fmt.Sprintf("no earlier version can be put back, and rotate/%s/%s asks for a new one", r.Kind, r.Name))
	}
	asked := rotation.Request{Reason: d.Get("reason").(string), RequestedBy: requester(req), Keys: requestKeys(req, d)}
	if r.Run == nil {
		if err := b.mayBegin(ctx, r, asked); err != nil {
			return nil, err
		}
	}
	id, err := b.engine.RollBack(ctx, r.Name, asked)
	if err != nil {
		return nil, err
	}
	h, err := b.engine.Store().Header(ctx, id)
	if err != nil {
		return nil, err
	}
	// What it started goes forward; what it joined goes back, also when the
	// request comes again after that has ended.
	if h != nil && asked.Started(h) {
		return b.answerOne(ctx, req, id, r.Name, rotation.Settled, forward)
	}
	return b.answerOne(ctx, req, id, r.Name, rotation.Over, back)
}
