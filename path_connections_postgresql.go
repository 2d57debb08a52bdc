package harmonyflow

import (
	"slices"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/postgresql"
)

func postgresqlConnection() connectionType {
	return connectionType{
		name: connection.TypePostgreSQL,
		fields: withTLS(map[string]*framework.FieldSchema{
			"allowed_usernames": allowedUsernamesField,
			"username":          usernameField,
			"password":          passwordField,
			"connection_url": {
				Type:        framework.TypeString,
				Description: "Where PostgreSQL is: postgresql://{{username}}:{{password}}@host:5432/database, with commas between a primary and its standbys.",
			},
		}),
		answer: withTLSAnswer(map[string]*framework.FieldSchema{
			"allowed_usernames": listField("Users."), "username": stringField("Admin user."), "connection_url": stringField("Where PostgreSQL is."),
		}),
		help: `postgresql: connection_url is a URL, or keywords and values, with {{username}} and {{password}} where credentials
go; it holds none itself. Name the primary and every standby that clients log in to. TLS is spoken and certificates
are checked unless it says sslmode=disable. The admin user is "postgres" unless username is given.`,
		nodes:        true,
		apply:        applyPostgreSQL,
		describe:     describePostgreSQL,
		sameEndpoint: samePostgreSQL,
		verify:       postgresql.Verify,
	}
}

func applyPostgreSQL(before, e *connection.Entry, d *framework.FieldData) error {
	p := connection.PostgreSQL{}
	if before != nil {
		p = *before.PostgreSQL
	}
	e.PostgreSQL = &p
	setStrings(d, "allowed_usernames", &e.AllowedUsernames)
	setString(d, "connection_url", &p.URL, "")
	if err := setTLS(e, d); err != nil {
		return err
	}
	if err := postgresql.ValidateConfig(&p, e.TLS); err != nil {
		return err
	}
	if before == nil || !slices.Equal(p.Hosts, before.PostgreSQL.Hosts) {
		e.Generation++
		e.Members, e.RunIDs = nil, nil // found when it is verified, at the latest when the next role is created
	}
	moved := ""
	if before != nil && !samePostgreSQL(before, e) {
		moved = "connection_url, tls_ca, tls_server_name or tls_skip_verify"
	}
	return setPassword(before, e, d, "postgres", moved)
}

func describePostgreSQL(e *connection.Entry) map[string]any {
	return describeTLS(e, map[string]any{
		"allowed_usernames": orEmpty(e.AllowedUsernames), "username": e.Username(), "connection_url": e.PostgreSQL.URL,
	})
}

func samePostgreSQL(before, e *connection.Entry) bool {
	return before.PostgreSQL.URL == e.PostgreSQL.URL && before.TLS.SameTrust(e.TLS)
}
