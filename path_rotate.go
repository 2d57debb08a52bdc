package harmonyflow

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
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

// rotationAnswer is what every path answers that starts or steers a rotation.
// Beside these fields there is one for each of the first twenty roles, named
// <kind>/<role>, whose value is a line for a terminal.
func rotationAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"summary":         stringField("The outcome so far, in a sentence."),
		"follow":          stringField("The next command to type."),
		"rotation_id":     stringField("Id of the rotation."),
		"state":           stringField("State of the rotation."),
		"roles":           mapField("Version, state, phase and error of each role, by name."),
		"already_running": listField("Roles that were in a rotation already."),
	}
}

func (b *backend) rotateAll(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.rotateMany(ctx, req, d, "")
}

func (b *backend) rotateKind(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	k := d.Get("kind").(string)
	if b.kind(k) == nil {
		return nil, notFound("kind %.64q is not known; allowed are %s", k, b.kindNames())
	}
	return b.rotateMany(ctx, req, d, k)
}

// rotateMany rotates every role of a kind, or of all kinds.
func (b *backend) rotateMany(ctx context.Context, req *logical.Request, d *framework.FieldData, k string) (*logical.Response, error) {
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
	if err := b.notFrozen(ctx); err != nil {
		return nil, err
	}
	h, err := b.engine.Begin(ctx, rotation.Request{
		Trigger: rotation.Manual, Roles: names, RequestedBy: requester(req), Reason: d.Get("reason").(string), Keys: requestKeys(req, d),
	})
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
	if err := b.notFrozen(ctx); err != nil {
		return nil, err
	}
	if resp, err := b.reachable(ctx, r); err != nil {
		return resp, err
	}
	h, err := b.engine.Begin(ctx, rotation.Request{
		Trigger: rotation.Manual, Roles: []string{r.Name}, RequestedBy: requester(req), Reason: d.Get("reason").(string), Keys: requestKeys(req, d),
	})
	if err != nil {
		return nil, err
	}
	return b.answerOne(ctx, req, h.ID, r.Name, rotation.Settled, forward)
}

// roleOf reads the role that a path names by kind and name.
func (b *backend) roleOf(ctx context.Context, d *framework.FieldData) (*rotation.Role, error) {
	k, name := d.Get("kind").(string), d.Get("name").(string)
	if b.kind(k) == nil {
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

// reachable refuses a role whose connection is gone, before anything is stored.
func (b *backend) reachable(ctx context.Context, r *rotation.Role) (*logical.Response, error) {
	if r.Connection == "" {
		return nil, nil
	}
	e, err := b.connections.Get(ctx, r.Connection)
	if err == nil && e == nil {
		return refuse("%v", connection.Missing(r.Connection))
	}
	return nil, err
}

func (b *backend) notFrozen(ctx context.Context) error {
	c, err := b.engine.LoadConfig(ctx)
	if err == nil && c.Freeze {
		return conflict("the mount is frozen; write config freeze=false to rotate")
	}
	return err
}

// direction is which way a request wants a rotation to go.
type direction bool

const (
	forward direction = false
	back    direction = true
)

// waiting is how long a request may wait for a rotation: its last part is for
// reading what the rotation has come to.
func (b *backend) waiting(ctx context.Context) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		return context.WithDeadline(ctx, deadline.Add(-b.answerWithin/6))
	}
	return context.WithTimeout(ctx, b.answerWithin)
}

// answerOne waits for one role's part in a rotation, which may have others, and
// says what became of it.
func (b *backend) answerOne(
	ctx context.Context, req *logical.Request, id, role string, until rotation.Until, wanted direction,
) (*logical.Response, error) {
	wait, cancel := b.waiting(ctx)
	defer cancel()
	b.engine.WaitRole(wait, id, role, until)
	h, parts, err := b.partsOf(ctx, id)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(parts, func(p rotation.Part) bool { return p.Role == role })
	if i < 0 {
		return nil, conflict("role %q has no part in rotation %s; read rotations/%s", role, id, id)
	}
	switch p := parts[i]; {
	case !failed(p, wanted):
		return answer(req, h, parts[i:i+1]), nil
	case h.Trigger == rotation.Create && p.State == rotation.Failed:
		return nil, conflict("role %q was not created: %s", role, p.Error)
	default:
		return refuse("%s (rotation %s; read rotations/%s)", p.Line(), id, id)
	}
}

// failed reports whether a role did not come to where the request wanted it.
func failed(p rotation.Part, wanted direction) bool {
	switch p.State {
	case rotation.Failed, rotation.RollbackFailed:
		return true
	case rotation.RolledBack, rotation.RollingBack, rotation.Cancelled, rotation.Superseded:
		return wanted == forward
	}
	return false
}

