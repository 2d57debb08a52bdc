package consumer

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
)

// Emergencies. What pods run with is refused already, so that nothing is gained by care:
// all waves are restarted at once, and a workload that does not come up stops no other.
// Whoever calls gives up on it when its time is over. Hooks are called, and pods flagged,
// whatever else fails.

// SecurityAlert is the annotation of pods that an emergency flags; its value is the id of
// the rotation.
const SecurityAlert = "security-alert"

// hooksLate is after how long hooks are called though not every pod is well; where a
// rollout may take less than twice as long, half of that.
const hooksLate = time.Minute

// Bounds on hooks.
const (
	maxHooks     = 16
	hookPause    = 2 * time.Second // after a first failure; it doubles
	maxHookPause = 30 * time.Second
)

var hookRegexp = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)

// Hook is a request that an emergency sends: for example to a server that is to end all
// sessions. It is a check of type http that changes something.
type Hook struct {
	Name      string            `json:"name"`
	URL       string            `json:"url"`
	Method    string            `json:"method,omitempty"` // POST by default
	Headers   map[string]string `json:"headers,omitempty"`
	Body      string            `json:"body,omitempty"`
	BasicAuth string            `json:"basic_auth,omitempty"`
	CACert    string            `json:"ca_cert,omitempty"`
	Expect    string            `json:"expect,omitempty"`
}

// request is the hook as the check that it is sent like.
func (h *Hook) request() *Check {
	return &Check{
		Type: checkHTTP, URL: h.URL, Method: cmp.Or(h.Method, "POST"), Headers: maps.Clone(h.Headers), Body: h.Body,
		BasicAuth: h.BasicAuth, CACert: h.CACert, Expect: h.Expect,
	}
}

func (c *Consumer) validateHooks() error {
	if len(c.Hooks) > maxHooks {
		return fmt.Errorf("hooks has %d hooks; at most %d are allowed", len(c.Hooks), maxHooks)
	}
	known := map[string]bool{}
	for i := range c.Hooks {
		h := &c.Hooks[i]
		switch {
		case !hookRegexp.MatchString(h.Name):
			return fmt.Errorf("hook %d of hooks has name %.60q; use 1 to 40 of the characters a-z 0-9 -", i+1, h.Name)
		case h.Name == NoHooks:
			return fmt.Errorf("hook %d of hooks has name %q, which stands for no hook at all", i+1, h.Name)
		case known[h.Name]:
			return fmt.Errorf("hooks has two hooks with name %q; give each its own", h.Name)
		case h.URL == "":
			return fmt.Errorf("hook %q has no url; give where the request goes", h.Name)
		}
		known[h.Name] = true
		if err := h.request().validate(); err != nil {
			return fmt.Errorf("hook %q: %w", h.Name, err)
		}
	}
	return nil
}

// NoHooks stands for none of them where names of hooks are given.
const NoHooks = "none"

// called are the hooks of the consumer that an emergency calls.
func (e *Emergency) called(c *Consumer) (out []*Hook) {
	for i := range c.Hooks {
		if h := &c.Hooks[i]; e.Hooks == nil || slices.Contains(e.Hooks, h.Name) {
			out = append(out, h)
		}
	}
	return out
}

func (d *Delivery) urgent() bool { return d.Emergency != nil }

func (d *Delivery) whole() bool { return d.urgent() && d.Emergency.Whole }

// urgentMark tells the marks of emergencies from others: <rotation>-e<number>.
var urgentMark = regexp.MustCompile(`^(.+)-e(\d+)$`)

// rotationOf is the rotation that a delivery is one of.
func rotationOf(id string) string {
	if i := strings.LastIndexAny(id, "-~"); i > 0 {
		return id[:i]
	}
	return id
}

// awaits reports whether a restart that is under way, of mark theirs, is waited for by
// that of mark mine, and not begun anew. Of any two one waits for the other at most, or
// each for the other's rollout to be over, so that no two restart a workload in turn for
// ever: what is over and did not do is restarted once by each.
func awaits(mine, theirs string) bool {
	me, they := urgentMark.FindStringSubmatch(mine), urgentMark.FindStringSubmatch(theirs)
	switch {
	case me == nil: // what this one takes back may never end
		return !sameRotation(theirs, mine)
	case they == nil: // what others bring about in peace is no reason to wait
		return false
	case me[1] != they[1]:
		return true
	}
	return number(they[2]) > number(me[2])
}

