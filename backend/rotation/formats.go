package rotation

import (
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// Formats are examples of what is stored here, by prefix.
func Formats() map[string]any {
	return map[string]any{
		storage.Config: Config{}, storage.Role: Role{}, storage.Deleted: Tombstone{}, storage.Rotation: Header{}, storage.Evidence: Evidence{},
		storage.Proof: seen.Consumer{}, storage.Plan: childPlan{}, storage.Open: struct{}{}, storage.Request: requestEntry{}, storage.Due: dueEntry{},
		storage.Claim: Claim{}, storage.Reservation: reservation{},
	}
}
