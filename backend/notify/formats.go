package notify

import "github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"

// Formats are examples of what is stored here, by prefix.
func Formats() map[string]any {
	return map[string]any{storage.Notification: Notification{}, storage.Outbox: letter{}, storage.Telling: telling{}}
}
