package consumer

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// ref names a workload in the namespace of the consumer.
type ref struct{ kind, name string }

// view is what one look has read.
type view struct {
	mu    sync.Mutex
	fresh map[ref]*workload
	// left is how many more workloads this look may read, one by one.
	left int
	// many: there are so many that the pods of the namespace are read at once.
	many bool
	// pods by their workload; whole: those of the namespace.
	pods  map[ref][]corev1.Pod
	whole bool
}

func newView() *view {
	return &view{fresh: map[ref]*workload{}, pods: map[ref][]corev1.Pod{}, left: readsPerLook}
}

func (v *view) get(r ref) *workload {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.fresh[r]
}

// take has this look use what another one has read.
func (v *view) take(r ref, w *workload) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fresh[r] = w
}

// seen takes a workload that was read.
func (s *step) seen(w *workload) {
	r := ref{w.kind, w.name}
	s.view.mu.Lock()
	s.view.fresh[r] = w
	s.view.mu.Unlock()
	before, _ := s.memory.get(r)
	w.meta.ManagedFields, w.template.Spec = nil, corev1.PodSpec{} // much, and never looked at
	s.memory.put(r, known{w: w, at: s.now, told: before.told})
}

// concluded notes what was made of a workload that was read.
func (s *step) concluded(r ref, proven bool, pods []corev1.Pod) {
	k, ok := s.memory.get(r)
	if !ok {
		return
	}
	k.looked, k.proven, k.step, k.pods = true, proven, s.name, len(living(pods))
	s.memory.put(r, k)
}

// waves names the workloads of the consumer. One that is found twice belongs to the
// first wave that has it. Only what selectors find is read.
func (s *step) waves(ctx context.Context) ([][]ref, error) {
	found, err := s.selected(ctx)
	if err != nil {
		return nil, err
	}
	seen := map[ref]bool{}
	out := make([][]ref, len(s.c.Workloads))
	for i, wave := range s.c.Workloads {
		for _, w := range wave {
			refs := []ref{{w.Kind, w.Name}}
			if w.Selector != "" {
				refs = found[w]
			}
			for _, r := range refs {
				if !seen[r] {
					seen[r] = true
					out[i] = append(out[i], r)
				}
			}
		}
	}
	if s.d.whole() {
		rest, err := s.everyWorkload(ctx, seen)
		if err != nil {
			return nil, err
		}
		out = append(out, rest)
	}
	s.view.many = len(seen) > few
	s.looked.waves = out
	return out, nil
}

// selected finds what the selectors of the consumer do: one list for each, or of a
// kind that has many of them, one for all.
func (s *step) selected(ctx context.Context) (map[Workload][]ref, error) {
	of := map[string][]Workload{}
	for _, w := range slices.Concat(s.c.Workloads...) {
		if w.Selector != "" {
			of[w.Kind] = append(of[w.Kind], w)
		}
	}
	out := map[Workload][]ref{}
	for k, all := range of {
		var whole []*workload
		if len(all) > few {
			var err error
			if whole, err = s.listWorkloads(ctx, k, ""); err != nil {
				return nil, err
			}
		}
		for _, w := range all {
			matches, err := s.matching(ctx, w, whole, len(all) > few)
			if err != nil {
				return nil, err
			}
			for _, one := range matches {
				s.seen(one)
				out[w] = append(out[w], ref{one.kind, one.name})
			}
		}
	}
	return out, nil
}

func (s *step) matching(ctx context.Context, w Workload, whole []*workload, listed bool) ([]*workload, error) {
	if !listed {
		return s.workloads(ctx, w)
	}
	selector, err := labels.Parse(w.Selector)
	if err != nil {
		return nil, kind.Definitely("selector %.80q cannot be read; write the consumer again", w.Selector)
	}
	var out []*workload
	for _, one := range whole {
		if selector.Matches(labels.Set(one.meta.Labels)) {
			out = append(out, one)
		}
	}
	if len(out) == 0 {
		return nil, s.nothingFound(w)
	}
	return out, nil
}

// read reads workloads, as far as one look may. Many of a kind are listed, where that
// is permitted: a Role that names what it may read permits no list.
func (s *step) read(ctx context.Context, refs []ref) error {
	of := map[string][]ref{}
	for _, r := range refs {
		if s.view.get(r) == nil {
			of[r.kind] = append(of[r.kind], r)
		}
	}
	var single []ref
	for k, missing := range of {
		rest, err := s.readListed(ctx, k, missing)
		if err != nil {
			return err
		}
		single = append(single, rest...)
	}
	slices.SortFunc(single, func(a, b ref) int { return slices.Index(refs, a) - slices.Index(refs, b) })
	if len(single) > s.view.left {
		single = single[:s.view.left]
	}
	s.view.left -= len(single)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(reviewsAtOnce)
	for _, r := range single {
		g.Go(func() error {
			one, err := s.workloads(ctx, Workload{Kind: r.kind, Name: r.name})
			if err != nil && s.tolerates(ctx, r, err, false) {
				return nil
			}
			for _, w := range one {
				s.seen(w)
			}
			return err
		})
	}
	return g.Wait()
}

