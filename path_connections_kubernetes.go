package harmonyflow

import (
	"fmt"
	"net/url"
	"strings"
	"unicode"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

func kubernetesConnection() connectionType {
	return connectionType{
		name: connection.TypeKubernetes,
		fields: map[string]*framework.FieldSchema{
			"host":    {Type: framework.TypeString, Description: "URL of the API server: https://host:port."},
			"ca_cert": {Type: framework.TypeString, Description: "Certificates that sign that of the API server, PEM; empty for those the system trusts."},
			"token": {
				Type: framework.TypeString, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
				Description: "Of a cluster: the token of a service account. Never read back.",
			},
			"kubeconfig": {
				Type: framework.TypeString, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
				Description: "Instead of host, ca_cert and token: a kubeconfig, with everything inline. Its current context is taken; never read back.",
			},
			"in_cluster":    {Type: framework.TypeBool, Description: "Use the service account of the pod that Vault runs in, whose token is read anew at each use."},
			"field_manager": {Type: framework.TypeString, Description: "Whom the cluster is told that changes are by. Default harmonyflow."},
		},
		answer: map[string]*framework.FieldSchema{
			"host": stringField("URL of the API server."), "ca_cert": stringField("Certificates that sign that of the API server."),
			"in_cluster":    boolField("Whether the service account of Vault's own pod is used."),
			"field_manager": stringField("Whom the cluster is told that changes are by."),
			"auth":          stringField("How to log in."),
		},
		help: `kubernetes: the API server of a cluster, whose workloads consumers name. Give host, ca_cert and token, or a kubeconfig, or
in_cluster=true. Nothing in it may make the engine read files or run programs.`,
		apply:        applyKubernetes,
		describe:     describeKubernetes,
		sameEndpoint: sameKubernetes,
		verify:       consumer.Verify,
	}
}

func applyKubernetes(before, e *connection.Entry, d *framework.FieldData) error {
	k := connection.Kubernetes{FieldManager: connection.FieldManager}
	if before != nil {
		k = *before.Kubernetes
	}
	e.Kubernetes = &k
	setString(d, "field_manager", &k.FieldManager, connection.FieldManager)
	if len(k.FieldManager) > 128 || strings.ContainsFunc(k.FieldManager, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("field_manager is %.40q; give up to 128 printable characters", k.FieldManager)
	}
	way, err := wayToCluster(before, d)
	if err != nil {
		return err
	}
	if err := way(before, e, d); err != nil {
		return err
	}
	if before == nil || !sameKubernetes(before, e) {
		e.Generation++
		e.Members = nil
	}
	return nil
}

// wayToCluster is which of the three ways to reach a cluster is asked for; what was
// there stays where none is.
func wayToCluster(before *connection.Entry, d *framework.FieldData) (func(before, e *connection.Entry, d *framework.FieldData) error, error) {
	inCluster := before != nil && before.Kubernetes.InCluster
	if v, ok := d.GetOk("in_cluster"); ok {
		inCluster = v.(bool)
	}
	given := []string{}
	for _, field := range []string{"host", "ca_cert", "token"} {
		if v, ok := d.GetOk(field); ok && v.(string) != "" {
			given = append(given, field)
		}
	}
	config, _ := d.Get("kubeconfig").(string)
	asked, _ := d.Get("in_cluster").(bool)
	switch {
	case config != "" && (asked || len(given) > 0):
		return nil, fmt.Errorf("kubeconfig stands for host, ca_cert and token, and for in_cluster; give one of them")
	case config != "":
		return setKubeconfig, nil
	case inCluster && len(given) > 0:
		return nil, fmt.Errorf("in_cluster is true, and takes no %s; leave it out, or write in_cluster=false", given[0])
	case inCluster:
		return setInCluster, nil
	}
	return setHost, nil
}

func setInCluster(_, e *connection.Entry, _ *framework.FieldData) error {
	e.Kubernetes.InCluster, e.Kubernetes.Host = true, ""
	e.TLS, e.Admin = connection.TLS{}, connection.Admin{}
	return nil
}

func setKubeconfig(_, e *connection.Entry, d *framework.FieldData) error {
	c, err := connection.ParseKubeconfig(d.Get("kubeconfig").(string))
	if err != nil {
		return err
	}
	if err := checkAPIServer("server of kubeconfig", c.Host); err != nil {
		return err
	}
	if _, err := c.TLS.Config(""); err != nil {
		return fmt.Errorf("the certificates of kubeconfig cannot be used; give them as certificate-authority-data, client-certificate-data and client-key-data")
	}
	if err := checkBearer("token of kubeconfig", c.Token); err != nil {
		return err
	}
	e.Kubernetes.InCluster, e.Kubernetes.Host, e.TLS = false, c.Host, c.TLS
	if c.Token == "" {
		e.Admin = connection.Admin{}
		return nil
	}
	setAdmin(e, kind.Material{Secret: c.Token})
	return nil
}

// setHost sets what was given. Who changes where the token is sent has to bring it
// again.
func setHost(before, e *connection.Entry, d *framework.FieldData) error {
	k := e.Kubernetes
	k.InCluster = false
	setString(d, "host", &k.Host, "")
	k.Host = strings.TrimRight(k.Host, "/")
	setString(d, "ca_cert", &e.TLS.CA, "")
	if err := checkAPIServer("host", k.Host); err != nil {
		return err
	}
	if !strings.Contains(e.TLS.CA, "CERTIFICATE") && e.TLS.CA != "" {
		return fmt.Errorf("ca_cert holds no certificate: give one or more in PEM form")
	}
	token, given := d.GetOk("token")
	switch {
	case given && token.(string) != "":
		if err := checkBearer("token", token.(string)); err != nil {
			return err
		}
		e.TLS.Cert, e.TLS.Key = "", ""
		setAdmin(e, kind.Material{Secret: token.(string)})
	case before == nil || before.Kubernetes.InCluster || given:
		return fmt.Errorf("token is missing; give the token of a service account, a kubeconfig, or in_cluster=true")
	case !sameKubernetes(before, e):
		return fmt.Errorf("host or ca_cert change where the stored token is sent; give token in the same request")
	}
	return nil
}

func checkBearer(field, token string) error {
	if strings.ContainsFunc(token, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }) {
		return fmt.Errorf("%s holds a space or a control character; check that its file does not end with a new line", field)
	}
	return nil
}

