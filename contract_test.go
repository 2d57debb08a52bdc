package harmonyflow

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// TestEveryOperationAnswersAsDeclared uses every operation of every path once;
// the helpers hold each answer to the declared schema. A path or an operation
// that is added without a request here fails.
func TestEveryOperationAnswersAsDeclared(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))

	m.must("config", map[string]any{"grace_period": "2h"})
	require.EqualValues(t, 7200, m.read("config").data["grace_period"])

	m.connect("cache", server.Addr, nil)
	m.must("connections/cache", map[string]any{"allowed_usernames": "user-*"})
	require.Equal(t, http.StatusOK, m.read("connections/cache").code)
	require.Equal(t, []string{"cache"}, m.list("connections/").data["keys"])

	m.cluster("prod")
	m.must("consumers/web", map[string]any{"connection": "prod", "namespace": "app", "secrets": "db", "checks": `[{"type":"pods","selector":"app=web"}]`})
	m.must("consumers/web", map[string]any{"max_parallel": 2})
	require.Equal(t, http.StatusOK, m.read("consumers/web").code)
	require.Equal(t, []string{"web"}, m.list("consumers/").data["keys"])
	require.Equal(t, http.StatusNoContent, m.delete("consumers/web").code)

	m.adopt("app", "cache", 0, map[string]any{"rotation_period": "24h"})
	m.must("documents/team/web", map[string]any{"allowed_roles": "tok*"})
	require.Equal(t, []string{"tok*"}, m.read("documents/team/web").data["allowed_roles"])
	require.Equal(t, []string{"team/"}, m.list("documents/").data["keys"])
	m.must("roles/token", map[string]any{"kind": "api-key", "previous_field": "OLD", "document": "team/web", "field": "key"})
	require.Equal(t, http.StatusOK, m.read("data/team/web").code)
	require.Equal(t, http.StatusOK, m.read("metadata/team/web").code)
	require.Equal(t, []string{"team/"}, m.list("metadata/").data["keys"])
	require.Equal(t, []string{"web"}, m.list("metadata/team/").data["keys"])
	require.Equal(t, http.StatusBadRequest, m.write("data/team/web", map[string]any{"data": map[string]any{"key": "mine"}}).code)
	require.Equal(t, http.StatusBadRequest, m.delete("data/team/web").code)
	require.Equal(t, http.StatusNoContent, m.delete("documents/team/web").code)
	m.must("roles/signer", map[string]any{"kind": "jwt", "algorithm": "EdDSA", "max_token_ttl": "1h", "public_jwks": true})
	require.Equal(t, http.StatusOK, m.read("jwks/signer").code)
	m.creds("signer")
	m.must("roles/cipher", map[string]any{"kind": "encryption-key", "propagation_delay": "1s", "require_reencryption_ack": true})
	m.ended(id(m.must("rotate/encryption-key/cipher", nil)))
	m.must("ack/encryption-key/cipher", map[string]any{"version": 1})
	m.must("roles/app", map[string]any{"description": "an app"})
	require.Equal(t, http.StatusOK, m.patch("roles/app", map[string]any{"description": "the app"}).code)
	require.Equal(t, http.StatusOK, m.read("roles/app").code)
	require.Equal(t, []string{"app", "cipher", "signer", "token"}, m.list("roles/").data["keys"])
	m.creds("app")

	first := m.must("rotate/redis/app", nil)
	m.must("rotate/redis/app", map[string]any{"dry_run": true})
	m.must("reconcile/redis/app", nil)
	require.Equal(t, true, m.read("verify/redis/app").data["ok"])
	require.Equal(t, true, m.read("verify/api-key/token").data["ok"])
	m.must("retire/redis/app", nil)
	m.ended(id(first))
	m.must("rotate/redis", nil)
	batch := m.must("rotate/all", map[string]any{"reason": "because"})
	m.must("rotate/all", map[string]any{"dry_run": true})
	m.must("cancel/"+id(batch), map[string]any{"reason": "not today"})
	require.GreaterOrEqual(t, m.write("resume/"+id(batch), nil).code, http.StatusBadRequest, "it is not held")
	m.must("rollback/redis/app", nil)
	m.must("emergency/rotate/redis/app", map[string]any{"reason": "a drill"})
	m.must("emergency/rotate/redis", map[string]any{"reason": "a drill"})
	m.must("emergency/rotate/all", map[string]any{"dry_run": true})
	m.must("emergency/rotate/all", map[string]any{"reason": "a drill"})
	m.must("rotate-root/cache", map[string]any{"dry_run": true})
	m.must("rotate-root/cache", nil)

	require.Equal(t, http.StatusOK, m.read("rotations").code)
	require.Equal(t, http.StatusOK, m.list("rotations/").code)
	require.Equal(t, http.StatusOK, m.read("status").code)
	require.Equal(t, http.StatusOK, m.read("metrics").code)
	hook := newReceiver(t, "whsec_"+strings.Repeat("a", 40))
	m.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	m.must("notifications/ops", map[string]any{"url": hook.URL, "secret": "whsec_" + strings.Repeat("a", 40)})
	m.must("notifications/ops", map[string]any{"events": "failed"})
	m.must("notifications/ops/test", nil)
	require.Equal(t, http.StatusOK, m.list("notifications/").code)
	require.Equal(t, http.StatusOK, m.read("notifications/ops").code)
	require.Equal(t, http.StatusNoContent, m.delete("notifications/ops").code)
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	require.Equal(t, []string{"app"}, m.list("deleted/").data["keys"])
	require.Equal(t, http.StatusOK, m.read("deleted").code)
	require.Equal(t, http.StatusOK, m.read("deleted/app").code)
	m.must("restore/app", nil)
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
	require.Equal(t, http.StatusNoContent, m.send(request{op: logical.DeleteOperation, path: "connections/cache", data: map[string]any{"force": "true"}}).code)

	for _, p := range m.b.Paths {
		for op := range p.Operations {
			require.True(t, m.exercised[p.Pattern+" "+string(op)], "no request above uses %s of %s", op, p.Pattern)
		}
	}
}

