package harmonyflow

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathEmergency() []*framework.Path {
	fields := func(more map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
		all := map[string]*framework.FieldSchema{
			"reason":          {Type: framework.TypeString, Description: "What happened, in words: one line of at most 256 bytes, kept with the rotation. Required, but for a dry run."},
			"dry_run":         boolField("Say what it would reach, and what would stand against it, and change nothing."),
			"idempotency_key": idempotencyField,
			"restart_namespaces": {
				Type:        framework.TypeCommaStringSlice,
				Description: "Namespaces in which every workload is restarted, and not those alone that consumers name. Those of consumers of the roles may be given.",
			},
			"hooks": {
				Type:        framework.TypeCommaStringSlice,
				Description: "Names of the hooks of consumers that are called; none for none of them. Default: all that the consumers of the roles have.",
			},
		}
		for k, v := range more {
			all[k] = v
		}
		return all
	}
	answer := rotationAnswer()
	answer["earlier_versions_refused"] = stringField("Of how many secrets every earlier version is refused, and how long after the request the last was.")
	answer["overrides"] = listField("What it set aside: a freeze, and rotations that it has ended.")
	answer["consumers"] = mapField("Of a dry run: what would be done at each consumer, by name.")
	path := func(pattern, suffix, synopsis string, fields map[string]*framework.FieldSchema, call framework.OperationFunc) *framework.Path {
		return &framework.Path{
			Pattern: pattern,
			Fields:  fields,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: operation{
					call: call, summary: synopsis, verb: "emergency-rotate", suffix: suffix, fields: answer, errors: []int{404, 409}, mutating: true,
				}.handler(fields),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: synopsis,
			HelpDescription: `For secrets that somebody knows who must not. There is no grace: as soon as the new version is served every
earlier one is refused at every node that can be reached, and sessions that were opened with it are closed. Only then
consumers are brought the new version, all at once: they are refused until they have it. A rotation that a role is in is
ended, freezes and windows do not count, and what was set aside is recorded. Nothing is rolled back; a consumer that cannot
be proven is told, and stops no other. Earlier versions count as compromised: they are never served or brought back, but
for keys that decrypt. The answer comes when earlier versions are refused, or within 30 seconds with what there is.`,
		}
	}
	return []*framework.Path{
		path("emergency/rotate/all/?$", "all", "Replace every secret at once, after a compromise.", fields(nil), b.emergencyAll),
		path("emergency/rotate/(?P<kind>[^/]+)/?$", "kind", "Replace every secret of a kind at once, after a compromise.",
			fields(map[string]*framework.FieldSchema{"kind": kindField}), b.emergencyKind),
		path("emergency/rotate/(?P<kind>[^/]+)/"+namePattern, "role", "Replace one secret at once, after a compromise.",
			fields(map[string]*framework.FieldSchema{"kind": kindField, "name": nameField}), b.emergencyRole),
	}
}

func (b *backend) emergencyAll(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return b.emergencyOf(ctx, req, d, "")
}

func (b *backend) emergencyKind(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	k := d.Get("kind").(string)
	if b.offered(k) == nil {
		return nil, notFound("kind %.64q is not known; allowed are %s", k, b.kindNames())
	}
	return b.emergencyOf(ctx, req, d, k)
}

func (b *backend) emergencyOf(ctx context.Context, req *logical.Request, d *framework.FieldData, k string) (*logical.Response, error) {
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
	id, resp, err := b.emergency(ctx, req, d, names)
	if err != nil || resp != nil {
		return resp, err
	}
	return b.answerMany(ctx, req, id, forward)
}

func (b *backend) emergencyRole(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	id, resp, err := b.emergency(ctx, req, d, []string{r.Name})
	if err != nil || resp != nil {
		return resp, err
	}
	return b.answerOne(ctx, req, id, r.Name, rotation.Settled, forward)
}

