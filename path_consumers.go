package harmonyflow

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-secure-stdlib/parseutil"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
)

// consumerFields are those of a consumer, for a write and for what reading shows.
func consumerFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"connection":       {Type: framework.TypeString, Description: "Connection of type kubernetes."},
		"namespace":        {Type: framework.TypeString, Description: "Namespace of everything that is named here."},
		"allowed_roles":    {Type: framework.TypeCommaStringSlice, Description: "Roles (or globs) that may name the consumer; none by default."},
		"external_secrets": {Type: framework.TypeCommaStringSlice, Description: "ExternalSecrets to sync: names, or a JSON array with selectors of labels (app=web)."},
		"secrets":          {Type: framework.TypeCommaStringSlice, Description: "Other Secrets that have to hold what is served: names or selectors, as above."},
		"workloads": {
			Type: framework.TypeSlice, Description: `Waves of workloads to restart, a JSON array of arrays: [[{"kind":"Deployment","name":"canary"}],[{"kind":"Deployment","selector":"app=web"}]].`,
		},
		"mode":             {Type: framework.TypeString, Description: "Who restarts: restart (the engine, default), observe (somebody else does, and is waited for), none."},
		"checks":           {Type: framework.TypeSlice, Description: "What has to be true afterwards, a JSON array: types http, logs, prometheus and pods."},
		"rollout_timeout":  durationField("How long all restarts may take. Default 5m."),
		"stabilization":    durationField("How long all pods have to be ready, without a restart. Default 60s."),
		"max_parallel":     intField("How many workloads of a wave are restarted at once. Default 0: all."),
		"restart_operator": {Type: framework.TypeString, Description: "Deployment of External Secrets (namespace/name), restarted where ExternalSecrets do not react; empty: never."},
	}
}

func (b *backend) pathConsumers() []*framework.Path {
	answer, fields := consumerFields(), consumerFields()
	fields["name"] = nameField
	only := map[string]*framework.FieldSchema{"name": nameField}
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
			HelpDescription: "Lists the names of all consumers, with where they are.",
		},
		{
			Pattern: "consumers/" + namePattern,
			Fields:  fields,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readConsumer, summary: "Read a consumer.", verb: "read", suffix: "consumer", fields: answer, errors: []int{404},
				}.handler(only),
				logical.UpdateOperation: operation{
					call: b.writeConsumer, summary: "Create or change a consumer; what is not given stays.", verb: "write", suffix: "consumer", none: true, errors: []int{409}, mutating: true,
				}.handler(fields),
				logical.DeleteOperation: operation{
					call: b.deleteConsumer, summary: "Delete a consumer that no role names.", verb: "delete", suffix: "consumer", none: true, errors: []int{409}, mutating: true,
				}.handler(only),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "What must pick a secret up, in one namespace of a cluster.",
			HelpDescription: `ExternalSecrets are forced to sync, the Secrets compared with what is served, the workloads restarted in waves, and
the checks made. A wave begins when every pod of the one before runs with the change; a wave of one workload is a canary.
A check holds no credentials: it is read back.`,
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
			info[name] = map[string]any{"connection": c.Connection, "namespace": c.Namespace}
		}
	}
	return logical.ListResponseWithInfo(names, info), nil
}

func (b *backend) readConsumer(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	c, err := b.consumers.Get(ctx, d.Get("name").(string))
	if err != nil || c == nil {
		return nil, err
	}
	data := map[string]any{
		"connection": c.Connection, "namespace": c.Namespace, "allowed_roles": orEmpty(c.AllowedRoles),
		"external_secrets": orEmpty(c.ExternalSecrets), "secrets": orEmpty(c.Secrets), "mode": string(c.Mode),
		"rollout_timeout": seconds(c.RolloutTimeout), "stabilization": seconds(c.Stabilization), "max_parallel": int64(c.MaxParallel),
		"restart_operator": c.RestartOperator,
	}
	if data["workloads"], err = plain(c.Workloads); err != nil {
		return nil, err
	}
	forms := make([]checkForm, len(c.Checks))
	for i, one := range c.Checks {
		forms[i] = checkForm{Check: one}
		if one.Timeout > 0 {
			forms[i].Timeout = seconds(one.Timeout)
		}
	}
	data["checks"], err = plain(forms)
	return &logical.Response{Data: data}, err
}

// plain is a value as JSON has it.
func plain(v any) ([]any, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	out := []any{}
	return out, decodeStrict(raw, &out)
}

// checkForm is a check as users type it.
type checkForm struct {
	consumer.Check
	Timeout any `json:"timeout,omitempty"`
}

func (b *backend) writeConsumer(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	defer b.consumers.Lock()()
	c, err := b.consumers.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if c == nil {
		c = &consumer.Consumer{Name: name, Stabilization: consumer.DefaultStabilization}
	}
	if err := applyConsumer(c, d); err != nil {
		return refuse("%v", err)
	}
	c.Normalize()
	if err := c.Validate(); err != nil {
		return refuse("%v", err)
	}
	unlock, err := b.holdConnection(ctx, c.Connection, b.connections.Share)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := b.checkCluster(ctx, c.Connection); err != nil {
		return nil, err
	}
	return nil, b.consumers.Put(ctx, c)
}

