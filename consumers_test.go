package harmonyflow

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const apiServerToken = "eyJ-the-token-of-a-service-account"

// cluster writes a connection to an API server that nobody runs.
func (m *mount) cluster(name string) {
	m.Helper()
	a, err := servers.NewAuthority()
	require.NoError(m, err)
	m.must("connections/"+name, map[string]any{
		"type": "kubernetes", "host": "https://127.0.0.1:1/", "ca_cert": a.PEM, "token": apiServerToken, "verify_connection": false,
	})
}

func TestKubernetesConnection(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.cluster("prod")
	data := m.read("connections/prod").data
	require.Equal(t, "https://127.0.0.1:1", data["host"])
	require.Equal(t, "harmonyflow", data["field_manager"])
	require.Equal(t, "token", data["auth"])
	m.must("connections/prod", map[string]any{"field_manager": "flux-client-side-apply", "verify_connection": false})
	require.Equal(t, "flux-client-side-apply", m.read("connections/prod").data["field_manager"])

	for _, c := range []struct {
		data map[string]any
		says string
	}{
		{map[string]any{"host": "https://stranger:6443"}, "give token in the same request"},
		{map[string]any{"ca_cert": ""}, "give token in the same request"},
		{map[string]any{"host": "http://10.0.0.1"}, "use https://"},
		{map[string]any{"host": "https://u:p@10.0.0.1"}, "host is no URL"},
		{map[string]any{"token": "with space"}, "token holds a space"},
		{map[string]any{"in_cluster": true, "token": "x"}, "in_cluster is true, and takes no token"},
		{map[string]any{"kubeconfig": "x", "token": "y"}, "kubeconfig stands for host"},
		{map[string]any{"kubeconfig": "users: [{name: a, user: {exec: {command: sh}}}]"}, "kubeconfig"},
		{map[string]any{"tls_skip_verify": true}, "is not for a connection of type kubernetes"},
		{map[string]any{"verify_connection": true}, "cannot be reached"},
	} {
		if _, ok := c.data["verify_connection"]; !ok {
			c.data["verify_connection"] = false
		}
		r := m.write("connections/prod", c.data)
		require.Equal(t, http.StatusBadRequest, r.code, c.says)
		require.Contains(t, r.message, c.says)
	}
	m.must("connections/prod", map[string]any{"in_cluster": true, "verify_connection": false})
	require.Equal(t, "in_cluster", m.read("connections/prod").data["auth"])
	require.Equal(t, "", m.read("connections/prod").data["ca_cert"])
}

func TestConsumers(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.cluster("prod")
	checks := `[{"type":"http","service":"http:web:8080","path":"/healthz","times":3,"timeout":"90s"},{"type":"logs","forbid":"(?i)auth.*failed"}]`
	m.must("consumers/web", map[string]any{
		"connection": "prod", "namespace": "app", "allowed_roles": "db-*", "external_secrets": "db-creds",
		"workloads": `[[{"kind":"Deployment","name":"canary"}],[{"kind":"Deployment","selector":"app=web"}]]`, "checks": checks,
		"hooks": `[{"name":"revoke","url":"https://api.example.com/v1/sessions/revoke-all"}]`,
	})
	want := map[string]any{
		"connection": "prod", "namespace": "app", "allowed_roles": []string{"db-*"}, "hooks": []any{map[string]any{"name": "revoke", "url": "https://api.example.com/v1/sessions/revoke-all"}}, "external_secrets": []string{"db-creds"}, "secrets": []string{},
		"workloads": []any{
			[]any{map[string]any{"kind": "Deployment", "name": "canary"}},
			[]any{map[string]any{"kind": "Deployment", "selector": "app=web"}},
		},
		"mode": "restart", "rollout_timeout": int64(300), "stabilization": int64(60), "max_parallel": int64(0), "restart_operator": "",
		"checks": []any{
			map[string]any{"type": "http", "service": "http:web:8080", "path": "/healthz", "times": float64(3), "timeout": int64(90)},
			map[string]any{"type": "logs", "forbid": "(?i)auth.*failed"},
		},
	}
	require.Equal(t, want, m.read("consumers/web").data)
	require.Equal(t, map[string]any{"connection": "prod", "namespace": "app", "mode": "restart"}, m.list("consumers/").data["key_info"].(map[string]any)["web"])

	// What is read can be written, and what is not given stays.
	m.must("consumers/web", m.read("consumers/web").data)
	require.Equal(t, want, m.read("consumers/web").data)
	m.must("consumers/web", map[string]any{"checks": "", "stabilization": "30s", "secrets": "other"})
	data := m.read("consumers/web").data
	require.Empty(t, data["checks"])
	require.Equal(t, int64(30), data["stabilization"])
	require.Equal(t, want["workloads"], data["workloads"])
	m.must("consumers/web", map[string]any{"stabilization": ""})
	require.Equal(t, int64(60), m.read("consumers/web").data["stabilization"])

	r := m.delete("connections/prod")
	require.Equal(t, http.StatusConflict, r.code)
	require.Contains(t, r.message, `is used by consumer "web"`)
	m.delete("consumers/web")
	require.Equal(t, http.StatusNotFound, m.read("consumers/web").code)
	m.delete("connections/prod")
}

