package harmonyflow

import (
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// Roles whose secret another Vault keeps have a place there, and nothing that is
// served, published or taken back here.

func keptFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"mount": {Type: framework.TypeString, Description: "Of a transit or database-root role: where the secrets engine is mounted in the Vault behind the connection. Default transit or database. Given once."},
		"key":   {Type: framework.TypeString, Description: "Of a transit or database-root role: name of the key, or of the database, at its mount. Given once."},
		"min_decryption_version": {
			Type:        framework.TypeInt64,
			Description: "Of a transit role: versions of the key before this one no longer decrypt after a rotation. Never lowered; 0 (default) leaves it alone.",
		},
	}
}

func keptAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"mount": stringField("Mount in the other Vault, of a transit or database-root role."), "key": stringField("Name at that mount."),
		"min_decryption_version": intField("Oldest version that decrypts after a rotation, of a transit role; 0: it is left alone."),
	}
}

func isKept(r *rotation.Role) bool { return r.Spec.Strategy == kind.Kept }

func describeKept(r *rotation.Role, data map[string]any) {
	if !isKept(r) {
		return
	}
	delete(data, "grace_period")
	data["mount"], data["key"] = r.Spec.Mount, r.Spec.Key
	if r.Kind == "transit" {
		data["min_decryption_version"] = int64(r.Spec.MinDecryptionVersion)
	}
}

func applyKeptSpec(s *kind.Spec, d *framework.FieldData) {
	setString(d, "mount", &s.Mount, "")
	setString(d, "key", &s.Key, "")
	if v, ok := d.GetOk("min_decryption_version"); ok {
		s.MinDecryptionVersion = int(v.(int64))
	}
}

// notForKept are common fields that need material, or nodes.
var notForKept = []string{
	"initial_password", "initial_value", "overwrite_existing", "grace_period", "allow_partial",
	"document", "field", "username_field", "previous_field", "publish_connection", "publish_mount", "publish_path",
}

// checkKept refuses what makes no sense where another Vault keeps the secret;
// before is the role's min_decryption_version until now.
func checkKept(r *rotation.Role, before int, req *logical.Request) error {
	if !isKept(r) {
		return nil
	}
	for _, name := range notForKept {
		if _, given := req.Data[name]; given {
			return fmt.Errorf("field %q is not for kind %s, whose secret another Vault keeps and nobody sees", name, r.Kind)
		}
	}
	if now := r.Spec.MinDecryptionVersion; now != 0 && now < before {
		return fmt.Errorf("min_decryption_version of role %q is %d and is not lowered to %d, which would let ended versions decrypt again; "+
			"where that is wanted write it at %s/keys/%s/config of that Vault, and 0 here", r.Name, before, now, r.Spec.Mount, r.Spec.Key)
	}
	none := time.Duration(0)
	r.GracePeriod = &none
	return nil
}

// refuseKept answers what needs material of a role that has none here.
func refuseKept(r *rotation.Role, what string) error {
	return badRequest("the secret of role %q is kept by the Vault behind connection %q and nobody sees it: %s; read verify/%s/%s",
		r.Name, r.Connection, what, r.Kind, r.Name)
}

// verifyKept shows what the other Vault shows.
func verifyKept(rep rotation.Report, mount string) map[string]any {
	r := rep.Role
	problems := []string{}
	if rep.Sight != nil {
		problems = orEmpty(rep.Sight.Problems)
	}
	data := map[string]any{
		"state": r.State(), "version": currentNumber(r), "notes": orEmpty(rep.Notes), "ok": rep.Err == nil && r.Suspended == "",
		"checks": []any{map[string]any{"key": r.Spec.Owns()[0], "ok": rep.Err == nil, "problems": problems}},
		"follow": fmt.Sprintf("vault read %sroles/%s", mount, r.Name),
	}
	place := fmt.Sprintf("%s at connection %q", r.Spec.Owns()[0], r.Connection)
	switch s := rep.Sight; {
	case rep.Err != nil:
		data["summary"] = rep.Err.Error()
		return data
	case s.Version > 0:
		data["key_version"], data["min_decryption_version"] = int64(s.Version), int64(s.MinDecryptionVersion)
		data["summary"] = fmt.Sprintf("version %d is the newest of %s, and versions from %d on decrypt", s.Version, place, s.MinDecryptionVersion)
	default:
		data["summary"] = place + " is there and may be rotated; its Vault shows no version"
	}
	if r.Suspended != "" {
		data["summary"] = r.Suspended
		data["follow"] = fmt.Sprintf("vault write -f %srotate/%s/%s", mount, r.Kind, r.Name)
	}
	return data
}

// planKept is what a rotation would do.
func planKept(rep rotation.Report) string {
	line := "would ask for a new version of " + rep.Role.Spec.Owns()[0]
	if s := rep.Sight; s != nil && s.Version > 0 {
		line += fmt.Sprintf(", of which %d is the newest", s.Version)
		if want := rep.Role.Spec.MinDecryptionVersion; want > s.MinDecryptionVersion {
			line += fmt.Sprintf(", and end decryption with versions before %d", want)
		}
	}
	return line
}
