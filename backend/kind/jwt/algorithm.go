package jwt

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// algorithm is a signature algorithm of RFC 7518 section 3.1 or RFC 8037.
type algorithm struct {
	name  string
	keys  string         // what its keys are, in words
	size  int            // bytes of a shared secret: that of the hash (RFC 7518 section 3.2)
	curve elliptic.Curve // of ES*
}

const (
	sharedKeys = "shared secret"
	rsaKeys    = "RSA key"
	edKeys     = "Ed25519 key"
)

var algorithms = []algorithm{
	{name: "HS256", keys: sharedKeys, size: 32},
	{name: "HS384", keys: sharedKeys, size: 48},
	{name: "HS512", keys: sharedKeys, size: 64},
	{name: "RS256", keys: rsaKeys},
	{name: "RS384", keys: rsaKeys},
	{name: "RS512", keys: rsaKeys},
	{name: "ES256", keys: "P-256 key", curve: elliptic.P256()},
	{name: "ES384", keys: "P-384 key", curve: elliptic.P384()},
	{name: "ES512", keys: "P-521 key", curve: elliptic.P521()},
	{name: "EdDSA", keys: edKeys},
}

const defaultAlgorithm = "HS256"

func algorithmOf(name string) (algorithm, error) {
	names := make([]string, len(algorithms))
	for i, a := range algorithms {
		if a.name == name {
			return a, nil
		}
		names[i] = a.name
	}
	return algorithm{}, fmt.Errorf("algorithm is %.64q: allowed are %s", name, strings.Join(names, ", "))
}

func (a algorithm) symmetric() bool { return a.keys == sharedKeys }

// Sizes of RSA keys, in bits. The default is what every verifier takes; keys
// that are replaced within months need no more.
const (
	defaultBits = 2048
	minBits     = 2048
	maxBits     = 4096
)

// maxShared bounds a generated shared secret, in bytes: beyond the block of the
// hash more of them add nothing.
const maxShared = 512

// checkSize checks the fields that say what a new key is like.
func (a algorithm) checkSize(spec kind.Spec) error {
	if a.symmetric() {
		switch spec.Encoding {
		case Base64, Base64URL, Hex:
		default:
			return fmt.Errorf("encoding is %.64q: allowed are %s, %s and %s", spec.Encoding, Base64, Base64URL, Hex)
		}
		if spec.Length < a.size || spec.Length > maxShared {
			return fmt.Errorf("length is %d: a key of %s has %d to %d random bytes", spec.Length, a.name, a.size, maxShared)
		}
		return nil
	}
	if spec.Encoding != "" {
		return fmt.Errorf("encoding is %.64q: keys of %s are PEM, so leave encoding out", spec.Encoding, a.name)
	}
	switch {
	case a.keys == rsaKeys:
		if spec.Length != 2048 && spec.Length != 3072 && spec.Length != 4096 {
			return fmt.Errorf("length is %d: a key of %s has 2048, 3072 or 4096 bits", spec.Length, a.name)
		}
	case spec.Length != 0:
		return fmt.Errorf("length is %d: keys of %s have one size, so leave length out", spec.Length, a.name)
	}
	return nil
}

// generate makes a key pair. The standard library's own functions take no
// randomness from their caller any more (Go 1.26): they read the system's. So
// that Vault's source of entropy counts, the keys that are a random number are
// made from that number. An RSA key, which is two random primes, is left to the
// library, and comes from the system's randomness alone.
func (a algorithm) generate(bits int, source io.Reader) (crypto.Signer, error) {
	switch {
	case a.keys == rsaKeys:
		return rsa.GenerateKey(rand.Reader, bits)
	case a.keys == edKeys:
		seed, err := kind.RandomBytes(source, ed25519.SeedSize)
		if err != nil {
			return nil, err
		}
		return ed25519.NewKeyFromSeed(seed), nil
	}
	return generateEC(a.curve, source)
}

// maxCandidates bounds how often a number is drawn again. P-256 refuses one in
// 2^32, the other curves fewer: a source that is refused so often is broken.
const maxCandidates = 16

// generateEC draws the private number of a key until it is in the group, which
// leaves all of them equally likely (FIPS 186-5, A.2.2).
func generateEC(curve elliptic.Curve, source io.Reader) (crypto.Signer, error) {
	bits := curve.Params().N.BitLen()
	for range maxCandidates {
		raw, err := kind.RandomBytes(source, (bits+7)/8)
		if err != nil {
			return nil, err
		}
		if extra := bits % 8; extra != 0 { // P-521: one bit of the first byte counts
			raw[0] &= 1<<extra - 1
		}
		// It refuses zero and what is not below the order of the group.
		if key, err := ecdsa.ParseRawPrivateKey(curve, raw); err == nil {
			return key, nil
		}
	}
	return nil, errors.New("the source of randomness keeps giving numbers that cannot be used: check it")
}

// fits refuses a key that the algorithm cannot sign with.
func (a algorithm) fits(key crypto.Signer) error {
	is := "of a type that is not known"
	switch key := key.(type) {
	case *rsa.PrivateKey:
		if is = "an " + rsaKeys; a.keys == rsaKeys {
			if n := key.N.BitLen(); n < minBits || n > maxBits || len(key.Primes) != 2 {
				return fmt.Errorf("initial_value is an RSA key of %d bits and %d primes: %d to %d bits and two primes are allowed", n, len(key.Primes), minBits, maxBits)
			}
			return nil
		}
	case *ecdsa.PrivateKey:
		if is = "a " + key.Curve.Params().Name + " key"; key.Curve == a.curve {
			return nil
		}
	case ed25519.PrivateKey:
		if is = "an " + edKeys; a.keys == edKeys {
			return nil
		}
	}
	return fmt.Errorf("initial_value is %s, but algorithm is %s: give a key of that algorithm (%s), or another algorithm", is, a.name, a.keys)
}
