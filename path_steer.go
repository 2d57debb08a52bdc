package harmonyflow

import (
	"context"
	"fmt"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// steer declares a path that acts on one role by kind and name.
func steer(verb, synopsis, description string, more map[string]*framework.FieldSchema, call framework.OperationFunc) []*framework.Path {
	fields := map[string]*framework.FieldSchema{"kind": kindField, "name": nameField}
	for k, v := range more {
		fields[k] = v
	}
	return []*framework.Path{{
		Pattern: verb + "/(?P<kind>[^/]+)/(?P<name>.+)",
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: operation{
				call: call, summary: synopsis, verb: verb, suffix: "role", fields: rotationAnswer(), errors: []int{400, 404, 409}, mutating: true,
			}.handler(fields),
		},
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis:    synopsis,
		HelpDescription: description,
	}}
}

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
		if resp, err := b.reachable(ctx, r); err != nil {
			return resp, err
		}
	}
	id, err := b.engine.RollBack(ctx, r.Name, rotation.Request{
		Reason: d.Get("reason").(string), RequestedBy: requester(req), Keys: requestKeys(req, d),
	})
	if err != nil {
		return nil, err
	}
	until := rotation.Settled
	if r.Run != nil {
		until = rotation.Over
	}
	return b.answerOne(ctx, req, id, until)
}

func (b *backend) pathRetire() []*framework.Path {
	return steer("retire", "End the grace of a role now.",
		`The target refuses the previous version at once, proven by refused logins. Refused with 409 before the new
version is served. From here back leads only a new rotation: rollback/.`,
		nil, b.retire)
}

func (b *backend) retire(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	id, err := b.engine.Retire(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if id == "" {
		return &logical.Response{Data: map[string]any{
			"summary": fmt.Sprintf("nothing to retire: only version %d of role %q is accepted", currentNumber(r), r.Name),
			"follow":  fmt.Sprintf("vault read %sverify/%s/%s", req.MountPoint, r.Kind, r.Name),
			"state":   r.State(),
		}}, nil
	}
	return b.answerOne(ctx, req, id, rotation.Over)
}

func (b *backend) pathReconcile() []*framework.Path {
	return steer("reconcile", "Apply the served version again where a target or a node drifted.",
		`Makes every node accept the current version (during grace the previous one as well) and refuse everything else
for the user, with the connection's admin rights, and proves it by logins.`,
		map[string]*framework.FieldSchema{"reason": reasonField, "idempotency_key": idempotencyField}, b.reconcile)
}

func (b *backend) reconcile(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	if r.Connection == "" {
		return refuse("roles of kind %s have no target to reconcile", r.Kind)
	}
	if resp, err := b.reachable(ctx, r); err != nil {
		return resp, err
	}
	id, err := b.engine.ReconcileRole(ctx, r.Name, rotation.Request{
		Reason: d.Get("reason").(string), RequestedBy: requester(req), Keys: requestKeys(req, d),
	})
	if err != nil {
		return nil, err
	}
	until := rotation.Over
	if r.Run != nil {
		until = rotation.Settled
	}
	return b.answerOne(ctx, req, id, until)
}
