package readme

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestRabbitMQReference does what the reference shows, with a broker that takes
// TLS and known clients alone.
func TestRabbitMQReference(t *testing.T) {
	const file, inDocs = "docs/reference/rabbitmq.md", "rabbitmq.example.com:15671"
	ca, err := servers.NewAuthority()
	require.NoError(t, err)
	cert, key, err := ca.Issue("engine")
	require.NoError(t, err)
	vault := servers.NewVault(t, servers.VaultOptions{})
	n := servers.RabbitMQ(t, servers.WithRabbitMQTLS(ca))
	require.NoError(t, n.SetUser(t.Context(), "orders", "first", ""))
	sh := newShell(t, vault)
	for name, content := range map[string]string{
		"admin.password": servers.RabbitMQAdminPassword, "orders.password": "first",
		"ca.pem": ca.PEM, "engine.pem": cert, "engine.key": key,
	} {
		sh.file(t, name, content)
	}
	sh.play(t, inDocs, n.HTTPSAddr, steps(t, file))
}
