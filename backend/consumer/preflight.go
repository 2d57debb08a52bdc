package consumer

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Preflight looks at everything that a delivery would meet, and changes nothing.
func (k *clusters) Preflight(ctx context.Context, c *Consumer) Finding {
	s, err := k.step(ctx, c, Delivery{ID: "preflight", Since: k.Now()})
	if err != nil {
		return finding(Finding{}, err)
	}
	defer s.close()
	s.memory = &memory{known: map[ref]known{}} // it looks at everything afresh
	f := Finding{}
	missing, err := s.missing(ctx, s.rights())
	if err != nil {
		return s.found(finding(f, s.explain(err)))
	}
	s.lacking(&f, missing)
	for _, look := range []func(context.Context, *Finding) error{s.lintExternals, s.lintSecrets, s.lintWorkloads, s.lintOperator, s.planChecks} {
		if err := look(ctx, &f); err != nil {
			f = finding(f, s.explain(err))
		}
	}
	if s.lacks {
		f.Err = nil // what is not permitted cannot be looked at either
	}
	return s.found(f)
}

// lacking adds a problem for each right that is missing.
func (s *step) lacking(f *Finding, missing []right) {
	for _, r := range missing {
		s.lacks = true
		f.problem("%s", r.sentence(s.cluster.name))
	}
}

// finding adds an error to what was found: a definite one is a problem.
func finding(f Finding, err error) Finding {
	switch {
	case err == nil:
	case kind.IsDefinite(err):
		f.problem("%v", err)
	case f.Err == nil:
		f.Err = err
	}
	return f
}

func (f *Finding) problem(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(f.Problems, text) {
		f.Problems = append(f.Problems, text)
	}
}

func (f *Finding) note(format string, args ...any) {
	f.Notes = append(f.Notes, fmt.Sprintf(format, args...))
}

func (f *Finding) plan(format string, args ...any) {
	f.Plan = append(f.Plan, fmt.Sprintf(format, args...))
}

func (s *step) lintExternals(ctx context.Context, f *Finding) error {
	externals, err := s.externals(ctx)
	if err != nil {
		return err
	}
	missing, err := s.missing(ctx, externalRights(s.c.Namespace, externals))
	if err != nil {
		return err
	}
	s.lacking(f, missing)
	known := map[string]bool{}
	for _, e := range externals {
		for _, why := range e.deaf(s.now) {
			f.problem("ExternalSecret %s %s", e.name(), why)
		}
		if e.condition("Ready") == "False" {
			f.note("ExternalSecret %s is not ready now (%s)", e.name(), word(condition(e.object, "Ready", "reason")))
		}
		switch {
		case e.parent == nil:
			f.plan("sync ExternalSecret %s into Secret %s", e.name(), e.target())
		case !known[e.parent.GetName()]:
			known[e.parent.GetName()] = true
			f.plan("sync ClusterExternalSecret %s, all of its ExternalSecrets", e.parent.GetName())
		}
	}
	return s.lintStores(ctx, externals, f)
}

// deaf are the reasons why an ExternalSecret would not bring what is served,
// though it says that it is ready.
func (e *external) deaf(now time.Time) []string {
	var out []string
	policy, interval := e.text("spec", "refreshPolicy"), e.text("spec", "refreshInterval")
	switch {
	case policy == "CreatedOnce":
		out = append(out, "has refreshPolicy CreatedOnce, and is never read again; set OnChange or Periodic")
	case policy != "OnChange" && isZero(interval):
		out = append(out, "has refreshInterval 0, and is not read again whatever asks for it; set refreshPolicy OnChange, or an interval")
	}
	if immutable(e) {
		out = append(out, "has spec.target.immutable, and its Secret keeps the old values without a word; set it to false and delete the Secret")
	}
	for _, key := range e.pinned() {
		out = append(out, fmt.Sprintf("reads a fixed version of %q; leave version out of its remoteRef", key))
	}
	if e.text("spec", "target", "creationPolicy") == "None" {
		out = append(out, "has creationPolicy None, and writes no Secret; name the Secret under secrets of the consumer instead")
	}
	if e.condition("Ready") == "True" && condition(e.object, "Ready", "reason") == "SecretMissing" {
		out = append(out, fmt.Sprintf("has creationPolicy Merge, and there is no Secret %s to merge into; create it", e.target()))
	}
	if e.object.GetDeletionTimestamp() != nil {
		out = append(out, "is being deleted")
	}
	return out
}

func isZero(interval string) bool {
	if interval == "" {
		return false // an hour
	}
	if d, err := time.ParseDuration(interval); err == nil {
		return d <= 0
	}
	return false
}

func (s *step) lintSecrets(ctx context.Context, f *Finding) error {
	externals, err := s.externals(ctx)
	if err != nil {
		return err
	}
	secrets, err := s.secrets(ctx, externals)
	if err != nil {
		return err
	}
	names := []string{}
	for _, one := range secrets {
		names = append(names, one.name)
		switch {
		case one.missing && slices.Contains(s.c.Secrets, one.name):
			f.problem("Secret %s of namespace %s does not exist; check secrets of the consumer", one.name, s.c.Namespace)
		case one.missing:
			f.note("Secret %s does not exist yet", one.name)
		case one.immutable:
			f.problem("Secret %s is immutable, and cannot get other values; make a new one", one.name)
		}
	}
	if len(names) > 0 {
		f.plan("compare what is served with Secrets %s", strings.Join(names, ", "))
	}
	return nil
}

// mostTried bounds how many restarts a preflight tries. It takes a while.
const mostTried = 200

