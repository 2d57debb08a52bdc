package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Bounds on what is done about an ExternalSecret that does not come.
const (
	// againAfter is when one that has synced, and not to what is served, is forced
	// once more: it may have been read from a Vault that was not up to date.
	againAfter = 15 * time.Second
	// operatorAfter is when External Secrets itself is restarted.
	operatorAfter = 45 * time.Second
	// enoughAfter is when, on the way back, Secrets count that were never given what
	// is taken back, whether External Secrets reacts or not.
	enoughAfter = 30 * time.Second
)

// Sync forces the ExternalSecrets of a consumer, and compares its Secrets with what
// is served.
func (k *clusters) Sync(ctx context.Context, c *Consumer, d Delivery) Progress {
	s, err := k.step(ctx, c, d)
	if err != nil {
		return failedBefore(err)
	}
	defer s.close()
	externals, err := s.externals(ctx)
	if err != nil {
		return s.failed(err)
	}
	s.looked.externals = externals
	for _, e := range externals {
		if err := s.force(ctx, e, ""); err != nil {
			return s.failed(err)
		}
	}
	left, notSynced := s.synced(ctx, externals)
	if left != "" && !s.enough() || left == "" && notSynced != nil {
		return s.unfinished(left, notSynced)
	}
	secrets, err := s.secrets(ctx, externals)
	if err != nil {
		return s.failed(err)
	}
	s.looked.secrets = secrets
	if left != "" {
		if !heldAllAlong(secrets, d) {
			return s.unfinished(left, notSynced)
		}
		s.tell("%s; their Secrets hold what is served all the same", left)
	}
	if err := compare(secrets, d); err != nil {
		if again := s.forceAgain(ctx, externals); again != nil {
			return s.failed(again)
		}
		return s.failed(err)
	}
	s.tellHeld(secrets)
	return s.done()
}

// enough reports whether what Secrets hold may count without a sync.
func (s *step) enough() bool {
	return len(s.d.Undone) > 0 && s.now.Sub(s.d.Since) > enoughAfter
}

// heldAllAlong reports whether Secrets hold everything that is served again, and
// nothing of what is taken back. A sync that comes late reads what is served now.
func heldAllAlong(secrets []*secret, d Delivery) bool {
	if len(secrets) == 0 || len(d.Holds) == 0 || compare(secrets, d) != nil {
		return false
	}
	for _, v := range d.Holds {
		if !slices.ContainsFunc(d.Undone, func(u Value) bool { return u.Role == v.Role }) {
			return false // of a key ring, what is taken back stays readable
		}
	}
	return !slices.ContainsFunc(d.Undone, func(u Value) bool { return whichShows(secrets, u.Secret, d.Holds) != nil })
}

func (s *step) unfinished(left string, err error) Progress {
	if err != nil {
		return s.failed(err)
	}
	return s.waits("%s", left)
}

func (s *step) tellHeld(secrets []*secret) {
	names := make([]string, len(secrets))
	for i, one := range secrets {
		names[i] = one.name
	}
	var roles []string
	for _, v := range s.d.Holds {
		if !slices.Contains(roles, v.Role) { // it may show several values
			roles = append(roles, v.Role)
		}
	}
	if len(names) > 0 {
		s.tell("Secrets %s hold what is served of %s", strings.Join(names, ", "), strings.Join(roles, ", "))
	}
}

// force puts the id of the delivery on an ExternalSecret, or on what it was made
// from, which would take it away again. suffix tells further tries apart.
func (s *step) force(ctx context.Context, e *external, suffix string) error {
	if e.forced(s.d.ID) && suffix == "" {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{e.forceKey(): s.d.ID + suffix}}})
	if err != nil {
		return err
	}
	o := metav1.PatchOptions{FieldManager: s.manager}
	if e.parent != nil {
		changed, err := s.dynamic.Resource(clusterExternalSecrets).Patch(ctx, e.parent.GetName(), types.MergePatchType, patch, o)
		if err != nil {
			return err
		}
		e.parent.Object = changed.Object // of all its ExternalSecrets
		s.tell("ClusterExternalSecret %s: forced to sync", e.parent.GetName())
		return nil
	}
	changed, err := s.dynamic.Resource(externalSecrets).Namespace(s.c.Namespace).Patch(ctx, e.name(), types.MergePatchType, patch, o)
	if err != nil {
		return err
	}
	e.object = changed
	s.tell("ExternalSecret %s: forced to sync", e.name())
	return nil
}

// synced says which ExternalSecrets have not been read since the delivery, and why
// not.
func (s *step) synced(ctx context.Context, externals []*external) (string, error) {
	var left []string
	var failed error
	for _, e := range externals {
		if e.read(s.d) {
			continue
		}
		left = append(left, e.name())
		if why := e.failure(); why != "" {
			failed = unsure("%s", why)
		}
	}
	if len(left) == 0 {
		return "", nil
	}
	if s.c.RestartOperator != "" && len(s.told) == 0 && s.now.Sub(s.d.Since) > operatorAfter {
		return s.restartOperator(ctx, left)
	}
	return fmt.Sprintf("ExternalSecrets have not synced yet: %s; if that lasts, look whether External Secrets runs, and serves the controller that their SecretStore names",
		strings.Join(left, ", ")), failed
}

// restartOperator restarts External Secrets, once a delivery, where it does not
// react to being told.
func (s *step) restartOperator(ctx context.Context, left []string) (string, error) {
	ns, name, _ := strings.Cut(s.c.RestartOperator, "/")
	w, err := s.getWorkload(ctx, ns, deployment, name)
	if err != nil {
		return "", err
	}
	if w.mark() != s.d.ID {
		if err := s.restart(ctx, w); err != nil {
			return "", err
		}
		s.tell("%s: restarted", w)
	}
	if w.left != "" {
		return fmt.Sprintf("%s, the operator of ExternalSecrets: %s", w, w.left), nil
	}
	return fmt.Sprintf("ExternalSecrets have not synced, though %s was restarted: %s", w, strings.Join(left, ", ")), nil
}

// forceAgain forces those once more that have synced a while ago to something
// else.
func (s *step) forceAgain(ctx context.Context, externals []*external) error {
	tried := map[string]bool{}
	for _, e := range externals {
		if s.now.Sub(e.refreshed()).Abs() < againAfter {
			continue
		}
		if e.parent != nil {
			if tried[e.parent.GetName()] {
				continue
			}
			tried[e.parent.GetName()] = true
		}
		if err := s.force(ctx, e, "."+strconv.Itoa(e.tries(s.d.ID)+1)); err != nil {
			return err
		}
	}
	return nil
}
