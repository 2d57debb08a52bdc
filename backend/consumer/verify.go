package consumer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
)

// Verify looks at the API server of a connection, and at who it takes the engine
// for.
func Verify(ctx context.Context, e *connection.Entry) (*connection.Info, error) {
	return verify(ctx, e, podFolder)
}

func verify(ctx context.Context, e *connection.Entry, folder string) (*connection.Info, error) {
	c, err := dial(e, folder)
	if err != nil {
		return nil, err
	}
	defer c.close()
	me, err := c.authn.SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return nil, c.explain(err)
	}
	info := &connection.Info{
		Summary:  "logged in as " + me.Status.UserInfo.Username,
		Identity: c.identity(ctx, e),
		Members:  []string{c.host},
		Nodes:    []connection.Node{{Name: hostOf(c.host), Note: c.version(ctx)}},
		Warnings: c.warnings(ctx),
	}
	return info, nil
}

func hostOf(address string) string {
	if u, err := url.Parse(address); err == nil {
		return u.Host
	}
	return address
}

// version is no reason against a connection where it is not shown.
func (c *cluster) version(ctx context.Context) string {
	var v struct {
		GitVersion string `json:"gitVersion"`
	}
	if err := c.getJSON(ctx, "/version", &v); err != nil || v.GitVersion == "" {
		return "version not shown"
	}
	return fmt.Sprintf("Kubernetes %.40s", v.GitVersion)
}

// identity is that of the namespace that every cluster has, for as long as it
// lives; where that may not be read, of the address and of who signs for it.
func (c *cluster) identity(ctx context.Context, e *connection.Entry) string {
	if ns, err := c.core.Namespaces().Get(ctx, "kube-system", metav1.GetOptions{}); err == nil && ns.UID != "" {
		return "kubernetes:" + string(ns.UID)
	}
	sum := sha256.Sum256([]byte(strings.TrimSpace(e.TLS.CA)))
	return "kubernetes:" + c.host + "/" + hex.EncodeToString(sum[:8])
}

// warnings are about a service account that may do what no delivery needs.
func (c *cluster) warnings(ctx context.Context) []string {
	review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
		ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "list", Resource: "secrets"},
	}}
	answer, err := c.authz.SelfSubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil || !answer.Status.Allowed {
		return nil
	}
	return []string{"the user may list the Secrets of every namespace; give it Roles that name what consumers need, and no more"}
}
