package readme

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestPostgreSQLReference makes the users that the reference makes, of which it
// calls the admin user sufficient, and does with it what the reference shows, over TLS alone.
func TestPostgreSQLReference(t *testing.T) {
	const file, inDocs = "docs/reference/postgresql.md", "db.example.com:5432"
	text, err := os.ReadFile(root + file)
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```sql\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	var made []string
	for _, b := range blocks {
		made = append(made, strings.Replace(b[1], "'PASSWORD'", "'admin'", 1))
	}
	require.Contains(t, strings.Join(made, ""), "CREATE ROLE vault ", "%s does not say how to make the user vault", file)

	ca, err := servers.NewAuthority()
	require.NoError(t, err)
	cert, key, err := ca.Issue("127.0.0.1")
	require.NoError(t, err)
	vault := servers.NewVault(t, servers.VaultOptions{})
	n := servers.Postgres(t, servers.WithPostgresTLS(cert, key, ca.PEM), servers.WithHBA("hostnossl all vault,shop 127.0.0.1/32 reject"))
	require.NoError(t, n.Exec(t.Context(), append(made, "CREATE ROLE shop LOGIN PASSWORD 'first'")...))
	sh := newShell(t, vault)
	for name, content := range map[string]string{"admin.password": "admin", "shop.password": "first", "ca.pem": ca.PEM} {
		sh.file(t, name, content)
	}
	sh.play(t, inDocs, n.Addr, steps(t, file))
}
