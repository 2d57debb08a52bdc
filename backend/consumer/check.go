package consumer

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// checkTimeout is how long a check may fail after the workloads are proven, where
// it does not say.
const checkTimeout = time.Minute

// Check proves every workload once more, waits until all of their pods have been
// well for as long as the stabilization, and then makes the checks, in order.
func (k *clusters) Check(ctx context.Context, c *Consumer, d Delivery) Progress {
	s, err := k.step(ctx, c, d)
	if err != nil {
		return failedBefore(err)
	}
	defer s.close()
	s.name = "check"
	s.looked.checks = s.seenChecks()
	pods, proven, left, err := s.settled(ctx)
	if d.urgent() {
		return s.checkUrgently(ctx, pods, proven, left, err)
	}
	if err != nil || left != "" {
		return s.unfinished(left, err)
	}
	for i := range c.Checks {
		check := &c.Checks[i]
		err := s.check(ctx, check, pods, proven)
		if waits, ok := err.(notYet); ok { //nolint:errorlint // it is never wrapped
			return s.waits("check %d (%s): %v", i+1, check.Type, waits)
		}
		s.sawCheck(i, err)
		if err != nil {
			return s.failed(fmt.Errorf("check %d (%s): %w", i+1, check.Type, err))
		}
		s.tell("check %d (%s): passed", i+1, check.Type)
	}
	return s.done()
}

// settled returns the pods of all workloads once they are proven and have been well
// for long enough, and since when that is so.
func (s *step) settled(ctx context.Context) (pods []corev1.Pod, since time.Time, left string, err error) {
	changed, err := s.changed(ctx)
	if err != nil {
		return nil, since, "", err
	}
	s.looked.changed = changed
	waves, err := s.waves(ctx)
	if err != nil {
		return nil, since, "", err
	}
	all := slices.Concat(waves...)
	if s.c.Mode == None {
		if changed.Before(s.d.Since) {
			changed = s.d.Since
		}
		since = changed.Add(s.c.Stabilization)
		if left := since.Sub(s.now); left > 0 {
			return nil, since, fmt.Sprintf("the workloads are given %s to read the Secrets", s.c.Stabilization), nil
		}
		if left, err = s.readNew(ctx, all); err != nil || left != "" {
			return nil, since, left, err
		}
		pods, err = s.allPods(ctx, all)
		return pods, since, "", err
	}
	newest, left, err := s.allWell(ctx, all, changed)
	if err != nil || left != "" {
		return nil, since, left, err
	}
	if since = s.d.Since; newest.After(since) {
		since = newest
	}
	pods, err = s.allPods(ctx, all)
	return pods, since.Add(s.c.Stabilization), "", err
}

// allWell proves workloads once more, and that their pods have been well for long
// enough. newest is when the last of them became ready. For as long as pods say that
// it is too early no workload is read that need not be.
func (s *step) allWell(ctx context.Context, all []ref, changed time.Time) (newest time.Time, left string, err error) {
	var unsure, unread []ref
	for _, r := range all {
		waits, is, err := s.guess(ctx, r, changed)
		if err != nil && s.tolerates(ctx, r, err, true) {
			continue
		}
		if err != nil {
			return newest, "", err
		}
		switch is {
		case isUnread:
			unread = append(unread, r)
		case isUnsure, isOpen:
			unsure = append(unsure, r)
			continue
		case isWaiting, isProven:
		}
		if waits == "" {
			k, _ := s.memory.get(r)
			if newest, waits, err = s.long(ctx, r, k.w, newest); err != nil {
				return newest, "", err
			}
		}
		left = cmp.Or(left, waits)
	}
	if left == "" {
		unsure = append(unsure, unread...)
	}
	if err := s.read(ctx, unsure); err != nil {
		return newest, "", err
	}
	for _, r := range unsure {
		var waits string
		at, waits, err := s.well(ctx, r, changed, newest)
		if err != nil && s.tolerates(ctx, r, err, true) {
			continue
		}
		if newest = at; err != nil {
			return newest, "", err
		}
		left = cmp.Or(left, waits)
	}
	if left == "" {
		s.tellProven(all, "%d pods run with the change, and have been well for "+s.c.Stabilization.String())
	}
	return newest, left, nil
}

