package consumer

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
)

// looking is a look at a consumer that is under way. Its parts fill it at once.
type looking struct {
	*step
	mu  sync.Mutex
	out *seen.Consumer
	// why are the reasons why parts of it are missing, and why it is not as it should, by
	// what they are about.
	why [inChecks + 1][]string
}

// What a reason is about, in the order in which they are told.
const (
	inSecrets = iota
	inPods
	inChecks
)

// maxReasons is how many reasons a look tells.
const maxReasons = 5

// Look implements Clusters. Its parts are made at once, and each that cannot be says
// why: what the others saw is told all the same.
func (k *clusters) Look(ctx context.Context, c *Consumer, d Delivery) *seen.Consumer {
	s, err := k.step(ctx, c, d)
	if err != nil {
		return &seen.Consumer{Connection: c.Connection, Namespace: c.Namespace, Mode: string(c.Mode), At: k.Now().UTC(), Error: short(err.Error())}
	}
	defer s.close()
	l := &looking{step: s, out: s.evidenceOf(false, "")}
	l.out.Checks = s.seenChecks()
	if d.Sure {
		l.lookAtSecrets(ctx)
		if !l.out.Changed.IsZero() { // by the clock of the API server, in seconds: in doubt they are of before
			l.d.Since = l.out.Changed.Truncate(time.Second).Add(time.Second)
		}
		l.lookAtWorkloads(ctx)
	} else {
		g := errgroup.Group{}
		g.Go(func() error { l.lookAtSecrets(ctx); return nil })
		g.Go(func() error {
			pods := l.lookAtWorkloads(ctx)
			l.lookAtChecks(ctx, pods)
			return nil
		})
		_ = g.Wait()
	}
	l.out.Count()
	why := slices.Concat(l.why[:]...)
	if n := len(why); n > maxReasons {
		why = append(why[:maxReasons], fmt.Sprintf("and %d more", n-maxReasons))
	}
	l.out.Done, l.out.Error = len(why) == 0, strings.Join(why, "; ")
	l.out.Map(s.clean)
	return l.out
}

// wrong notes what is not as it should, once.
func (l *looking) wrong(about int, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if text := fmt.Sprintf(format, args...); !slices.Contains(l.why[about], text) {
		l.why[about] = append(l.why[about], text)
	}
}