func number(digits string) int {
	n, _ := strconv.Atoi(digits)
	return n
}

// tolerates keeps why one workload is bad, where that stops no other: it reports whether
// the step may go on. What mends is what may come to be well by itself.
func (s *step) tolerates(ctx context.Context, r ref, err error, mends bool) bool {
	if !s.d.urgent() || ctx.Err() != nil {
		return false
	}
	why := s.explain(err)
	if !kind.IsDefinite(why) && !apierrors.IsForbidden(err) && !apierrors.IsNotFound(err) {
		return false
	}
	if w := s.view.get(r); w != nil && unfit(w) != "" {
		mends = false
	}
	s.bad.mu.Lock()
	defer s.bad.mu.Unlock()
	s.saw(r, "", why)
	s.bad.of[r] = why.Error()
	s.bad.mends = s.bad.mends || mends
	return true
}

// spoilt are workloads of an emergency that are bad, and why they are.
type spoilt struct {
	mu    sync.Mutex
	of    map[ref]string
	mends bool // one of them may come to be well
}

// spoiled says which workloads are bad; "" where none is.
func (s *step) spoiled() string {
	var words []string
	for _, why := range s.bad.of {
		words = append(words, why)
	}
	slices.Sort(words)
	switch len(words) {
	case 0:
		return ""
	case 1:
		return words[0]
	}
	return fmt.Sprintf("%d workloads are not well, the first: %s", len(words), words[0])
}

// everyWorkload names all of the namespace that no wave has.
func (s *step) everyWorkload(ctx context.Context, known map[ref]bool) ([]ref, error) {
	var out []ref
	for _, of := range []string{deployment, statefulSet, daemonSet} {
		all, err := s.listWorkloads(ctx, of, "")
		if err != nil {
			return nil, err
		}
		for _, w := range all {
			if r := (ref{w.kind, w.name}); !known[r] {
				s.seen(w)
				known[r] = true
				out = append(out, r)
			}
		}
	}
	return out, nil
}

// checkUrgently is Check after a compromise: pods are flagged, hooks called and checks
// made, each whatever becomes of the others.
func (s *step) checkUrgently(ctx context.Context, pods []corev1.Pod, proven time.Time, left string, err error) Progress {
	var waits, failed []string
	note := func(what string, err error) {
		switch {
		case err == nil:
		case kind.IsDefinite(err):
			failed = append(failed, strings.TrimSpace(what+" "+err.Error()))
		default:
			waits = append(waits, strings.TrimSpace(what+" "+err.Error()))
		}
	}
	well := err == nil && left == "" && !s.bad.mends
	if err != nil {
		waits = append(waits, s.explain(err).Error())
	}
	if left != "" {
		waits = append(waits, left)
	}
	if why := s.spoiled(); why != "" { // it has had its time for the restart
		failed = append(failed, why)
	}
	note("", s.flag(ctx))
	for _, h := range s.d.Emergency.called(s.c) {
		note(fmt.Sprintf("hook %q:", h.Name), s.callHook(ctx, h, well))
	}
	if err == nil && left == "" {
		for i := range s.c.Checks {
			check := &s.c.Checks[i]
			err := s.check(ctx, check, pods, proven)
			if _, early := err.(notYet); !early { //nolint:errorlint // it is never wrapped
				s.sawCheck(i, err)
			}
			note(fmt.Sprintf("check %d (%s):", i+1, check.Type), err)
			if err == nil {
				s.tell("check %d (%s): passed", i+1, check.Type)
			}
		}
	}
	s.looked.hooks = s.seenHooks()
	switch {
	case len(waits) > 0:
		return s.waits("%s", strings.Join(append(waits, failed...), "; "))
	case len(failed) > 0:
		return s.failed(kind.Definitely("%s", strings.Join(failed, "; ")))
	}
	return s.done()
}

