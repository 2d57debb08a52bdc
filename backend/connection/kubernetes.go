package connection

import (
	"errors"
	"fmt"
	"strings"

	clientcmd "k8s.io/client-go/tools/clientcmd/api/v1"
	"sigs.k8s.io/yaml"
)

// TypeKubernetes is a connection to the API server of a Kubernetes cluster.
const TypeKubernetes = "kubernetes"

// FieldManager is whom a cluster is told that changes are by, unless the
// connection says another one.
const FieldManager = "harmonyflow"

// Kubernetes is what a connection of type kubernetes has beyond the common
// fields. Its token is the secret of Admin; the certificate that it trusts, and
// the one that it may show instead of a token, are in TLS.
type Kubernetes struct {
	// Host is the URL of the API server, "" with InCluster.
	Host string `json:"host,omitempty"`
	// InCluster: host, certificate and token are those of the pod that Vault runs
	// in, read anew at each use.
	InCluster    bool   `json:"in_cluster,omitempty"`
	FieldManager string `json:"field_manager"`
}

// Kubeconfig is what a connection takes from a kubeconfig.
type Kubeconfig struct {
	Host  string
	Token string
	TLS   TLS
}

// howToKubeconfig says how to make a kubeconfig that can be taken.
const howToKubeconfig = "give what `kubectl config view --raw --minify --flatten` prints for a service account with a token"

// ParseKubeconfig reads the current context of a kubeconfig. It refuses all that
// would make whoever uses it read files, run programs or go other ways. Its errors
// hold nothing of what was given but the names of fields.
func ParseKubeconfig(text string) (*Kubeconfig, error) {
	var c clientcmd.Config
	if err := yaml.UnmarshalStrict([]byte(text), &c); err != nil {
		return nil, errors.New("kubeconfig cannot be read as one; " + howToKubeconfig)
	}
	at, err := contextOf(&c)
	if err != nil {
		return nil, err
	}
	cluster, user, err := partsOf(&c, at)
	if err != nil {
		return nil, err
	}
	out := &Kubeconfig{Host: strings.TrimRight(cluster.Server, "/"), Token: user.Token}
	out.TLS = TLS{
		CA: string(cluster.CertificateAuthorityData), ServerName: cluster.TLSServerName,
		Cert: string(user.ClientCertificateData), Key: string(user.ClientKeyData),
	}
	switch {
	case out.Host == "":
		return nil, errors.New("kubeconfig names no server in its cluster; " + howToKubeconfig)
	case out.Token == "" && out.TLS.Cert == "":
		return nil, errors.New("kubeconfig has neither token nor client-certificate-data in its user; " + howToKubeconfig)
	}
	return out, nil
}

func contextOf(c *clientcmd.Config) (*clientcmd.Context, error) {
	for i := range c.Contexts {
		if c.Contexts[i].Name == c.CurrentContext {
			return &c.Contexts[i].Context, nil
		}
	}
	return nil, errors.New("kubeconfig has no context that its current-context names; " + howToKubeconfig)
}

func partsOf(c *clientcmd.Config, at *clientcmd.Context) (*clientcmd.Cluster, *clientcmd.AuthInfo, error) {
	var cluster *clientcmd.Cluster
	var user *clientcmd.AuthInfo
	for i := range c.Clusters {
		if c.Clusters[i].Name == at.Cluster {
			cluster = &c.Clusters[i].Cluster
		}
	}
	for i := range c.AuthInfos {
		if c.AuthInfos[i].Name == at.AuthInfo {
			user = &c.AuthInfos[i].AuthInfo
		}
	}
	if cluster == nil || user == nil {
		return nil, nil, errors.New("kubeconfig lacks the cluster or the user that its current context names; " + howToKubeconfig)
	}
	return cluster, user, checkParts(cluster, user)
}

// checkParts refuses what a kubeconfig of somebody else must not make the engine
// do.
func checkParts(cluster *clientcmd.Cluster, user *clientcmd.AuthInfo) error {
	const asData = "the engine reads no files for it; give it inline"
	for _, f := range []struct {
		name, why string
		given     bool
	}{
		{"certificate-authority", asData + " as certificate-authority-data", cluster.CertificateAuthority != ""},
		{"client-certificate", asData + " as client-certificate-data", user.ClientCertificate != ""},
		{"client-key", asData + " as client-key-data", user.ClientKey != ""},
		{"tokenFile", asData + " as token, or set in_cluster=true", user.TokenFile != ""},
		{"exec", "the engine runs no programs for it; give the token of a service account", user.Exec != nil},
		{"auth-provider", "the engine runs none; give the token of a service account", user.AuthProvider != nil},
		{"username", "API servers take no passwords; give the token of a service account", user.Username != "" || user.Password != ""},
		{"as", "give the token of the service account itself", user.Impersonate != "" || user.ImpersonateUID != "" || len(user.ImpersonateGroups) > 0 || len(user.ImpersonateUserExtra) > 0},
		{"proxy-url", "the engine goes to the API server itself; give a server that it can reach", cluster.ProxyURL != ""},
		{"insecure-skip-tls-verify", "whoever answers would get the token; give certificate-authority-data", cluster.InsecureSkipTLSVerify},
	} {
		if f.given {
			return fmt.Errorf("kubeconfig has %s, which is not taken: %s", f.name, f.why)
		}
	}
	return nil
}
