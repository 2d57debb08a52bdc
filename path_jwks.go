package harmonyflow

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/jwt"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// jwksPath is read without a token.
const jwksPath = "jwks/"

func (b *backend) pathJWKS() []*framework.Path {
	read := operation{
		summary: "Read the public keys of a role.", verb: "read", suffix: "jwks", errors: []int{http.StatusNotModified, http.StatusNotFound},
		fields: map[string]*framework.FieldSchema{},
	}.handler(nil).(*framework.PathOperation)
	// Not strict: a request that is wrong tells no more than any other.
	read.Callback = b.readJWKS
	return []*framework.Path{{
		Pattern:      jwksPath + namePattern,
		Fields:       map[string]*framework.FieldSchema{"name": nameField},
		Operations:   map[logical.Operation]framework.OperationHandler{logical.ReadOperation: read},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis: "Public keys, as a JSON Web Key Set. Needs no token.",
		HelpDescription: `The next, the current and the earlier keys of a jwt role whose keys are pairs and that has public_jwks=true, as RFC
7517 says; every other name is answered with the same 404. The answer may be kept for half of the role's
propagation_delay (Cache-Control). For ETag and 304, tune the mount once:
vault secrets tune -allowed-response-headers=ETag -passthrough-request-headers=If-None-Match <mount>.`,
	}}
}

// readJWKS costs one read of storage, whoever asks. Nothing in an answer tells
// apart names that are not shown.
func (b *backend) readJWKS(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if checkName(name) != nil {
		return nil, nil //nolint:nilerr // the 404 of every name that is not shown
	}
	r, err := b.engine.Store().Role(ctx, name)
	switch {
	case storage.IsUndecodable(err):
		return nil, nil
	case err != nil: // no 404: verifiers would forget keys that are there
		return nil, logical.CodedError(http.StatusServiceUnavailable, "storage cannot be read now; try again")
	case r == nil:
		return nil, nil
	}
	set, err := b.keySets.of(r)
	if err != nil { // not louder: anybody could fill the log
		b.Logger().Debug("public keys cannot be shown", "role", name, "error", err)
	}
	if set == nil {
		return nil, nil
	}
	return set.answer(req, r), nil
}

// keySet is what jwks/ shows of a role: public keys, and nothing else.
type keySet struct {
	ids  string // of its keys, which are digests of them, and the algorithm
	body string
	etag string
}

func (s *keySet) answer(req *logical.Request, r *rotation.Role) *logical.Response {
	resp := &logical.Response{
		Headers: map[string][]string{"ETag": {s.etag}},
		Data: map[string]any{
			logical.HTTPContentType: jwt.ContentType,
			logical.HTTPRawBody:     s.body,
			logical.HTTPStatusCode:  http.StatusOK,
			// Whoever keeps it half as long as a key is shown before it is used has
			// the time to read it once more.
			logical.HTTPCacheControlHeader: fmt.Sprintf("public, max-age=%d", seconds(r.Spec.PropagationDelay/2)),
		},
	}
	if matches(req.Headers, s.etag) {
		resp.Data[logical.HTTPRawBody], resp.Data[logical.HTTPStatusCode] = "", http.StatusNotModified
	}
	return resp
}

// matches reports whether the client has what etag names (RFC 9110, 13.1.2).
// Vault hands the header on where the mount was tuned to.
func matches(headers map[string][]string, etag string) bool {
	for name, values := range headers {
		if !strings.EqualFold(name, "If-None-Match") {
			continue
		}
		for _, tag := range strings.Split(strings.Join(values, ","), ",") {
			tag = strings.TrimSpace(tag)
			if tag == "*" || strings.TrimPrefix(tag, "W/") == etag {
				return true
			}
		}
	}
	return false
}

// keySets remembers the sets that were shown: to find the public half of a
// stored key takes milliseconds, and anybody may ask.
type keySets struct {
	mu    sync.Mutex
	known map[string]*keySet // by role
}

// maxKeySets bounds what is remembered, a few kilobytes each.
const maxKeySets = 1024

// of returns the set of a role; nil when the role shows none.
func (k *keySets) of(r *rotation.Role) (*keySet, error) {
	if r.Kind != (jwt.Kind{}).Name() || !r.Spec.PublicJWKS || !jwt.Publishable(r.Spec.Algorithm) {
		return nil, nil
	}
	ring := r.Ring()
	if len(ring) == 0 { // it is being created
		return nil, nil
	}
	keys, ids := make([]kind.Material, len(ring)), r.Spec.Algorithm
	for i, v := range ring {
		keys[i] = v.Material
		ids += " " + v.Material.KeyID
	}
	k.mu.Lock()
	set := k.known[r.Name]
	k.mu.Unlock()
	if set != nil && set.ids == ids {
		return set, nil
	}
	body, err := jwt.JWKS(keys, r.Spec.Algorithm)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body)
	set = &keySet{ids: ids, body: string(body), etag: `"` + base64.RawURLEncoding.EncodeToString(sum[:]) + `"`}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known == nil || len(k.known) >= maxKeySets {
		k.known = map[string]*keySet{}
	}
	k.known[r.Name] = set
	return set, nil
}
