package harmonyflow

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
)

// What was seen at consumers, as rotations/<id> and verify/ show it: a line for
// people, named after the consumer, and the same for programs under consumers.

// describeDeliveries adds what is kept of a rotation's deliveries, and the conditions
// of success.
func (b *backend) describeDeliveries(ctx context.Context, h *rotation.Header, roles []*rotation.Evidence, only string, data map[string]any) error {
	st := b.engine.Store()
	proofs, more, err := st.Proofs(ctx, h.ID, only, maxLines, true)
	if err != nil {
		return err
	}
	all := proofs
	if more > 0 || only != "" {
		if all, _, err = st.Proofs(ctx, h.ID, "", maxProofs, false); err != nil {
			return err
		}
	}
	lines := []string{}
	for _, c := range append(rotation.Success(roles, all), rotation.Recorded(h)) {
		lines = append(lines, c.Line())
	}
	data["criteria"] = lines
	consumers := []any{}
	for _, p := range proofs {
		s := p.All()
		m := consumerMap(p.Consumer, s)
		m["direction"], m["outcome"] = p.Direction(), p.State()
		consumers = append(consumers, m)
		if _, told := data["consumer "+p.Consumer]; told && !p.Main() {
			continue // what pods run with is what people look for
		}
		data["consumer "+p.Consumer] = fmt.Sprintf("%s, %s: %s", p.Direction(), p.State(), consumerLine(s))
	}
	for _, name := range unreached(roles, all, only) {
		consumers = append(consumers, map[string]any{"consumer": name, "outcome": "not reached"})
	}
	data["consumers"] = consumers
	if more > 0 {
		data["more_consumers"] = int64(more)
	}
	return nil
}

// maxProofs is how many consumers the conditions of success are told by.
const maxProofs = 200

// unreached are consumers of the roles of which nothing is kept (yet).
func unreached(roles []*rotation.Evidence, proofs []*rotation.Proof, only string) []string {
	var out []string
	for _, ev := range roles {
		if ev == nil || ev.Account == nil || ev.Trigger == rotation.Create || ev.Trigger == rotation.Reconcile {
			continue
		}
		for _, c := range ev.Account.Consumers {
			seen := slices.ContainsFunc(proofs, func(p *rotation.Proof) bool { return p.Consumer == c })
			if !seen && (only == "" || only == c) && !slices.Contains(out, c) {
				out = append(out, c)
			}
		}
	}
	slices.Sort(out)
	return out[:min(len(out), maxLines)]
}

// describeConsumersNow adds how the consumers of a role stand, and lets what is wrong
// there count.
func describeConsumersNow(rep rotation.Report, mount string, data map[string]any) {
	consumers := []any{}
	notes, _ := data["notes"].([]string)
	wrong, follow := "", ""
	for _, c := range rep.Consumers {
		c.Seen.Fit(maxConsumerAnswer)
		m := consumerMap(c.Consumer, c.Seen)
		m["ok"] = c.Seen.Done
		consumers = append(consumers, m)
		line := consumerLine(c.Seen)
		if !c.Seen.Done {
			line = c.Seen.Error
			if wrong == "" {
				wrong = fmt.Sprintf("consumer %q: %s", c.Consumer, line)
				follow = fmt.Sprintf("vault read %sconsumers/%s", mount, c.Consumer)
			}
		}
		data["consumer "+c.Consumer] = line
		notes = append(notes, unknownPods(c)...)
	}
	data["consumers"], data["notes"] = consumers, orEmpty(notes)
	if wrong == "" {
		return
	}
	if data["ok"] == true { // what is wrong with the target comes first
		data["summary"], data["follow"] = wrong, follow
	}
	data["ok"] = false
}

// maxConsumerAnswer bounds what is shown of one consumer.
const maxConsumerAnswer = 128 << 10

func unknownPods(c rotation.ConsumerReport) []string {
	n := 0
	for _, w := range c.Seen.Workloads {
		if w.Unknown {
			n++
		}
	}
	switch {
	case n == 0:
		return nil
	case c.Seen.Mode == "none":
		return []string{fmt.Sprintf("consumer %q has mode=none: what its pods have read cannot be seen from outside", c.Consumer)}
	}
	return []string{fmt.Sprintf("consumer %q: whether the pods of %s run with what is served is not known: no rotation has brought it there; the next one will",
		c.Consumer, count(n, "workload"))}
}

