package harmonyflow

import (
	"fmt"
	"maps"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
)

// withTLS adds to the fields of a type those that say whom it trusts.
func withTLS(fields map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
	maps.Copy(fields, map[string]*framework.FieldSchema{
		"tls_ca":          {Type: framework.TypeString, Description: "Certificates that sign those of the servers, PEM; empty for those the system trusts."},
		"tls_cert":        {Type: framework.TypeString, Description: "Certificate that the engine shows to servers, PEM."},
		"tls_key":         {Type: framework.TypeString, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}, Description: "Its key, PEM. Never read back."},
		"tls_server_name": {Type: framework.TypeString, Description: "Name in the certificates of the servers, where it is not the one that is dialled."},
		"tls_skip_verify": {Type: framework.TypeBool, Description: "Trust every certificate. Whoever is on the way then reads the passwords."},
	})
	return fields
}

// withTLSAnswer adds what is shown of them.
func withTLSAnswer(fields map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
	maps.Copy(fields, map[string]*framework.FieldSchema{
		"tls_ca": stringField("Certificates that sign those of the servers."), "tls_cert": stringField("Certificate that is shown to servers."),
		"tls_server_name": stringField("Name in the certificates of the servers."), "tls_skip_verify": boolField("Whether every certificate is trusted."),
	})
	return fields
}

// setTLS sets what was given. A certificate is changed together with its key.
func setTLS(e *connection.Entry, d *framework.FieldData) error {
	_, cert := d.GetOk("tls_cert")
	_, key := d.GetOk("tls_key")
	if cert != key {
		return fmt.Errorf("tls_cert and tls_key belong together; give both in one request")
	}
	setString(d, "tls_ca", &e.TLS.CA, "")
	setString(d, "tls_cert", &e.TLS.Cert, "")
	setString(d, "tls_key", &e.TLS.Key, "")
	setString(d, "tls_server_name", &e.TLS.ServerName, "")
	if v, ok := d.GetOk("tls_skip_verify"); ok {
		e.TLS.SkipVerify = v.(bool)
	}
	_, err := e.TLS.Config("")
	return err
}

// describeTLS adds to an answer what is shown of TLS.
func describeTLS(e *connection.Entry, data map[string]any) map[string]any {
	data["tls_ca"], data["tls_cert"] = e.TLS.CA, e.TLS.Cert
	data["tls_server_name"], data["tls_skip_verify"] = e.TLS.ServerName, e.TLS.SkipVerify
	return data
}
