package harmonyflow

import (
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/rabbitmq"
)

func rabbitmqConnection() connectionType {
	return connectionType{
		name: connection.TypeRabbitMQ,
		fields: withTLS(map[string]*framework.FieldSchema{
			"allowed_usernames": allowedUsernamesField,
			"address_map":       addressMapField,
			"username":          usernameField,
			"password":          passwordField,
			"management_urls":   {Type: framework.TypeCommaStringSlice, Description: "Management APIs of the cluster, http(s)://host:port; the first that answers is used."},
			"amqp_urls":         {Type: framework.TypeCommaStringSlice, Description: "Where logins are tried, amqp(s)://host:port, each broker once; by default where the brokers say that they listen."},
			"vhosts":            {Type: framework.TypeCommaStringSlice, Description: "Vhosts that every user has to get into; by default those that it has a permission in."},
		}),
		answer: withTLSAnswer(map[string]*framework.FieldSchema{
			"allowed_usernames": listField("Users."), "address_map": mapField("Discovered to reachable."), "username": stringField("Admin user."),
			"management_urls": listField("Management APIs."), "amqp_urls": listField("Where logins are tried."), "vhosts": listField("Vhosts to get into."),
		}),
		help: `rabbitmq: the admin user needs the tag administrator and no permission in any vhost. With a management API over
https logins are tried over TLS alone. In address_map a broker is called by its node name (rabbit@host) or host:port.`,
		apply:        applyRabbitMQ,
		describe:     describeRabbitMQ,
		sameEndpoint: sameRabbitMQ,
		verify:       rabbitmq.Verify,
	}
}

func applyRabbitMQ(before, e *connection.Entry, d *framework.FieldData) error {
	var settings connection.RabbitMQ
	if before != nil {
		settings = *before.RabbitMQ
	}
	e.RabbitMQ = &settings
	setStrings(d, "allowed_usernames", &e.AllowedUsernames)
	setStrings(d, "management_urls", &settings.ManagementURLs)
	setStrings(d, "amqp_urls", &settings.AMQPURLs)
	setStrings(d, "vhosts", &settings.VHosts)
	if v, ok := d.GetOk("address_map"); ok {
		e.AddressMap = v.(map[string]string)
	}
	if err := setTLS(e, d); err != nil {
		return err
	}
	if err := rabbitmq.ValidateConfig(&settings); err != nil {
		return err
	}
	moved := ""
	if before == nil || !sameRabbitMQ(before, e) {
		e.Generation++
		e.Members = nil // found when it is verified, at the latest when the next role is created
		moved = "management_urls, amqp_urls, address_map, tls_ca, tls_server_name or tls_skip_verify"
	}
	if err := setPassword(before, e, d, "", moved); err != nil {
		return err
	}
	if e.Username() == "" {
		return fmt.Errorf("username is missing; give the admin user's name")
	}
	return nil
}

func describeRabbitMQ(e *connection.Entry) map[string]any {
	return describeTLS(e, map[string]any{
		"allowed_usernames": orEmpty(e.AllowedUsernames), "address_map": stringMap(e.AddressMap), "username": e.Username(),
		"management_urls": orEmpty(e.RabbitMQ.ManagementURLs), "amqp_urls": orEmpty(e.RabbitMQ.AMQPURLs), "vhosts": orEmpty(e.RabbitMQ.VHosts),
	})
}

func sameRabbitMQ(before, e *connection.Entry) bool {
	return maps.Equal(before.AddressMap, e.AddressMap) && before.TLS.SameTrust(e.TLS) &&
		slices.Equal(before.RabbitMQ.ManagementURLs, e.RabbitMQ.ManagementURLs) &&
		slices.Equal(before.RabbitMQ.AMQPURLs, e.RabbitMQ.AMQPURLs)
}