// answeredByActive are paths whose reads only the active node can answer.
var answeredByActive = map[string]bool{"metrics": true, "notifications/" + namePattern: true}

func TestEveryPathIsDescribed(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	mutating := map[logical.Operation]bool{
		logical.CreateOperation: true, logical.UpdateOperation: true, logical.PatchOperation: true, logical.DeleteOperation: true,
	}
	for _, p := range m.b.Paths {
		require.NotEmpty(t, p.HelpSynopsis, p.Pattern)
		require.NotEmpty(t, p.HelpDescription, p.Pattern)
		require.NotNil(t, p.DisplayAttrs, p.Pattern)
		require.Equal(t, operationPrefix, p.DisplayAttrs.OperationPrefix, p.Pattern)
		require.NotEmpty(t, p.Operations, p.Pattern)
		for name, field := range p.Fields {
			require.NotEmpty(t, field.Description, "%s of %s", name, p.Pattern)
		}
		for op, handler := range p.Operations {
			props := handler.Properties()
			require.NotEmpty(t, props.Summary, "%s of %s", op, p.Pattern)
			require.NotNil(t, props.DisplayAttrs, "%s of %s", op, p.Pattern)
			require.NotEmpty(t, props.Responses, "%s of %s", op, p.Pattern)
			require.Equal(t, mutating[op] || answeredByActive[p.Pattern], props.ForwardPerformanceStandby, "%s of %s", op, p.Pattern)
			require.Equal(t, mutating[op] || answeredByActive[p.Pattern], props.ForwardPerformanceSecondary, "%s of %s", op, p.Pattern)
			for code, responses := range props.Responses {
				for _, r := range responses {
					require.NotEmpty(t, r.Description, "%d of %s of %s", code, op, p.Pattern)
					for name, field := range r.Fields {
						require.NotEmpty(t, field.Description, "%s of %s of %s", name, op, p.Pattern)
					}
				}
			}
		}
	}
}

// TestOpenAPI makes the document that sys/internal/specs/openapi shows, and
// from which clients are generated: two operations of one id would be one
// function.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	resp, err := m.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.HelpOperation, Storage: m.storage})
	require.NoError(t, err)
	require.Contains(t, resp.Data["help"], "connections/<name>")
	doc, ok := resp.Data["openapi"].(*framework.OASDocument)
	require.True(t, ok, "%T", resp.Data["openapi"])
	raw, err := json.Marshal(doc)
	require.NoError(t, err)
	var decoded struct {
		Paths map[string]map[string]json.RawMessage `json:"paths"`
	}
	require.NoError(t, json.Unmarshal(raw, &decoded))
	ids := map[string]string{}
	for path, methods := range decoded.Paths {
		for method, body := range methods {
			var op struct {
				OperationID string                     `json:"operationId"`
				Responses   map[string]json.RawMessage `json:"responses"`
			}
			if json.Unmarshal(body, &op) != nil || (method != "get" && method != "post" && method != "delete") {
				continue
			}
			require.NotEmpty(t, op.OperationID, "%s %s", method, path)
			require.Empty(t, ids[op.OperationID], "%s is also %s %s", op.OperationID, method, path)
			require.NotContains(t, op.OperationID, "2", "a collision that the framework numbered: %s %s", method, path)
			require.NotEmpty(t, op.Responses, "%s %s", method, path)
			ids[op.OperationID] = method + " " + path
		}
	}
	require.GreaterOrEqual(t, len(ids), 20)
	require.NotContains(t, m.log.String(), "OpenAPI")
}

func TestPathHelp(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	for _, path := range []string{
		"config", "connections", "connections/cache", "roles", "roles/app", "creds/app", "rotate/all", "rotate/redis", "rotate/redis/app", "emergency/rotate/all", "emergency/rotate/redis/app",
		"rotations", "rotations/x", "cancel/x", "rollback/redis/app", "retire/redis/app", "reconcile/redis/app", "verify/redis/app", "status", "metrics", "notifications", "notifications/ops", "notifications/ops/test", "jwks/x",
	} {
		resp, err := m.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.HelpOperation, Path: path, Storage: m.storage})
		require.NoError(t, err, path)
		require.Greater(t, len(resp.Data["help"].(string)), 100, path)
	}
}
