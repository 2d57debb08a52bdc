package jwt

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Labels of PEM (RFC 7468, RFC 5915; PKCS #1 as OpenSSL writes it).
const (
	labelPKCS8     = "PRIVATE KEY"
	labelPKCS1     = "RSA PRIVATE KEY"
	labelSEC1      = "EC PRIVATE KEY"
	labelEncrypted = "ENCRYPTED PRIVATE KEY"
	labelECParams  = "EC PARAMETERS" // openssl ecparam -genkey writes them before the key
	labelPKIX      = "PUBLIC KEY"
)

// adoptPrivate reads the private key that a user gave. No error repeats any of
// it.
func adoptPrivate(a algorithm, text string) (crypto.Signer, error) {
	block, err := privateBlock(text)
	if err != nil {
		return nil, err
	}
	key, err := parsePrivate(block)
	if err != nil {
		return nil, fmt.Errorf("initial_value is PEM, but no private key that can be read: give PKCS #8, PKCS #1 or SEC 1, for example what openssl pkey -in key.pem prints")
	}
	return key, a.fits(key)
}

// privateBlock finds the one private key in a text.
func privateBlock(text string) (*pem.Block, error) {
	var found *pem.Block
	rest := []byte(text)
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		switch {
		case block.Type == labelECParams:
		case block.Type == labelEncrypted || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED"):
			return nil, errors.New("initial_value is an encrypted key: decrypt it first, with openssl pkey -in key.pem -out plain.pem")
		case block.Type != labelPKCS8 && block.Type != labelPKCS1 && block.Type != labelSEC1:
			return nil, fmt.Errorf("initial_value holds a PEM block %.40q: give the private key alone", block.Type)
		case found != nil:
			return nil, errors.New("initial_value holds several private keys: give one")
		default:
			found = block
		}
	}
	if found == nil {
		return nil, errors.New("initial_value is no private key in PEM: give the whole file, for example initial_value=@key.pem")
	}
	return found, nil
}

func parsePrivate(block *pem.Block) (crypto.Signer, error) {
	var (
		key any
		err error
	)
	switch block.Type {
	case labelPKCS1:
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case labelSEC1:
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, err
	}
	if signer, ok := key.(crypto.Signer); ok {
		return signer, nil
	}
	return nil, errors.New("the key does not sign")
}

// pairMaterial stores a key pair. Its id is the thumbprint of the public half
// (RFC 7638), which anybody who has the key can compute.
func pairMaterial(key crypto.Signer) (kind.Material, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return kind.Material{}, errors.New("the new key cannot be encoded")
	}
	id, err := thumbprint(key.Public())
	if err != nil {
		return kind.Material{}, err
	}
	return kind.Material{Secret: string(pem.EncodeToMemory(&pem.Block{Type: labelPKCS8, Bytes: der})), KeyID: id}, nil
}

// isPair tells a key pair from a shared secret, which has no new line. In doubt
// it is a pair: of a pair nothing but the public half is ever shown.
func isPair(m kind.Material) bool {
	return strings.Contains(m.Secret, "\n") || strings.Contains(m.Secret, "-----BEGIN")
}

// public is the public half of a stored pair.
func public(m kind.Material) (crypto.PublicKey, error) {
	if block, _ := pem.Decode([]byte(m.Secret)); block != nil {
		if key, err := parsePrivate(block); err == nil {
			return key.Public(), nil
		}
	}
	return nil, kind.Definitely("the stored key %.64q cannot be read", m.KeyID)
}

func encodePublic(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("the public key cannot be encoded: %w", err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: labelPKIX, Bytes: der})), nil
}
