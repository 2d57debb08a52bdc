package ha_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// play leads the cluster through a script.
type play struct {
	*stage
	drivers *drivers
	done    []happened
	lost    []string
	kept    int // connections and messages that did not come through to a server
}

// happened is an event, and what it met.
type happened struct {
	event
	met string // where its role stood
	at  time.Time
	// old is how long a node that was cut off took itself for the active one.
	old time.Duration
	// until is when a rotation was seen to complete.
	until time.Duration
}

func (h happened) String() string {
	text := fmt.Sprintf("%s; it was in %s; a rotation completed after %s", h.event, h.met, h.until.Round(time.Millisecond))
	if h.sort == cutPeers {
		text += fmt.Sprintf("; the old node was active for %s", h.old.Round(time.Millisecond))
	}
	return text
}

// event waits for the moment that e is aimed at, lets it happen, and returns when
// the cluster is whole, rotations go on, and nothing was lost.
func (p *play) event(ctx context.Context, e event) error {
	if err := p.touchQuiet(ctx); err != nil {
		return err
	}
	active, err := p.cluster.Active(ctx)
	if err != nil {
		return err
	}
	h := happened{event: e, met: p.awaitMoment(ctx, active, e.aim)}
	p.delay(e.role, e.late)
	h.at = time.Now()
	if h.old, err = p.happen(ctx, active, e); err != nil {
		return err
	}
	p.delay(e.role, 0)
	if err := p.awaitWhole(ctx); err != nil {
		return err
	}
	end, err := p.drivers.awaitCompleted(ctx, h.at)
	if err != nil {
		return err
	}
	h.until = end.Sub(h.at)
	p.done = append(p.done, h)
	return p.look(ctx)
}

// delay makes everything that is sent to the server of a role late.
func (p *play) delay(name string, by time.Duration) {
	for _, r := range p.roles {
		if r.name == name {
			for _, proxy := range p.toServer[r.kind] {
				proxy.SetLatency(by, 0)
			}
		}
	}
}

// before are the phases that come before those that a server can make last.
var before = map[rotation.Phase]rotation.Phase{
	rotation.Apply: rotation.Preflight, rotation.Test: rotation.Preflight, rotation.Retire: rotation.Grace,
}