func (s *step) lintWorkloads(ctx context.Context, f *Finding) error {
	waves, err := s.waves(ctx)
	if err != nil {
		return err
	}
	all := slices.Concat(waves...)
	s.view.left = len(all)
	if err := s.read(ctx, all); err != nil {
		return err
	}
	tried, err := s.tryRestarts(ctx, all)
	if err != nil {
		return err
	}
	for i, wave := range waves {
		names := make([]string, len(wave))
		for j, r := range wave {
			w := s.view.get(r)
			if w == nil {
				return s.strange(r)
			}
			names[j] = w.String()
			s.lintWorkload(w, f)
			if err := tried[r]; err != nil {
				f.problem("%s cannot be restarted: %v", w, s.explain(err))
			}
		}
		f.plan("%s", s.planWave(i, len(waves), names))
	}
	if s.c.Mode != None && len(waves) > 0 {
		f.plan("prove that every pod is new, and well for %s", s.c.Stabilization)
	}
	if s.c.Mode == Restart && len(all) > mostTried {
		f.note("of %d workloads the restart of %d was tried", len(all), mostTried)
	}
	return nil
}

// tryRestarts has the API server, its policies and its webhooks say what a restart
// would meet. It returns what they refuse for now.
func (s *step) tryRestarts(ctx context.Context, all []ref) (map[ref]error, error) {
	refusals := map[ref]error{}
	if s.c.Mode != Restart {
		return refusals, nil
	}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(reviewsAtOnce)
	for _, r := range all[:min(len(all), mostTried)] {
		w := s.view.get(r)
		if w == nil {
			return nil, s.strange(r)
		}
		if unfit(w) != "" || restarter(w) != "" {
			continue // it is a problem already
		}
		g.Go(func() error {
			_, err := s.patchWorkload(ctx, w, s.d.ID, s.now, true)
			if err != nil && !kind.IsDefinite(s.explain(err)) && refused(err) {
				mu.Lock()
				defer mu.Unlock()
				refusals[r] = err
				return nil
			}
			return err
		})
	}
	return refusals, g.Wait()
}

func (s *step) planWave(i, of int, names []string) string {
	what := strings.Join(names, ", ")
	switch {
	case s.c.Mode == None:
		return fmt.Sprintf("restart nothing: %s read the Secrets themselves", what)
	case s.c.Mode == Observe:
		return fmt.Sprintf("wait until somebody else has restarted %s", what)
	case s.c.MaxParallel > 0 && s.c.MaxParallel < len(names):
		return fmt.Sprintf("wave %d of %d: restart %s, %d at once", i+1, of, what, s.c.MaxParallel)
	}
	return fmt.Sprintf("wave %d of %d: restart %s", i+1, of, what)
}

func (s *step) lintWorkload(w *workload, f *Finding) {
	if w.want == 0 {
		f.note("%s has no replicas: nothing would be proven of it", w)
	}
	if s.c.Mode == None {
		return
	}
	if w.stalled {
		f.problem("%s makes no progress (ProgressDeadlineExceeded); repair it before its Secrets change", w)
	} else if w.left != "" {
		f.problem("%s is in the middle of a rollout (%s); wait until it is complete", w, w.left)
	}
	if s.c.Mode == Observe {
		return
	}
	if why := unfit(w); why != "" {
		f.problem("%s %s", w, why)
	}
	if by := restarter(w); by != "" {
		f.problem("%s is restarted by somebody else as well (%s), so that it would be twice; set mode=observe", w, by)
	}
}

// restarters are annotations of workloads, or of their templates, that have others
// restart them when a Secret changes.
var restarters = []string{
	"reloader.stakater.com/auto", "secret.reloader.stakater.com/auto", "secret.reloader.stakater.com/reload", "reloader.stakater.com/search",
	"reloader.stakater.com/last-reloaded-from", "vso.secrets.hashicorp.com/restartedAt", "secrets.infisical.com/auto-reload", "secrets.doppler.com/reload",
}

// restarter names an annotation by which somebody else restarts a workload; "" when
// there is none.
func restarter(w *workload) string {
	for _, key := range restarters {
		for _, has := range []map[string]string{w.meta.Annotations, w.template.Annotations} {
			if v, ok := has[key]; ok && v != "false" {
				return key
			}
		}
	}
	return ""
}

func (s *step) lintOperator(ctx context.Context, f *Finding) error {
	ns, name, ok := strings.Cut(s.c.RestartOperator, "/")
	if !ok {
		return nil
	}
	w, err := s.getWorkload(ctx, ns, deployment, name)
	if err != nil {
		return err
	}
	if why := unfit(w); why != "" {
		f.problem("%s, the operator of ExternalSecrets, %s", w, why)
	}
	return nil
}

func (s *step) planChecks(ctx context.Context, f *Finding) error {
	for i := range s.c.Checks {
		c := &s.c.Checks[i]
		f.plan("check %d: %s", i+1, c.summary())
		if c.URL != "" && !s.k.MayCall(hostname(c.URL)) {
			f.problem("check %d sends a request to %q, which is none of the hosts that checks may send to; add it to allowed_hosts of config", i+1, hostname(c.URL))
		}
		if _, err := c.permitted(ctx, s.c.Name, s.k.Sources); kind.IsDefinite(err) {
			f.problem("check %d: %v", i+1, err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// summary says what a check does, without its body and headers.
func (c *Check) summary() string {
	switch c.Type {
	case checkHTTP:
		at := c.URL
		if c.Service != "" {
			at = "Service " + c.Service + " " + c.Path
		}
		return fmt.Sprintf("%s %s", c.Type, strings.TrimSpace(at))
	case checkLogs:
		return "no log has lines that match " + fmt.Sprintf("%.80q", c.Forbid)
	case checkPrometheus:
		return fmt.Sprintf("%.80s %s", c.Query, c.Expect)
	}
	return "all pods with the labels " + c.Selector + " are ready"
}