// consumerLine is what was seen at a consumer, in short.
func consumerLine(s *seen.Consumer) string {
	var words []string
	if n := s.Counted.Externals; n > 0 {
		words = append(words, count(n, "ExternalSecret")+" synced")
	}
	if n := s.Counted.Values; n > 0 {
		good := s.More.Values
		for _, v := range s.Values {
			if v.Good() {
				good++
			}
		}
		words = append(words, fmt.Sprintf("%d of %s in the Secrets as served", good, count(n, "value")))
	}
	if n := s.Counted.Workloads; n > 0 {
		words = append(words, fmt.Sprintf("%d of %s complete", s.Counted.WellWorkloads, count(n, "workload")))
	}
	if n := s.Counted.Pods; n > 0 {
		words = append(words, fmt.Sprintf("%d of %s well", s.Counted.WellPods, count(n, "pod")))
	}
	passed, made := 0, 0
	for _, c := range s.Checks {
		if c.Ran {
			made++
		}
		if c.Passed {
			passed++
		}
	}
	if made > 0 {
		words = append(words, fmt.Sprintf("%d of %s passed", passed, count(made, "check")))
	}
	if n := len(s.Hooks); n > 0 {
		good := 0
		for _, h := range s.Hooks {
			if h.OK {
				good++
			}
		}
		words = append(words, fmt.Sprintf("%d of %s succeeded", good, count(n, "hook")))
	}
	if s.Error != "" && !s.Done {
		words = append(words, s.Error)
	}
	if len(words) == 0 {
		return "nothing to look at"
	}
	return strings.Join(words, ", ")
}

// consumerMap is all that was seen at a consumer.
func consumerMap(name string, s *seen.Consumer) map[string]any {
	m := map[string]any{
		"consumer": name, "connection": s.Connection, "namespace": s.Namespace, "mode": s.Mode, "at": formatTime(s.At), "error": s.Error,
		"secrets_changed_at": formatTime(s.Changed),
		"external_secrets":   each(s.Externals, externalMap), "secrets": each(s.Values, valueMap), "workloads": each(s.Workloads, workloadMap),
		"pods": each(s.Pods, podMap), "checks": each(s.Checks, checkMap), "timeline": eventsOf(s),
	}
	if len(s.Hooks) > 0 {
		m["hooks"] = each(s.Hooks, func(h seen.Hook) map[string]any {
			return map[string]any{"hook": h.Name, "target": h.Target, "called": int64(h.Called), "succeeded": h.OK, "result": h.Result, "at": formatTime(h.At)}
		})
	}
	if len(s.Stores) > 0 {
		m["stores"] = each(s.Stores, func(o seen.Store) map[string]any {
			return map[string]any{"kind": o.Kind, "name": o.Name, "ready": o.Ready, "problem": o.Problem}
		})
	}
	more := map[string]any{}
	for what, n := range map[string]int{"external_secrets": s.More.Externals, "secrets": s.More.Values, "workloads": s.More.Workloads, "pods": s.More.Pods} {
		if n > 0 {
			more[what] = int64(n)
		}
	}
	if len(more) > 0 {
		m["more"] = more
	}
	return m
}

func each[T any](of []T, show func(T) map[string]any) []any {
	out := make([]any, len(of))
	for i, v := range of {
		out[i] = show(v)
	}
	return out
}

func externalMap(e seen.External) map[string]any {
	return map[string]any{
		"name": e.Name, "cluster_external_secret": e.Parent, "secret": e.Target, "ready": e.Ready, "forced_at": formatTime(e.Forced),
		"refreshed_at": formatTime(e.Refreshed), "synced_version": e.Version, "refresh_interval": e.Interval, "problem": e.Problem,
	}
}

func valueMap(v seen.Value) map[string]any {
	return map[string]any{
		"role": v.Role, "field": v.Field, "secret": v.Secret, "keys": orEmpty(v.Keys), "matches": v.Good(), "no_longer_served": v.Old, "problem": v.Problem,
	}
}