// awaitMoment returns when a role stands where it is aimed at, or has not for a
// while, and says where it stands. Phases that are over before they are seen are
// made to last by the server.
func (p *play) awaitMoment(ctx context.Context, active *servers.Vault, a aim) (met string) {
	within := 30 * time.Second
	if a.phase == rotation.Publish {
		within = 12 * time.Second // no server is asked
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if a.phase == rotation.Preflight {
		p.delay(a.role, 100*time.Millisecond)
	}
	c := active.Client()
	for met = "unknown"; ctx.Err() == nil; wait(ctx, 2*time.Millisecond) {
		r := &rotation.Role{}
		if err := p.rawAt(ctx, c, "role/"+a.role, r); err != nil {
			continue
		}
		met = phaseOf(r)
		if r.Run == nil || r.Run.Back {
			continue
		}
		// A change of a server is met while it is under way.
		underWay := r.Run.Attempt != nil || r.Connection == "" || a.phase != rotation.Apply && a.phase != rotation.Retire
		if r.Run.Phase == a.phase && underWay {
			return met
		}
		if earlier, ok := before[a.phase]; ok && r.Run.Phase == earlier {
			p.delay(a.role, 400*time.Millisecond)
		}
	}
	return met
}

func phaseOf(r *rotation.Role) string {
	switch {
	case r.Run == nil:
		return "idle"
	case r.Run.Attempt != nil && time.Since(r.Run.Attempt.Deadline.Add(-kind.CallTimeout)) > 2*time.Second:
		return "waiting for a late call"
	case r.Run.Back:
		return "way back"
	case r.Run.Attempt != nil:
		return string(r.Run.Phase) + " (call under way)"
	}
	return string(r.Run.Phase)
}

func (p *play) happen(ctx context.Context, active *servers.Vault, e event) (old time.Duration, err error) {
	switch e.sort {
	case failover:
		return 0, p.failOver(ctx, active, e)
	case stepDown:
		return 0, p.stepDown(ctx, active)
	case seal:
		return 0, p.seal(ctx, active, e)
	case cutPeers:
		return p.cutPeers(ctx, active, e)
	case cutTargets:
		p.cluster.CutTargets(active, e.silent)
		wait(ctx, e.lasts)
		p.kept += p.cluster.HealTargets()
		return 0, nil
	case pluginKilled:
		killed, err := active.KillPlugin()
		if err == nil && killed == 0 {
			err = errors.New("no plugin ran")
		}
		return 0, err
	case pluginReload:
		return 0, p.reload(ctx, &api.ReloadPluginInput{Plugin: servers.PluginName}, e)
	case mountReload:
		return 0, p.reload(ctx, &api.ReloadPluginInput{Mounts: []string{mountPath + "/"}}, e)
	case upgrade:
		return 0, p.upgrade(ctx, e)
	}
	return 0, fmt.Errorf("unknown event %q", e.sort)
}

func (p *play) failOver(ctx context.Context, active *servers.Vault, e event) error {
	if err := active.Kill(); err != nil {
		return err
	}
	if _, err := p.cluster.Active(ctx, active); err != nil {
		return err
	}
	wait(ctx, e.lasts)
	return active.Restart(ctx)
}

func (p *play) stepDown(ctx context.Context, active *servers.Vault) error {
	if err := active.Client().Sys().StepDownWithContext(ctx); err != nil {
		return err
	}
	// It may be elected again, which nobody needs to see.
	_ = until(ctx, 15*time.Second, func(ctx context.Context) error {
		if active.IsActive(ctx) {
			return errors.New("still active")
		}
		return nil
	})
	_, err := p.cluster.Active(ctx)
	return err
}

func (p *play) seal(ctx context.Context, active *servers.Vault, e event) error {
	if err := active.Client().Sys().SealWithContext(ctx); err != nil {
		return err
	}
	if _, err := p.cluster.Active(ctx, active); err != nil {
		return err
	}
	wait(ctx, e.lasts)
	return active.Unseal(ctx)
}

// cutPeers takes the active node off the network of the cluster. Its plugin still
// reaches the targets, and clients still reach it. old is how long it took itself
// for the active node.
func (p *play) cutPeers(ctx context.Context, active *servers.Vault, e event) (old time.Duration, err error) {
	began := time.Now()
	p.cluster.CutPeers(active, e.silent)
	defer p.cluster.HealPeers(active)
	var both sync.WaitGroup
	both.Go(func() {
		_ = until(ctx, time.Minute, func(ctx context.Context) error {
			if active.IsActive(ctx) {
				return errors.New("still active")
			}
			return nil
		})
		old = time.Since(began)
	})
	_, err = p.cluster.Active(ctx, active)
	both.Wait()
	wait(ctx, e.lasts)
	return old, err
}

func (p *play) reload(ctx context.Context, input *api.ReloadPluginInput, e event) error {
	if e.cluster {
		input.Scope = "global"
	}
	return p.ask(ctx, func(ctx context.Context, c *api.Client) error {
		_, err := c.Sys().ReloadPluginWithContext(ctx, input)
		return err
	})
}

// upgrade installs another version as docs/operations.md says, and goes back.
func (p *play) upgrade(ctx context.Context, e event) error {
	for _, to := range []string{newer, older} {
		err := p.ask(ctx, func(ctx context.Context, c *api.Client) error {
			if err := c.Sys().TuneMountAllowNilWithContext(ctx, mountPath, api.TuneMountConfigInput{PluginVersion: &to}); err != nil {
				return err
			}
			_, err := c.Sys().ReloadPluginWithContext(ctx, &api.ReloadPluginInput{Plugin: servers.PluginName, Scope: "global"})
			return err
		})
		if err != nil {
			return err
		}
		err = p.ask(ctx, func(ctx context.Context, c *api.Client) error {
			mounts, err := c.Sys().ListMountsWithContext(ctx)
			if err == nil && mounts[mountPath+"/"].RunningVersion != to {
				err = fmt.Errorf("%s runs, not %s", mounts[mountPath+"/"].RunningVersion, to)
			}
			return err
		})
		if err != nil {
			return err
		}
		wait(ctx, e.lasts)
	}
	return nil
}

// awaitWhole returns when every node is unsealed and knows the same active one.
func (s *stage) awaitWhole(ctx context.Context) error {
	return until(ctx, 8*time.Minute, func(ctx context.Context) error {
		leader := ""
		for i, v := range s.cluster.Nodes {
			ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
			answer, err := s.root[i].Sys().LeaderWithContext(ctx)
			cancel()
			switch {
			case err != nil:
				return fmt.Errorf("%s: %w", v.Name(), err)
			case answer.LeaderAddress == "":
				return fmt.Errorf("%s knows no active node", v.Name())
			case leader != "" && leader != answer.LeaderAddress:
				return fmt.Errorf("%s follows another node", v.Name())
			}
			leader = answer.LeaderAddress
		}
		for _, v := range s.cluster.Nodes {
			if v.Address == leader && v.IsActive(ctx) {
				return nil
			}
		}
		return errors.New("the active node is not ready")
	})
}

// touchQuiet makes sure that the other mount has an instance in the plugin.
func (s *stage) touchQuiet(ctx context.Context) error {
	return s.ask(ctx, func(ctx context.Context, c *api.Client) error {
		_, err := c.Logical().ReadWithContext(ctx, quietMount+"/config")
		return err
	})
}

// leaderWatch measures how long no node is active.
type leaderWatch struct {
	stop    func()
	longest time.Duration
	times   int
}

func (s *stage) watchLeader() *leaderWatch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &leaderWatch{}
	var watching sync.WaitGroup
	w.stop = func() { cancel(); watching.Wait() }
	watching.Go(func() {
		last, current := time.Now(), 0
		for without := false; ctx.Err() == nil; wait(ctx, 50*time.Millisecond) {
			found := false
			for i := range s.cluster.Nodes {
				n := (current + i) % len(s.cluster.Nodes)
				if found = s.cluster.Nodes[n].IsActive(ctx); found {
					current = n
					break
				}
			}
			switch {
			case found && without:
				w.longest, w.times, without = max(w.longest, time.Since(last)), w.times+1, false
			case !found:
				without = true
			}
			if found {
				last = time.Now()
			}
		}
	})
	return w
}