func TestConsumersThatCannotBe(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.cluster("prod")
	base := map[string]any{"connection": "prod", "namespace": "app", "secrets": "db"}
	check := func(c string) map[string]any { return map[string]any{"checks": "[" + c + "]"} }
	hook := func(h string) map[string]any { return map[string]any{"hooks": "[" + h + "]"} }
	for says, data := range map[string]map[string]any{
		`connection "gone" does not exist`: {"connection": "gone"},
		"connection":                       {"connection": ""},
		"namespace is missing":             {"namespace": ""},
		"namespace is":                     {"namespace": "No"},
		"has nothing to do":                {"secrets": ""},
		"mode is":                          {"mode": "eventually"},
		"no workloads to observe":          {"mode": "observe"},
		`with name "" and selector ""`:     {"workloads": `[{"kind":"Deployment"}]`},
		"workloads is no JSON list":        {"workloads": `deployment/web`},
		`unknown field "replicas"`:         {"workloads": `[[{"kind":"Deployment","name":"web","replicas":3}]]`},
		"workloads has kind":               {"workloads": `[[{"kind":"Job","name":"web"}]]`},
		"give one of them":                 {"workloads": `[[{"kind":"Deployment"}]]`},
		"empty wave":                       {"workloads": `[[]]`},
		"twice":                            {"workloads": `[[{"kind":"Deployment","name":"web"}],[{"kind":"Deployment","name":"web"}]]`},
		"selector is":                      {"workloads": `[[{"kind":"Deployment","selector":"=="}]]`},
		"hooks is no JSON list":            {"hooks": "x"},
		"has name \"Revoke\"":              hook(`{"name":"Revoke","url":"https://api.example.com/"}`),
		"two hooks with name":              hook(`{"name":"a","url":"https://api.example.com/"},{"name":"a","url":"https://api.example.com/"}`),
		"stands for no hook":               hook(`{"name":"none","url":"https://api.example.com/"}`),
		"has no url":                       hook(`{"name":"revoke"}`),
		`hook "revoke": url begins with`:   hook(`{"name":"revoke","url":"http://api.example.com/"}`),
		`hook "revoke": method is`:         hook(`{"name":"revoke","url":"https://api.example.com/","method":"EXEC"}`),
		`hook "revoke": headers has`:       hook(`{"name":"revoke","url":"https://api.example.com/","headers":{"Authorization":"Bearer x"}}`),
		`there is no role "admin-token"`:   hook(`{"name":"revoke","url":"https://api.example.com/","headers":{"Authorization":"Bearer {{admin-token.value}}"}}`),
		`unknown field "timeout"`:          hook(`{"name":"revoke","url":"https://api.example.com/","timeout":"5s"}`),
		"secrets holds":                    {"secrets": "Not_A_Name"},
		"restart_operator is":              {"restart_operator": "external-secrets"},
		"stabilization is":                 {"stabilization": "2h"},
		"rollout_timeout is":               {"rollout_timeout": "48h"},
		"max_parallel is":                  {"max_parallel": -1},
		"allowed_roles holds":              {"allowed_roles": "[x"},
		"type is":                          check(`{"type":"grpc"}`),
		"give url, or service":             check(`{"type":"http"}`),
		"allowed are https://":             check(`{"type":"http","url":"http://web.example.com/"}`),
		"url holds a user":                 check(`{"type":"http","url":"https://u:p@web.example.com/"}`),
		"API server takes out":             check(`{"type":"http","service":"http:web:80","headers":{"Authorization":"Bearer x"}}`),
		"checks hold no credentials, for":  check(`{"type":"http","url":"https://web.example.com/","headers":{"authorization":"Bearer x"}}`),
		"service is":                       check(`{"type":"http","service":"web"}`),
		"path is":                          check(`{"type":"http","service":"http:web:80","path":"/../../secrets"}`),
		"give status codes":                check(`{"type":"http","service":"http:web:80","expect":"fine"}`),
		"forbid is missing":                check(`{"type":"logs"}`),
		"no regular expression":            check(`{"type":"logs","forbid":"("}`),
		"give a comparison":                check(`{"type":"prometheus","url":"https://p.example.com","query":"up","expect":"0"}`),
		"query is not for type pods, which takes selector": check(`{"type":"pods","query":"up"}`),
		"times is":                    check(`{"type":"pods","selector":"a=b","times":1000}`),
		"give a duration such as 30s": check(`{"type":"pods","selector":"a=b","timeout":"soon"}`),
		"checks is no JSON list":      {"checks": `[{"type":]`},
	} {
		all := map[string]any{}
		for k, v := range base {
			all[k] = v
		}
		for k, v := range data {
			all[k] = v
		}
		r := m.write("consumers/web", all)
		require.Equal(t, http.StatusBadRequest, r.code, says)
		require.Contains(t, r.message, says)
	}
	require.Empty(t, m.list("consumers/").data["keys"])
	require.Equal(t, http.StatusBadRequest, m.write("consumers/all", base).code)
}
