package consumer

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Restart brings the pods of a consumer to read what its Secrets hold, wave by
// wave: those of one are restarted after those of the one before are proven, and
// nothing more after the first that is bad. A wave of one workload is a canary. In
// mode observe nothing is changed, and pods from after the change are waited for.
func (k *clusters) Restart(ctx context.Context, c *Consumer, d Delivery) Progress {
	if !d.whole() && (c.Mode == None || len(c.Workloads) == 0) {
		return Progress{Done: true, Told: []string{"nothing is restarted"}}
	}
	s, err := k.step(ctx, c, d)
	if err != nil {
		return failedBefore(err)
	}
	defer s.close()
	s.name = "restart"
	changed, err := s.changed(ctx)
	if err != nil {
		return s.failed(err)
	}
	s.looked.changed = changed
	waves, err := s.waves(ctx)
	if err != nil {
		return s.failed(err)
	}
	if d.urgent() {
		s.lateHooks(ctx)
		waves = [][]ref{slices.Concat(waves...)}
	}
	for i, wave := range waves {
		left, err := s.restartWave(ctx, wave, changed)
		if err != nil {
			return s.failed(err)
		}
		if left != "" {
			return s.waits("wave %d of %d: %s", i+1, len(waves), left)
		}
	}
	switch why := s.spoiled(); {
	case why != "" && s.bad.mends:
		return s.waits("%s", why)
	case why != "": // whoever waits for it waits in vain
		return s.failed(kind.Definitely("%s", why))
	}
	return s.done()
}

// restartWave does what can be done now of one wave, and says what it waits for.
func (s *step) restartWave(ctx context.Context, wave []ref, changed time.Time) (string, error) {
	waits, running, still, err := s.lookAt(ctx, wave, changed)
	if err != nil {
		return "", err
	}
	if len(still) > 0 && s.now.Sub(changed).Abs() < s.k.settle {
		return "the nodes get a moment to see the change of the Secrets", nil
	}
	begun := 0
	for len(still) > 0 && begun < restartsPerLook {
		n := min(len(still), restartsPerLook-begun)
		if most := s.c.MaxParallel; most > 0 && !s.d.urgent() {
			n = min(n, most-running)
		}
		if n <= 0 {
			break
		}
		left, some, err := s.restartSome(ctx, still[:n], changed)
		if err != nil {
			return "", err
		}
		still = still[n:]
		begun, running = begun+n, running+some
		if left != "" {
			waits = left
		}
	}
	if waits == "" && len(still) > 0 {
		waits = fmt.Sprintf("%d workloads have still to be restarted", len(still))
	}
	return waits, nil
}

// restartSome restarts workloads that have not been for this delivery. They are read
// first: somebody may have, and they may not be fit for it. running are those that
// are not proven then.
func (s *step) restartSome(ctx context.Context, some []ref, changed time.Time) (waits string, running int, err error) {
	if err := s.read(ctx, some); err != nil {
		return "", 0, err
	}
	var todo []*workload
	for _, r := range some {
		w := s.view.get(r)
		if w == nil {
			waits, running = s.unread(r, waits), running+1
			continue
		}
		left, begun, err := s.judge(ctx, r, w, changed)
		switch {
		case err != nil && s.tolerates(ctx, r, err, true):
		case err != nil:
			return "", 0, err
		case !begun:
			todo = append(todo, w)
		case left != "":
			waits, running = left, running+1
		}
	}
	s.tellProven(some, "all pods (%d) run with the change")
	var names []string
	defer func() { s.tellAll(names, func(int) string { return "restarted" }) }()
	for _, w := range todo {
		if err := s.restart(ctx, w); err != nil {
			if s.tolerates(ctx, ref{w.kind, w.name}, err, false) {
				continue
			}
			return "", 0, err
		}
		names = append(names, w.String())
		waits, running = fmt.Sprintf("%s has been restarted", w), running+1
	}
	return waits, running, nil
}

// lookAt proves the workloads of a wave that were restarted, and returns those that
// were not. The first that is bad ends the delivery before any other is touched.
func (s *step) lookAt(ctx context.Context, wave []ref, changed time.Time) (waits string, running int, still []ref, err error) {
	var unsure []ref
	rest := map[ref]bool{}
	for _, r := range wave {
		left, is, err := s.guess(ctx, r, changed)
		switch {
		case err != nil && s.tolerates(ctx, r, err, true):
		case err != nil:
			return "", 0, nil, err
		case is == isWaiting:
			waits, running = left, running+1
		case is == isOpen:
			rest[r] = true
		case is == isUnsure || is == isUnread:
			unsure = append(unsure, r)
		}
	}
	if err := s.read(ctx, unsure); err != nil {
		return "", 0, nil, err
	}
	for _, r := range unsure {
		w := s.view.get(r)
		if w == nil {
			waits, running = s.unread(r, waits), running+1
			continue
		}
		left, begun, err := s.judge(ctx, r, w, changed)
		switch {
		case err != nil && s.tolerates(ctx, r, err, true):
		case err != nil:
			return "", 0, nil, err
		case !begun:
			rest[r] = true
		case left != "":
			waits, running = left, running+1
		}
	}
	s.tellProven(wave, "all pods (%d) run with the change")
	for _, r := range wave {
		if rest[r] {
			still = append(still, r)
		}
	}
	return waits, running, still, nil
}

