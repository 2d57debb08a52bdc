package harmonyflow

import (
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

func vaultConnection() connectionType {
	return connectionType{
		name: connection.TypeVault,
		fields: withTLS(map[string]*framework.FieldSchema{
			"address":    {Type: framework.TypeString, Description: "URL of the Vault: https://, or http:// to this machine."},
			"namespace":  {Type: framework.TypeString, Description: "Namespace of a Vault Enterprise."},
			"auth":       {Type: framework.TypeString, Description: "How to log in: token (default), approle or kubernetes."},
			"auth_mount": {Type: framework.TypeString, Description: "Where that is mounted. Default approle or kubernetes."},
			"token": {
				Type: framework.TypeString, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
				Description: "Of auth=token: a token, best a periodic one. Of auth=kubernetes: a service account token. Never read back.",
			},
			"role_id": {Type: framework.TypeString, Description: "Of auth=approle."},
			"secret_id": {
				Type: framework.TypeString, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}, Description: "Of auth=approle. Never read back.",
			},
			"role":                  {Type: framework.TypeString, Description: "Of auth=kubernetes: the role to log in to. Of auth=approle: name of the AppRole, which rotate-root needs."},
			"allowed_publish_paths": {Type: framework.TypeCommaStringSlice, Description: "Where roles may publish to: globs over <mount>/<path>; nowhere by default."},
		}),
		answer: withTLSAnswer(map[string]*framework.FieldSchema{
			"address": stringField("URL."), "namespace": stringField("Namespace."), "auth": stringField("How to log in."),
			"auth_mount": stringField("Where that is mounted."), "role_id": stringField("Of auth=approle."), "role": stringField("Of auth=kubernetes, or the name of the AppRole."),
			"allowed_publish_paths": listField("Where roles may publish to."),
		}),
		help: `vault: a Vault whose secrets roles rotate, or that they publish to; it may be the one that the engine runs in.
The engine keeps its token alive, and logs in again where it can. Without token, auth=kubernetes takes the projected
service account token that is mounted at /var/run/secrets/harmonyflow/vault/token, anew at each login.`,
		apply:        applyVault,
		describe:     describeVault,
		sameEndpoint: sameVault,
		verify:       vault.Verify,
	}
}

// vaultLogin is what one way to log in takes.
type vaultLogin struct {
	fields       []string
	name, secret string // the fields of the credential
	optional     bool   // the secret may be left out
}

var vaultLogins = map[string]vaultLogin{
	connection.AuthToken:      {fields: []string{"token"}, secret: "token"},
	connection.AuthAppRole:    {fields: []string{"role_id", "secret_id", "auth_mount", "role"}, name: "role_id", secret: "secret_id"},
	connection.AuthKubernetes: {fields: []string{"role", "token", "auth_mount"}, name: "role", secret: "token", optional: true},
}

func applyVault(before, e *connection.Entry, d *framework.FieldData) error {
	v := connection.Vault{Auth: connection.AuthToken}
	if before != nil {
		v = *before.Vault
	}
	e.Vault = &v
	setString(d, "address", &v.Address, "")
	setString(d, "namespace", &v.Namespace, "")
	setString(d, "auth", &v.Auth, connection.AuthToken)
	if before != nil && v.Auth != before.Vault.Auth {
		v.AuthMount = "" // the default of the new one
	}
	setString(d, "auth_mount", &v.AuthMount, "")
	if v.Auth == connection.AuthAppRole {
		setString(d, "role", &v.Role, "") // of auth=kubernetes it is part of the credential
	} else {
		v.Role = ""
	}
	setStrings(d, "allowed_publish_paths", &v.AllowedPublishPaths)
	if err := setTLS(e, d); err != nil {
		return err
	}
	if err := vault.ValidateConfig(&v, e.TLS); err != nil {
		return err
	}
	if before == nil || !sameVault(before, e) {
		e.Generation++
		e.Members = nil
	}
	return setVaultAdmin(before, e, d)
}

// setVaultAdmin sets what the engine logs in with. Who changes where that is
// sent has to bring it again.
func setVaultAdmin(before, e *connection.Entry, d *framework.FieldData) error {
	login := vaultLogins[e.Vault.Auth]
	given := map[string]string{}
	for _, field := range []string{"token", "role_id", "secret_id", "role", "auth_mount"} {
		v, ok := d.GetOk(field)
		if !ok || v.(string) == "" {
			continue
		}
		if !slices.Contains(login.fields, field) {
			return fmt.Errorf("field %q is not for auth %s, which takes %s", field, e.Vault.Auth, strings.Join(login.fields, ", "))
		}
		if strings.ContainsFunc(v.(string), func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }) {
			return fmt.Errorf("%s holds a space or a control character; check that its file does not end with a new line", field)
		}
		given[field] = v.(string)
	}
	m := kind.Material{}
	if before != nil && before.Vault.Auth == e.Vault.Auth {
		if v := before.Admin.With(version.Current); v != nil {
			m = v.Material
		}
		if _, again := given[login.secret]; m.Secret != "" && !again {
			if !sameVault(before, e) {
				return fmt.Errorf("address, namespace, auth_mount, tls_ca, tls_server_name or tls_skip_verify change where the stored %s is sent; give %s in the same request", login.secret, login.secret)
			}
			if login.name == "role_id" && given["role_id"] != "" && given["role_id"] != m.Username {
				return fmt.Errorf("role_id changes; give its secret_id in the same request")
			}
		}
		if cleared, ok := d.GetOk(login.secret); ok && cleared == "" {
			m.Secret = ""
		}
	}
	if name := given[login.name]; name != "" {
		m.Username = name
	}
	if secret := given[login.secret]; secret != "" {
		m.Secret = secret
	}
	switch {
	case login.name != "" && m.Username == "":
		return fmt.Errorf("%s is missing; auth %s takes %s", login.name, e.Vault.Auth, strings.Join(login.fields, ", "))
	case m.Secret == "" && !login.optional:
		return fmt.Errorf("%s is missing; auth %s takes %s", login.secret, e.Vault.Auth, strings.Join(login.fields, ", "))
	}
	setAdmin(e, m)
	return nil
}

func describeVault(e *connection.Entry) map[string]any {
	data := map[string]any{
		"address": e.Vault.Address, "namespace": e.Vault.Namespace, "auth": e.Vault.Auth, "auth_mount": e.Vault.AuthMount,
		"allowed_publish_paths": orEmpty(e.Vault.AllowedPublishPaths), "role_id": "", "role": e.Vault.Role,
	}
	if name := vaultLogins[e.Vault.Auth].name; name != "" {
		data[name] = e.Username()
	}
	return describeTLS(e, data)
}

func sameVault(before, e *connection.Entry) bool {
	return before.Vault.Address == e.Vault.Address && before.Vault.Namespace == e.Vault.Namespace &&
		before.Vault.AuthMount == e.Vault.AuthMount && before.Vault.Auth == e.Vault.Auth && before.TLS.SameTrust(e.TLS)
}
