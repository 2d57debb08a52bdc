package harmonyflow

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
)

// deliverer is rotation.Deliverer: it reads a consumer at each call, so that a change
// of it counts at once, and has its cluster do the step.
type deliverer struct {
	consumers *consumer.Store
	clusters  consumer.Clusters
}

var _ rotation.Deliverer = deliverer{}

// syncPatience is how long External Secrets may take.
const syncPatience = 2 * time.Minute

func (d deliverer) Survey(ctx context.Context, name, role string) rotation.Survey {
	c, err := d.consumers.Must(ctx, name)
	if err != nil {
		return rotation.Survey{Err: err}
	}
	if !c.AllowsRole(role) {
		return rotation.Survey{Err: kind.Definitely("it does not allow role %q; add it to its allowed_roles", role)}
	}
	f := d.clusters.Preflight(ctx, c)
	return rotation.Survey{Err: f.Err, Problems: f.Problems, Notes: f.Notes, Plan: f.Plan}
}

func (d deliverer) Radius(ctx context.Context, name string, what rotation.Emergency) rotation.Survey {
	c, err := d.consumers.Must(ctx, name)
	if err != nil {
		return rotation.Survey{Err: err}
	}
	f := d.clusters.Radius(ctx, c, *emergencyAt(c, &what))
	return rotation.Survey{Err: f.Err, Notes: f.Notes, Plan: f.Plan}
}

// emergencyAt is what an emergency does at one consumer; nil where there is none.
func emergencyAt(c *consumer.Consumer, what *rotation.Emergency) *consumer.Emergency {
	switch {
	case what == nil:
		return nil
	case what.NoHooks:
		return &consumer.Emergency{Whole: slices.Contains(what.Namespaces, c.Namespace), Hooks: []string{}}
	case len(what.Hooks) == 0:
		return &consumer.Emergency{Whole: slices.Contains(what.Namespaces, c.Namespace)}
	}
	return &consumer.Emergency{Whole: slices.Contains(what.Namespaces, c.Namespace), Hooks: what.Hooks}
}

func (d deliverer) Deliver(ctx context.Context, step rotation.Phase, what rotation.Delivery) rotation.Progress {
	c, err := d.consumers.Must(ctx, what.Consumer)
	if err != nil {
		return rotation.Progress{Err: err}
	}
	call := map[rotation.Phase]func(context.Context, *consumer.Consumer, consumer.Delivery) consumer.Progress{
		rotation.Sync: d.clusters.Sync, rotation.Restart: d.clusters.Restart, rotation.Check: d.clusters.Check,
	}[step]
	p := call(ctx, c, consumer.Delivery{
		ID: what.ID, Since: what.Since, Holds: values(what.Holds), Lacks: values(what.Lacks), Undone: values(what.Undone),
		Emergency: emergencyAt(c, what.Emergency),
	})
	return rotation.Progress{Done: p.Done, Err: p.Err, Waits: p.Waits, Told: p.Told, Seen: p.Seen}
}

func (d deliverer) Look(ctx context.Context, what rotation.Delivery) *seen.Consumer {
	c, err := d.consumers.Must(ctx, what.Consumer)
	if err != nil {
		return &seen.Consumer{At: time.Now().UTC(), Error: err.Error()}
	}
	return d.clusters.Look(ctx, c, consumer.Delivery{ID: what.ID, Since: what.Since, Holds: values(what.Holds), Lacks: values(what.Lacks), Sure: what.Sure})
}

func values(shown []rotation.Shown) []consumer.Value {
	out := make([]consumer.Value, len(shown))
	for i, s := range shown {
		out[i] = consumer.Value{Role: s.Role, Field: s.Field, Secret: s.Value}
	}
	return out
}

// Patience is how long a step may take: each wave the time that the consumer gives a
// rollout, and a check that and the time for which it has to last.
func (d deliverer) Patience(ctx context.Context, name string, step rotation.Phase) (time.Duration, error) {
	c, err := d.consumers.Must(ctx, name)
	if err != nil {
		return 0, err
	}
	longest := time.Duration(0)
	for _, check := range c.Checks {
		longest = max(longest, check.Timeout)
	}
	switch step {
	case rotation.Restart:
		return c.RolloutTimeout * time.Duration(max(1, len(c.Workloads))), nil
	case rotation.Check:
		return c.RolloutTimeout + c.Stabilization + longest, nil
	default:
		return syncPatience, nil
	}
}

// consumerUser names a role that has a consumer; "" when none does.
func (b *backend) consumerUser(ctx context.Context, name string) (string, error) {
	return b.engine.Store().FirstRole(ctx, func(r *rotation.Role) bool { return slices.Contains(r.Consumers, name) })
}

// mayCall says which hosts checks may send requests to.
func (b *backend) mayCall(host string) bool {
	return slices.ContainsFunc(b.engine.Config().AllowedHosts, func(allowed string) bool {
		suffix, wild := strings.CutPrefix(allowed, "*.")
		return strings.EqualFold(allowed, host) || wild && strings.HasSuffix(strings.ToLower(host), "."+strings.ToLower(suffix))
	})
}
