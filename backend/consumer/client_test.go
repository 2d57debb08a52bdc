package consumer

import (
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// apiServer answers as handler does.
func apiServer(t *testing.T, handler http.HandlerFunc) *connection.Entry {
	t.Helper()
	s := httptest.NewTLSServer(handler)
	t.Cleanup(s.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	return &connection.Entry{
		Name: "prod", Type: connection.TypeKubernetes, Kubernetes: &connection.Kubernetes{Host: s.URL},
		TLS: connection.TLS{CA: string(ca)}, Admin: connection.NewAdmin(kind.Material{Secret: "a-secret-token"}),
	}
}

func restartOf(t *testing.T, e *connection.Entry) Progress {
	t.Helper()
	k := newClusters(Options{Entry: func(context.Context, string) (*connection.Entry, error) { return e, nil }})
	c := &Consumer{Connection: "prod", Namespace: "app", Mode: Restart, Workloads: [][]Workload{{{Kind: deployment, Name: "web"}}}}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	return k.Restart(ctx, c, Delivery{ID: "r1", Since: noon})
}

// TestAnswers: what waiting may mend waits, and nothing of a message is shown but
// names of Kubernetes.
func TestAnswers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		code     int
		message  string
		definite bool
		says     string
	}{
		{401, "a-secret", false, "refuses the token"},
		{403, `deployments.apps "web" is forbidden: User "system:serviceaccount:vault:harmonyflow" cannot get resource "deployments" in API group "apps" in the namespace "app"`, false, "user system:serviceaccount:vault:harmonyflow may not get deployments web in namespace app (API group apps); add that to a Role that is bound to it there"},
		{403, "admission webhook said a-secret", false, "is refused; look at roles, policies and webhooks"},
		{404, "a-secret", true, "has no deployments web"},
		{409, "a-secret", false, "409"},
		{422, "a-secret", true, "refuses the change"},
		{422, "ValidatingAdmissionPolicy 'keep' with binding 'keep' denied request: a-secret", false, "policy keep refuses"},
		{429, "a-secret", false, "429"},
		{500, "a-secret", false, "500"},
		{503, "a-secret", false, "503"},
		{302, "a-secret", false, "302"},
	} {
		p := restartOf(t, apiServer(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Location", "https://stranger.example.com/")
			w.WriteHeader(c.code)
			_, _ = fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":%q,"reason":"x","code":%d,"details":{"kind":"deployments","name":"web"}}`, c.message, c.code)
		}))
		require.ErrorContains(t, p.Err, c.says)
		require.NotContains(t, p.Err.Error(), "a-secret")
		require.Equal(t, c.definite, kind.IsDefinite(p.Err), "%d: %v", c.code, p.Err)
	}
	for _, answer := range []string{"", "<html>", "{}", `{"kind":"Deployment","apiVersion":"apps/v1"`} {
		p := restartOf(t, apiServer(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(answer)) }))
		require.Error(t, p.Err)
		require.False(t, p.Done)
	}
}

// The token goes to the API server alone, and not by way of a proxy that the
// environment names.
func TestTokenGoesNowhereElse(t *testing.T) {
	proxied := false
	proxy := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { proxied = true }))
	t.Cleanup(proxy.Close)
	t.Setenv("HTTPS_PROXY", proxy.URL)
	var tokens, agents []string
	stranger := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		tokens = append(tokens, "stranger: "+r.Header.Get("Authorization"))
	}))
	t.Cleanup(stranger.Close)
	e := apiServer(t, func(w http.ResponseWriter, r *http.Request) {
		tokens, agents = append(tokens, r.Header.Get("Authorization")), append(agents, r.Header.Get("User-Agent"))
		http.Redirect(w, r, stranger.URL, http.StatusTemporaryRedirect)
	})
	require.Error(t, restartOf(t, e).Err)
	require.Equal(t, []string{"Bearer a-secret-token"}, tokens)
	require.True(t, strings.HasPrefix(agents[0], "vault-plugin-secrets-harmonyflow/v"), agents)
	require.False(t, proxied)
}

// The token of a pod is replaced while it runs: it is read at each use.
func TestInCluster(t *testing.T) {
	var tokens []string
	outside := apiServer(t, func(w http.ResponseWriter, r *http.Request) {
		tokens = append(tokens, r.Header.Get("Authorization"))
		w.WriteHeader(http.StatusNotFound)
	})
	folder := t.TempDir()
	write := func(file, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(folder, file), []byte(text), 0o600))
	}
	host, port, _ := strings.Cut(strings.TrimPrefix(outside.Kubernetes.Host, "https://"), ":")
	t.Setenv("KUBERNETES_SERVICE_HOST", host)
	t.Setenv("KUBERNETES_SERVICE_PORT", port)
	e := &connection.Entry{Name: "here", Type: connection.TypeKubernetes, Kubernetes: &connection.Kubernetes{InCluster: true}}
	_, err := verify(t.Context(), e, folder)
	require.ErrorContains(t, err, "give the pod that Vault runs in a service account token")
	write("ca.crt", outside.TLS.CA)
	for _, token := range []string{"first\n", "second\n"} {
		write("token", token)
		_, err = verify(t.Context(), e, folder)
		require.Error(t, err)
	}
	require.Equal(t, []string{"Bearer first", "Bearer second"}, tokens)
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	e := apiServer(t, nil)
	e.Kubernetes.Host = "https://127.0.0.1:1"
	require.True(t, kind.IsUnreachable(restartOf(t, e).Err))
	hung := make(chan struct{})
	e = apiServer(t, func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hung:
		case <-r.Context().Done():
		}
	})
	defer close(hung)
	p := restartOf(t, e)
	require.True(t, kind.IsUnreachable(p.Err), "%v", p.Err)
	require.ErrorContains(t, p.Err, "did not answer in time")
	e = apiServer(t, nil)
	e.Type, e.Kubernetes = connection.TypeVault, nil
	require.True(t, kind.IsDefinite(restartOf(t, e).Err))
}
