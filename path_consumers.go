package harmonyflow

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/hashicorp/go-secure-stdlib/parseutil"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

func (b *backend) pathConsumers() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"name":             nameField,
		"connection":       {Type: framework.TypeString, Description: "Connection of type kubernetes: the cluster."},
		"namespace":        {Type: framework.TypeString, Description: "Namespace of everything below."},
		"allowed_roles":    {Type: framework.TypeCommaStringSlice, Description: "Roles (or globs) that may name the consumer; none by default."},
		"external_secrets": {Type: framework.TypeCommaStringSlice, Description: "ExternalSecrets that are forced to sync, by name or label selector; their Secrets are compared with what is served."},
		"secrets":          {Type: framework.TypeCommaStringSlice, Description: "Further Secrets that are compared, by name or label selector."},
		"workloads":        {Type: framework.TypeSlice, Description: `What is restarted, as JSON: a list of waves, each a list of {"kind":"Deployment","name":"web"} (or "selector" for "name"); kinds are Deployment, StatefulSet and DaemonSet. A wave begins when the one before is proven, so that a first wave of one workload is a canary.`},
		"mode":             {Type: framework.TypeString, Description: "restart (default), observe (somebody else restarts: Reloader, Vault Secrets Operator) or none (workloads read their Secret anew by themselves)."},
		"checks":           {Type: framework.TypeSlice, Description: "What has to be true afterwards, as a JSON list of checks of type http, logs, prometheus or pods. A header may hold {{role.value}}, and basic_auth name a role, to show the secret to a host that is among the role's secret_hosts."},
		"hooks":            {Type: framework.TypeSlice, Description: `Requests that an emergency sends, as a JSON list of {"name":"revoke","url":"https://…"}, with method (POST), headers, body, basic_auth, ca_cert and expect as of checks: for example to end all sessions. A header may hold {{role.value}}, which is the new one. Called at least once, with the same Idempotency-Key.`},
		"rollout_timeout":  {Type: framework.TypeDurationSecond, Description: "How long a wave may take. Default 5m."},
		"stabilization":    {Type: framework.TypeDurationSecond, Description: "How long all pods have to be ready without a restart of their own. Default 60s."},
		"max_parallel":     {Type: framework.TypeInt64, Description: "How many workloads of a wave are restarted at once; 0 (default) for all."},
		"restart_operator": {Type: framework.TypeString, Description: "namespace/name of the Deployment of External Secrets, to be restarted where an ExternalSecret ignores being forced. Default: it never is."},
	}
	answer := maps.Clone(fields)
	delete(answer, "name")
	return []*framework.Path{
		{
			Pattern: "consumers/?$",
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: operation{
					call: b.listConsumers, summary: "List consumers.", verb: "list", suffix: "consumers", fields: keyInfoFields,
				}.handler(nil),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List consumers.",
			HelpDescription: "Lists the names of all consumers, with their cluster and namespace.",
		},
		{
			Pattern:        "consumers/" + namePattern,
			Fields:         fields,
			ExistenceCheck: b.consumerExists,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readConsumer, summary: "Read a consumer.", verb: "read", suffix: "consumer", fields: answer, errors: []int{404},
				}.handler(nil),
				logical.CreateOperation: operation{
					call: b.writeConsumer, summary: "Create a consumer.", verb: "write", suffix: "consumer", none: true, mutating: true,
				}.handler(fields),
				logical.UpdateOperation: operation{
					call: b.writeConsumer, summary: "Change a consumer; what is not given stays.", verb: "write", suffix: "consumer", none: true, mutating: true,
				}.handler(fields),
				logical.DeleteOperation: operation{
					call: b.deleteConsumer, summary: "Delete a consumer that no role names.", verb: "delete", suffix: "consumer", none: true, errors: []int{409}, mutating: true,
				}.handler(nil),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "What has to run with a new version.",
			HelpDescription: `A consumer is what uses secrets in one namespace of one cluster. After a rotation of a role that names it, its
ExternalSecrets are forced to sync and the Secrets compared with what is served, its workloads restarted in waves, and
every pod, rollout and check looked at; only then the grace period begins, and where anything fails target, Secret
and pods go back. Roles of one rotation that share a consumer go forward or back together, with one restart.`,
		},
	}
}

