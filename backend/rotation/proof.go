package rotation

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// What was seen at consumers is kept: an entry for each consumer and step of a
// delivery, and one for its pods, which are the most. It is written when the step is
// proven, or when it has failed, before the role says so. Its key follows from what it
// is about, so that a step that is done again writes the same entry again.

// Proof is what was seen of one delivery at one consumer, step by step.
type Proof struct {
	Consumer string
	// Way is 0 for the next key of a ring, 1 for what was promoted, 2 for the way back,
	// and 3 for what was left to publish then: that the previous version, or the one that
	// failed, is gone.
	Way string
	// Steps are those of which something is kept, in order.
	Steps []Phase
	by    map[Phase]*seen.Consumer
}

// The ways of a rotation; see deliveryID.
const (
	wayAhead   = "0"
	WayForward = "1"
	wayBack    = "2"
	wayAfter   = "3"
)

var deliverySteps = []Phase{Sync, Restart, Check}

// Seen is what a step saw; nil where nothing of it is kept.
func (p *Proof) Seen(step Phase) *seen.Consumer {
	if p == nil {
		return nil
	}
	return p.by[step]
}

// All is what all steps have seen, the last of them last.
func (p *Proof) All() *seen.Consumer {
	out := &seen.Consumer{}
	for _, step := range p.Steps {
		out.Add(p.by[step])
	}
	return out
}

// since is p without what was seen before a time.
func (p *Proof) since(at time.Time) *Proof {
	if p == nil || at.IsZero() {
		return p
	}
	out := &Proof{Consumer: p.Consumer, Way: p.Way, by: map[Phase]*seen.Consumer{}}
	for _, step := range p.Steps {
		if one := p.by[step]; !one.At.Before(at) {
			out.Steps, out.by[step] = append(out.Steps, step), one
		}
	}
	return out
}

// Direction names the way.
func (p *Proof) Direction() string {
	return map[string]string{wayAhead: "next key", WayForward: "forward", wayBack: "back", wayAfter: "afterwards"}[p.Way]
}

// Main reports whether it is a delivery that pods had to follow.
func (p *Proof) Main() bool { return p.Way != wayAfter }

// State is how far a delivery is, or what became of it.
func (p *Proof) State() string {
	last := p.Steps[len(p.Steps)-1]
	switch {
	case !p.by[last].Done:
		return "failed"
	case last == Check, p.Way == wayAfter:
		return "proven"
	}
	return "in " + string(last)
}

const podsOf = "-pods"

func proofKey(rotation, way, step, consumer string) string {
	return storage.Proof + rotation + "/" + way + "." + step + "." + consumer
}

// wayOf is the end of the id of a delivery.
func wayOf(id string) string {
	way := id[strings.LastIndexAny(id, "-~")+1:]
	if strings.HasPrefix(way, emergencyMark) {
		return WayForward
	}
	return way
}

