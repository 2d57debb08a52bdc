package harmonyflow

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathStatus() []*framework.Path {
	return []*framework.Path{{
		Pattern: "status",
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: operation{
				call: b.status, summary: "One look at the mount.", verb: "read", suffix: "status",
				fields: map[string]*framework.FieldSchema{
					"summary": stringField("In a sentence."), "roles": intField("How many roles there are."),
					"due": listField("Roles whose slot has come, first twenty."), "overdue": listField("Roles whose slot came over an hour ago, first twenty."),
					"running": listField("Roles in a rotation, first twenty."), "failed": listField("Roles whose last rotation failed, first twenty."),
					"drifted":   listField("Roles whose target differs from what is stored, first twenty."),
					"suspended": listField("Roles whose scheduled rotations have stopped, first twenty."), "unreadable": listField("Roles whose entries cannot be decoded, first twenty."),
					"counts": mapField("How many there are of each."), "next": stringField("The next scheduled rotation."), "frozen": boolField("Whether new rotations are stopped."),
					"frozen_until": stringField("When that ends by itself, RFC 3339."), "freeze_reason": stringField("Why they are stopped."),
					"follow": stringField("The next command to type."),
				},
			}.handler(nil),
		},
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis:    "One look: what is due, running, failed or drifted.",
		HelpDescription: "Counts, and the first of each list; it fits a terminal. The first look after a start reads every role, later ones none.",
	}}
}

func (b *backend) status(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	c, err := b.engine.LoadConfig(ctx)
	if err != nil {
		return nil, err
	}
	lists := map[string][]string{"due": {}, "overdue": {}, "running": {}, "failed": {}, "drifted": {}, "suspended": {}, "unreadable": {}}
	roles, next := 0, ""
	var nextAt time.Time
	now := time.Now()
	err = b.engine.EachStanding(ctx, func(name string, s rotation.Standing) {
		label := rotation.Label(s.Kind, name)
		for _, in := range s.In(now) {
			lists[in] = append(lists[in], label)
		}
		if rotation.IsRoot(name) {
			return
		}
		roles++
		if !s.Next.IsZero() && s.Next.After(now) && (nextAt.IsZero() || s.Next.Before(nextAt)) {
			nextAt, next = s.Next, fmt.Sprintf("%s at %s", label, formatTime(s.Next))
		}
	})
	if err != nil {
		return nil, err
	}
	data := map[string]any{"roles": int64(roles), "next": next, "frozen": c.Frozen(now), "follow": "vault list " + req.MountPoint + "rotations"}
	if c.Frozen(now) {
		data["frozen_until"], data["freeze_reason"] = formatTime(c.FreezeUntil), c.FreezeReason
	}
	counts := map[string]any{}
	for in, names := range lists {
		slices.Sort(names)
		counts[in] = int64(len(names))
		data[in] = names[:min(maxLines, len(names))]
	}
	data["counts"] = counts
	data["summary"] = fmt.Sprintf("%s: %d running, %d due, %d overdue, %d failed, %d drifted",
		count(roles, "role"), counts["running"], counts["due"], counts["overdue"], counts["failed"], counts["drifted"])
	return &logical.Response{Data: data}, nil
}