// well proves one workload that was read.
func (s *step) well(ctx context.Context, r ref, changed, before time.Time) (newest time.Time, left string, err error) {
	w := s.view.get(r)
	if w == nil {
		return before, s.unread(r, ""), nil
	}
	pods, err := s.podsOf(ctx, r, w)
	if err != nil {
		return before, "", err
	}
	left, err = s.look(w, pods, changed)
	s.saw(r, left, err)
	s.concluded(r, err == nil && left == "", pods)
	if err != nil || left != "" {
		return before, left, err
	}
	return s.long(ctx, r, w, before)
}

// long says what keeps the pods of a workload from having been well for long enough.
// newest is when the last of them, or of those before, became ready.
func (s *step) long(ctx context.Context, r ref, w *workload, before time.Time) (newest time.Time, left string, err error) {
	pods, err := s.podsOf(ctx, r, w)
	if err != nil {
		return before, "", err
	}
	newest = before
	for i := range pods {
		p := &pods[i]
		if ended(p) || terminating(p) {
			continue
		}
		if left := unsettled(p, s.now, s.c.Stabilization); left != "" {
			s.saw(r, left, nil)
			return newest, fmt.Sprintf("%s: %s", w, left), nil
		}
		if _, at := ready(p); at.After(newest) {
			newest = at
		}
	}
	s.saw(r, "", nil)
	return newest, "", nil
}

// readNew reads workloads of which nothing is known.
func (s *step) readNew(ctx context.Context, all []ref) (left string, err error) {
	unread := slices.DeleteFunc(slices.Clone(all), func(r ref) bool { _, ok := s.memory.get(r); return ok })
	if err := s.read(ctx, unread); err != nil {
		return "", err
	}
	for _, r := range unread {
		if left := s.unread(r, ""); s.view.get(r) == nil && left != "" {
			return left, nil
		}
	}
	return "", nil
}

// allPods are the living pods of workloads that were read.
func (s *step) allPods(ctx context.Context, all []ref) ([]corev1.Pod, error) {
	var out []corev1.Pod
	for _, r := range all {
		k, known := s.memory.get(r)
		if !known { // it is bad, and stops no other
			continue
		}
		pods, err := s.podsOf(ctx, r, k.w)
		if err != nil {
			return nil, err
		}
		out = append(out, living(pods)...)
	}
	return out, nil
}

// bad is what a check found to be wrong.
type bad struct{ error }

func badly(format string, args ...any) error { return bad{fmt.Errorf(format, args...)} }

// check makes one check as often as it has to pass in a row. What it finds bad is
// definite once it has been for as long as the check may take: programs are ready
// before they have done everything.
func (s *step) check(ctx context.Context, c *Check, pods []corev1.Pod, proven time.Time) error {
	s.tries, s.inRow = 0, 0
	for i := range max(c.Times, 1) {
		if i > 0 {
			if err := pause(ctx); err != nil {
				return err
			}
		}
		s.tries++
		err := s.checkOnce(ctx, c, pods, i)
		found, isBad := err.(bad) //nolint:errorlint // it is never wrapped
		_, early := err.(notYet)  //nolint:errorlint // nor is that
		switch {
		case early:
			return err
		case !isBad && err != nil:
			return s.explain(err)
		case !isBad:
			s.inRow++
		case s.now.Sub(proven) > timeoutOf(c):
			return kind.Definitely("%w", found.error)
		default:
			return unsure("%w", found.error)
		}
	}
	return nil
}

func timeoutOf(c *Check) time.Duration {
	if c.Timeout > 0 {
		return c.Timeout
	}
	return checkTimeout
}

// betweenChecks is between two tries of a check that has to pass several times.
const betweenChecks = 200 * time.Millisecond

func pause(ctx context.Context) error {
	timer := time.NewTimer(betweenChecks)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *step) checkOnce(ctx context.Context, c *Check, pods []corev1.Pod, round int) error {
	switch {
	case c.Type == checkHTTP && c.Service != "":
		return s.checkService(ctx, c)
	case c.Type == checkHTTP:
		return s.checkURL(ctx, c)
	case c.Type == checkPrometheus:
		return s.checkPrometheus(ctx, c)
	case c.Type == checkLogs:
		return s.checkLogs(ctx, c, pods, round)
	case c.Type == checkPods:
		return s.checkPods(ctx, c)
	}
	return kind.Definitely("check %.40q is not known", c.Type)
}
