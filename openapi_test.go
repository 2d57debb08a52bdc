package harmonyflow

import (
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// document is the OpenAPI document that a Vault gives, of the mount alone.
func document(t *testing.T, c *api.Client, mount string) *openapi3.T {
	t.Helper()
	resp, err := c.Logical().ReadRawWithContext(t.Context(), "sys/internal/specs/openapi")
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	var whole map[string]any
	require.NoError(t, json.Unmarshal(raw, &whole))
	paths := whole["paths"].(map[string]any)
	for path := range paths {
		if !strings.HasPrefix(path, "/"+mount+"/") {
			delete(paths, path)
		}
	}
	// What no path of the mount refers to is of other engines.
	schemas := whole["components"].(map[string]any)["schemas"].(map[string]any)
	ours, err := json.Marshal(paths)
	require.NoError(t, err)
	for name := range schemas {
		if !strings.Contains(string(ours), `"#/components/schemas/`+name+`"`) {
			delete(schemas, name)
		}
	}
	raw, err = json.Marshal(whole)
	require.NoError(t, err)
	doc, err := openapi3.NewLoader().LoadFromData(raw)
	require.NoError(t, err)
	return doc
}

// TestOpenAPIOfVault: the document that a real Vault makes of the engine is one, it has
// every path, field and answer, and answers are as it says.
func TestOpenAPIOfVault(t *testing.T) {
	t.Parallel()
	vault := servers.NewVault(t, servers.VaultOptions{})
	c := vault.Client()
	doc := document(t, c, servers.DefaultMount)
	require.NoError(t, doc.Validate(t.Context()))

	m := newMount(t)
	resp, err := m.b.HandleRequest(context.Background(), &logical.Request{Operation: logical.HelpOperation, Storage: m.storage})
	require.NoError(t, err)
	own := resp.Data["openapi"].(*framework.OASDocument)
	require.Len(t, doc.Paths.Map(), len(own.Paths), "%v", slices.Sorted(maps.Keys(doc.Paths.Map())))
	operations, fields, answers := 0, 0, 0
	for path := range own.Paths {
		item := doc.Paths.Value("/" + servers.DefaultMount + path)
		require.NotNil(t, item, path)
		for method, op := range item.Operations() {
			operations++
			require.NotEmpty(t, op.Summary, "%s %s", method, path)
			good := 0
			for code, r := range op.Responses.Map() {
				require.NotNil(t, r.Value.Description, "%s of %s %s", code, method, path)
				if code[0] != '2' {
					continue
				}
				good++
				content := r.Value.Content.Get("application/json")
				if content == nil {
					require.Contains(t, []string{"204", "200"}, code, "%s %s", method, path)
					continue
				}
				answers++
				fields += described(t, method+" "+path, content.Schema)
			}
			require.Positive(t, good, "%s %s says nothing of its answer", method, path)
			if op.RequestBody != nil {
				fields += described(t, method+" "+path, op.RequestBody.Value.Content.Get("application/json").Schema)
			}
			for _, p := range append(slices.Clone(op.Parameters), item.Parameters...) {
				fields++
				require.NotEmpty(t, p.Value.Description, "%s of %s %s", p.Value.Name, method, path)
			}
		}
	}
	for _, p := range m.b.Paths { // and every field of a path is in one of its operations
		for name := range p.Fields {
			require.True(t, declared(doc, name, p), "field %s of %s", name, p.Pattern)
		}
	}
	figure(t, "OpenAPI: %d paths, %d operations, %d fields and %d answers described, valid to an OpenAPI library", len(own.Paths), operations, fields, answers)
	validAnswers(t, vault, doc)
}

// described requires a type and a description of each property.
func described(t *testing.T, of string, schema *openapi3.SchemaRef) int {
	t.Helper()
	require.NotNil(t, schema, of)
	for name, p := range schema.Value.Properties {
		require.NotEmpty(t, p.Value.Description, "%s of %s", name, of)
		require.NotEmpty(t, p.Value.Type, "%s of %s", name, of)
	}
	return len(schema.Value.Properties)
}

// declared reports whether the path has a field in the document.
func declared(doc *openapi3.T, name string, p *framework.Path) bool {
	own := "/" + servers.DefaultMount + "/" + strings.NewReplacer("<", "{", ">", "}").Replace(strings.TrimSuffix(human(p), "/"))
	for path, item := range doc.Paths.Map() {
		if strings.TrimSuffix(path, "/") != own {
			continue
		}
		for _, op := range item.Operations() {
			if op.RequestBody != nil {
				if _, ok := op.RequestBody.Value.Content.Get("application/json").Schema.Value.Properties[name]; ok {
					return true
				}
			}
			for _, param := range append(slices.Clone(op.Parameters), item.Parameters...) {
				if param.Value.Name == name {
					return true
				}
			}
		}
	}
	return p.Fields[name].Deprecated
}

// validAnswers holds real answers against the document.
func validAnswers(t *testing.T, vault *servers.Vault, doc *openapi3.T) {
	t.Helper()
	c := vault.Client()
	server := servers.Redis(t, users(1))
	write := func(path string, data map[string]any) {
		t.Helper()
		_, err := c.Logical().WriteWithContext(t.Context(), servers.DefaultMount+"/"+path, data)
		require.NoError(t, err, path)
	}
	write("connections/cache", map[string]any{"type": "redis", "addresses": server.Addr, "username": servers.RedisAdmin, "password": servers.RedisAdminPassword, "allowed_roles": "*"})
	write("connections/prod", map[string]any{"type": "kubernetes", "host": "https://127.0.0.1:1", "token": "t", "verify_connection": false})
	write("consumers/web", map[string]any{"connection": "prod", "namespace": "app", "secrets": "db", "hooks": `[{"name":"revoke","url":"https://api.example.com/"}]`})
	write("roles/app", map[string]any{"kind": "redis", "connection": "cache", "username": "user-0", "initial_password": password(0), "rotation_period": "24h"})
	write("roles/key", map[string]any{"kind": "api-key", "document": "web", "field": "key", "previous_field": "old"})
	write("documents/web", map[string]any{"allowed_roles": "key"})
	write("config", map[string]any{"allowed_hosts": "127.0.0.1", "freeze": false})
	write("notifications/ops", map[string]any{"url": "http://127.0.0.1:1/", "events": "failed", "secret": "whsec_" + strings.Repeat("a", 40)})
	secret, err := c.Logical().WriteWithContext(t.Context(), servers.DefaultMount+"/rotate/all", nil)
	require.NoError(t, err)
	id := secret.Data["rotation_id"].(string)
	checked := 0
	for template, paths := range map[string][]string{
		"config": {"config"}, "connections/{name}": {"connections/cache", "connections/prod"}, "consumers/{name}": {"consumers/web"},
		"roles/{name}": {"roles/app", "roles/key"}, "creds/{name}": {"creds/app", "creds/key"}, "documents/{document}": {"documents/web"},
		"data/{document}": {"data/web"}, "metadata/{document}": {"metadata/web"}, "rotations/{id}": {"rotations/" + id}, "status": {"status"},
		"verify/{kind}/{name}": {"verify/redis/app", "verify/api-key/key"}, "notifications/{name}": {"notifications/ops"},
	} {
		item := doc.Paths.Value("/" + servers.DefaultMount + "/" + template)
		require.NotNil(t, item, template)
		schema := item.Get.Responses.Value("200").Value.Content.Get("application/json").Schema
		for _, path := range paths {
			resp, err := c.Logical().ReadRawWithContext(t.Context(), servers.DefaultMount+"/"+path)
			require.NoError(t, err, path)
			require.Equal(t, http.StatusOK, resp.StatusCode, path)
			var body struct {
				Data any `json:"data"`
			}
			require.NoError(t, json.NewDecoder(resp.Body).Decode(&body))
			_ = resp.Body.Close()
			if fields, ok := body.Data.(map[string]any); ok && fields["custom_metadata"] == nil {
				delete(fields, "custom_metadata") // null, as of KV version 2, which Vault's documents cannot say
			}
			require.NoError(t, schema.Value.VisitJSON(body.Data), path)
			checked++
		}
	}
	figure(t, "OpenAPI: %d answers of a real Vault are as it says", checked)
}

func figure(t *testing.T, format string, args ...any) {
	t.Helper()
	report.Figure(t, "PROOF_FILE", format, args...)
}
