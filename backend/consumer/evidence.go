package consumer

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
)

// What a step has looked at becomes evidence: what it saw of each object, and when
// that happened by the cluster's own clock. Nothing more is asked for it.

// looked is what a step has read.
type looked struct {
	externals []*external
	secrets   []*secret
	checks    []seen.Check
	hooks     []seen.Hook
	// waves are the workloads of the consumer, problems what is wrong with them, and
	// changed when their Secrets were.
	waves    [][]ref
	problems map[ref]string
	changed  time.Time
}

// saw notes what is wrong with a workload that was looked at; "" where nothing is.
func (s *step) saw(r ref, left string, err error) {
	if err != nil {
		left = err.Error()
	}
	if s.looked.problems == nil {
		s.looked.problems = map[ref]string{}
	}
	s.looked.problems[r] = left
}

// evidence is what the step has seen, and whether it was all it looked for.
func (s *step) evidence(done bool, why string) *seen.Consumer {
	out := s.evidenceOf(done, why)
	for _, e := range s.looked.externals {
		out.Externals = append(out.Externals, s.seenExternal(e))
	}
	out.Values, out.Changed = seenValues(s.looked.secrets, s.d), lastChange(s.looked.secrets)
	s.addWorkloads(out)
	out.Checks, out.Hooks = s.looked.checks, s.looked.hooks
	out.Count()
	out.Map(s.clean)
	return out
}

// addWorkloads adds the workloads that this look has looked at, with the pods that it
// has listed.
func (s *step) addWorkloads(out *seen.Consumer) {
	is := s.proofOf(s.looked.changed)
	for i, wave := range s.looked.waves {
		for _, r := range wave {
			problem, looked := s.looked.problems[r]
			k, ok := s.memory.get(r)
			if !ok || !looked {
				continue
			}
			one, pods := seenWorkload(k.w, s.podsListed(r, k.w), is.isNew, s.now)
			one.Wave, one.Problem = i+1, short(problem)
			out.Workloads, out.Pods = append(out.Workloads, one), append(out.Pods, pods...)
		}
	}
}

func (s *step) evidenceOf(done bool, why string) *seen.Consumer {
	return &seen.Consumer{
		Connection: s.cluster.name, Namespace: s.c.Namespace, Mode: string(s.c.Mode), At: s.now.UTC(), Done: done, Error: short(why),
	}
}

// proofOf tells pods of this delivery, and those from after its change.
func (s *step) proofOf(changed time.Time) proof {
	if s.c.Mode == Restart {
		return proof{mark: s.d.ID, since: surely(changed), now: s.now}
	}
	return proof{since: changed.Truncate(time.Second), now: s.now}
}

// maxSeen bounds a text of evidence.
const maxSeen = 200

func short(text string) string {
	if runes := []rune(text); len(runes) > maxSeen {
		return string(runes[:maxSeen]) + "…"
	}
	return text
}

func (s *step) seenExternal(e *external) seen.External {
	out := seen.External{
		Name: e.name(), Target: e.target(), Ready: e.condition("Ready") == "True", Refreshed: e.refreshed().UTC(),
		Version: short(e.text("status", "syncedResourceVersion")), Interval: short(e.text("spec", "refreshInterval")), Problem: e.failure(),
	}
	object := e.object
	if e.parent != nil {
		out.Parent, object = e.parent.GetName(), e.parent
	}
	if !e.forced(s.d.ID) {
		return out
	}
	for _, f := range object.GetManagedFields() {
		if f.Manager == s.manager && f.Time != nil && f.FieldsV1 != nil && strings.Contains(f.FieldsV1.GetRawString(), `"f:`+e.forceKey()+`"`) {
			out.Forced = f.Time.UTC()
		}
	}
	return out
}

// seenValues says in which keys of which Secrets the values of a delivery stand. It
// finds them as compare does.
func seenValues(secrets []*secret, d Delivery) []seen.Value {
	if len(secrets) == 0 {
		return nil
	}
	var out []seen.Value
	for _, v := range d.Holds {
		if v.Secret != "" {
			out = append(out, seenValue(secrets, v))
		}
	}
	for _, v := range d.Lacks {
		if one := whichShows(secrets, v.Secret, d.Holds); one != nil {
			out = append(out, seen.Value{Role: v.Role, Secret: one.name, Held: true, Old: true})
		} else if v.Secret != "" {
			out = append(out, seen.Value{Role: v.Role, Old: true})
		}
	}
	return out
}

