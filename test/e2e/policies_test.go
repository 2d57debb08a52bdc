package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// The names of deploy/policies, and what each may do.
const (
	nobodyElse = ""
	admin      = "admin"
	looks      = "admin operator auditor emergency"
	steers     = "admin operator"
)

// access is a row of the matrix: a request, and whose policy allows it.
type access struct{ method, path, who string }

// matrix has every path of the engine. What is allowed may fail for another reason:
// nothing that is named here exists.
var matrix = []access{
	{"GET", "config", "admin auditor"},
	{"PUT", "config", admin},

	{"LIST", "connections/", looks},
	{"GET", "connections/absent", looks},
	{"PUT", "connections/absent", admin},
	{"PATCH", "connections/absent", admin},
	{"DELETE", "connections/absent", admin},
	{"PUT", "rotate-root/absent", admin},

	{"LIST", "consumers/", looks},
	{"GET", "consumers/absent", looks},
	{"PUT", "consumers/absent", admin},
	{"PATCH", "consumers/absent", admin},
	{"DELETE", "consumers/absent", admin},

	{"LIST", "documents/", looks},
	{"GET", "documents/absent", looks},
	{"PUT", "documents/absent", admin},
	{"DELETE", "documents/absent", admin},

	{"LIST", "roles/", looks},
	{"GET", "roles/absent", looks},
	{"PUT", "roles/absent", admin},
	{"PATCH", "roles/absent", admin},
	{"DELETE", "roles/absent", admin},
	{"DELETE", "roles/absent?abandon=true", admin},
	{"GET", "deleted", "admin auditor"},
	{"LIST", "deleted/", "admin auditor"},
	{"GET", "deleted/absent", "admin auditor"},
	{"PUT", "restore/absent", admin},

	{"GET", "creds/absent", nobodyElse},
	{"GET", "data/session-state-service", "reader"},
	{"GET", "data/session-state-service?version=1", "reader"},
	{"GET", "data/other", nobodyElse},
	{"PUT", "data/session-state-service", nobodyElse},
	{"DELETE", "data/session-state-service", nobodyElse},
	{"LIST", "metadata/", looks},
	{"LIST", "metadata/folder/", looks},
	{"GET", "metadata/session-state-service", looks + " reader"},
	{"GET", "metadata/other", looks},

	{"PUT", "rotate/redis", steers},
	{"PUT", "rotate/redis/absent", steers},
	{"PUT", "rotate/postgresql", admin},
	{"PUT", "rotate/postgresql/absent", admin},
	{"PUT", "rotate/all", admin},
	{"PUT", "emergency/rotate/redis", "emergency"},
	{"PUT", "emergency/rotate/redis/absent", "emergency"},
	{"PUT", "emergency/rotate/postgresql", "emergency"},
	{"PUT", "emergency/rotate/all", "emergency"},
	{"PUT", "rollback/redis/absent", steers},
	{"PUT", "rollback/postgresql/absent", admin},
	{"PUT", "retire/redis/absent", steers},
	{"PUT", "retire/postgresql/absent", admin},
	{"PUT", "reconcile/redis/absent", steers},
	{"PUT", "reconcile/postgresql/absent", admin},
	{"PUT", "ack/redis/absent", steers},
	{"PUT", "ack/postgresql/absent", admin},
	{"GET", "verify/redis/absent", steers + " emergency"},
	{"GET", "verify/postgresql/absent", "admin emergency"},
	{"PUT", "cancel/absent", steers},
	{"PUT", "resume/absent", steers},

	{"GET", "rotations", looks},
	{"LIST", "rotations/", looks},
	{"GET", "rotations/absent", looks},
	{"GET", "status", looks},
	{"GET", "metrics", "admin auditor monitoring"},
	{"LIST", "notifications/", "admin auditor"},
	{"GET", "notifications/absent", "admin auditor"},
	{"PUT", "notifications/absent", admin},
	{"DELETE", "notifications/absent", admin},
	{"PUT", "notifications/absent/test", admin},
	{"GET", "jwks/absent", "anybody"},
}

