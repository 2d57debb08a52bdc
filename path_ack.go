package harmonyflow

import (
	"context"
	"fmt"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

func (b *backend) pathAck() []*framework.Path {
	return steerTo(map[string]*framework.FieldSchema{
		"summary": stringField("What was recorded."), "follow": stringField("The next command to type."),
	}, "ack", "Say that nothing needs an earlier key of a ring any more.",
		`What the key encrypted has been encrypted anew, by every consumer. A role with require_reencryption_ack keeps
each earlier key until this was said of it; then it leaves when it is old enough (retire_after), or is retired.`,
		map[string]*framework.FieldSchema{
			"version": {Type: framework.TypeInt64, Required: true, Description: "Number of the earlier key."},
		}, b.acknowledge)
}

func (b *backend) acknowledge(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	number := int(d.Get("version").(int64))
	switch {
	case r.Spec.Strategy != kind.KeyRing:
		return refuse("role %q is of kind %s, which has no earlier keys to acknowledge", r.Name, r.Kind)
	case number < 1:
		return refuse("version is %d; give the number of an earlier key, as roles/%s shows it", number, r.Name)
	}
	if err := b.engine.Acknowledge(ctx, r.Name, number); err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{
		"summary": fmt.Sprintf("nothing needs version %d of role %q any more; it may leave the ring", number, r.Name),
		"follow":  fmt.Sprintf("vault write %sretire/%s/%s version=%d", req.MountPoint, r.Kind, r.Name, number),
	}}, nil
}