// emergency begins one, and waits for what it came for; or answers a dry run.
func (b *backend) emergency(ctx context.Context, req *logical.Request, d *framework.FieldData, names []string) (id string, resp *logical.Response, err error) {
	asked := rotation.Request{
		Trigger: rotation.Urgent, Roles: names, RequestedBy: requester(req), Reason: strings.TrimSpace(d.Get("reason").(string)), Keys: requestKeys(req, d),
	}
	if h, err := b.engine.Repeated(ctx, asked); h != nil || err != nil {
		if err != nil {
			return "", nil, err
		}
		return h.ID, nil, b.refusedOrNot(ctx, h)
	}
	scene, err := b.engine.Scene(ctx, names)
	if err != nil {
		return "", nil, err
	}
	if asked.Emergency, err = b.reachOf(ctx, d, scene.Consumers); err != nil {
		return "", nil, err
	}
	if asked.Overrides, err = b.overrides(ctx, scene); err != nil {
		return "", nil, err
	}
	if d.Get("dry_run").(bool) {
		resp, err := b.radius(ctx, req, asked, scene)
		return "", resp, err
	}
	if asked.Reason == "" {
		return "", nil, badRequest("reason is empty: an emergency is recorded with what happened, for example reason=\"laptop stolen, ticket 4711\"")
	}
	h, err := b.engine.Begin(ctx, asked)
	if err != nil {
		return "", nil, err
	}
	b.Logger().Warn("an emergency rotation has begun", "rotation", h.ID, "roles", len(names), "requested_by", asked.RequestedBy.DisplayName, "reason", asked.Reason)
	return h.ID, nil, b.refusedOrNot(ctx, h)
}

// refusedOrNot waits until earlier versions are refused, as long as the request may.
func (b *backend) refusedOrNot(ctx context.Context, h *rotation.Header) error {
	wait, cancel := b.waiting(ctx)
	defer cancel()
	b.engine.WaitAll(wait, h, rotation.Settled)
	return nil
}

// reachOf reads what an emergency does at consumers. It reaches no further than the roles
// that its path names do.
func (b *backend) reachOf(ctx context.Context, d *framework.FieldData, names []string) (*rotation.Emergency, error) {
	out := &rotation.Emergency{}
	namespaces, hooks := unique(d.Get("restart_namespaces").([]string)), unique(d.Get("hooks").([]string))
	if len(namespaces) == 0 && len(hooks) == 0 {
		return out, nil
	}
	var known, knownHooks []string
	for _, name := range names {
		c, err := b.consumers.Get(ctx, name)
		if err != nil {
			return nil, err
		}
		if c == nil {
			continue
		}
		known = append(known, c.Namespace)
		for _, h := range c.Hooks {
			knownHooks = append(knownHooks, h.Name)
		}
	}
	for _, ns := range namespaces {
		if !slices.Contains(known, ns) {
			return nil, badRequest("restart_namespaces names %.80q; consumers of these roles are in %s", ns, orNone(unique(known)))
		}
	}
	out.Namespaces = namespaces
	if slices.Equal(hooks, []string{consumer.NoHooks}) {
		out.NoHooks = true
		return out, nil
	}
	for _, h := range hooks {
		if !slices.Contains(knownHooks, h) {
			return nil, badRequest("hooks names %.80q; consumers of these roles have %s, and none is for none of them", h, orNone(unique(knownHooks)))
		}
	}
	out.Hooks = hooks
	return out, nil
}

func unique(list []string) []string {
	list = slices.DeleteFunc(slices.Clone(list), func(s string) bool { return s == "" })
	slices.Sort(list)
	return slices.Compact(list)
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	if len(list) > maxLines {
		return strings.Join(list[:maxLines], ", ") + fmt.Sprintf(" and %d more", len(list)-maxLines)
	}
	return strings.Join(list, ", ")
}

