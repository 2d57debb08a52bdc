package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// performance is one run of the story.
type performance struct {
	*stage
	pool    *pool
	began   time.Time
	moments []moment
}

// moment is a line of the closing timeline.
type moment struct {
	after time.Duration
	what  string
	tried int64
}

// play tells the whole story and proves it.
func play(ctx context.Context, s *screen) (err error) {
	s.print(bold, "HarmonyFlow: a real Vault rotates a live secret, and nobody notices")
	s.pass("building the plugin, starting Vault and a Redis cluster of six …")
	st, err := setUp(ctx, s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	p := &performance{stage: st}
	p.prologue()
	s.scene("Say what there is")
	if err := p.introduce(ctx); err != nil {
		return err
	}
	if err := p.open(ctx); err != nil {
		return err
	}
	defer p.pool.stop()
	for _, scene := range []struct {
		title string
		act   func(context.Context) error
	}{
		{"Rotate", p.rotate},
		{"Retire the old one", p.retire},
		{"Kill the plugin in the middle of the next rotation", p.crash},
		{"Retire again", p.retire},
		{"Put the old one back", p.rollBack},
	} {
		s.scene(scene.title)
		if err := scene.act(ctx); err != nil {
			return err
		}
		if err := p.watch(ctx); err != nil {
			return err
		}
	}
	p.pool.stop()
	if err := p.pool.verdict(); err != nil {
		return err
	}
	p.epilogue()
	return nil
}

func (p *performance) prologue() {
	p.blank()
	if p.redis == nil {
		p.say("Vault %s with the plugin at harmonyflow/: private, on loopback, gone when this ends.", p.vaultVersion)
		p.say("There is no redis-server on this machine, so an API key is rotated instead: a secret")
		p.say("that no server has to be told about.")
	} else {
		p.say("Vault %s with the plugin at harmonyflow/, and a Redis %s cluster of three primaries", p.vaultVersion, p.redis.version)
		p.say("and three replicas: private, on loopback, gone when this ends.")
	}
	p.say("What follows a $ is really typed. Answers are cut to the lines that matter, and secrets")
	p.say("to their first %d characters. What follows a ✓ was just tried and found true.", shown)
}

// open lets the clients in.
func (p *performance) open(ctx context.Context) (err error) {
	p.began = time.Now()
	if p.pool, err = startPool(ctx, p.target, p.creds); err != nil {
		return err
	}
	if err := p.pool.moved(ctx, 1); err != nil {
		p.pool.stop()
		return fmt.Errorf("clients cannot log in with version 1: %w", err)
	}
	p.mark("clients log in with version 1")
	p.blank()
	p.check("%d clients log in from now on, about 200 times a second, each time on a fresh", poolSize)
	p.say("  connection to %s, with what creds/%s serves", p.anywhere(), role)
	return p.watch(ctx)
}

// watchFor is how long the clients go on after each scene before the next.
const watchFor = 1500 * time.Millisecond

// watch lets clients log in for a while and returns an error if one was
// refused.
func (p *performance) watch(ctx context.Context) error {
	end := time.Now().Add(watchFor)
	return until(ctx, func() (bool, error) {
		p.progress()
		return time.Now().After(end), p.pool.verdict()
	})
}

func (p *performance) progress() {
	p.pass("logins tried: %s, refused: %s", grouped(p.pool.tried.Load()), grouped(p.pool.refused.Load()))
}

// mark adds a line to the closing timeline.
func (p *performance) mark(format string, args ...any) {
	p.moments = append(p.moments, moment{after: time.Since(p.began), what: fmt.Sprintf(format, args...), tried: p.pool.tried.Load()})
}

func (p *performance) rotate(ctx context.Context) error {
	old, err := p.creds(ctx)
	if err != nil {
		return err
	}
	if _, err := p.run(ctx, []string{p.kind() + "/" + role, "state", "follow"}, "write", "-f", "harmonyflow/rotate/"+p.kind()); err != nil {
		return err
	}
	p.mark("rotate: version %d is served", old.Version+1)
	p.blank()
	if _, err := p.run(ctx, []string{"password", "value", "previous_password", "previous_value", "version"}, "read", "harmonyflow/creds/"+role); err != nil {
		return err
	}
	p.blank()
	return p.both(ctx, old)
}

// both shows that the served and the earlier credential are accepted, and that
// every client has moved on to the served one.
func (p *performance) both(ctx context.Context, old credential) error {
	now, err := p.creds(ctx)
	if err != nil {
		return err
	}
	if now.Secret == old.Secret || now.Version != old.Version+1 {
		return fmt.Errorf("version %d is served after version %d, and should be another secret, one number up", now.Version, old.Version)
	}
	for _, c := range []credential{now, old} {
		if err := p.accepted(ctx, c, true); err != nil {
			return err
		}
	}
	p.check("%s accepts %s (version %d), and %s (version %d) as well", p.everywhere(), mask(now.Secret), now.Version, mask(old.Secret), old.Version)
	if err := p.pool.moved(ctx, now.Version); err != nil {
		return fmt.Errorf("not every client moved on to version %d: %w", now.Version, err)
	}
	p.mark("all clients have moved on to version %d", now.Version)
	p.check("all %d clients have moved on to version %d, none was refused", poolSize, now.Version)
	return nil
}

func (p *performance) anywhere() string {
	if p.target.places() > 1 {
		return "any " + p.target.noun()
	}
	return "the " + p.target.noun()
}

func (p *performance) everywhere() string {
	if n := p.target.places(); n > 1 {
		return fmt.Sprintf("each of %d %ss", n, p.target.noun())
	}
	return "the " + p.target.noun()
}

// accepted logs in at every place and returns an error unless each answers as
// expected.
func (p *performance) accepted(ctx context.Context, c credential, expected bool) error {
	for i := range p.target.places() {
		err := p.target.login(ctx, i, c)
		switch {
		case err != nil && !errors.Is(err, errRefused):
			return fmt.Errorf("trying version %d: %w", c.Version, err)
		case (err == nil) != expected:
			return fmt.Errorf("version %d (%s) accepted at %s %d: %t, and should be %t", c.Version, mask(c.Secret), p.target.noun(), i+1, err == nil, expected)
		}
	}
	return nil
}

func (p *performance) retire(ctx context.Context) error {
	now, err := p.creds(ctx)
	if err != nil {
		return err
	}
	old := credential{Username: now.Username, Secret: now.Previous, Version: now.Version - 1}
	if _, err := p.run(ctx, []string{p.kind() + "/" + role}, "write", "-f", "harmonyflow/retire/"+p.kind()+"/"+role); err != nil {
		return err
	}
	p.mark("retire: version %d is refused", old.Version)
	if err := p.accepted(ctx, old, false); err != nil {
		return err
	}
	if err := p.accepted(ctx, now, true); err != nil {
		return err
	}
	p.blank()
	p.check("%s refuses %s (version %d) and accepts %s (version %d)", p.everywhere(), mask(old.Secret), old.Version, mask(now.Secret), now.Version)
	return nil
}

// key lets a repeated request find the rotation that the first one started.
const key = "idempotency_key=change-4711"

// crash kills the plugin while nodes hold a password that is not served yet,
// and shows that the rotation finishes without anybody's help.
func (p *performance) crash(ctx context.Context) error {
	if p.redis == nil {
		return p.crashWithoutServer(ctx)
	}
	old, err := p.creds(ctx)
	if err != nil {
		return err
	}
	p.redis.proxy.LoseReplyTo("setuser")
	cli, err := p.begin(ctx, "write", "harmonyflow/rotate/redis", key)
	if err != nil {
		return err
	}
	id, err := p.caught(ctx, old)
	if err != nil {
		_ = cli.command.Process.Kill()
		_, _ = cli.end()
		return err
	}
	killed := time.Now()
	if err := p.kill(); err != nil {
		return err
	}
	p.mark("kill -9 in the middle of a rotation")
	p.redis.proxy.Heal()
	out, err := cli.end()
	if err == nil {
		return errors.New("the command whose plugin was killed succeeded all the same")
	}
	p.output(pick(out, "Error ", "Code: "))
	p.blank()
	p.say("Vault starts the plugin again when a client asks for something. The new one waits until")
	p.say("the call that the old one was in can no longer arrive, asks every node what it accepts,")
	p.say("and goes on from there:")
	if err := p.finish(ctx, id); err != nil {
		return err
	}
	p.mark("it finished by itself: version %d is served", old.Version+1)
	p.blank()
	p.check("%.0f s after the crash the rotation is done; nobody repeated the command", time.Since(killed).Seconds())
	if err := p.both(ctx, old); err != nil {
		return err
	}
	return p.repeat(ctx, id)
}

// repeat types the command once more.
func (p *performance) repeat(ctx context.Context, id string) error {
	p.blank()
	out, err := p.run(ctx, []string{p.kind() + "/" + role, "rotation_id"}, "write", "harmonyflow/rotate/"+p.kind(), key)
	if err != nil {
		return err
	}
	if !strings.Contains(out, id) {
		return fmt.Errorf("the repeated command did not answer with rotation %s:\n%s", id, out)
	}
	p.blank()
	if id == "" {
		p.check("one rotation came of it")
	} else {
		p.check("the command once more, with the same key, answers with the same rotation")
	}
	return nil
}

// crashWithoutServer cannot catch a rotation in the middle, because one that
// has no server to tell takes a few milliseconds: it kills the plugin right
// after the command.
func (p *performance) crashWithoutServer(ctx context.Context) error {
	old, err := p.creds(ctx)
	if err != nil {
		return err
	}
	cli, err := p.begin(ctx, "write", "harmonyflow/rotate/"+p.kind(), key)
	if err != nil {
		return err
	}
	if err := p.kill(); err != nil {
		return err
	}
	p.mark("kill -9 around a rotation")
	_, _ = cli.end() // it may have come through before
	p.say("(The plugin is killed as the command comes in; whichever of them was faster, the same")
	p.say("command with the same key makes one rotation of both.)")
	if err := p.repeat(ctx, ""); err != nil {
		return err
	}
	return p.both(ctx, old)
}

// caught waits until the rotation is seen to be in the middle: nodes have the
// new password already, and it is not served.
func (p *performance) caught(ctx context.Context, old credential) (id string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err = until(ctx, func() (bool, error) {
		n, err := p.redis.passwords(ctx, 0, "app")
		return n == 2, err
	})
	if err != nil {
		return "", fmt.Errorf("the rotation did not get to the first node: %w", err)
	}
	reader := p.vault.Client().Logical()
	secret, err := reader.ReadWithContext(ctx, "harmonyflow/roles/"+role)
	if err != nil {
		return "", err
	}
	id, _ = secret.Data["rotation_id"].(string)
	run, err := reader.ReadWithContext(ctx, "harmonyflow/rotations/"+id)
	if err != nil {
		return "", err
	}
	if run == nil || run.Data["phase"] != "apply" {
		return "", fmt.Errorf("rotation %q is not in phase apply", id)
	}
	if served, err := p.creds(ctx); err != nil || served != old {
		return "", fmt.Errorf("version %d is served in phase apply, and version %d was: %w", served.Version, old.Version, err)
	}
	p.check("caught in phase apply: nodes hold the new password, a proxy of this demo holds one")
	p.say("  reply back, creds/%s still serves the old password, and now:", role)
	return id, nil
}

func (p *performance) kill() error {
	pids, err := p.vault.PluginPIDs()
	if err != nil {
		return err
	}
	if len(pids) != 1 {
		return fmt.Errorf("there are %d processes of the plugin, and not one", len(pids))
	}
	p.command("kill", "-9", fmt.Sprint(pids[0]))
	_, err = p.vault.KillPlugin()
	return err
}

// finish waits until the rotation has promoted, which nobody helps it with.
func (p *performance) finish(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	reader := p.vault.Client().Logical()
	return until(ctx, func() (bool, error) {
		p.progress()
		secret, err := reader.ReadWithContext(ctx, "harmonyflow/rotations/"+id)
		if err != nil || secret == nil {
			return false, ctx.Err() // the plugin is being started again
		}
		switch state := secret.Data["state"]; state {
		case "grace":
			return true, nil
		case "running", "waiting":
			return false, p.pool.verdict()
		default:
			return false, fmt.Errorf("rotation %s is %v after the crash", id, state)
		}
	})
}

func (p *performance) rollBack(ctx context.Context) error {
	was, err := p.creds(ctx)
	if err != nil {
		return err
	}
	if _, err := p.run(ctx, []string{p.kind() + "/" + role}, "write", "harmonyflow/rollback/"+p.kind()+"/"+role, `reason=one client was forgotten`); err != nil {
		return err
	}
	p.mark("rollback: version %d is served, the secret of version %d", was.Version+1, was.Version-1)
	p.blank()
	if err := p.both(ctx, was); err != nil {
		return err
	}
	p.blank()
	out, err := p.run(ctx, []string{"node ", "ok", "summary"}, "read", "harmonyflow/verify/"+p.kind()+"/"+role)
	if err == nil && !okLine.MatchString(out) {
		return fmt.Errorf("verify is not content:\n%s", out)
	}
	return err
}

var okLine = regexp.MustCompile(`(?m)^ok +true$`)

func (p *performance) epilogue() {
	p.blank()
	p.print(bold, "Summary")
	p.blank()
	p.say(" time    logins  what")
	for _, m := range p.moments {
		p.say("%4.1f s  %7s  %s", m.after.Seconds(), grouped(m.tried), m.what)
	}
	p.blank()
	p.say("logins tried    %7s", grouped(p.pool.tried.Load()))
	p.say("logins refused  %7s", grouped(p.pool.refused.Load()))
	p.blank()
	p.print(bold, "Next")
	p.blank()
	p.say("make dev    the same servers, left running, with the lines to paste")
	p.say("make test   what this project claims, proven")
	p.say("README.md   a tour of the commands")
}

// develop starts the servers, says how to use them, and waits.
func develop(ctx context.Context, s *screen) (err error) {
	s.print(bold, "HarmonyFlow: servers to play with")
	s.pass("building the plugin, starting Vault and a Redis cluster of six …")
	st, err := setUp(ctx, s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	s.blank()
	if err := st.introduce(ctx); err != nil {
		return err
	}
	export := fmt.Sprintf("export VAULT_ADDR=%s VAULT_TOKEN=%s", st.vault.Address, st.vault.Token)
	if st.redis != nil {
		host, port, err := net.SplitHostPort(st.redis.set.Nodes[0].Addr)
		if err != nil {
			return err
		}
		export += fmt.Sprintf(" REDIS_HOST=%s REDIS_PORT=%s", host, port)
	}
	if _, err := exec.LookPath("vault"); err != nil {
		export += " PATH=" + filepath.Dir(st.vault.Binary()) + ":$PATH"
	}
	s.blank()
	s.print(bold, "In another terminal")
	s.blank()
	s.say("%s", export)
	s.say("vault write -f harmonyflow/rotate/%s", st.kind())
	s.say("vault read harmonyflow/creds/%s", role)
	s.blank()
	if st.redis != nil {
		s.say("Redis is at %s, its admin %s with password %s.", st.redis.set.Nodes[0].Addr, servers.RedisAdmin, servers.RedisAdminPassword)
	}
	s.say("docs/tutorial.md goes on from here.")
	s.say("Vault's log is %s. Ctrl-C ends it all.", st.vault.LogPath)
	<-ctx.Done()
	return nil
}
