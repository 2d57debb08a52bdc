package harmonyflow

import (
	"context"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

func (b *backend) pathCreds() []*framework.Path {
	return []*framework.Path{{
		Pattern: "creds/" + namePattern,
		Fields:  map[string]*framework.FieldSchema{"name": nameField},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: operation{
				call: b.readCreds, summary: "Read the served secret of a role.", verb: "read", suffix: "credentials", errors: []int{404, 409},
				fields: map[string]*framework.FieldSchema{
					"username": stringField("User the password belongs to."), "password": stringField("Current password."),
					"value":             stringField("Current secret, of kinds without users."),
					"previous_username": stringField("User of previous_password."), "previous_password": stringField("Previous password, while it is accepted."),
					"previous_value":       stringField("Previous secret, while it is accepted."),
					"previous_valid_until": stringField("Until when the previous one is accepted at least, RFC 3339."),
					"version":              intField("Version of the current secret."),
					"last_vault_rotation":  stringField("When it was promoted, RFC 3339."),
					"rotation_period":      durationField("Period of scheduled rotations, in seconds."),
					"rotation_schedule":    stringField("Cron schedule of scheduled rotations."),
					"rotation_timezone":    stringField("Its time zone; UTC without one."),
					"ttl":                  durationField("Seconds until the stored next rotation; 0 while a newer version is on its way; absent without automatic rotation."),
				},
			}.handler(nil),
		},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis: "The served secret of a role.",
		HelpDescription: `What is served has been accepted by a fresh login at every known node of its target. During a grace
period the previous secret is served beside it. A role with previous_field also carries the previous
secret under that name. No lease: read it again before ttl seconds have passed.`,
	}}
}

func (b *backend) readCreds(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.engine.Store().Role(ctx, d.Get("name").(string))
	if err != nil || r == nil {
		return nil, err
	}
	current := r.With(version.Current)
	if current == nil {
		return nil, conflict("role %q has no version yet; read roles/%s", r.Name, r.Name)
	}
	data := map[string]any{
		"version":             int64(current.Number),
		"last_vault_rotation": formatTime(r.LastRotation),
	}
	putMaterial(data, "", current.Material)
	if previous, until := r.PreviousServed(); previous != nil {
		putMaterial(data, "previous_", previous.Material)
		data["previous_valid_until"] = formatTime(until)
		if r.Spec.PreviousField != "" {
			data[r.Spec.PreviousField] = previous.Material.Secret
		}
	}
	if r.Schedule.Period > 0 {
		data["rotation_period"] = seconds(r.Schedule.Period)
	}
	if r.Schedule.Cron != "" {
		data["rotation_schedule"] = r.Schedule.Cron
	}
	if r.Schedule.Zone != "" {
		data["rotation_timezone"] = r.Schedule.Zone
	}
	if ttl, ok := r.TTL(time.Now()); ok {
		data["ttl"] = seconds(ttl)
	}
	return &logical.Response{Data: data}, nil
}

func putMaterial(data map[string]any, prefix string, m kind.Material) {
	if m.Username == "" {
		data[prefix+"value"] = m.Secret
		return
	}
	data[prefix+"username"], data[prefix+"password"] = m.Username, m.Secret
}
