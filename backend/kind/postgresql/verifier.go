package postgresql

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"

	"github.com/xdg-go/scram"
	"github.com/xdg-go/stringprep"
	"golang.org/x/text/secure/precis"
)

// What PostgreSQL itself uses for the passwords that it hashes.
const (
	iterations = 4096
	saltLength = 16
)

// agreed reports whether all clients make the same of secret before they use
// it. RFC 5802 prepares passwords with SASLprep, libpq falls back to the bytes
// as they are where that fails, and pgx uses its successor (RFC 8265): only
// what all of them leave alone is one password to everybody.
func agreed(secret string) bool {
	prepared, err := stringprep.SASLprep.Prepare(secret)
	if err != nil || prepared != secret {
		return false
	}
	opaque, err := precis.OpaqueString.String(secret)
	return err == nil && opaque == secret
}

// verifierOf is the form in which PostgreSQL stores a password (RFC 5803, with
// its own separators), and the only one in which it is sent to change a user.
// It holds letters, digits and + / = $ : - and so needs no escaping.
func verifierOf(secret string) (string, error) {
	salt := make([]byte, saltLength)
	if _, err := rand.Read(salt); err != nil {
		return "", fmt.Errorf("make a salt: %w", err)
	}
	return saltedVerifier(secret, salt)
}

func saltedVerifier(secret string, salt []byte) (string, error) {
	client, err := scram.SHA256.NewClientUnprepped("", secret, "")
	if err != nil {
		return "", fmt.Errorf("make a verifier: %w", err)
	}
	stored, err := client.GetStoredCredentialsWithError(scram.KeyFactors{Salt: string(salt), Iters: iterations})
	if err != nil {
		return "", fmt.Errorf("make a verifier: %w", err)
	}
	encode := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations, encode(salt), encode(stored.StoredKey), encode(stored.ServerKey)), nil
}
