package vault

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
)

// Verify logs in and looks at what was logged in to.
func Verify(ctx context.Context, e *connection.Entry) (*connection.Info, error) {
	s, err := newSession(e, time.Now)
	if err != nil {
		return nil, err
	}
	defer s.close()
	l, err := s.authenticate(ctx)
	if err != nil {
		return nil, s.explain(err)
	}
	info := &connection.Info{Warnings: s.warnings(ctx, l)}
	if s.logsIn() {
		// The login was a trial. A batch token cannot be revoked, and ends soon.
		_ = l.client.Auth().Token().RevokeSelfWithContext(ctx, "")
	}
	node := connection.Node{Name: s.address, Note: "version not shown"}
	if u, err := url.Parse(s.address); err == nil {
		node.Name = u.Host
	}
	// Two addresses lead to one Vault where it shows the same cluster id.
	target := s.address
	if health := s.health(ctx); health != nil {
		node.Note = fmt.Sprintf("Vault %.40s", health.Version)
		if health.ClusterID != "" {
			target = health.ClusterID
		}
	}
	info.Identity = "vault:" + target + "/" + s.vault.Namespace
	info.Members = []string{s.address + "/" + s.vault.Namespace}
	info.Nodes = []connection.Node{node}
	info.Summary = "logged in by " + s.vault.Auth
	return info, nil
}

// health asks what anybody may ask, and is nil where nobody may. It is no matter
// of a namespace.
func (s *session) health(ctx context.Context) *api.HealthResponse {
	client := s.bare
	client.ClearNamespace()
	health, err := client.Sys().HealthWithContext(ctx)
	if err != nil {
		return nil
	}
	return health
}

func (s *session) warnings(ctx context.Context, l lease) []string {
	var out []string
	if s.tls.SkipVerify {
		out = append(out, "tls_skip_verify is on: whoever answers at address gets the credentials; give tls_ca instead")
	}
	answer, err := l.client.Auth().Token().LookupSelfWithContext(ctx)
	if err != nil {
		return out
	}
	policies, err := answer.TokenPolicies()
	for _, p := range policies {
		if err == nil && p == "root" {
			out = append(out, "it is a root token; give one whose policies allow what roles publish and rotate, and no more")
		}
	}
	if !s.logsIn() && l.life > 0 && !l.renewable {
		out = append(out, fmt.Sprintf("the token ends at %s and cannot be renewed; give a periodic one", l.expires.UTC().Format(time.RFC3339)))
	}
	if end := secondsOf(answer.Data["explicit_max_ttl"]); !s.logsIn() && l.renewable && end > 0 {
		out = append(out, fmt.Sprintf("the token ends %s after it was made, renewed or not; give a periodic one without explicit_max_ttl", end))
	}
	if uses, ok := answer.Data["num_uses"].(json.Number); ok && uses.String() != "0" {
		out = append(out, "the token may be used a limited number of times; every call and every renewal counts")
	}
	return out
}

func secondsOf(v any) time.Duration {
	n, ok := v.(json.Number)
	if !ok {
		return 0
	}
	seconds, err := n.Int64()
	if err != nil {
		return 0
	}
	return time.Duration(seconds) * time.Second
}
