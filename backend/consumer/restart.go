package consumer

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Restart brings the pods of a consumer to read what its Secrets hold, wave by
// wave: those of one are restarted after those of the one before are proven, and
// nothing more after the first that is bad. A wave of one workload is a canary. In
// mode observe nothing is changed, and pods from after the change are waited for.
func (k *clusters) Restart(ctx context.Context, c *Consumer, d Delivery) Progress {
	if c.Mode == None || len(c.Workloads) == 0 {
		return Progress{Done: true, Told: []string{"nothing is restarted"}}
	}
	s, err := k.step(ctx, c, d)
	if err != nil {
		return failedBefore(err)
	}
	defer s.close()
	changed, err := s.changed(ctx)
	if err != nil {
		return s.failed(err)
	}
	waves, err := s.waves(ctx)
	if err != nil {
		return s.failed(err)
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
	return s.done()
}

// restartWave does what can be done now of one wave, and says what it waits for.
func (s *step) restartWave(ctx context.Context, wave []*workload, changed time.Time) (string, error) {
	waits, running, still, err := s.lookAt(ctx, wave, changed)
	if err != nil {
		return "", err
	}
	if len(still) > 0 && s.now.Sub(changed).Abs() < s.k.settle {
		return "the nodes get a moment to see the change of the Secrets", nil
	}
	for _, w := range still {
		if most := s.c.MaxParallel; most > 0 && running >= most {
			break
		}
		if err := s.restart(ctx, w); err != nil {
			return "", err
		}
		running++
		waits = fmt.Sprintf("%s has been restarted", w)
	}
	return waits, nil
}

// lookAt proves the workloads of a wave that were restarted, and returns those
// that were not. The first that is bad ends the delivery before any other is
// touched.
func (s *step) lookAt(ctx context.Context, wave []*workload, changed time.Time) (waits string, running int, still []*workload, err error) {
	for _, w := range wave {
		pods, err := s.podsOf(ctx, w)
		if err != nil {
			return "", 0, nil, err
		}
		left, begun, err := s.lookAtOne(w, pods, changed)
		if err != nil {
			s.saw(w, pods, changed, left, err)
			return "", 0, nil, err
		}
		if !begun {
			s.saw(w, pods, changed, "has not been restarted yet", nil)
			still = append(still, w)
			continue
		}
		s.saw(w, pods, changed, left, nil)
		if left == "" {
			s.tellProven(w, pods)
			continue
		}
		waits, running = left, running+1
	}
	return waits, running, still, nil
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

func (s *step) tellProven(w *workload, pods []corev1.Pod) {
	living := 0
	for i := range pods {
		if !ended(&pods[i]) && !terminating(&pods[i]) {
			living++
		}
	}
	s.tell("%s: all of its pods (%d) run with the change", w, living)
}

// restart changes the template of one workload.
func (s *step) restart(ctx context.Context, w *workload) error {
	if why := unfit(w); why != "" {
		return kind.Definitely("%s %s", w, why)
	}
	if err := s.patchWorkload(ctx, w, s.d.ID, s.now, false); err != nil {
		return err
	}
	s.tell("%s: restarted", w)
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