func seenValue(secrets []*secret, v Value) seen.Value {
	out := seen.Value{Role: v.Role, Field: v.Field}
	for _, one := range secrets {
		for key, held := range one.data {
			if same(held, v.Secret) || one.loose && contains(held, v.Secret) {
				out.Keys = append(out.Keys, key)
			}
		}
		if len(out.Keys) > 0 {
			slices.Sort(out.Keys)
			out.Secret, out.Held = one.name, true
			return out
		}
	}
	for _, one := range secrets { // where it should stand, if a key has its name
		if _, ok := one.data[v.Field]; ok && v.Field != "" {
			out.Secret = one.name
			out.Problem = fmt.Sprintf("key %s of Secret %s holds something else than what role %s serves", v.Field, one.name, v.Role)
			return out
		}
	}
	names := make([]string, len(secrets))
	for i, one := range secrets {
		names[i] = one.name
	}
	out.Problem = short(fmt.Sprintf("no key of Secret %s holds what role %s serves", strings.Join(names, ", "), v.Role))
	return out
}

func lastChange(secrets []*secret) time.Time {
	at := time.Time{}
	for _, one := range secrets {
		if one.changed.After(at) {
			at = one.changed.UTC()
		}
	}
	return at
}

// seenWorkload says how far a workload is, by its pods. isNew tells those that run
// with what is served.
func seenWorkload(w *workload, pods []corev1.Pod, isNew func(*corev1.Pod) bool, now time.Time) (seen.Workload, []seen.Pod) {
	out := seen.Workload{Kind: w.kind, Name: w.name, Generation: w.meta.Generation, Revision: w.revision, Replicas: int(w.want)}
	if at, err := time.Parse(time.RFC3339Nano, w.template.Annotations[restartedAt]); err == nil {
		out.Restarted = at.UTC()
	}
	var all []seen.Pod
	for i := range pods {
		p := &pods[i]
		if ended(p) {
			continue
		}
		one := seenPod(w, p, isNew(p), now)
		all = append(all, one)
		if !one.New || terminating(p) {
			continue
		}
		out.New++
		if is, at := ready(p); is {
			out.Ready++
			if at.After(out.Complete) {
				out.Complete = at.UTC()
			}
		}
	}
	if out.Ready < out.Replicas || w.left != "" {
		out.Complete = time.Time{}
	}
	return out, all
}

func seenPod(w *workload, p *corev1.Pod, isNew bool, now time.Time) seen.Pod {
	out := seen.Pod{Workload: w.kind + "/" + w.name, Name: p.Name, Node: p.Spec.NodeName, Created: p.CreationTimestamp.UTC(), New: isNew}
	for _, c := range p.Status.ContainerStatuses {
		out.Restarts += int(c.RestartCount)
		if out.Image == "" {
			out.Image = imageOf(c.ImageID)
		}
	}
	is, at := ready(p)
	if is {
		out.Ready = at.UTC()
	}
	switch why := containerWaits(p, now); {
	case terminating(p):
		out.Problem = "terminates"
	case why != "":
		out.Problem = short(why)
	case !is:
		out.Problem = "is not ready"
	case !isNew:
		out.Problem = "is from before the change"
	}
	return out
}

// containerWaits is what a container of a pod waits for, and what became of it before.
func containerWaits(p *corev1.Pod, now time.Time) string {
	if why := broken(p, now); why != "" {
		return why
	}
	for _, all := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for _, c := range all {
			if w := c.State.Waiting; w != nil {
				return fmt.Sprintf("container %s waits: %s%s", c.Name, word(w.Reason), ending(c))
			}
		}
	}
	return ""
}

// digestRegexp is how the digest of an image begins.
var digestRegexp = regexp.MustCompile(`^sha256:[0-9a-f]{12}`)

// imageOf is the beginning of the digest of an image, which tells images apart.
func imageOf(id string) string {
	if i := strings.LastIndex(id, "@"); i >= 0 {
		id = id[i+1:]
	}
	if !digestRegexp.MatchString(id) {
		return ""
	}
	return id[:len("sha256:")+12]
}

// seenChecks are the checks of a consumer, none of which has been made.
func (s *step) seenChecks() []seen.Check {
	out := make([]seen.Check, len(s.c.Checks))
	for i := range s.c.Checks {
		c := &s.c.Checks[i]
		out[i] = seen.Check{Number: i + 1, Type: c.Type, Target: c.target(), Times: max(c.Times, 1)}
	}
	return out
}

// target is whom a check asks: a host, a Service, or labels of pods.
func (c *Check) target() string {
	switch {
	case c.Service != "":
		return "Service " + c.Service
	case c.URL != "":
		return hostOf(c.URL)
	case c.Selector != "":
		return "pods with " + short(c.Selector)
	}
	return "pods of the workloads"
}

// sawCheck notes what became of check i.
func (s *step) sawCheck(i int, err error) {
	one := &s.looked.checks[i]
	one.Ran, one.Passed, one.Tries, one.InRow, one.Result = true, err == nil, s.tries, s.inRow, short(s.result)
	if err != nil {
		one.Result = short(err.Error())
	}
}
