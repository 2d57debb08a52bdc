// Package approle rotates the secret-id that a connection of type vault logs in
// with itself. Nobody creates roles of this kind: it is what rotate-root of such a
// connection does.
//
// The new secret-id is made here and given to Vault as a custom one, so that it is
// stored before Vault hears of it, and an answer that is lost loses nothing.
//
// An AppRole has the secret-ids of all its clients, and those of others are none of
// our business: destroying one is an outage of whoever uses it, and only accessors
// of them can be seen, which tell nothing about whose they are. So this target
// never counts a credential that nobody asked about (Extra is 0), and a change
// that is Exclusive refuses what is in Refuse and what else the connection itself
// may log in with, and no more.
//
// Whether a secret-id is refused is never asked by a login. After five refused ones
// in a row, of whoever, Vault locks the AppRole out for fifteen minutes with all its
// secret-ids (user_lockout counts by role_id, and AppRole is one of the methods that
// it is on for). A lookup by the admin says that a secret-id is not there and counts
// for nothing; one that is there has to prove itself by a login.
//
//	approle.go    the kind: generation
//	target.go     Probe and Change
//	preflight.go  Preflight
package approle

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	// length is that of more than 200 random bits; the secret-ids of Vault's own have
	// 122.
	length    = 40
	maxSecret = 4096
)

// Kind is the approle kind. Its zero value is ready to use.
type Kind struct{}

var _ kind.Kind = Kind{}

// Name is what answers show.
func (Kind) Name() string { return "approle" }

// ConnectionType is the type of connection that is rotated.
func (Kind) ConnectionType() string { return connection.TypeVault }

// Fields are none: there is nothing that a user could say.
func (Kind) Fields() []string { return nil }

// Complete sets the strategy, of which there is one.
func (Kind) Complete(spec *kind.Spec) error {
	spec.Strategy = kind.Overlap
	return nil
}

// CheckInitial refuses what is no secret-id. It need not look like a generated one.
func (Kind) CheckInitial(_ kind.Spec, secret string) error {
	switch {
	case secret == "":
		return errors.New("secret_id is empty; give the secret-id that the connection logs in with")
	case len(secret) > maxSecret:
		return fmt.Errorf("secret_id has %d bytes; give at most %d", len(secret), maxSecret)
	case strings.ContainsFunc(secret, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		return errors.New("secret_id holds a space or a control character; check that its file does not end with a new line")
	}
	return nil
}

// Generate makes a new secret-id.
func (Kind) Generate(_ context.Context, spec kind.Spec, source kind.Source) (kind.Material, error) {
	secret, err := kind.RandomString(source, length, alphabet)
	if err != nil {
		return kind.Material{}, fmt.Errorf("generate a secret-id: %w", err)
	}
	return kind.Material{Username: spec.Username, Secret: secret}, nil
}