// checkCluster refuses a connection that leads to no cluster.
func (b *backend) checkCluster(ctx context.Context, name string) error {
	e, err := b.connections.Get(ctx, name)
	switch {
	case err != nil:
		return err
	case e == nil:
		return badRequest("%w", connection.Missing(name))
	case e.Type != connection.TypeKubernetes:
		return badRequest("connection %q is of type %s; a consumer needs one of type %s", name, e.Type, connection.TypeKubernetes)
	}
	return nil
}

func applyConsumer(c *consumer.Consumer, d *framework.FieldData) error {
	setString(d, "connection", &c.Connection, "")
	setString(d, "namespace", &c.Namespace, "")
	setStrings(d, "allowed_roles", &c.AllowedRoles)
	setStrings(d, "external_secrets", &c.ExternalSecrets)
	setStrings(d, "secrets", &c.Secrets)
	setString(d, "restart_operator", &c.RestartOperator, "")
	if v, ok := d.GetOk("mode"); ok {
		c.Mode = consumer.Mode(v.(string))
	}
	if v, ok := d.GetOk("max_parallel"); ok {
		c.MaxParallel = int(v.(int64))
	}
	setConsumerTime(d, "rollout_timeout", &c.RolloutTimeout, consumer.DefaultRolloutTimeout)
	setConsumerTime(d, "stabilization", &c.Stabilization, consumer.DefaultStabilization)
	if err := setWorkloads(c, d); err != nil {
		return err
	}
	return setChecks(c, d)
}

// setConsumerTime sets a duration; an empty value is the default.
func setConsumerTime(d *framework.FieldData, name string, to *time.Duration, empty time.Duration) {
	if v, ok := d.Raw[name]; ok {
		if *to = duration(d, name); cleared(v) {
			*to = empty
		}
	}
}

func setWorkloads(c *consumer.Consumer, d *framework.FieldData) error {
	raw, given, err := jsonArray(d, "workloads")
	if err != nil || !given {
		return err
	}
	c.Workloads = nil
	if err := decodeStrict(raw, &c.Workloads); err != nil {
		return fmt.Errorf(`workloads cannot be read (%w); give waves, an array of arrays such as [[{"kind":"Deployment","name":"web"}]]`, err)
	}
	return nil
}

func setChecks(c *consumer.Consumer, d *framework.FieldData) error {
	raw, given, err := jsonArray(d, "checks")
	if err != nil || !given {
		return err
	}
	var forms []checkForm
	if err := decodeStrict(raw, &forms); err != nil {
		return fmt.Errorf(`checks cannot be read (%w); give an array such as [{"type":"http","service":"http:web:8080","path":"/healthz"}]`, err)
	}
	c.Checks = nil
	for i, form := range forms {
		one := form.Check
		if form.Timeout != nil {
			if one.Timeout, err = parseutil.ParseDurationSecond(form.Timeout); err != nil {
				return fmt.Errorf("check %d of checks: timeout is no duration; give one such as 60s", i+1)
			}
		}
		c.Checks = append(c.Checks, one)
	}
	return nil
}

// jsonArray is a field that takes a JSON array, or its text. An empty value clears
// it.
func jsonArray(d *framework.FieldData, name string) (raw []byte, given bool, err error) {
	v, ok := d.Raw[name]
	if !ok {
		return nil, false, nil
	}
	switch v := v.(type) {
	case string:
		raw = []byte(v)
	default:
		if raw, err = json.Marshal(v); err != nil {
			return nil, true, fmt.Errorf("%s is no JSON array", name)
		}
	}
	if raw = bytes.TrimSpace(raw); len(raw) == 0 || string(raw) == "null" {
		raw = []byte("[]")
	}
	if raw[0] != '[' {
		return nil, true, fmt.Errorf("%s is no JSON array; give one, its text, or @file", name)
	}
	return raw, true, nil
}

// decodeStrict refuses unknown fields. Its errors name fields and types, and hold
// nothing of the values.
func decodeStrict(raw []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	dec.UseNumber()
	err := dec.Decode(into)
	var (
		syntax *json.SyntaxError
		wrong  *json.UnmarshalTypeError
	)
	switch {
	case errors.As(err, &syntax):
		return fmt.Errorf("it is no JSON from byte %d on", syntax.Offset)
	case errors.As(err, &wrong):
		return fmt.Errorf("%.64q is a %.20s", wrong.Field, wrong.Value)
	case err != nil:
		return fmt.Errorf("%.120s", err.Error())
	case dec.More():
		return errors.New("there is more after the array")
	}
	return nil
}

func (b *backend) deleteConsumer(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	defer b.consumers.Lock()()
	user, err := b.consumerUser(ctx, name)
	if err != nil {
		return nil, err
	}
	if user != "" {
		return nil, conflict("consumer %q is named by role %q; take it out of the role's consumers first", name, user)
	}
	return nil, b.consumers.Delete(ctx, name)
}

// consumerUser names a role that lists a consumer; "" when none does. Roles have no
// consumers yet.
func (b *backend) consumerUser(context.Context, string) (string, error) { return "", nil }

// consumerOf names a consumer that uses a connection; "" when none does.
func (b *backend) consumerOf(ctx context.Context, name string) (string, error) {
	return b.consumers.First(ctx, func(c *consumer.Consumer) bool { return c.Connection == name })
}