// unread says that a workload has still to be read, unless it cannot be.
func (s *step) unread(r ref, waits string) string {
	if s.bad.of[r] != "" {
		return waits
	}
	return r.in(s.c.Namespace) + " has still to be read"
}

// judge says of a workload that was read what it waits for, and whether it has been
// restarted at all.
func (s *step) judge(ctx context.Context, r ref, w *workload, changed time.Time) (left string, begun bool, err error) {
	pods, err := s.podsOf(ctx, r, w)
	if err != nil {
		return "", false, err
	}
	left, begun, err = s.lookAtOne(w, pods, changed)
	if err == nil && !begun {
		s.saw(r, "has not been restarted yet", nil)
	} else {
		s.saw(r, left, err)
	}
	s.concluded(r, err == nil && begun && left == "", pods)
	return left, begun, err
}

// guessed is what can be said of a workload without reading it.
type guessed int

const (
	isUnsure  guessed = iota // it has to be read
	isUnread                 // its pods are as they should be, and it was not read in this step
	isWaiting                // it was restarted, and its pods are not as they should be
	isOpen                   // nothing shows that it was restarted
	isProven
)

// guess says what the pods of a workload, and what was read of it before, say by
// themselves. Nothing is failed, restarted or proven by a guess alone: what is proven
// was read once in this step, and its pods are as they should be now.
func (s *step) guess(ctx context.Context, r ref, changed time.Time) (left string, is guessed, err error) {
	if !s.view.many || s.view.get(r) != nil {
		return "", isUnsure, nil
	}
	k, ok := s.memory.get(r)
	pods, err := s.podsOf(ctx, r, k.w)
	switch {
	case err != nil:
		return "", isUnsure, err
	case !ok && s.c.Mode == Restart && !marked(pods, s.d.ID):
		return "", isOpen, nil
	case !ok:
		return "", isUnsure, nil
	case k.proven && k.step == s.name:
		if left, begun, err := s.lookAtOne(k.w, pods, changed); err == nil && begun && left == "" {
			s.saw(r, "", nil)
			return "", isProven, nil
		}
		return "", isUnsure, nil
	case s.c.Mode == Restart && k.w.mark() != s.d.ID && !marked(pods, s.d.ID):
		return "", isOpen, nil
	}
	if !k.looked && s.now.Sub(k.at) < readAgain { // there was no time to
		s.view.take(r, k.w)
		return "", isUnsure, nil
	}
	bare := *k.w // whose controller has done what it has to
	bare.left, bare.stalled = "", false
	left, err = s.look(&bare, pods, changed)
	switch {
	case err == nil && left == "":
		return "", isUnread, nil
	case err == nil && s.now.Sub(k.at) < readAgain:
		s.saw(r, left, nil)
		return left, isWaiting, nil
	}
	return "", isUnsure, nil
}

// lookAtOne says what a workload waits for, and whether it has been restarted at
// all.
func (s *step) lookAtOne(w *workload, pods []corev1.Pod, changed time.Time) (left string, begun bool, err error) {
	if s.c.Mode == Restart && w.mark() != s.d.ID && !marked(pods, s.d.ID) {
		return s.lookAtOther(w, pods, changed)
	}
	left, err = s.look(w, pods, changed)
	return left, true, err
}

// restart changes the template of one workload.
func (s *step) restart(ctx context.Context, w *workload) error {
	if why := unfit(w); why != "" {
		return kind.Definitely("%s %s", w, why)
	}
	now, err := s.patchWorkload(ctx, w, s.d.ID, s.now, false)
	if err != nil {
		return err
	}
	r := ref{w.kind, w.name}
	s.memory.put(r, known{w: now, at: s.now, looked: true})
	s.memory.restarted(r)
	return nil
}

// unfit says why a restart of w would not reach all of its pods; "" when it would.
func unfit(w *workload) string {
	switch {
	case w.paused:
		return "is paused, and a restart would wait until it no longer is; resume it (kubectl rollout resume)"
	case w.strategy == "OnDelete":
		return "has updateStrategy OnDelete, and its pods stay as they are until somebody deletes them; set RollingUpdate, or delete them and set mode=observe"
	case w.partition > 0:
		return fmt.Sprintf("has a partition of %d, and pods below it would keep the old Secret; set it to 0", w.partition)
	}
	return ""
}
