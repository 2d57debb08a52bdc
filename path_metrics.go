package harmonyflow

import (
	"context"
	"net/http"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/metrics"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// countWithin is how long a look waits for the roles to be read, the first time after
// a start. Prometheus gives up after 10 s.
const countWithin = 5 * time.Second

func (b *backend) pathMetrics() []*framework.Path {
	return []*framework.Path{{
		Pattern: "metrics",
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: operation{
				call: b.readMetrics, summary: "Metrics in the text format of Prometheus.", verb: "read", suffix: "metrics",
				fields: map[string]*framework.FieldSchema{}, active: true, // it has counted
			}.handler(nil),
		},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis: "Metrics in the text format of Prometheus.",
		HelpDescription: `Rotations by kind and outcome, how long phases and targets take, the age of secrets, what is due, overdue, failed or
drifted, and what the workers do. Series are by kind; roles are named only where something is wrong, at most 100 of them.
Counters begin anew when the plugin starts. From a shell: vault read -format=raw harmonyflow/metrics.
Prometheus scrapes /v1/harmonyflow/metrics with a token that may read this path (authorization in scrape_config).`,
	}}
}

func (b *backend) readMetrics(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	now := time.Now()
	text, err := b.metrics.Text(metrics.Look{
		At: now, Load: b.engine.Load(), Frozen: b.engine.Config().Frozen(now), Unsent: b.notifier.Pending(),
		Each: func(f func(string, rotation.Standing)) error {
			ctx, cancel := context.WithTimeout(ctx, countWithin)
			defer cancel()
			return b.engine.EachStanding(ctx, f)
		},
	})
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{
		logical.HTTPContentType: metrics.ContentType,
		logical.HTTPRawBody:     text,
		logical.HTTPStatusCode:  http.StatusOK,
	}}, nil
}