// flag marks the living pods of the consumer, or of its whole namespace, for those who
// watch them more closely. Where that is not permitted it is told, and nothing else.
func (s *step) flag(ctx context.Context) error {
	if s.memory.unflagged() != "" {
		return nil
	}
	all, err := s.listPods(ctx, s.c.Namespace, "")
	if err != nil {
		return err
	}
	ours := map[ref]bool{}
	for _, wave := range s.looked.waves {
		for _, r := range wave {
			ours[r] = true
		}
	}
	id := rotationOf(s.d.ID)
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{SecurityAlert: id}}})
	if err != nil {
		return err
	}
	flagged := 0
	for _, p := range living(all) {
		if p.Annotations[SecurityAlert] == id || !s.d.whole() && !ours[ownerOf(&p)] {
			continue
		}
		if flagged >= restartsPerLook {
			return unsure("more pods have still to be flagged")
		}
		_, err := s.core.Pods(p.Namespace).Patch(ctx, p.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: s.manager})
		switch {
		case apierrors.IsForbidden(err):
			why := "pods are not flagged: " + s.explain(err).Error()
			s.memory.notFlagged(why)
			s.tell("%s", why)
			return nil
		case apierrors.IsNotFound(err): // it is gone by now
		case err != nil:
			return s.explain(err)
		default:
			flagged++
		}
	}
	if flagged > 0 {
		s.tell("%d pods flagged (%s)", flagged, SecurityAlert)
	}
	return nil
}

// hookState is what became of a hook.
type hookState struct {
	calls  int
	done   bool
	next   time.Time
	at     time.Time
	result string
}

// callHook calls a hook until it has succeeded once, which this process remembers: after
// a crash it may be called again, with the same Idempotency-Key.
func (s *step) callHook(ctx context.Context, h *Hook, well bool) error {
	state, late := s.memory.hook(h.Name), s.late()
	switch {
	case state.done:
		return nil
	case !well && s.now.Before(late):
		return unsure("it is called when all pods are well, or at %s", late.UTC().Format(time.TimeOnly))
	case s.now.Before(state.next):
		return unsure("%s; it is called again", state.result)
	}
	request := h.request()
	if request.Headers == nil {
		request.Headers = map[string]string{}
	}
	request.Headers["Idempotency-Key"] = s.d.ID + "/" + h.Name
	err := s.checkURL(ctx, request)
	state.calls++
	state.at = s.now
	var found bad
	if errors.As(err, &found) {
		err = unsure("%w", found.error)
	}
	if state.done = err == nil; state.done {
		state.result = s.result
		s.tell("hook %s: %s", h.Name, s.result)
	} else {
		state.result = err.Error()
		state.next = s.now.Add(min(maxHookPause, hookPause<<min(state.calls-1, 6)))
	}
	s.memory.setHook(h.Name, state)
	return err
}

// late is when hooks are called though not every pod is well.
func (s *step) late() time.Time { return s.d.Since.Add(min(hooksLate, s.c.RolloutTimeout/2)) }

// lateHooks calls hooks whose time has come while workloads are still restarted.
func (s *step) lateHooks(ctx context.Context) {
	if s.now.Before(s.late()) {
		return
	}
	for _, h := range s.d.Emergency.called(s.c) {
		_ = s.callHook(ctx, h, false) // it is called again until check knows that it has succeeded
	}
	s.looked.hooks = s.seenHooks()
}

func (s *step) seenHooks() []seen.Hook {
	var out []seen.Hook
	for _, h := range s.d.Emergency.called(s.c) {
		state := s.memory.hook(h.Name)
		out = append(out, seen.Hook{
			Name: h.Name, Target: short(cmp.Or(h.Method, "POST") + " " + h.URL), Called: state.calls, OK: state.done, Result: short(state.result), At: state.at,
		})
	}
	return out
}

// Radius says what an emergency would do at a consumer. Nothing stops it, so that what
// stands against it is a note.
func (k *clusters) Radius(ctx context.Context, c *Consumer, e Emergency) Finding {
	s, err := k.step(ctx, c, Delivery{ID: "radius-e0", Since: k.Now(), Emergency: &e})
	if err != nil {
		return Finding{Err: err}
	}
	defer s.close()
	s.memory = &memory{known: map[ref]known{}}
	f, g := Finding{}, Finding{}
	missing, err := s.missing(ctx, append(s.rights(), s.urgentRights()...))
	if err != nil {
		return s.found(Finding{Err: s.explain(err)})
	}
	s.lacking(&f, missing)
	for _, look := range []func(context.Context, *Finding) error{s.lintExternals, s.lintSecrets, s.radiusOfWorkloads, s.radiusOfHooks} {
		if err := look(ctx, &f); err != nil && !s.lacks {
			f = finding(f, s.explain(err))
		}
	}
	g.Err, g.Plan, g.Notes = f.Err, f.Plan, slices.Concat(f.Problems, f.Notes)
	return s.found(g)
}