func (b *backend) partsOf(ctx context.Context, id string) (*rotation.Header, []rotation.Part, error) {
	h, err := b.engine.Store().Header(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	if h == nil {
		return nil, nil, notFound("there is no rotation %q; list rotations/ to see which there are", id)
	}
	parts, err := b.engine.Store().AllParts(ctx, h)
	return h, parts, err
}

// answerMany says what became of every role of a rotation: the failures as
// warnings, or as an error when there is nothing else.
func (b *backend) answerMany(ctx context.Context, req *logical.Request, id string, wanted direction) (*logical.Response, error) {
	h, parts, err := b.partsOf(ctx, id)
	if err != nil {
		return nil, err
	}
	resp := answer(req, h, parts)
	failures := 0
	for _, p := range parts {
		if !failed(p, wanted) {
			continue
		}
		if failures++; failures <= maxLines {
			resp.AddWarning(p.Line())
		}
	}
	if failures > 0 && failures == len(parts) {
		return refuse("%s (rotation %s; read rotations/%s)", allFailed(parts), h.ID, h.ID)
	}
	return resp, nil
}

func allFailed(parts []rotation.Part) string {
	if len(parts) == 1 {
		return parts[0].Line()
	}
	return fmt.Sprintf("none of %d roles succeeded, the first is %s", len(parts), parts[0].Line())
}

// maxLines is how many roles an answer shows one by one.
const maxLines = 20

// stateOf is the state of a rotation, or of those of its parts that are shown.
func stateOf(h *rotation.Header, parts []rotation.Part) rotation.State {
	if len(parts) == 1 && parts[0].State != "" {
		return parts[0].State
	}
	return rotation.StateOf(h, parts)
}

// answer prints a rotation: lines for people first, the same for programs under
// roles.
func answer(req *logical.Request, h *rotation.Header, parts []rotation.Part) *logical.Response {
	data := map[string]any{
		"rotation_id": h.ID,
		"state":       string(stateOf(h, parts)),
		"follow":      "vault read " + req.MountPoint + "rotations/" + h.ID,
		"summary":     summary(parts),
	}
	roles := map[string]any{}
	for i, p := range parts {
		if i < maxLines {
			name := p.Kind + "/" + p.Role
			data[name] = strings.TrimPrefix(p.Line(), name+": ")
		}
		roles[p.Role] = partMap(p)
	}
	data["roles"] = roles
	if len(h.Running) > 0 {
		data["already_running"] = h.Running
	}
	return &logical.Response{Data: data}
}

func partMap(p rotation.Part) map[string]any {
	return map[string]any{
		"kind": p.Kind, "version": int64(p.Version), "state": string(p.State), "phase": string(p.Phase), "error": p.Error,
	}
}

// summary counts parts by what a person wants to know of them.
func summary(parts []rotation.Part) string {
	tally := map[string]int{}
	for _, p := range parts {
		word := string(p.State)
		switch p.State {
		case rotation.InGrace:
			word = "promoted"
		case "":
			word = "waiting"
		}
		tally[word]++
	}
	words := make([]string, 0, len(tally))
	for w, n := range tally {
		words = append(words, fmt.Sprintf("%d %s", n, strings.ReplaceAll(w, "_", " ")))
	}
	slices.Sort(words)
	return count(len(parts), "role") + ": " + strings.Join(words, ", ")
}

// plan is dry_run: what a rotation would do, and what it would meet.
func (b *backend) plan(ctx context.Context, req *logical.Request, names []string) (*logical.Response, error) {
	reports, err := b.engine.Examine(ctx, names)
	if err != nil {
		return nil, err
	}
	data := map[string]any{"state": "dry_run", "follow": "vault write -f " + req.MountPoint + strings.TrimPrefix(req.Path, req.MountPoint)}
	roles := map[string]any{}
	ready := 0
	for i, rep := range reports {
		line := fmt.Sprintf("would make version %d and retire %d (%s)", rep.Role.Set.Last+1, currentNumber(rep.Role), rep.Role.Spec.Strategy)
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
		if i < maxLines {
			data[rep.Role.Kind+"/"+rep.Role.Name] = line
		}
		roles[rep.Role.Name] = map[string]any{"kind": rep.Role.Kind, "plan": line, "error": problem, "notes": orEmpty(rep.Notes)}
	}
	data["roles"], data["summary"] = roles, fmt.Sprintf("%d of %s could be rotated now; nothing was changed", ready, count(len(reports), "role"))
	return &logical.Response{Data: data}, nil
}
