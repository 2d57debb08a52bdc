package rabbitmq

import (
	"bytes"
	"crypto/md5" //nolint:gosec // only to recognize passwords from before RabbitMQ 3.6
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// The algorithms that come with RabbitMQ. Each user's record names its own.
// https://www.rabbitmq.com/docs/passwords
const (
	hashMD5    = "rabbit_password_hashing_md5"
	hashSHA256 = "rabbit_password_hashing_sha256"
	hashSHA512 = "rabbit_password_hashing_sha512"
)

// saltLength is how many bytes of salt stand before each hash.
const saltLength = 4

// digest returns salt and the hash of salt and secret, as RabbitMQ keeps them;
// false where the algorithm is none that comes with it.
func digest(algorithm string, salt []byte, secret string) ([]byte, bool) {
	salted := append(bytes.Clone(salt), secret...)
	switch algorithm {
	case hashSHA256:
		sum := sha256.Sum256(salted)
		return append(bytes.Clone(salt), sum[:]...), true
	case hashSHA512:
		sum := sha512.Sum512(salted)
		return append(bytes.Clone(salt), sum[:]...), true
	case hashMD5:
		sum := md5.Sum(salted) //nolint:gosec // see above
		return append(bytes.Clone(salt), sum[:]...), true
	}
	return nil, false
}

// passwordHash hashes secret with fresh salt, the form in which a password is
// sent to change a user.
func passwordHash(algorithm, secret string) (string, error) {
	salt, err := kind.RandomBytes(rand.Reader, saltLength)
	if err != nil {
		return "", err
	}
	sum, ok := digest(algorithm, salt, secret)
	if !ok {
		return "", kind.Definitely("password hashing %q is not known here", algorithm)
	}
	return base64.StdEncoding.EncodeToString(sum), nil
}

// user is the record of one user, as the management API shows it.
type user struct {
	Name      string `json:"name"`
	Hash      string `json:"password_hash"`
	Algorithm string `json:"hashing_algorithm"`
	Tags      tags   `json:"tags"`
	Limits    limits `json:"limits"`

	exists bool
}

// has reports whether secret is the password of u.
func (u user) has(secret string) bool {
	kept, err := base64.StdEncoding.DecodeString(u.Hash)
	if err != nil || len(kept) <= saltLength || secret == "" {
		return false
	}
	sum, ok := digest(u.algorithm(), kept[:saltLength], secret)
	return ok && bytes.Equal(sum, kept)
}

// algorithm is how the password of u is hashed. Records from before RabbitMQ 3.6
// do not say.
func (u user) algorithm() string {
	if u.Algorithm == "" {
		return hashMD5
	}
	return u.Algorithm
}

// next is how the next password of u is hashed: as the last one was, but no
// longer with MD5. It is "" where that is an extension of the broker.
func (u user) next() string {
	switch u.algorithm() {
	case hashMD5, hashSHA256:
		return hashSHA256
	case hashSHA512:
		return hashSHA512
	}
	return ""
}
