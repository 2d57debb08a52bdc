//go:build !race

package harmonyflow

import (
	"context"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
)

// BenchmarkReads is what the plugin itself does for a read, without Vault and the
// connection between them: a role that keeps all versions that it may, and the document that
// it fills.
func BenchmarkReads(b *testing.B) {
	m := newFuzzed(b, nil)
	defer m.Cleanup(context.Background())
	m.answerWithin = answerWithin
	write := func(path string, data map[string]any) {
		b.Helper()
		resp, err := m.HandleRequest(context.Background(), &logical.Request{
			Operation: logical.UpdateOperation, Path: path, Data: data, Storage: m.storage, MountPoint: mountPoint, ID: uuid.NewString(),
		})
		require.NoError(b, err)
		require.False(b, resp.IsError(), "%s: %v", path, resp)
	}
	m.send(b, logical.UpdateOperation, "roles/token", map[string]any{"kind": "api-key", "document": "app", "field": "TOKEN", "previous_field": "TOKEN_PREVIOUS"})
	for range 5 {
		write("rotate/api-key/token", nil)
		write("retire/api-key/token", nil)
	}
	write("rotate/api-key/token", nil)
	for _, path := range []string{"creds/token", "data/app"} {
		b.Run(path, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				resp, err := m.HandleRequest(context.Background(), &logical.Request{
					Operation: logical.ReadOperation, Path: path, Storage: m.storage, MountPoint: mountPoint, ID: "0192",
				})
				require.NoError(b, err)
				require.NotEmpty(b, resp.Data)
			}
		})
	}
}