// overrides says what an emergency sets aside.
func (b *backend) overrides(ctx context.Context, scene *rotation.Scene) ([]string, error) {
	out := []string{}
	c, err := b.engine.LoadConfig(ctx)
	if err != nil {
		return nil, err
	}
	if c.Frozen(time.Now()) {
		line := "the mount is frozen"
		if !c.FreezeUntil.IsZero() {
			line += " until " + formatTime(c.FreezeUntil)
		}
		if c.FreezeReason != "" {
			line += ": " + c.FreezeReason
		}
		out = append(out, line)
	}
	for i, t := range scene.Taken {
		if i == maxLines {
			out = append(out, fmt.Sprintf("and %s more", count(len(scene.Taken)-i, "rotation")))
			break
		}
		out = append(out, t)
	}
	return out, nil
}

// radius is a dry run: what an emergency would reach, and what it would meet.
func (b *backend) radius(ctx context.Context, req *logical.Request, asked rotation.Request, scene *rotation.Scene) (*logical.Response, error) {
	roles, consumers, err := b.engine.Foresee(ctx, scene, *asked.Emergency)
	if err != nil {
		return nil, err
	}
	data := map[string]any{
		"state": "dry_run", "overrides": asked.Overrides,
		"follow": fmt.Sprintf("vault write %s reason=…", req.MountPoint+strings.TrimPrefix(req.Path, req.MountPoint)),
	}
	byRole, nodes, held := map[string]any{}, map[string]bool{}, 0
	for i, f := range roles {
		part := rotation.Part{Role: f.Role.Name, Kind: f.Role.Kind}
		line := foreseen(f)
		problem := scene.Busy[f.Role.Name]
		if problem == "" && f.Err != nil {
			problem = f.Err.Error()
		}
		if problem != "" {
			held++
			line = "would not get far: " + problem
		}
		for _, n := range f.Nodes {
			nodes[n.Node] = true
		}
		if i < maxLines {
			data[part.Label()] = line
		}
		byRole[part.Key()] = map[string]any{
			"kind": f.Role.Kind, "plan": line, "error": problem, "notes": orEmpty(f.Notes), "versions": f.Ends,
			"shown": f.Role.ShownAt(), "consumers": orEmpty(f.Role.Consumers),
		}
	}
	byConsumer := map[string]any{}
	for i, name := range scene.Consumers {
		s := consumers[name]
		notes := s.Notes
		if s.Err != nil {
			notes = append(notes, s.Err.Error())
		}
		if i < maxLines {
			data["consumer "+name] = strings.Join(append(slices.Clone(s.Plan), prefixed("but ", notes)...), "; ")
		}
		byConsumer[name] = map[string]any{"plan": orEmpty(s.Plan), "notes": orEmpty(notes)}
	}
	data["roles"], data["consumers"] = byRole, byConsumer
	data["summary"] = fmt.Sprintf("%s at %s, and %s, would be reached; nothing was changed",
		count(len(roles), "secret"), count(len(nodes), "node"), count(len(scene.Consumers), "consumer"))
	if held > 0 {
		data["summary"] = fmt.Sprintf("%s; %d of the secrets would wait or fail", data["summary"], held)
	}
	return &logical.Response{Data: data}, nil
}

// foreseen is what an emergency would do to one secret, in a line.
func foreseen(f rotation.Foresight) string {
	if isKept(f.Role) {
		return planKept(f.Report)
	}
	line := fmt.Sprintf("would make version %d", f.Role.Set.Last+1)
	switch n := len(f.Nodes); {
	case len(f.Ends) == 0:
	case n > 0:
		line += fmt.Sprintf(", and have %s refuse %s", count(n, "node"), versions(f.Ends))
	default:
		line += ", and no longer show " + versions(f.Ends)
	}
	if at := f.Role.ShownAt(); at != "" {
		line += "; shown in " + at
	}
	if run := f.Role.Run; run != nil {
		line += "; would end rotation " + run.Rotation
	}
	return line
}

func versions(numbers []int) string {
	words := make([]string, len(numbers))
	for i, n := range numbers {
		words[i] = fmt.Sprint(n)
	}
	if len(words) == 1 {
		return "version " + words[0]
	}
	return "versions " + strings.Join(words, ", ")
}

func prefixed(with string, list []string) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = with + s
	}
	return out
}