// keepProofs stores what deliveries of a job have seen where that ends a step: it is
// proven, or it has failed and there is a way back. A look in between is kept by
// nobody.
func (e *Engine) keepProofs(j *job, deliveries []Delivery, results []Progress) error {
	run := j.role.Run
	g := errgroup.Group{}
	g.SetLimit(parallelConsumers)
	for i, p := range results {
		consumer := deliveries[i].Consumer
		until := run.Deadline
		if run.urgent() {
			until = run.until(consumer)
		}
		expired := !until.IsZero() && !time.Now().Before(until)
		failed := p.Err != nil && kind.IsDefinite(p.Err) || expired
		if p.Seen == nil || !p.Done && (run.Back || run.Retired && !run.urgent() || !failed) {
			continue
		}
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
			defer cancel()
			d := deliveries[i]
			for _, id := range j.deliveredFor() {
				if err := e.st.putProof(ctx, id, wayOf(d.ID), run.stepFor(d.Consumer), d.Consumer, p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// deliveredFor are the rotations that a delivery is one of: each keeps what was seen.
func (j *job) deliveredFor() []string {
	ids := []string{j.role.Run.Rotation}
	for _, m := range j.facts.unit.everybody() {
		if run := m.run(); run != nil && run.deliveryID() == j.role.Run.deliveryID() && !slices.Contains(ids, run.Rotation) {
			ids = append(ids, run.Rotation)
		}
	}
	return ids
}

// putProof writes what one step has seen. Pods are written first: who finds the other
// entry finds them.
func (st *Store) putProof(ctx context.Context, rotation, way string, step Phase, consumer string, p Progress) error {
	kept := *p.Seen
	kept.Done = p.Done
	if p.Err != nil {
		kept.Error = p.Err.Error()
	}
	kept.Error = clip(kept.Error)
	pods := &seen.Consumer{Pods: slices.Clone(kept.Pods)}
	if step != Check { // check sees them all
		pods.Pods = slices.DeleteFunc(pods.Pods, func(p seen.Pod) bool { return p.Problem == "" })
	}
	kept.Pods = nil
	kept.Externals, kept.Values, kept.Workloads = slices.Clone(kept.Externals), slices.Clone(kept.Values), slices.Clone(kept.Workloads)
	if kept.PodsApart = len(pods.Pods) > 0; kept.PodsApart {
		pods.Fit(maxSmallEntry)
		kept.More.Pods += pods.More.Pods
		if err := storage.Put(ctx, st.s, proofKey(rotation, way, string(step)+podsOf, consumer), pods, maxSmallEntry); err != nil {
			return err
		}
	}
	kept.Fit(maxSmallEntry)
	return storage.Put(ctx, st.s, proofKey(rotation, way, string(step), consumer), &kept, maxSmallEntry)
}

// maxProofs bounds how many consumers are read at once.
const maxProofs = 200

// Proofs reads what is kept of the deliveries of a rotation, of one consumer or (with
// "") of the first of them by name: in the order of their names and ways. pods adds
// those. more is how many consumers were left out.
func (st *Store) Proofs(ctx context.Context, rotation, consumer string, most int, pods bool) (out []*Proof, more int, err error) {
	keys, err := st.s.List(ctx, storage.Proof+rotation+"/")
	if err != nil {
		return nil, 0, err
	}
	keys, more = ofConsumers(keys, consumer, min(most, maxProofs), pods)
	entries := make([]*seen.Consumer, len(keys))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelStorage)
	for i, key := range keys {
		g.Go(func() (err error) {
			entries[i], err = storage.Get[seen.Consumer](ctx, st.s, storage.Proof+rotation+"/"+key)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, 0, err
	}
	return assemble(keys, entries), more, nil
}

func splitProof(key string) (way, step, consumer string) {
	way, rest, _ := strings.Cut(key, ".")
	step, consumer, _ = strings.Cut(rest, ".")
	return way, step, consumer
}

func ofConsumers(keys []string, only string, most int, pods bool) (kept []string, more int) {
	by := map[string][]string{}
	for _, key := range keys {
		_, step, consumer := splitProof(key)
		if consumer != "" && (only == "" || consumer == only) && (pods || !strings.HasSuffix(step, podsOf)) {
			by[consumer] = append(by[consumer], key)
		}
	}
	names := make([]string, 0, len(by))
	for name := range by {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		if i < most {
			kept = append(kept, by[name]...)
		} else {
			more++
		}
	}
	return kept, more
}

func assemble(keys []string, entries []*seen.Consumer) []*Proof {
	var out []*Proof
	pods := map[string]*seen.Consumer{}
	for i, key := range keys {
		way, step, consumer := splitProof(key)
		if entries[i] == nil { // retention was faster
			continue
		}
		if of, ok := strings.CutSuffix(step, podsOf); ok {
			pods[way+of+"/"+consumer] = entries[i]
			continue
		}
		n := slices.IndexFunc(out, func(p *Proof) bool { return p.Consumer == consumer && p.Way == way })
		if n < 0 {
			n = len(out)
			out = append(out, &Proof{Consumer: consumer, Way: way, by: map[Phase]*seen.Consumer{}})
		}
		out[n].by[Phase(step)] = entries[i]
	}
	for _, p := range out {
		for _, step := range deliverySteps {
			if p.by[step] == nil {
				continue
			}
			p.Steps = append(p.Steps, step)
			if with := pods[p.Way+string(step)+"/"+p.Consumer]; with != nil && p.by[step].PodsApart {
				p.by[step].Pods = with.Pods
			}
		}
	}
	out = slices.DeleteFunc(out, func(p *Proof) bool { return len(p.Steps) == 0 })
	slices.SortFunc(out, func(a, b *Proof) int {
		return cmp.Or(strings.Compare(a.Consumer, b.Consumer), strings.Compare(a.Way, b.Way))
	})
	return out
}

// forgetProofs removes all that is kept of the deliveries of a rotation.
func (st *Store) forgetProofs(ctx context.Context, rotation string) error {
	prefix := storage.Proof + rotation + "/"
	keys, err := st.s.List(ctx, prefix)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelStorage)
	for _, key := range keys {
		g.Go(func() error { return st.s.Delete(ctx, prefix+key) })
	}
	return g.Wait()
}

// Evidences are what each role of a rotation has to show: what is kept of it, or what
// it shows so far.
func (st *Store) Evidences(ctx context.Context, h *Header, parts []Part) ([]*Evidence, error) {
	out := make([]*Evidence, len(parts))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelStorage)
	for i, p := range parts {
		g.Go(func() error {
			r, err := st.Role(ctx, p.Role)
			if err != nil {
				return err
			}
			if r != nil && r.Run != nil && r.Run.Rotation == h.ID {
				out[i] = r.LiveEvidence()
				return nil
			}
			ev, err := st.Evidence(ctx, h.ID, p.Role)
			if err == nil && ev == nil { // it has not begun, or never will
				ev = &Evidence{Part: p, Account: &Account{}}
			}
			out[i] = ev
			return err
		})
	}
	return out, g.Wait()
}
