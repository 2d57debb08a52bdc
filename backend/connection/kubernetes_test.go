package connection

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// kubeconfig is one as kubectl prints it, with lines added to its cluster and its
// user.
func kubeconfig(cluster, user string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
preferences: {}
clusters:
- name: other
  cluster: {server: "https://other:6443"}
- name: prod
  cluster:
    server: https://10.0.0.1:6443/
%s
users:
- name: rotator
  user:
%s
contexts:
- name: prod
  context: {cluster: prod, user: rotator, namespace: app}
current-context: prod
`, indented(cluster), indented(user))
}

func indented(lines string) string { return "    " + strings.ReplaceAll(lines, "\n", "\n    ") }

func TestKubeconfig(t *testing.T) {
	ca := base64.StdEncoding.EncodeToString([]byte("PEM"))
	c, err := ParseKubeconfig(kubeconfig("certificate-authority-data: "+ca, "token: a-token"))
	require.NoError(t, err)
	require.Equal(t, &Kubeconfig{Host: "https://10.0.0.1:6443", Token: "a-token", TLS: TLS{CA: "PEM"}}, c)
	c, err = ParseKubeconfig(kubeconfig("tls-server-name: api", "client-certificate-data: "+ca+"\nclient-key-data: "+ca))
	require.NoError(t, err)
	require.Equal(t, TLS{ServerName: "api", Cert: "PEM", Key: "PEM"}, c.TLS)
}

// A kubeconfig is an instruction to whoever loads it. Of somebody else's the engine
// takes data alone.
func TestKubeconfigThatWouldDoThings(t *testing.T) {
	const token = "token: a-secret-token"
	for says, text := range map[string]string{
		"has certificate-authority,":                 kubeconfig("certificate-authority: /etc/shadow", token),
		"has client-certificate,":                    kubeconfig("", token+"\nclient-certificate: /etc/shadow"),
		"has client-key,":                            kubeconfig("", token+"\nclient-key: /etc/shadow"),
		"has tokenFile,":                             kubeconfig("", "tokenFile: /etc/shadow"),
		"has exec,":                                  kubeconfig("", token+"\nexec: {apiVersion: client.authentication.k8s.io/v1, command: sh, interactiveMode: Never}"),
		"has auth-provider,":                         kubeconfig("", token+"\nauth-provider: {name: gcp, config: {}}"),
		"has username,":                              kubeconfig("", "username: admin\npassword: a-secret-token"),
		"has as,":                                    kubeconfig("", token+"\nas: system:admin"),
		"has proxy-url,":                             kubeconfig("proxy-url: http://attacker:3128", token),
		"has insecure-skip-tls-verify,":              kubeconfig("insecure-skip-tls-verify: true", token),
		"cannot be read as one":                      kubeconfig("execute: true", token),
		"cannot be read":                             "a-secret-token: [",
		"has no context":                             "apiVersion: v1\nkind: Config\ncurrent-context: prod\n",
		"has neither token":                          kubeconfig("", "{}"),
		"lacks the cluster or the user":              strings.Replace(kubeconfig("", token), "cluster: prod", "cluster: gone", 1),
		"has no context that its current-context na": strings.Replace(kubeconfig("", token), "current-context: prod", "current-context: gone", 1),
	} {
		_, err := ParseKubeconfig(text)
		require.ErrorContains(t, err, says)
		require.NotContains(t, err.Error(), "a-secret")
	}
}
