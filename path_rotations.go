package harmonyflow

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathRotations() []*framework.Path {
	idField := &framework.FieldSchema{Type: framework.TypeString, Required: true, Description: "Id of a rotation."}
	page := map[string]*framework.FieldSchema{
		"state": {Type: framework.TypeString, Query: true, Description: "Only rotations in this state."},
		"after": {Type: framework.TypeString, Query: true, Description: "Only rotations started before the one with this id: the last one of the page before."},
		"limit": limitField,
	}
	one := map[string]*framework.FieldSchema{"id": idField, "consumer": {
		Type: framework.TypeString, Query: true, Description: "Show this consumer alone. Without it, the first 20 by name.",
	}}
	lists := operation{call: b.listRotations, summary: "List rotations, newest first.", verb: "list", suffix: "rotations", fields: keyInfoFields}
	reads := lists
	reads.verb, reads.suffix = "read", "rotations-list"
	return []*framework.Path{
		{
			Pattern: "rotations/?$",
			Fields:  page,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: lists.handler(page),
				logical.ReadOperation: reads.handler(page),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List rotations, newest first.",
			HelpDescription: "Rotations are kept for 90 days, and at most 10,000 of them. Filter with state= and page with after= and limit=.",
		},
		{
			Pattern: "rotations/(?P<id>[^/]+)",
			Fields:  one,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readRotation, summary: "Read the progress and evidence of a rotation.", verb: "read", suffix: "rotation", errors: []int{404},
					fields: map[string]*framework.FieldSchema{
						"rotation_id": stringField("Id."), "state": stringField("State."), "phase": stringField("Phase, of a rotation of one role."),
						"summary": stringField("The outcome so far, in a sentence."), "follow": stringField("The next command to type."),
						"trigger": stringField("create, manual, schedule, rollback, reconcile, retire, rotate-root or emergency."), "reason": stringField("Why, in words."),
						"requested_by": mapField("Entity id, accessor, display name and request id of who asked."),
						"started":      stringField("RFC 3339."), "finished": stringField("RFC 3339."),
						"roles": mapField("Version, state, phase and error of each role, by name."),
						"units": {Type: framework.TypeSlice, Description: "Roles that go forward or back together."}, "children": listField("Rotations that a large request was split into."),
						"overrides": listField("Of an emergency: what it set aside."), "earlier_versions_refused": stringField("Of an emergency: of how many secrets every earlier version is refused, and how long after the request the last was."), "parent": stringField("Rotation this one is a part of."),
						"timeline": listField("What happened when; of several roles each line names its role, and there are the last 500."), "check_until": stringField("Until when consumers have to read what was published, RFC 3339."),
						"criteria":        listField("What a rotation has to show, a line each: met, not met, pending, unknown or not applicable, the condition, and what was seen of it."),
						"consumers":       {Type: framework.TypeSlice, Description: "One entry a consumer and direction: outcome, external_secrets, secrets, workloads, pods and checks, each with what was seen of it and when (RFC 3339), and a timeline of them. No values, and nothing made of values."},
						"more_consumers":  intField("How many consumers are left out; read them with consumer=."),
						"already_running": listField("Roles that were in a rotation already."),
						"nodes":           listField("Nodes of the target, of a rotation of one role."), "missed_nodes": listField("Nodes that were passed over."),
						"previous_sessions": stringField("Who was seen to use the previous version in its grace, of a rotation of one role; under roles for each of several."),
						"previous_clients":  listField("Clients that were, at most 20, with the time at which one was seen to be gone."),
						"retry_at":          stringField("When a waiting rotation tries again, RFC 3339."), "grace_until": stringField("When the previous version is retired, RFC 3339."),
					},
				}.handler(one),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "Progress and evidence of a rotation.",
			HelpDescription: `What each role is doing or has come to, the timeline, and what was seen of each condition of success. Of each
consumer there is a line, named after it, and what was seen of every ExternalSecret, Secret, workload, pod and check,
with times; of very many, what is bad and the first of the others, and how many more there are. No secret is in it.`,
		},
		{
			Pattern: "cancel/(?P<id>[^/]+)",
			Fields:  map[string]*framework.FieldSchema{"id": idField, "reason": reasonField},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: operation{
					call: b.cancel, summary: "Stop a rotation that has not retired anything: it rolls back.", verb: "cancel", suffix: "rotation",
					fields: rotationAnswer(), errors: []int{404, 409}, mutating: true,
				}.handler(map[string]*framework.FieldSchema{"id": idField, "reason": reasonField}),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "Stop a rotation: it rolls back.",
			HelpDescription: `Before promotion the new version is refused again; after it the previous material is served again, under a new
number, and the new one is refused after that. Once a rotation retires the previous version it cannot be
cancelled: rollback/ then starts a rotation back.`,
		},
	}
}

func (b *backend) listRotations(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	limit, err := pageLimit(d)
	if err != nil {
		return nil, err
	}
	state, after := rotation.State(d.Get("state").(string)), d.Get("after").(string)
	if state != "" && !slices.Contains(rotation.States, state) {
		return refuse("state is %.64q; allowed are %v", state, rotation.States)
	}
	ids, err := b.engine.Store().Headers(ctx)
	if err != nil {
		return nil, err
	}
	var keys []string
	info := map[string]any{}
	for _, id := range slices.Backward(ids) {
		if after != "" && id >= after {
			continue
		}
		h, parts, err := b.partsOf(ctx, id)
		if err != nil {
			continue // removed by retention while we looked
		}
		s := rotation.StateOf(h, parts)
		if state != "" && s != state {
			continue
		}
		keys = append(keys, id)
		info[id] = map[string]any{
			"state": string(s), "trigger": string(h.Trigger), "started": formatTime(h.Started), "summary": summary(parts),
		}
		if len(keys) == limit {
			break
		}
	}
	return logical.ListResponseWithInfo(keys, info), nil
}

