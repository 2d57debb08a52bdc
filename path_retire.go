package harmonyflow

import (
	"context"
	"fmt"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathRetire() []*framework.Path {
	return steer("retire", "End the grace of a role now.",
		`The target refuses the previous version at once, proven by refused logins. Refused with 409 before the new
version is served. From here back leads only a new rotation: rollback/. Earlier keys of a ring, which stay
after their rotation has ended, leave it one by one: version=N says which.`,
		map[string]*framework.FieldSchema{
			"version":         {Type: framework.TypeInt64, Description: "Earlier key of a ring that is to leave it; the only one by default."},
			"idempotency_key": idempotencyField,
		}, b.retire)
}

func (b *backend) retire(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	number := int(d.Get("version").(int64))
	switch _, given := d.GetOk("version"); {
	case given && r.Spec.Strategy != kind.KeyRing:
		return refuse("version is for key rings, whose earlier keys leave one by one; role %q is of kind %s: leave it out", r.Name, r.Kind)
	case given && number < 1:
		return refuse("version is %d; give the number of an earlier key, as roles/%s shows it", number, r.Name)
	}
	if isKept(r) {
		return &logical.Response{Data: map[string]any{
			"summary": fmt.Sprintf("nothing to retire: the versions of %s are kept by its Vault; min_decryption_version ends those of a transit key", r.Spec.Owns()[0]),
			"follow":  fmt.Sprintf("vault read %sverify/%s/%s", req.MountPoint, r.Kind, r.Name),
			"state":   r.State(),
		}}, nil
	}
	id, err := b.engine.Retire(ctx, r.Name, number, rotation.Request{RequestedBy: requester(req), Keys: requestKeys(req, d)})
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
	return b.answerOne(ctx, req, id, r.Name, rotation.Over, forward)
}
