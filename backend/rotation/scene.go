package rotation

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Scene is what roles of an emergency are in the middle of.
type Scene struct {
	Roles     []*Role
	Consumers []string // those of all roles
	// Taken are the rotations that it would end, a line each; Busy is why a role could not
	// be taken over.
	Taken []string
	Busy  map[string]string
}

// Scene reads it. It asks nobody but storage.
func (e *Engine) Scene(ctx context.Context, names []string) (*Scene, error) {
	s := &Scene{Busy: map[string]string{}}
	for page := range slices.Chunk(names, 1000) {
		roles, _, err := e.st.readable(ctx, page)
		if err != nil {
			return nil, err
		}
		for _, r := range roles {
			if r == nil {
				continue
			}
			s.Roles = append(s.Roles, r)
			s.Consumers = union(s.Consumers, r.Consumers)
			switch run := r.Run; {
			case run == nil:
			case !r.yields():
				s.Busy[r.Name] = busy(r).Text
			default:
				s.Taken = append(s.Taken, fmt.Sprintf("rotation %s of %s (%s, in %s)", run.Rotation, Label(r.Kind, r.Name), run.Trigger, run.Phase))
			}
		}
	}
	slices.Sort(s.Consumers)
	return s, nil
}

// Foresight is what an emergency of a role would meet. Nothing was changed.
type Foresight struct {
	Report
	// Ends are the numbers of the versions that would be refused.
	Ends []int
}

// Foresee asks the targets of a scene's roles what an emergency would meet, and the
// clusters of their consumers what it would do there.
func (e *Engine) Foresee(ctx context.Context, s *Scene, what Emergency) (roles []Foresight, consumers map[string]Survey, err error) {
	asked := make([]*Role, len(s.Roles))
	for i, r := range s.Roles {
		asked[i] = r.clone()
		asked[i].Run = &Run{Trigger: Urgent, Phase: Preflight}
		asked[i].Consumers = nil // they are asked once, however many roles they have
	}
	reports, err := e.examine(ctx, asked)
	if err != nil {
		return nil, nil, err
	}
	for i, rep := range reports {
		f := Foresight{Report: rep}
		f.Role = s.Roles[i]
		for _, v := range f.Role.Versions {
			if !v.Refused.IsZero() || f.Role.decrypts() {
				continue
			}
			if v.Stage != version.Failed && v.Stage != version.Compromised || f.Role.Connection != "" {
				f.Ends = append(f.Ends, v.Number)
			}
		}
		roles = append(roles, f)
	}
	return roles, e.radius(ctx, s.Consumers, what), nil
}

// radius asks clusters what an emergency would do at consumers, all at once.
func (e *Engine) radius(ctx context.Context, consumers []string, what Emergency) map[string]Survey {
	found := make([]Survey, len(consumers))
	g := errgroup.Group{}
	g.SetLimit(parallelConsumers)
	for i, c := range consumers {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, surveyTimeout)
			defer cancel()
			err := e.guardedPublication(func() error { found[i] = e.o.Consumers.Radius(ctx, c, what); return nil })
			if err != nil {
				found[i].Err = err
			}
			return nil
		})
	}
	_ = g.Wait()
	out := map[string]Survey{}
	for i, c := range consumers {
		out[c] = found[i]
	}
	return out
}