func workloadMap(w seen.Workload) map[string]any {
	return map[string]any{
		"workload": w.Label(), "wave": int64(w.Wave), "restarted_at": formatTime(w.Restarted), "generation": w.Generation, "revision": w.Revision,
		"replicas": int64(w.Replicas), "new_pods": int64(w.New), "ready_pods": int64(w.Ready), "complete_at": formatTime(w.Complete), "problem": w.Problem,
	}
}

func podMap(p seen.Pod) map[string]any {
	return map[string]any{
		"pod": p.Name, "workload": p.Workload, "node": p.Node, "created_at": formatTime(p.Created), "ready_at": formatTime(p.Ready),
		"restarts": int64(p.Restarts), "image": p.Image, "new": p.New, "problem": p.Problem,
	}
}

func checkMap(c seen.Check) map[string]any {
	return map[string]any{
		"check": int64(c.Number), "type": c.Type, "target": c.Target, "made": c.Ran, "passed": c.Passed, "result": c.Result,
		"tries": int64(c.Tries), "in_row": int64(c.InRow), "times": int64(c.Times),
	}
}

// maxEvents bounds the timeline of a consumer, and of several roles.
const maxEvents = 500

type event struct {
	at   time.Time
	what string
}

// inOrder prints events in the order in which they happened, the last of them.
func inOrder(all []event) []string {
	slices.SortStableFunc(all, func(a, b event) int { return a.at.Compare(b.at) })
	if len(all) > maxEvents {
		all = all[len(all)-maxEvents:]
	}
	out := make([]string, len(all))
	for i, e := range all {
		out[i] = formatTime(e.at) + " " + e.what
	}
	return out
}

// timelineOf is that of several roles.
func timelineOf(roles []*rotation.Evidence) []string {
	var all []event
	for _, ev := range roles {
		if ev == nil {
			continue
		}
		for _, m := range ev.Timeline {
			all = append(all, event{m.At, ev.Label() + ": " + m.What})
		}
	}
	return inOrder(all)
}

// eventsOf is what was seen at a consumer. Kubernetes keeps seconds: within one, it is
// told in the order in which a delivery goes.
func eventsOf(s *seen.Consumer) []string {
	var all []event
	add := func(at time.Time, format string, args ...any) {
		if !at.IsZero() {
			all = append(all, event{at.Truncate(time.Second), fmt.Sprintf(format, args...)})
		}
	}
	addPod := func(p seen.Pod) {
		add(p.Created, "%s: pod %s was created", p.Workload, p.Name)
		add(p.Ready, "%s: pod %s became ready on %s", p.Workload, p.Name, cmp.Or(p.Node, "no node"))
		if p.Problem != "" {
			add(s.At, "%s: pod %s: %s", p.Workload, p.Name, p.Problem)
		}
	}
	pods := map[string][]seen.Pod{}
	for _, p := range s.Pods {
		pods[p.Workload] = append(pods[p.Workload], p)
	}
	for _, e := range s.Externals {
		add(e.Forced, "ExternalSecret %s: told to sync", e.Name)
		add(e.Refreshed, "ExternalSecret %s: synced", e.Name)
	}
	add(s.Changed, "the Secrets got other values")
	for _, v := range s.Values {
		if v.Held && !v.Old {
			add(s.Changed, "Secret %s: key %s was compared, and holds what role %s serves", v.Secret, strings.Join(v.Keys, ", "), v.Role)
		}
	}
	for _, w := range s.Workloads {
		add(w.Restarted, "%s: restarted", w.Label())
		for _, p := range pods[w.Label()] {
			addPod(p)
		}
		add(w.Complete, "%s: complete, %d of %d pods are new and ready", w.Label(), w.Ready, w.Replicas)
		delete(pods, w.Label())
	}
	for _, label := range slices.Sorted(maps.Keys(pods)) { // of workloads that are not kept
		for _, p := range pods[label] {
			addPod(p)
		}
	}
	for _, h := range s.Hooks {
		if h.Called > 0 {
			add(h.At, "hook %s (%s): %s", h.Name, h.Target, h.Result)
		}
	}
	for _, c := range s.Checks {
		if c.Ran {
			add(s.At, "check %d (%s, %s): %s", c.Number, c.Type, c.Target, c.Result)
		}
	}
	return inOrder(all)
}