// urgentRights are those that only an emergency needs.
func (s *step) urgentRights() []right {
	ns := s.c.Namespace
	out := []right{{namespace: ns, resource: "pods", verb: "patch"}, {namespace: ns, resource: "pods", verb: "list"}}
	if s.d.whole() {
		for _, of := range []string{deployment, statefulSet, daemonSet} {
			for _, verb := range []string{"list", "patch"} {
				out = append(out, right{namespace: ns, group: "apps", resource: resources[of], verb: verb})
			}
		}
	}
	return out
}

// maxNamed is how many workloads a plan names.
const maxNamed = 20

func (s *step) radiusOfWorkloads(ctx context.Context, f *Finding) error {
	waves, err := s.waves(ctx)
	if err != nil {
		return err
	}
	all := slices.Concat(waves...)
	s.view.left = len(all)
	if err := s.read(ctx, all); err != nil {
		return err
	}
	var names []string
	pods := 0
	for _, r := range all {
		w := s.view.get(r)
		if w == nil {
			f.note("%s", s.bad.of[r])
			continue
		}
		names = append(names, w.String())
		pods += int(w.want)
		if why := unfit(w); why != "" && s.c.Mode == Restart {
			f.note("%s %s", w, why)
		}
	}
	if n := len(names); n > 0 {
		shown := strings.Join(names[:min(n, maxNamed)], ", ")
		if n > maxNamed {
			shown += fmt.Sprintf(" and %d more", n-maxNamed)
		}
		what := map[Mode]string{Restart: "restart at once", Observe: "wait until somebody else has restarted", None: "restart nothing of"}[s.c.Mode]
		f.plan("%s %s (%d workloads)", what, shown, n)
		f.plan("flag %d pods with the annotation %s", pods, SecurityAlert)
	}
	return nil
}

func (s *step) radiusOfHooks(ctx context.Context, f *Finding) error {
	for _, h := range s.d.Emergency.called(s.c) {
		f.plan("call hook %s: %s %s", h.Name, cmp.Or(h.Method, "POST"), hostname(h.URL))
		if !s.k.MayCall(hostname(h.URL)) {
			f.note("hook %q sends a request to %q, which is none of the hosts that may be called; add it to allowed_hosts of config", h.Name, hostname(h.URL))
		}
		if _, err := h.request().permitted(ctx, s.c.Name, s.k.Sources); kind.IsDefinite(err) {
			f.note("hook %q: %v", h.Name, err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// urgentMemory is what a process remembers of an emergency's delivery.
type urgentMemory struct {
	mu      sync.Mutex
	hooks   map[string]hookState
	noFlags string
	begun   map[ref]bool // workloads that it has restarted
}

func (m *memory) restarted(r ref) {
	m.urgent.mu.Lock()
	defer m.urgent.mu.Unlock()
	if m.urgent.begun == nil {
		m.urgent.begun = map[ref]bool{}
	}
	m.urgent.begun[r] = true
}

func (m *memory) wasRestarted(r ref) bool {
	m.urgent.mu.Lock()
	defer m.urgent.mu.Unlock()
	return m.urgent.begun[r]
}

func (m *memory) hook(name string) hookState {
	m.urgent.mu.Lock()
	defer m.urgent.mu.Unlock()
	return m.urgent.hooks[name]
}

func (m *memory) setHook(name string, s hookState) {
	m.urgent.mu.Lock()
	defer m.urgent.mu.Unlock()
	if m.urgent.hooks == nil {
		m.urgent.hooks = map[string]hookState{}
	}
	m.urgent.hooks[name] = s
}

func (m *memory) unflagged() string {
	m.urgent.mu.Lock()
	defer m.urgent.mu.Unlock()
	return m.urgent.noFlags
}

func (m *memory) notFlagged(why string) {
	m.urgent.mu.Lock()
	defer m.urgent.mu.Unlock()
	m.urgent.noFlags = why
}