func (b *backend) readRotation(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	id, err := rotationID(d)
	if err != nil {
		return nil, err
	}
	h, parts, err := b.partsOf(ctx, id)
	if err != nil {
		return nil, err
	}
	resp := answer(req, h, parts)
	data := resp.Data
	data["trigger"], data["started"] = string(h.Trigger), formatTime(h.Started)
	setKnown(data, "reason", h.Reason)
	setKnown(data, "finished", formatTime(h.Finished))
	data["requested_by"] = map[string]any{
		"entity_id": h.RequestedBy.EntityID, "accessor": h.RequestedBy.Accessor,
		"display_name": h.RequestedBy.DisplayName, "request_id": h.RequestedBy.RequestID,
	}
	setKnown(data, "parent", h.Parent)
	if len(h.Children) > 0 {
		data["children"] = h.Children
	}
	data["units"] = unitMaps(h, parts)
	if len(h.Children) > 0 {
		return resp, nil // each of them has its own
	}
	all, err := b.engine.Store().Evidences(ctx, h, parts)
	if err != nil {
		return nil, err
	}
	if err := b.describeDeliveries(ctx, h, all, d.Get("consumer").(string), data); err != nil {
		return nil, err
	}
	if len(parts) == 1 {
		return resp, b.detail(ctx, req, h, parts[0], data)
	}
	data["timeline"] = timelineOf(all)
	return resp, nil
}

// unitMaps shows which roles go forward or back together, and how far they are.
func unitMaps(h *rotation.Header, parts []rotation.Part) []any {
	var units []any
	for _, members := range rotation.Units(h, parts) {
		roles := make([]string, len(members))
		for i, p := range members {
			roles[i] = p.Role
		}
		units = append(units, map[string]any{
			"roles": roles, "state": string(rotation.Summarize(members)), "phase": string(members[0].Phase),
		})
	}
	return units
}

// rotationID reads the id that a path names; storage is not asked for what cannot
// be one.
func rotationID(d *framework.FieldData) (string, error) {
	id := d.Get("id").(string)
	if u, err := uuid.Parse(id); err != nil || u.String() != id {
		return "", notFound("%.64q is no id of a rotation; list rotations/ to see which there are", id)
	}
	return id, nil
}

// setKnown leaves out what is not known (yet): the CLI would print it as n/a.
func setKnown(data map[string]any, field, value string) {
	if value != "" {
		data[field] = value
	}
}

// detail adds what a rotation of one role has to tell beyond its state.
func (b *backend) detail(ctx context.Context, req *logical.Request, h *rotation.Header, p rotation.Part, data map[string]any) error {
	setKnown(data, "phase", string(p.Phase))
	r, err := b.engine.Store().Role(ctx, p.Role)
	if err != nil {
		return err
	}
	if r != nil && r.Run != nil && r.Run.Rotation == h.ID {
		data["timeline"], data["nodes"], data["missed_nodes"] = lines(r.Run.Timeline), orEmpty(r.Nodes), orEmpty(r.Run.Missed)
		setKnown(data, "retry_at", formatTime(r.Run.RetryAt))
		setKnown(data, "grace_until", formatTime(r.Run.GraceUntil))
		setKnown(data, "check_until", formatTime(p.Until))
		describeUsage(r.Run.Usage, data)
		if p.State == rotation.InGrace {
			data["follow"] = fmt.Sprintf("vault write -f %sretire/%s/%s", req.MountPoint, p.Kind, p.Role)
		}
		return nil
	}
	ev, err := b.engine.Store().Evidence(ctx, h.ID, p.Role)
	if err != nil || ev == nil {
		return err
	}
	data["timeline"], data["nodes"], data["missed_nodes"] = lines(ev.Timeline), orEmpty(ev.Nodes), orEmpty(ev.Missed)
	criteria, _ := data["criteria"].([]string)
	for _, c := range ev.Criteria {
		criteria = append(criteria, c.Line())
	}
	data["criteria"] = criteria
	describeUsage(ev.Usage, data)
	data["follow"] = fmt.Sprintf("vault read %sverify/%s/%s", req.MountPoint, p.Kind, p.Role)
	return nil
}

// describeUsage says who uses the previous version still, or did to its end.
func describeUsage(u *rotation.Usage, data map[string]any) {
	if u == nil {
		return
	}
	setKnown(data, "previous_sessions", u.Line())
	clients := make([]string, len(u.Clients))
	for i, c := range u.Clients {
		clients[i] = c.Line()
	}
	data["previous_clients"] = clients
}

func lines(timeline []rotation.Moment) []string {
	out := make([]string, len(timeline))
	for i, m := range timeline {
		out[i] = formatTime(m.At) + " " + m.What
	}
	return out
}

func (b *backend) cancel(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	id, err := rotationID(d)
	if err != nil {
		return nil, err
	}
	h, err := b.engine.Cancel(ctx, id, d.Get("reason").(string))
	if err != nil {
		return nil, err
	}
	wait, cancel := b.waiting(ctx)
	defer cancel()
	b.engine.WaitAll(wait, h, rotation.Over)
	return b.answerMany(ctx, req, h.ID, back)
}