func checkAPIServer(field, host string) error {
	u, err := url.Parse(host)
	switch {
	case host == "":
		return fmt.Errorf("%s is missing; give the URL of the API server, such as https://10.0.0.1:6443, a kubeconfig, or in_cluster=true", field)
	case err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.ContainsFunc(host, unicode.IsSpace):
		return fmt.Errorf("%s is no URL of an API server; give scheme, host and port, such as https://10.0.0.1:6443", field)
	case u.Scheme != "https":
		return fmt.Errorf("%s begins with %.20q, and the token would cross the network readable; use https://", field, u.Scheme+"://")
	}
	return nil
}

func describeKubernetes(e *connection.Entry) map[string]any {
	auth := "token"
	switch {
	case e.Kubernetes.InCluster:
		auth = "in_cluster"
	case e.TLS.Cert != "":
		auth = "certificate"
	}
	return map[string]any{
		"host": e.Kubernetes.Host, "ca_cert": e.TLS.CA, "in_cluster": e.Kubernetes.InCluster,
		"field_manager": e.Kubernetes.FieldManager, "auth": auth,
	}
}

func sameKubernetes(before, e *connection.Entry) bool {
	return before.Kubernetes.Host == e.Kubernetes.Host && before.Kubernetes.InCluster == e.Kubernetes.InCluster && before.TLS.SameTrust(e.TLS)
}