func (l *looking) lookAtSecrets(ctx context.Context) {
	externals, err := l.externals(ctx)
	if err != nil {
		l.wrong(inSecrets, "%v", l.explain(err))
		return
	}
	if !l.d.Sure {
		l.lookAtStores(ctx, externals)
	}
	for _, e := range externals {
		one := l.seenExternal(e)
		switch deaf := e.deaf(l.now); {
		case one.Problem != "":
		case len(deaf) > 0:
			one.Problem = short(fmt.Sprintf("ExternalSecret %s %s", e.name(), deaf[0]))
		case !one.Ready:
			one.Problem = fmt.Sprintf("ExternalSecret %s has not been synced yet; look at its status", e.name())
		}
		if one.Problem != "" && !l.d.Sure {
			l.wrong(inSecrets, "%s", one.Problem)
		}
		l.mu.Lock()
		l.out.Externals = append(l.out.Externals, one)
		l.mu.Unlock()
	}
	secrets, err := l.secrets(ctx, externals)
	if err != nil {
		l.wrong(inSecrets, "%v", l.explain(err))
		return
	}
	values := seenValues(secrets, l.d)
	for _, v := range values {
		if !v.Good() {
			l.wrong(inSecrets, "%s", cmp.Or(v.Problem, fmt.Sprintf("Secret %s still holds what role %s no longer serves", v.Secret, v.Role)))
		}
	}
	for _, one := range secrets {
		if one.missing {
			l.wrong(inSecrets, "Secret %s is not there; look at the status of its ExternalSecret", one)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out.Values, l.out.Changed = values, lastChange(secrets)
}

// lookAtStores says whether External Secrets can read from where ExternalSecrets do.
func (l *looking) lookAtStores(ctx context.Context, externals []*external) {
	known := map[string]bool{}
	for _, e := range externals {
		of, name := cmp.Or(e.text("spec", "secretStoreRef", "kind"), "SecretStore"), e.text("spec", "secretStoreRef", "name")
		if name == "" || known[of+"/"+name] {
			continue
		}
		known[of+"/"+name] = true
		one := seen.Store{Kind: of, Name: name}
		o, err := l.store(ctx, of, name)
		switch {
		case apierrors.IsForbidden(err): // no delivery needs it
			one.Problem = "reading it is not permitted, so that whether it is ready is not known"
		case err != nil:
			one.Problem = short(l.explain(err).Error())
			l.wrong(inSecrets, "%s %s: %s", of, name, one.Problem)
		case condition(o, "Ready", "status") != "True":
			one.Problem = fmt.Sprintf("%s %s is not ready%s: External Secrets cannot read from Vault through it; look at its status", of, name, because(o))
			l.wrong(inSecrets, "%s", one.Problem)
		default:
			one.Ready = true
		}
		l.mu.Lock()
		l.out.Stores = append(l.out.Stores, one)
		l.mu.Unlock()
	}
}

// lookAtWorkloads returns the pods of all workloads.
func (l *looking) lookAtWorkloads(ctx context.Context) []corev1.Pod {
	if len(l.c.Workloads) == 0 {
		return nil
	}
	var all []corev1.Pod
	var failed error
	g := errgroup.Group{}
	g.Go(func() error {
		all, failed = l.listPods(ctx, l.c.Namespace, "") // once, and not for each workload
		return nil
	})
	found := l.readWorkloads(ctx)
	_ = g.Wait()
	if failed != nil {
		l.wrong(inPods, "%v", l.explain(failed))
		return nil
	}
	var out []corev1.Pod
	for _, w := range found {
		own, err := theirs(all, w)
		if err != nil {
			l.wrong(inPods, "%v", err)
			continue
		}
		l.lookAtWorkload(w, own)
		out = append(out, own...)
	}
	return out
}

// readWorkloads reads what can be read of the workloads: one that is missing costs the
// others nothing.
func (l *looking) readWorkloads(ctx context.Context) []*workload {
	type named struct {
		Workload
		wave int
	}
	var names []named
	for i, wave := range l.c.Workloads {
		for _, w := range wave {
			names = append(names, named{w, i + 1})
		}
	}
	found := make([][]*workload, len(names))
	g := errgroup.Group{}
	g.SetLimit(reviewsAtOnce)
	for i, name := range names {
		g.Go(func() error {
			some, err := l.workloads(ctx, name.Workload)
			if err != nil {
				l.wrong(inPods, "%v", l.explain(err))
			}
			found[i] = some
			return nil
		})
	}
	_ = g.Wait()
	var out []*workload
	known := map[string]bool{}
	for i, some := range found {
		for _, w := range some {
			if !known[w.String()] {
				known[w.String()], w.wave = true, names[i].wave
				out = append(out, w)
			}
		}
	}
	return out
}

// theirs are the pods of one workload.
func theirs(all []corev1.Pod, w *workload) ([]corev1.Pod, error) {
	selector, err := metav1.LabelSelectorAsSelector(w.selector)
	if err != nil {
		return nil, kind.Definitely("the selector of %s cannot be read", w)
	}
	var out []corev1.Pod
	for i := range all {
		if p := &all[i]; selector.Matches(labels.Set(p.Labels)) && ownedBy(p, w) {
			out = append(out, *p)
		}
	}
	return out, nil
}

// lookAtWorkload tells pods that run with what is served from those of before: by
// the mark of the rotation that made it, or by when the Secrets got it.
func (l *looking) lookAtWorkload(w *workload, pods []corev1.Pod) {
	unknown := !l.d.Sure && l.d.Since.IsZero() && !l.marks(w.mark()) || l.c.Mode == None
	isNew := func(p *corev1.Pod) bool {
		return unknown || l.marks(p.Annotations[Mark]) || !l.d.Since.IsZero() && !p.CreationTimestamp.Time.Before(l.d.Since.Truncate(time.Second))
	}
	one, found := seenWorkload(w, pods, isNew, l.now)
	one.Unknown, one.Wave = unknown, w.wave
	switch {
	case w.stalled:
		one.Problem = "makes no progress (ProgressDeadlineExceeded); look at its pods"
	case w.left != "":
		one.Problem = w.left
	}
	if p := telling(found); p != nil {
		one.Problem = strings.TrimPrefix(one.Problem+"; pod "+p.Name+": "+p.Problem, "; ")
	}
	if l.d.Sure { // whether they are well is another question
		one.Problem = ""
		if i := slices.IndexFunc(found, func(p seen.Pod) bool { return !p.New }); i >= 0 {
			one.Problem = "pod " + found[i].Name + " is not sure to be new"
		}
	}
	if one.Problem != "" {
		one.Problem = short(one.Problem)
		l.wrong(inPods, "%s: %s%s", w, one.Problem, l.remedy(one, found))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out.Workloads, l.out.Pods = append(l.out.Workloads, one), append(l.out.Pods, found...)
}

// telling is the pod that says most about what is wrong with a workload, or nil.
func telling(pods []seen.Pod) (out *seen.Pod) {
	for i := range pods {
		p := &pods[i]
		if p.Problem != "" && (out == nil || strings.Contains(p.Problem, "waits: ") && !strings.Contains(out.Problem, "waits: ")) {
			out = p
		}
	}
	return out
}

// marks reports whether a mark is one of the rotation that made what is served: of
// its way forward, or of its way back; or of that delivery.
func (l *looking) marks(mark string) bool {
	return l.d.ID != "" && (mark == l.d.ID || mark == l.d.ID+"-1" || mark == l.d.ID+"-2" || strings.HasPrefix(mark, l.d.ID+"-e"))
}

// remedy is what to do about pods that run with what is no longer served.
func (l *looking) remedy(w seen.Workload, pods []seen.Pod) string {
	if slices.ContainsFunc(pods, func(p seen.Pod) bool { return !p.New }) {
		return fmt.Sprintf("; restart it (kubectl rollout restart %s -n %s)", strings.ToLower(w.Label()), l.c.Namespace)
	}
	return ""
}

// lookAtChecks makes those checks that only read, once each.
func (l *looking) lookAtChecks(ctx context.Context, pods []corev1.Pod) {
	g := errgroup.Group{}
	g.SetLimit(reviewsAtOnce)
	for i := range l.c.Checks {
		g.Go(func() error {
			c, one := &l.c.Checks[i], l.out.Checks[i]
			if !c.reads() {
				one.Result = fmt.Sprintf("not made: it sends %s, and nothing is changed here", c.Method)
			} else {
				s := *l.step // a check leaves its result there, and counts what it reads
				s.view = newView()
				err := s.checkOnce(ctx, c, pods, 0)
				if found, isBad := err.(bad); isBad { //nolint:errorlint // it is never wrapped
					err = found.error
				} else if err != nil {
					err = s.explain(err)
				}
				one.Ran, one.Passed, one.Tries, one.Result = true, err == nil, 1, short(s.result)
				if err != nil {
					one.Result = short(err.Error())
					l.wrong(inChecks, "check %d (%s): %v", one.Number, one.Type, err)
				} else {
					one.InRow = 1
				}
				if err == nil && c.Type == checkLogs { // of many logs several looks read each once; the next begins anew
					s.memory.dirty()
				}
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			l.out.Checks[i] = one
			return nil
		})
	}
	_ = g.Wait()
}

// reads reports whether a check changes nothing where it asks.
func (c *Check) reads() bool {
	switch c.Method {
	case "", http.MethodGet, http.MethodHead:
		return true
	}
	return c.Type != checkHTTP
}
