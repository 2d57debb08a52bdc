package harmonyflow

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

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
	case h.Restores && p.State == rotation.Failed:
		return nil, conflict("role %q was not restored: %s", role, p.Error)
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
	default:
		return false
	}
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
		switch {
		case failed(p, wanted):
			if failures++; failures <= maxLines {
				resp.AddWarning(p.Line())
			}
		case p.State == rotation.Partial && len(resp.Warnings) < maxLines:
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
			name := p.Label()
			data[name] = strings.TrimPrefix(p.Line(), name+": ")
		}
		roles[p.Key()] = partMap(p)
	}
	data["roles"] = roles
	if len(h.Running) > 0 {
		data["already_running"] = h.Running
	}
	if h.Trigger == rotation.Urgent {
		describeEmergency(h, parts, data)
	}
	return &logical.Response{Data: data}
}

// describeEmergency adds what people ask about one: since when nothing earlier is
// accepted, and what was set aside for it.
func describeEmergency(h *rotation.Header, parts []rotation.Part, data map[string]any) {
	data["overrides"] = orEmpty(h.Overrides)
	var last time.Time
	refused := 0
	for _, p := range parts {
		if !p.Refused.IsZero() {
			refused++
		}
		if p.Refused.After(last) {
			last = p.Refused
		}
	}
	line := fmt.Sprintf("%d of %s", refused, count(len(parts), "secret"))
	if refused > 0 {
		line += fmt.Sprintf(", the last %s after it began", last.Sub(h.Started).Round(time.Millisecond))
	}
	data["earlier_versions_refused"] = line
}

func partMap(p rotation.Part) map[string]any {
	data := map[string]any{
		"kind": p.Kind, "version": int64(p.Version), "state": string(p.State), "phase": string(p.Phase), "error": p.Error,
	}
	setKnown(data, "previous_sessions", p.Clients)
	setKnown(data, "earlier_refused_at", formatTime(p.Refused))
	return data
}

// summary counts parts by what a person wants to know of them.
func summary(parts []rotation.Part) string {
	tally := map[string]int{}
	for _, p := range parts {
		word := string(p.State)
		switch {
		case p.Served():
			word = "promoted"
		case p.State == "":
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
