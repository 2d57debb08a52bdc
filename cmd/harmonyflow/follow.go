package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// patience is how long Vault may be away while a rotation is followed: long enough
// for another node to take over.
const patience = 2 * time.Minute

// begin starts a rotation, and follows it if asked to.
func (p *program) begin(ctx context.Context, path string) int {
	data := map[string]any{}
	for field, value := range map[string]string{"reason": p.o.reason, "idempotency_key": p.o.key} {
		if value != "" {
			data[field] = value
		}
	}
	for field, list := range map[string][]string{"restart_namespaces": p.o.namespaces, "hooks": p.o.hooks} {
		if len(list) > 0 {
			data[field] = list
		}
	}
	if p.o.dryRun {
		data["dry_run"] = true
	}
	secret, err := p.client.Logical().WriteWithContext(ctx, p.o.mount+"/"+path, data)
	if err != nil {
		return p.fail(err)
	}
	if p.clean(secret) == nil {
		return p.fail(errors.New("Vault answered nothing; is the engine mounted at " + p.o.mount + "/? Give --mount"))
	}
	if p.o.dryRun {
		p.print(secret.Data)
		return exitDone
	}
	id, _ := secret.Data["rotation_id"].(string)
	if !p.o.follow {
		p.print(secret.Data)
		return p.outcome(stateOf(secret.Data))
	}
	return p.follow(ctx, id)
}

// print shows an answer, a line a field.
func (p *program) print(data map[string]any) {
	if p.o.format == "json" {
		p.line(data)
		return
	}
	for _, key := range slices.Sorted(maps.Keys(data)) {
		switch v := data[key].(type) {
		case []any:
			for _, line := range v {
				fmt.Fprintf(p.out, "%-16s %v\n", key, line)
			}
		case map[string]any, nil:
		default:
			fmt.Fprintf(p.out, "%-16s %v\n", key, v)
		}
	}
}

// line is one object of JSON.
func (p *program) line(v any) {
	raw, err := json.Marshal(v)
	if err == nil {
		fmt.Fprintf(p.out, "%s\n", raw)
	}
}

func stateOf(data map[string]any) rotation.State {
	s, _ := data["state"].(string)
	return rotation.State(s)
}

// outcome is the exit status of a state.
func outcome(s rotation.State) int {
	switch s {
	case rotation.Failed, rotation.RolledBack, rotation.RollbackFailed, rotation.Cancelled, rotation.Partial, rotation.Superseded, rotation.RollingBack:
		return exitFailed
	case rotation.Held:
		return exitHeld
	default:
		return exitDone
	}
}

// outcome is the exit status of a state, for what was asked for.
func (p *program) outcome(s rotation.State) int {
	if p.back && (s == rotation.RolledBack || s == rotation.RollingBack) {
		return exitDone
	}
	return outcome(s)
}

// follow shows a rotation until it has come as far as asked.
func (p *program) follow(ctx context.Context, id string) int {
	v := &view{p: p, seen: map[string]bool{}}
	away := time.Time{}
	for {
		data, err := p.read(ctx, "rotations/"+id)
		var answer *api.ResponseError
		refused := errors.As(err, &answer) && answer.StatusCode < http.StatusInternalServerError && answer.StatusCode != http.StatusTooManyRequests
		switch {
		case ctx.Err() != nil:
			v.end()
			fmt.Fprintf(p.err, "The rotation goes on. Follow it again: harmonyflow follow %s\n", id)
			return exitInterrupted
		case refused:
			v.end()
			return p.fail(err)
		case err != nil && away.IsZero():
			away = time.Now()
			v.note("Vault does not answer; still trying. The rotation goes on by itself.")
		case err != nil && time.Since(away) > patience:
			v.end()
			return p.fail(err)
		case err == nil:
			away = time.Time{}
			v.show(data)
			if s := stateOf(data); p.far(s) {
				v.end()
				p.conclude(id, data)
				return p.outcome(s)
			}
		}
		select {
		case <-time.After(p.o.every):
		case <-ctx.Done():
		}
	}
}

// far reports whether there is nothing more to follow.
func (p *program) far(s rotation.State) bool {
	return s.Ended() || s == rotation.Held || s == rotation.InGrace && p.o.until == "grace"
}

func (p *program) conclude(id string, data map[string]any) {
	if p.o.format == "json" {
		return
	}
	fmt.Fprintln(p.out, data["summary"])
	if refused, ok := data["earlier_versions_refused"].(string); ok {
		fmt.Fprintln(p.out, "earlier versions refused: "+refused)
	}
	for _, c := range lines(data["criteria"]) {
		fmt.Fprintln(p.out, "  "+c)
	}
	switch stateOf(data) {
	case rotation.InGrace:
		role := "KIND/ROLE"
		if list, _ := parts(data); len(list) == 1 {
			role = list[0].name
		}
		fmt.Fprintf(p.out, "The previous version is accepted until %v. To go back: harmonyflow rollback %s. To end it now: vault write -f %s/retire/%s\n", data["grace_until"], role, p.o.mount, role)
	case rotation.Held:
		fmt.Fprintf(p.out, "Somebody has to decide: vault write -f %s/resume/%s, or vault write -f %s/cancel/%s\n", p.o.mount, id, p.o.mount, id)
	default:
	}
}

