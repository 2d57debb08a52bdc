package harmonyflow

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathConfig() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"grace_period":  durationField("How long the previous version stays accepted after promotion, where a role does not say. Default 1h."),
		"keep_versions": intField("How many versions of a role are kept, where it does not say. Default 5."),
		"workers":       intField("How many batches of roles are worked on at once. Default 32."),
		"allowed_hosts": {
			Type:        framework.TypeCommaStringSlice,
			Description: "Hosts that the checks of consumers may send requests to: names or addresses without a port, or *. and a domain. Default none.",
		},
		"freeze":        boolField("While true no rotation starts, scheduled or manual. Running ones go on; slots stay due, or run out of their window."),
		"freeze_until":  stringField("The freeze ends by itself then: RFC 3339, or a duration from now. Empty: when freeze=false is written."),
		"freeze_reason": stringField("Why, in words; told to everybody whose rotation is refused."),
	}
	return []*framework.Path{{
		Pattern: "config",
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: operation{
				call: b.readConfig, summary: "Read the mount's defaults.", verb: "read", suffix: "configuration", fields: fields,
			}.handler(nil),
			logical.UpdateOperation: operation{
				call: b.writeConfig, summary: "Write the mount's defaults; what is not given stays.",
				verb: "configure", none: true, mutating: true,
			}.handler(fields),
		},
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis:    "Defaults of the mount.",
		HelpDescription: "Defaults that roles may override, how many workers rotate at once, and a freeze that stops new rotations, until a time or until it is ended.",
	}}
}

func (b *backend) readConfig(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	c, err := b.engine.LoadConfig(ctx)
	if err != nil {
		return nil, err
	}
	endFreeze(&c, time.Now())
	return &logical.Response{Data: map[string]any{
		"grace_period":  seconds(c.GracePeriod),
		"keep_versions": int64(c.KeepVersions),
		"workers":       int64(c.Workers),
		"allowed_hosts": orEmpty(c.AllowedHosts),
		"freeze":        c.Freeze,
		"freeze_until":  formatTime(c.FreezeUntil),
		"freeze_reason": c.FreezeReason,
	}}, nil
}

func (b *backend) writeConfig(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return nil, b.engine.ChangeConfig(ctx, func(c *rotation.Config) error {
		if err := applyConfig(c, req, d); err != nil {
			return badRequest("%w", err)
		}
		return nil
	})
}

func applyConfig(c *rotation.Config, req *logical.Request, d *framework.FieldData) error {
	defaults := rotation.DefaultConfig()
	if v, ok := req.Data["grace_period"]; ok {
		if c.GracePeriod = duration(d, "grace_period"); cleared(v) {
			c.GracePeriod = defaults.GracePeriod
		}
	}
	if v, ok := d.GetOk("keep_versions"); ok {
		if c.KeepVersions = int(v.(int64)); c.KeepVersions == 0 {
			c.KeepVersions = defaults.KeepVersions
		}
	}
	if v, ok := d.GetOk("workers"); ok {
		if c.Workers = int(v.(int64)); c.Workers == 0 {
			c.Workers = defaults.Workers
		}
	}
	setStrings(d, "allowed_hosts", &c.AllowedHosts)
	for _, host := range c.AllowedHosts {
		if host == "" || strings.ContainsAny(host, "/@ ") || strings.Contains(strings.TrimPrefix(host, "*."), "*") {
			return fmt.Errorf("allowed_hosts holds %.64q; give names or addresses without a port, or *. and a domain", host)
		}
	}
	if err := applyFreeze(c, d, time.Now()); err != nil {
		return err
	}
	switch {
	case c.GracePeriod < 0 || c.GracePeriod > 90*24*time.Hour:
		return fmt.Errorf("grace_period is %s; it may be 0 to 2160h", c.GracePeriod)
	case c.KeepVersions < 2 || c.KeepVersions > maxKeepVersions:
		return fmt.Errorf("keep_versions is %d; it may be 2 to %d", c.KeepVersions, maxKeepVersions)
	case c.Workers < 1 || c.Workers > 256:
		return fmt.Errorf("workers is %d; it may be 1 to 256", c.Workers)
	}
	return nil
}

// maxReason bounds what is repeated to everybody.
const maxReason = 256

func applyFreeze(c *rotation.Config, d *framework.FieldData, now time.Time) error {
	endFreeze(c, now)
	if v, ok := d.GetOk("freeze"); ok {
		c.Freeze = v.(bool)
	}
	until, untilGiven := d.GetOk("freeze_until")
	reason, reasonGiven := d.GetOk("freeze_reason")
	if !c.Freeze {
		if untilGiven && until != "" || reasonGiven && reason != "" {
			return errors.New("freeze_until and freeze_reason are for a freeze, and freeze is false; write freeze=true with them")
		}
		c.FreezeUntil, c.FreezeReason = time.Time{}, ""
		return nil
	}
	if reasonGiven {
		c.FreezeReason = reason.(string)
		if len(c.FreezeReason) > maxReason || strings.ContainsFunc(c.FreezeReason, unicode.IsControl) {
			return fmt.Errorf("freeze_reason is %.40q; give one line of at most %d bytes", c.FreezeReason, maxReason)
		}
	}
	if !untilGiven {
		return nil
	}
	c.FreezeUntil = time.Time{}
	if until == "" {
		return nil
	}
	var err error
	c.FreezeUntil, err = moment("freeze_until", until.(string), now)
	return err
}

// endFreeze forgets a freeze that has ended by itself.
func endFreeze(c *rotation.Config, now time.Time) {
	if !c.Frozen(now) {
		c.Freeze, c.FreezeUntil, c.FreezeReason = false, time.Time{}, ""
	}
}

// maxKeepVersions keeps a role of the largest values within its entry: seven of
// 32 KiB fit into 256 KiB, and most secrets are far smaller.
const maxKeepVersions = 50
