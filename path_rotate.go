package harmonyflow

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathRotate() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"dry_run":         boolField("Give the plan and what preflight finds, and change nothing."),
		"reason":          reasonField,
		"idempotency_key": idempotencyField,
	}
	with := func(more map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
		for k, v := range fields {
			more[k] = v
		}
		return more
	}
	path := func(pattern, suffix, synopsis string, fields map[string]*framework.FieldSchema, call framework.OperationFunc) *framework.Path {
		return &framework.Path{
			Pattern: pattern,
			Fields:  fields,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: operation{
					call: call, summary: synopsis, verb: "rotate", suffix: suffix, fields: rotationAnswer(), errors: []int{404, 409}, mutating: true,
				}.handler(fields),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: synopsis,
			HelpDescription: `The answer comes as soon as the new version is served, or within 30 seconds with what there is; grace and retire
go on behind it and are read at rotations/<id>. A repeat of the same request, or of the same
idempotency_key, answers with the same rotation. No secret is in the answer: read creds/<name>.`,
		}
	}
	return []*framework.Path{
		path("rotate/all/?$", "all", "Rotate every role.", with(map[string]*framework.FieldSchema{}), b.rotateAll),
		path("rotate/(?P<kind>[^/]+)/?$", "kind", "Rotate every role of a kind.", with(map[string]*framework.FieldSchema{"kind": kindField}), b.rotateKind),
		path("rotate/(?P<kind>[^/]+)/"+namePattern, "role", "Rotate one role.", with(map[string]*framework.FieldSchema{"kind": kindField, "name": nameField}), b.rotateRole),
	}
}

func (b *backend) rotateAll(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.rotateMany(ctx, req, d, "")
}

func (b *backend) rotateKind(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	k := d.Get("kind").(string)
	if b.offered(k) == nil {
		return nil, notFound("kind %.64q is not known; allowed are %s", k, b.kindNames())
	}
	return b.rotateMany(ctx, req, d, k)
}

// rotateMany rotates every role of a kind, or of all kinds.
func (b *backend) rotateMany(ctx context.Context, req *logical.Request, d *framework.FieldData, k string) (*logical.Response, error) {
	asked := rotation.Request{
		Trigger: rotation.Manual, RequestedBy: requester(req), Reason: d.Get("reason").(string), Keys: requestKeys(req, d),
	}
	names, err := b.engine.Store().RolesOfKind(ctx, k)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		if k != "" {
			k = " of kind " + k
		}
		return nil, notFound("there is no role%s; write roles/<name> first", k)
	}
	if d.Get("dry_run").(bool) {
		return b.plan(ctx, req, names)
	}
	again, err := b.repeated(ctx, asked)
	if err == nil && !again {
		err = b.notFrozen(ctx)
	}
	if err != nil {
		return nil, err
	}
	asked.Roles = names
	h, err := b.engine.Begin(ctx, asked)
	if err != nil {
		return nil, err
	}
	wait, cancel := b.waiting(ctx)
	defer cancel()
	b.engine.WaitAll(wait, h, rotation.Settled)
	return b.answerMany(ctx, req, h.ID, forward)
}

func (b *backend) rotateRole(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	if d.Get("dry_run").(bool) {
		return b.plan(ctx, req, []string{r.Name})
	}
	asked := rotation.Request{
		Trigger: rotation.Manual, Roles: []string{r.Name}, RequestedBy: requester(req), Reason: d.Get("reason").(string), Keys: requestKeys(req, d),
	}
	if err := b.mayBegin(ctx, r, asked); err != nil {
		return nil, err
	}
	h, err := b.engine.Begin(ctx, asked)
	if err != nil {
		return nil, err
	}
	return b.answerOne(ctx, req, h.ID, r.Name, rotation.Settled, forward)
}

// repeated reports whether a request was served before: then it is answered with
// the same rotation, whatever has changed since.
func (b *backend) repeated(ctx context.Context, asked rotation.Request) (bool, error) {
	h, err := b.engine.Repeated(ctx, asked)
	return h != nil, err
}

// mayBegin refuses a new rotation of r while none may start.
func (b *backend) mayBegin(ctx context.Context, r *rotation.Role, asked rotation.Request) error {
	if again, err := b.repeated(ctx, asked); again || err != nil {
		return err
	}
	if err := b.notFrozen(ctx); err != nil {
		return err
	}
	return b.reachable(ctx, r)
}

// roleOf reads the role that a path names by kind and name.
func (b *backend) roleOf(ctx context.Context, d *framework.FieldData) (*rotation.Role, error) {
	k, name := d.Get("kind").(string), d.Get("name").(string)
	if b.offered(k) == nil {
		return nil, notFound("kind %.64q is not known; allowed are %s", k, b.kindNames())
	}
	r, err := b.engine.Store().Role(ctx, name)
	if err != nil {
		return nil, err
	}
	if r == nil || r.Kind != k {
		return nil, notFound("there is no role %.128q of kind %s; list roles/ to see which there are", name, k)
	}
	return r, nil
}

// reachable refuses a role whose connection is gone, or no longer allows it,
// before anything is stored.
func (b *backend) reachable(ctx context.Context, r *rotation.Role) error {
	if r.Connection == "" {
		return nil
	}
	return b.permit(ctx, []*rotation.Role{r})[0]
}

func (b *backend) notFrozen(ctx context.Context) error {
	c, err := b.engine.LoadConfig(ctx)
	if err != nil || !c.Frozen(time.Now()) {
		return err
	}
	until, why := "", ""
	if !c.FreezeUntil.IsZero() {
		until = " until " + formatTime(c.FreezeUntil)
	}
	if c.FreezeReason != "" {
		why = " (" + c.FreezeReason + ")"
	}
	return conflict("the mount is frozen%s%s; write config freeze=false to rotate before", until, why)
}

// plan is dry_run: what a rotation would do, and what it would meet.
func (b *backend) plan(ctx context.Context, req *logical.Request, names []string) (*logical.Response, error) {
	reports, err := b.engine.Examine(ctx, names)
	if err != nil {
		return nil, err
	}
	return planned(req, reports), nil
}

func planned(req *logical.Request, reports []rotation.Report) *logical.Response {
	data := map[string]any{"state": "dry_run", "follow": "vault write -f " + req.MountPoint + strings.TrimPrefix(req.Path, req.MountPoint)}
	roles := map[string]any{}
	ready := 0
	for i, rep := range reports {
		line := fmt.Sprintf("would make version %d and retire %d (%s)", rep.Role.Set.Last+1, currentNumber(rep.Role), rep.Role.Spec.Strategy)
		if isKept(rep.Role) {
			line = planKept(rep)
		}
		problem := ""
		switch {
		case rep.Role.Run != nil:
			problem = "already in rotation " + rep.Role.Run.Rotation
		case rep.Err != nil:
			problem = rep.Err.Error()
		default:
			ready++
		}
		if problem != "" {
			line = "would fail: " + problem
		}
		part := rotation.Part{Role: rep.Role.Name, Kind: rep.Role.Kind}
		if i < maxLines {
			data[part.Label()] = line
		}
		roles[part.Key()] = map[string]any{"kind": rep.Role.Kind, "plan": line, "consumers": orEmpty(rep.Plan), "error": problem, "notes": orEmpty(rep.Notes)}
	}
	data["roles"], data["summary"] = roles, fmt.Sprintf("%d of %s could be rotated now; nothing was changed", ready, count(len(reports), "role"))
	return &logical.Response{Data: data}
}