func (b *backend) listConsumers(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.consumers.List(ctx)
	if err != nil {
		return nil, err
	}
	info := map[string]any{}
	for _, name := range names {
		c, err := b.consumers.Get(ctx, name)
		if err != nil {
			return nil, err
		}
		if c != nil {
			info[name] = map[string]any{"connection": c.Connection, "namespace": c.Namespace, "mode": string(c.Mode)}
		}
	}
	return logical.ListResponseWithInfo(names, info), nil
}

func (b *backend) consumerExists(ctx context.Context, _ *logical.Request, d *framework.FieldData) (bool, error) {
	name := d.Get("name").(string)
	if checkName(name) != nil {
		return false, nil //nolint:nilerr // the write refuses it
	}
	c, err := b.consumers.Get(ctx, name)
	return c != nil, err
}

func (b *backend) readConsumer(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	c, err := b.consumers.Get(ctx, d.Get("name").(string))
	if err != nil || c == nil {
		return nil, err
	}
	checks, err := asList(c.Checks)
	if err != nil {
		return nil, err
	}
	for i, check := range c.Checks { // durations read back as seconds
		if check.Timeout > 0 {
			checks[i].(map[string]any)["timeout"] = seconds(check.Timeout)
		}
	}
	hooks, err := asList(c.Hooks)
	if err != nil {
		return nil, err
	}
	workloads, err := asList(c.Workloads)
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{
		"connection": c.Connection, "namespace": c.Namespace, "allowed_roles": orEmpty(c.AllowedRoles),
		"external_secrets": orEmpty(c.ExternalSecrets), "secrets": orEmpty(c.Secrets), "workloads": workloads,
		"mode": string(c.Mode), "checks": checks, "hooks": hooks, "rollout_timeout": seconds(c.RolloutTimeout), "stabilization": seconds(c.Stabilization),
		"max_parallel": int64(c.MaxParallel), "restart_operator": c.RestartOperator,
	}}, nil
}

// asList is how a list of objects is shown.
func asList(v any) ([]any, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	out := []any{}
	if string(raw) == "null" {
		return out, nil
	}
	return out, json.Unmarshal(raw, &out)
}

func (b *backend) writeConsumer(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	b.identities.Lock() // one write at a time: each keeps what it is not given
	defer b.identities.Unlock()
	c, err := b.consumers.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if c == nil {
		c = &consumer.Consumer{Name: name, Stabilization: consumer.DefaultStabilization}
	}
	if err := applyConsumer(c, req, d); err != nil {
		return refuse("%v", err)
	}
	e, err := b.connections.Get(ctx, c.Connection)
	switch {
	case err != nil:
		return nil, err
	case e == nil:
		return nil, connection.Missing(c.Connection)
	case e.Type != connection.TypeKubernetes:
		return refuse("connection %q is of type %s; a consumer needs one of type %s", e.Name, e.Type, connection.TypeKubernetes)
	}
	_, checks := req.Data["checks"]
	if _, hooks := req.Data["hooks"]; checks || hooks { // each rotation looks at it again
		if err := c.CheckTemplates(ctx, b.secretOf); kind.IsDefinite(err) {
			return refuse("%v", err)
		} else if err != nil {
			return nil, err
		}
	}
	return nil, b.consumers.Put(ctx, c)
}