// who reports whether a policy is among those of a row.
func (a access) allows(policy string) bool {
	return a.who == "anybody" || slices.Contains(strings.Fields(a.who), policy)
}

// TestPolicies tries every path with every policy of deploy/policies, and without a
// token.
func TestPolicies(t *testing.T) {
	vault := servers.NewVault(t, servers.VaultOptions{Race: raceEnabled})
	root := vault.Client()
	files, err := filepath.Glob("../../deploy/policies/*.hcl")
	require.NoError(t, err)
	require.Len(t, files, 6)
	tokens := map[string]string{"": ""}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".hcl")
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		tokens[name], err = vault.TokenFor(t.Context(), "matrix-"+name, string(text))
		require.NoError(t, err)
	}
	allowed, denied := 0, 0
	for policy, token := range tokens {
		client, err := root.Clone()
		require.NoError(t, err)
		client.SetToken(token)
		for _, row := range matrix {
			status := row.try(t, client)
			if row.allows(policy) {
				require.NotEqual(t, http.StatusForbidden, status, "%s of %s with %q", row.method, row.path, policy)
				allowed++
			} else {
				require.Equal(t, http.StatusForbidden, status, "%s of %s with %q", row.method, row.path, policy)
				denied++
			}
		}
	}
	t.Logf("policies: %d policies and no token, %d requests allowed, %d denied", len(files), allowed, denied)
	everyPath(t, root)
}

// try sends the request and returns its status.
func (a access) try(t *testing.T, c *api.Client) int {
	t.Helper()
	path, query, _ := strings.Cut(a.path, "?")
	req := c.NewRequest(a.method, "/v1/"+servers.DefaultMount+"/"+path)
	for _, pair := range strings.FieldsFunc(query, func(r rune) bool { return r == '&' }) {
		name, value, _ := strings.Cut(pair, "=")
		req.Params.Set(name, value)
	}
	switch a.method {
	case "PATCH":
		req.Headers.Set("Content-Type", "application/merge-patch+json")
		fallthrough
	case "PUT":
		require.NoError(t, req.SetJSONBody(map[string]any{"unknown": "field"})) // nothing is changed
	}
	resp, err := c.RawRequestWithContext(t.Context(), req) //nolint:staticcheck // what is said is looked at, not what a helper makes of it
	if resp != nil {
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	var answer *api.ResponseError
	require.True(t, errors.As(err, &answer), "%v", err)
	return answer.StatusCode
}

var parameter = regexp.MustCompile(`\\\{[^}]*\\\}`)

// everyPath: a path that the engine has and the matrix has not is a hole.
func everyPath(t *testing.T, root *api.Client) {
	t.Helper()
	secret, err := root.Logical().ReadRawWithContext(t.Context(), "sys/internal/specs/openapi")
	require.NoError(t, err)
	defer secret.Body.Close()
	var doc struct {
		Paths map[string]map[string]any `json:"paths"`
	}
	require.NoError(t, secret.DecodeJSON(&doc))
	methods := map[string][]string{"get": {"GET", "LIST"}, "post": {"PUT"}, "delete": {"DELETE"}, "patch": {"PATCH"}}
	paths := 0
	for template, operations := range doc.Paths {
		rest, ours := strings.CutPrefix(template, "/"+servers.DefaultMount+"/")
		if !ours {
			continue
		}
		paths++
		is := regexp.MustCompile("^" + parameter.ReplaceAllString(regexp.QuoteMeta(rest), `[^?]+`) + `/?(\?.*)?$`)
		for op := range operations {
			if methods[op] == nil {
				continue
			}
			require.True(t, slices.ContainsFunc(matrix, func(a access) bool {
				return is.MatchString(a.path) && slices.Contains(methods[op], a.method)
			}), fmt.Sprintf("no row of the matrix tries %s of %s", op, template))
		}
	}
	require.Greater(t, paths, 20)
}