func lines(v any) (out []string) {
	list, _ := v.([]any)
	for _, line := range list {
		if text, ok := line.(string); ok {
			out = append(out, text)
		}
	}
	return out
}

// read reads a path of the engine; one that is not there is an error that says so.
func (p *program) read(ctx context.Context, path string) (map[string]any, error) {
	secret, err := p.client.Logical().ReadWithContext(ctx, p.o.mount+"/"+path)
	switch {
	case err != nil:
		return nil, err
	case secret == nil:
		return nil, &api.ResponseError{StatusCode: http.StatusNotFound, Errors: []string{
			fmt.Sprintf("there is no %s/%s; is the engine mounted there? Give --mount", p.o.mount, path),
		}}
	}
	return p.clean(secret).Data, nil
}

// view shows a rotation as it moves: redrawn on a terminal, else a line for each thing
// that is new.
type view struct {
	p    *program
	seen map[string]bool
	last string
}

func (v *view) show(data map[string]any) {
	switch {
	case v.p.o.format == "json":
		raw, _ := json.Marshal(data)
		if text := string(raw); text != v.last {
			v.last = text
			fmt.Fprintln(v.p.out, text)
		}
	case v.p.screen != nil:
		v.p.screen.draw(append(progress(data), tail(lines(data["timeline"]), 5)...))
	default:
		for _, line := range append(plain(data), lines(data["timeline"])...) {
			if !v.seen[line] {
				v.seen[line] = true
				fmt.Fprintln(v.p.out, line)
			}
		}
	}
}

func (v *view) note(text string) {
	if v.p.screen != nil {
		v.p.screen.add(text)
		return
	}
	fmt.Fprintln(v.p.err, text)
}

func (v *view) end() {
	if v.p.screen != nil {
		v.p.screen.done()
	}
}

func tail(list []string, n int) []string { return list[max(0, len(list)-n):] }

// part is one role's part in a rotation.
type part struct{ name, state, phase, problem, version string }

// stands says where it is, in words.
func (p part) stands() string {
	s := p.state
	switch state := rotation.State(p.state); {
	case state == rotation.InGrace:
		s = "version " + p.version + " is served (grace)"
	case state == rotation.Completed:
		s = "version " + p.version + ", completed"
	case p.phase != "" && !state.Ended():
		s += " (" + p.phase + ")"
	}
	if p.problem != "" {
		s += ": " + p.problem
	}
	return s
}

// maxParts is how many roles are shown.
const maxParts = 20

func parts(data map[string]any) (out []part, more int) {
	roles, _ := data["roles"].(map[string]any)
	for _, name := range slices.Sorted(maps.Keys(roles)) {
		r, _ := roles[name].(map[string]any)
		text := func(field string) string { s, _ := r[field].(string); return s }
		label := name
		if kind := text("kind"); kind != "" && !strings.Contains(name, "/") {
			label = kind + "/" + name
		}
		out = append(out, part{name: label, state: text("state"), phase: text("phase"), problem: text("error"), version: fmt.Sprint(r["version"])})
	}
	if len(out) > maxParts {
		more = len(out) - maxParts
		slices.SortStableFunc(out, func(a, b part) int { return rank(b) - rank(a) })
		out = out[:maxParts]
	}
	return out, more
}

// rank is higher for what is worth a look.
func rank(p part) int {
	switch {
	case p.problem != "":
		return 2
	case !rotation.State(p.state).Ended():
		return 1
	}
	return 0
}

// plain are lines without a picture.
func plain(data map[string]any) (out []string) {
	list, _ := parts(data)
	for _, p := range list {
		out = append(out, p.name+": "+p.stands())
	}
	return out
}

// progress is a bar for each role.
func progress(data map[string]any) []string {
	out := []string{fmt.Sprintf("rotation %v  %v", data["rotation_id"], data["state"])}
	list, more := parts(data)
	width := 0
	for _, p := range list {
		width = max(width, len(p.name))
	}
	for _, p := range list {
		out = append(out, fmt.Sprintf("  %-*s %s %s", width, p.name, bar(p), p.stands()))
	}
	if more > 0 {
		out = append(out, fmt.Sprintf("  and %d more", more))
	}
	return out
}

// bar is how far a role has come.
func bar(p part) string {
	n := len(rotation.Phases)
	at := slices.Index(rotation.Phases, rotation.Phase(p.phase))
	if p.state == string(rotation.Completed) {
		at = n
	}
	full, empty := "█", "░"
	if outcome(rotation.State(p.state)) == exitFailed {
		full = "▒"
	}
	at = max(at, 0)
	return strings.Repeat(full, at) + strings.Repeat(empty, n-at)
}