func applyConsumer(c *consumer.Consumer, req *logical.Request, d *framework.FieldData) error {
	setString(d, "connection", &c.Connection, "")
	if c.Connection != "" {
		if err := checkName(c.Connection); err != nil {
			return fmt.Errorf("connection: %w", err)
		}
	}
	setString(d, "namespace", &c.Namespace, "")
	setString(d, "restart_operator", &c.RestartOperator, "")
	setStrings(d, "allowed_roles", &c.AllowedRoles)
	setStrings(d, "external_secrets", &c.ExternalSecrets)
	setStrings(d, "secrets", &c.Secrets)
	mode := string(c.Mode)
	setString(d, "mode", &mode, "")
	c.Mode = consumer.Mode(mode)
	setConsumerTime(d, "rollout_timeout", &c.RolloutTimeout, consumer.DefaultRolloutTimeout)
	setConsumerTime(d, "stabilization", &c.Stabilization, consumer.DefaultStabilization)
	if v, ok := d.GetOk("max_parallel"); ok {
		c.MaxParallel = int(v.(int64))
	}
	if err := applyWorkloads(c, req); err != nil {
		return err
	}
	if err := applyChecks(c, req); err != nil {
		return err
	}
	if err := applyHooks(c, req); err != nil {
		return err
	}
	c.Normalize()
	return c.Validate()
}

// setConsumerTime sets a duration; an empty value is the default, and no time at
// all has to be said.
func setConsumerTime(d *framework.FieldData, name string, to *time.Duration, empty time.Duration) {
	if v, ok := d.Raw[name]; ok {
		if *to = duration(d, name); cleared(v) {
			*to = empty
		}
	}
}

// given is the JSON of a field that is a list, or its text; nil where it was not
// given.
func given(req *logical.Request, field string) (raw []byte, err error) {
	v, ok := req.Data[field]
	if !ok {
		return nil, nil
	}
	if cleared(v) {
		return []byte("[]"), nil
	}
	if text, is := v.(string); is {
		return []byte(text), nil
	}
	return json.Marshal(v)
}

func decodeStrictly(field string, raw []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(into)
	if err == nil && decoder.More() {
		err = errors.New("there is more after it")
	}
	if err != nil {
		return fmt.Errorf("%s is no JSON list of the form that vault path-help shows: %w", field, err)
	}
	return nil
}

func applyWorkloads(c *consumer.Consumer, req *logical.Request) error {
	raw, err := given(req, "workloads")
	if err != nil || raw == nil {
		return err
	}
	var one []consumer.Workload // a single wave need not be in a list of its own
	if decodeStrictly("workloads", raw, &one) == nil {
		c.Workloads = nil
		if len(one) > 0 {
			c.Workloads = [][]consumer.Workload{one}
		}
		return nil
	}
	var waves [][]consumer.Workload
	if err := decodeStrictly("workloads", raw, &waves); err != nil {
		return err
	}
	c.Workloads = waves
	return nil
}

// applyChecks reads durations as Vault does.
func applyChecks(c *consumer.Consumer, req *logical.Request) error {
	raw, err := given(req, "checks")
	if err != nil || raw == nil {
		return err
	}
	var loose []map[string]any
	if err := decodeStrictly("checks", raw, &loose); err != nil {
		return err
	}
	for i, check := range loose {
		if timeout, ok := check["timeout"]; ok {
			d, err := parseutil.ParseDurationSecond(timeout)
			if err != nil {
				return fmt.Errorf("check %d of checks has timeout %v; give a duration such as 30s", i+1, timeout)
			}
			check["timeout"] = int64(d)
		}
	}
	if raw, err = json.Marshal(loose); err != nil {
		return err
	}
	var checks []consumer.Check
	if err := decodeStrictly("checks", raw, &checks); err != nil {
		return err
	}
	c.Checks = checks
	return nil
}

func applyHooks(c *consumer.Consumer, req *logical.Request) error {
	raw, err := given(req, "hooks")
	if err != nil || raw == nil {
		return err
	}
	var hooks []consumer.Hook
	if err := decodeStrictly("hooks", raw, &hooks); err != nil {
		return err
	}
	c.Hooks = hooks
	return nil
}

func (b *backend) deleteConsumer(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	user, err := b.consumerUser(ctx, name)
	if err != nil {
		return nil, err
	}
	if user != "" {
		return nil, conflict("consumer %q is named by role %q; take it from the consumers of its roles first", name, user)
	}
	return nil, b.consumers.Delete(ctx, name)
}

// consumerOf names a consumer that uses a connection; "" when none does.
func (b *backend) consumerOf(ctx context.Context, name string) (string, error) {
	return b.consumers.First(ctx, func(c *consumer.Consumer) bool { return c.Connection == name })
}