// readListed reads workloads of a kind with one list, where there are many and that
// is permitted. It returns those that are to be read one by one.
func (s *step) readListed(ctx context.Context, of string, missing []ref) (rest []ref, err error) {
	list := s.c.Connection + "/" + s.c.Namespace + "/" + of
	if len(missing) <= worthAList || !s.k.memories.mayList(list, s.now) {
		return missing, nil
	}
	all, err := s.listWorkloads(ctx, of, "")
	if apierrors.IsForbidden(err) {
		s.k.memories.notListed(list, s.now)
		return missing, nil
	}
	if err != nil {
		return nil, err
	}
	for _, w := range all {
		if slices.Contains(missing, ref{w.kind, w.name}) {
			s.seen(w)
		}
	}
	return slices.DeleteFunc(missing, func(r ref) bool { return s.view.get(r) != nil }), nil
}

// podsOf returns the pods of a workload: those of the namespace are listed once a
// look where there are many workloads. w may be nil where there are; then pods of
// another one whose owner is named as if it were its own may be among them.
func (s *step) podsOf(ctx context.Context, r ref, w *workload) ([]corev1.Pod, error) {
	var selector labels.Selector
	if w != nil {
		var err error
		if selector, err = metav1.LabelSelectorAsSelector(w.selector); err != nil {
			return nil, kind.Definitely("the selector of %s cannot be read", w)
		}
	}
	all, err := s.listed(ctx, r, w, selector)
	if err != nil || selector == nil {
		return all, err
	}
	return selectPods(all, selector), nil
}

func selectPods(all []corev1.Pod, selector labels.Selector) (out []corev1.Pod) {
	for _, p := range all {
		if selector.Matches(labels.Set(p.Labels)) {
			out = append(out, p)
		}
	}
	return out
}

// podsListed are the pods of a workload, as far as this look has listed them.
func (s *step) podsListed(r ref, w *workload) []corev1.Pod {
	selector, err := metav1.LabelSelectorAsSelector(w.selector)
	if err != nil {
		return nil
	}
	return selectPods(s.view.pods[r], selector)
}

// listed are the pods that belong to a workload by the name of their owner, listed
// once a look. Where there are many workloads it is one list for all.
func (s *step) listed(ctx context.Context, r ref, w *workload, selector labels.Selector) ([]corev1.Pod, error) {
	if own, ok := s.view.pods[r]; ok || s.view.whole {
		return own, nil
	}
	ns, labels := s.c.Namespace, ""
	if s.view.many {
		s.view.whole = true
	} else {
		ns, labels = w.namespace, selector.String()
	}
	all, err := s.listPods(ctx, ns, labels)
	if err != nil {
		return nil, err
	}
	own := map[ref][]corev1.Pod{r: nil}
	for _, p := range all {
		owner := ownerOf(&p)
		own[owner] = append(own[owner], p)
	}
	if s.view.whole {
		s.view.pods = own
		return own[r], nil
	}
	s.view.pods[r] = own[r]
	return own[r], nil
}

// ownerOf names the workload of a pod, by names alone: reading ReplicaSets would need
// a right more.
func ownerOf(p *corev1.Pod) ref {
	owner := metav1.GetControllerOf(p)
	switch {
	case owner == nil:
		return ref{}
	case owner.Kind == "ReplicaSet":
		if i := strings.LastIndex(owner.Name, "-"); i > 0 {
			return ref{deployment, owner.Name[:i]}
		}
		return ref{}
	}
	return ref{owner.Kind, owner.Name}
}

// tellAll tells the same of several workloads, in one line where they are many: a
// timeline is short. what says it of one of them, or, for -1, of all.
func (s *step) tellAll(names []string, what func(i int) string) {
	const most = 8
	if len(names) <= few {
		for i, name := range names {
			s.tell("%s: %s", name, what(i))
		}
		return
	}
	listed := strings.Join(names[:min(len(names), most)], ", ")
	if n := len(names) - most; n > 0 {
		listed += fmt.Sprintf(" and %d more", n)
	}
	s.tell("%d workloads (%s): %s", len(names), listed, what(-1))
}

// tellProven tells which of some workloads are proven, each once in a step. format has
// a place for the number of their pods.
func (s *step) tellProven(of []ref, format string) {
	var names []string
	var pods []int
	sum := 0
	for _, r := range of {
		k, ok := s.memory.get(r)
		if !ok || !k.proven || k.step != s.name || k.told == s.name {
			continue
		}
		k.told = s.name
		s.memory.put(r, k)
		names, pods, sum = append(names, k.w.String()), append(pods, k.pods), sum+k.pods
	}
	s.tellAll(names, func(i int) string {
		if i < 0 {
			return fmt.Sprintf(format, sum)
		}
		return fmt.Sprintf(format, pods[i])
	})
}

func (r ref) in(namespace string) string { return fmt.Sprintf("%s %s/%s", r.kind, namespace, r.name) }
