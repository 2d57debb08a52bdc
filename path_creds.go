package harmonyflow

import (
	"context"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
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
					"previous_value": stringField("Previous secret, while it is accepted; of a ring the newest of its earlier keys."),
					"private_key":    stringField("Current key of a pair, PKCS #8 in PEM."), "public_key": stringField("Its public half, PKIX in PEM."),
					"kid": stringField("Id of the current key of a ring."), "algorithm": stringField("Algorithm that it signs with."),
					"previous_public_key": stringField("Public half of the newest earlier key."), "previous_kid": stringField("Id of the newest earlier key."),
					"next_value": stringField("Next key, before it is used."), "next_public_key": stringField("Public half of the next key, before it is used."),
					"next_kid":             stringField("Id of the next key."),
					"keys":                 mapField("Every key of a ring that verifies or decrypts, by id; of pairs the public half."),
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
secret under that name. No lease: read it again before ttl seconds have passed.
Of a key ring: sign or encrypt with value (private_key of a pair) and name it by kid; verify or decrypt with
whichever of keys is named. The next key is among them propagation_delay before it is used, so read again at
least twice as often as that.`,
	}}
}

func (b *backend) readCreds(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.engine.Store().Role(ctx, d.Get("name").(string))
	if err != nil || r == nil {
		return nil, err
	}
	if isKept(r) {
		return nil, refuseKept(r, "there is nothing to read")
	}
	current := r.With(version.Current)
	if current == nil {
		return nil, conflict("role %q has no version yet; read roles/%s", r.Name, r.Name)
	}
	data := map[string]any{
		"version":             int64(current.Number),
		"last_vault_rotation": formatTime(r.LastRotation),
	}
	if r.Spec.Strategy == kind.KeyRing {
		return b.ringCreds(r, data)
	}
	putMaterial(data, "", current.Material)
	if previous, until := r.PreviousServed(); previous != nil {
		putMaterial(data, "previous_", previous.Material)
		data["previous_valid_until"] = formatTime(until)
		if r.Spec.PreviousField != "" {
			data[r.Spec.PreviousField] = previous.Material.Secret
		}
	}
	putTimes(data, r)
	return &logical.Response{Data: data}, nil
}

func putTimes(data map[string]any, r *rotation.Role) {
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
}

// ringCreds answers with the keys of a ring. Of a pair only the one that signs
// is shown whole.
func (b *backend) ringCreds(r *rotation.Role, data map[string]any) (*logical.Response, error) {
	ring, ok := b.kind(r.Kind).(kind.Ring)
	if !ok {
		return nil, badRequest("kind %q is not known to this version; install the one that does", r.Kind)
	}
	keys := map[string]any{}
	for _, v := range r.Ring() {
		form, err := ring.Verifying(v.Material)
		if err != nil {
			return nil, err
		}
		keys[v.Material.KeyID] = form
	}
	data["keys"] = keys
	for prefix, v := range map[string]*version.Version{
		"": r.With(version.Current), "previous_": r.With(version.Previous), "next_": r.With(version.Next),
	} {
		if v == nil {
			continue
		}
		data[prefix+"kid"] = v.Material.KeyID
		form, err := ring.Verifying(v.Material)
		if err != nil {
			return nil, err
		}
		if form == v.Material.Secret {
			data[prefix+"value"] = form
			continue
		}
		data[prefix+"public_key"] = form
		if v.Stage == version.Current {
			data["private_key"] = v.Material.Secret
		}
	}
	if r.Spec.Algorithm != "" {
		data["algorithm"] = r.Spec.Algorithm
	}
	if previous, until := r.PreviousServed(); previous != nil && !until.IsZero() {
		data["previous_valid_until"] = formatTime(until)
	}
	putTimes(data, r)
	return &logical.Response{Data: data}, nil
}

func putMaterial(data map[string]any, prefix string, m kind.Material) {
	if m.Username == "" {
		data[prefix+"value"] = m.Secret
		return
	}
	data[prefix+"username"], data[prefix+"password"] = m.Username, m.Secret
}
