package consumer

import (
	"context"
	"fmt"
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
	s.looked.checks = s.seenChecks()
	pods, proven, left, err := s.settled(ctx)
	if err != nil || left != "" {
		return s.unfinished(left, err)
	}
	for i := range c.Checks {
		check := &c.Checks[i]
		err := s.check(ctx, check, pods, proven)
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
	if s.c.Mode == None {
		if changed.Before(s.d.Since) {
			changed = s.d.Since
		}
		since = changed.Add(s.c.Stabilization)
		if left := since.Sub(s.now); left > 0 {
			return nil, since, fmt.Sprintf("the workloads are given %s to read the Secrets", s.c.Stabilization), nil
		}
		pods, err := s.allPods(ctx)
		return pods, since, "", err
	}
	waves, err := s.waves(ctx)
	if err != nil {
		return nil, since, "", err
	}
	since = s.d.Since
	for _, wave := range waves {
		for _, w := range wave {
			own, newest, left, err := s.well(ctx, w, changed)
			if err != nil || left != "" {
				return nil, since, left, err
			}
			pods = append(pods, own...)
			if newest.After(since) {
				since = newest
			}
		}
	}
	return pods, since.Add(s.c.Stabilization), "", nil
}

// well proves one workload, and that its pods have been well for long enough.
// newest is when the last of them became ready.
func (s *step) well(ctx context.Context, w *workload, changed time.Time) (living []corev1.Pod, newest time.Time, left string, err error) {
	pods, err := s.podsOf(ctx, w)
	if err != nil {
		return nil, newest, "", err
	}
	if left, err = s.look(w, pods, changed); err != nil || left != "" {
		s.saw(w, pods, changed, left, err)
		return nil, newest, left, err
	}
	for i := range pods {
		p := &pods[i]
		if ended(p) || terminating(p) {
			continue
		}
		if left := unsettled(p, s.now, s.c.Stabilization); left != "" {
			s.saw(w, pods, changed, left, nil)
			return nil, newest, fmt.Sprintf("%s: %s", w, left), nil
		}
		if _, at := ready(p); at.After(newest) {
			newest = at
		}
		living = append(living, *p)
	}
	s.saw(w, pods, changed, "", nil)
	s.tell("%s: %d pods run with the change, and have been well for %s", w, len(living), s.c.Stabilization)
	return living, newest, "", nil
}

// allPods are the pods of the workloads of a consumer that nobody restarts.
func (s *step) allPods(ctx context.Context) ([]corev1.Pod, error) {
	waves, err := s.waves(ctx)
	if err != nil {
		return nil, err
	}
	var out []corev1.Pod
	for _, wave := range waves {
		for _, w := range wave {
			pods, err := s.podsOf(ctx, w)
			if err != nil {
				return nil, err
			}
			out = append(out, pods...)
		}
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
		err := s.checkOnce(ctx, c, pods)
		found, isBad := err.(bad) //nolint:errorlint // it is never wrapped
		switch {
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

func (s *step) checkOnce(ctx context.Context, c *Check, pods []corev1.Pod) error {
	switch {
	case c.Type == checkHTTP && c.Service != "":
		return s.checkService(ctx, c)
	case c.Type == checkHTTP:
		return s.checkURL(ctx, c)
	case c.Type == checkPrometheus:
		return s.checkPrometheus(ctx, c)
	case c.Type == checkLogs:
		return s.checkLogs(ctx, c, pods)
	case c.Type == checkPods:
		return s.checkPods(ctx, c)
	}
	return kind.Definitely("check %.40q is not known", c.Type)
}
