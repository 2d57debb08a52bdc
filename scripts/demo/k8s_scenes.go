package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// delivery is one run of the story of a cluster.
type delivery struct {
	*clusterStage
	rotated, wentBack time.Duration // how long each took
}

// playCluster tells the story of a cluster, and proves it.
func playCluster(ctx context.Context, s *screen) error {
	_, err := deliver(ctx, s)
	return err
}

func deliver(ctx context.Context, s *screen) (d *delivery, err error) {
	s.print(bold, "HarmonyFlow on Kubernetes: a rotation reaches every pod, or everything goes back")
	s.pass("building the plugin, starting Vault, Redis, Kubernetes and External Secrets …")
	st, err := setUpCluster(ctx, s)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	d = &delivery{clusterStage: st}
	d.prologue()
	for _, scene := range []struct {
		title string
		act   func(context.Context) error
	}{
		{"An application that runs already", d.deploy},
		{"Let the engine in, and say who uses the secret", d.introduce},
		{"Rotate: every pod moves", d.rotate},
		{"Retire the old password", d.retire},
		{"Rotate again, to a password that pods crash on", d.crash},
	} {
		s.scene(scene.title)
		if err := scene.act(ctx); err != nil {
			return nil, err
		}
		if err := d.goOn(ctx); err != nil {
			return nil, err
		}
	}
	d.sim.Stop() // no login is counted after the summary
	d.epilogue()
	return d, nil
}

func (d *delivery) prologue() {
	d.blank()
	d.say("Vault %s with the plugin at harmonyflow/, Redis %s, Kubernetes %s and External", d.vaultVersion, d.redisVersion, d.kubeVersion)
	d.say("Secrets: all of them real and private, on loopback, gone when this ends. Only no container")
	d.say("runs: for each, this demo has a client that takes its password from the Kubernetes Secret")
	d.say("when the pod starts, as one does with environment variables, and logs in to Redis 20 times")
	d.say("a second with it.")
	d.say("What follows a $ is really typed. Answers are cut to the lines that matter, and secrets")
	d.say("to their first %d characters. What follows a ✓ was just tried and found true.", shown)
}

// admin is the connection and the role, whose document External Secrets reads.
func (d *delivery) admin(ctx context.Context) error {
	if _, err := d.run(ctx, []string{"summary"}, "write", "harmonyflow/connections/cache",
		"type=redis", "addresses="+d.node.Addr, "username="+servers.RedisAdmin, "password=@"+adminFile, "allowed_roles="+role); err != nil {
		return err
	}
	_, err := d.run(ctx, []string{"redis/" + role}, "write", "harmonyflow/roles/"+role,
		"kind=redis", "connection=cache", "username=app", "initial_password=@"+appFile,
		"document="+secretName, "username_field=username", "field=password")
	return err
}

// deploy starts the application, on what the engine serves.
func (d *delivery) deploy(ctx context.Context) error {
	if err := d.admin(ctx); err != nil {
		return err
	}
	d.blank()
	if err := d.cluster.Namespace(ctx, namespace); err != nil {
		return err
	}
	if err := d.kubectl(ctx, "apply", "-f", manifestFile); err != nil {
		return err
	}
	d.say("(an ExternalSecret %s that reads harmonyflow/data/%s, a Deployment %s)", secretName, secretName, workload)
	if err := d.cluster.WaitExternalSecret(ctx, namespace, secretName); err != nil {
		return err
	}
	if err := d.cluster.WaitRollout(ctx, "deployment", namespace, workload); err != nil {
		return err
	}
	c, err := d.creds(ctx)
	if err != nil {
		return err
	}
	pods, err := d.pods(ctx)
	if err != nil {
		return err
	}
	d.blank()
	d.showPods(pods)
	if err := allRun(pods, c.Secret, time.Time{}); err != nil {
		return err
	}
	d.check("%d pods run with %s (version %d), and log in from now on", len(pods), mask(c.Secret), c.Version)
	return nil
}

// introduce lets the engine into the cluster, and tells it who uses the secret.
func (d *delivery) introduce(ctx context.Context) error {
	if err := d.cluster.Namespace(ctx, "vault"); err != nil {
		return err
	}
	const dir = "deploy/kubernetes/"
	if err := d.kubectl(ctx, "apply", "-f", dir+"serviceaccount.yaml", "-f", dir+"role.yaml", "-f", dir+"policy.yaml"); err != nil {
		return err
	}
	d.say("(a service account that may restart %s, have %s synced, and nothing else)", workload, secretName)
	if err := d.kubectl(ctx, "create", "token", "harmonyflow", "-n", "vault", "--duration", "24h", ">", "token"); err != nil {
		return err
	}
	if _, err := d.run(ctx, []string{"summary"}, "write", "harmonyflow/connections/k8s",
		"type=kubernetes", "host="+d.cluster.Host, "ca_cert=@ca.crt", "token=@token", "allowed_roles="+role); err != nil {
		return err
	}
	if _, err := d.run(ctx, nil, "write", "harmonyflow/consumers/"+workload,
		"connection=k8s", "namespace="+namespace, "external_secrets="+secretName,
		`workloads=[[{"kind":"Deployment","name":"`+workload+`"}]]`,
		"stabilization=3s", "rollout_timeout=1m", "allowed_roles="+role); err != nil {
		return err
	}
	if _, err := d.run(ctx, nil, "write", "harmonyflow/roles/"+role, "consumers="+workload); err != nil {
		return err
	}
	d.blank()
	d.say("That is all. What the next rotation would do, and that it may:")
	d.blank()
	out, err := d.run(ctx, []string{"redis/" + role, "state"}, "write", "harmonyflow/rotate/redis/"+role, "dry_run=true")
	if err == nil && !strings.Contains(out, workload) {
		err = fmt.Errorf("the plan does not name %s:\n%s", workload, hide(out))
	}
	return err
}

// start types the command that rotates, and returns the id.
func (d *delivery) start(ctx context.Context) (string, error) {
	out, err := d.run(ctx, []string{"follow", "redis/" + role, "state"}, "write", "-f", "harmonyflow/rotate/redis/"+role)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if id, ok := strings.CutPrefix(line, "rotation_id"); ok {
			return strings.TrimSpace(id), nil
		}
	}
	return "", fmt.Errorf("the answer has no rotation_id:\n%s", hide(out))
}

// follow shows the timeline of a rotation as it grows, until the rotation is in
// state end.
func (d *delivery) follow(ctx context.Context, id, end string, watch func() error) error {
	d.blank()
	d.say("What `vault read harmonyflow/rotations/…` tells, as it happens:")
	d.blank()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	told := 0
	return until(ctx, func() (bool, error) {
		d.progress()
		if err := watch(); err != nil {
			return false, err
		}
		data, err := d.vault.Client().Logical().ReadWithContext(ctx, "harmonyflow/rotations/"+id)
		if err != nil {
			return false, err
		}
		if data == nil {
			return false, fmt.Errorf("rotations/%s is not there", id)
		}
		timeline, _ := data.Data["timeline"].([]any)
		for ; told < len(timeline); told++ {
			d.moment(fmt.Sprint(timeline[told]))
		}
		switch state := data.Data["state"]; state {
		case end:
			return true, nil
		case "running", "waiting", "rolling_back":
			return false, nil
		default:
			return false, fmt.Errorf("rotation %s is %v, and should become %s", id, state, end)
		}
	})
}

// moment shows a line of a timeline, with the time of day alone.
func (d *delivery) moment(line string) {
	stamp, what, _ := strings.Cut(line, " ")
	if at, err := time.Parse(time.RFC3339, stamp); err == nil {
		stamp = at.Format(time.TimeOnly)
	}
	d.output(wrap(stamp+"  "+what, 92, "          "))
}

func (d *delivery) progress() {
	f := d.sim.Total()
	d.pass("logins: %s, refused: %s", grouped(int64(f.Logins)), grouped(int64(f.Refused)))
}

func (d *delivery) rotate(ctx context.Context) error {
	old, err := d.creds(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	id, err := d.start(ctx)
	if err != nil {
		return err
	}
	if err := d.follow(ctx, id, "grace", d.refused); err != nil {
		return err
	}
	d.rotated = time.Since(began)
	now, err := d.creds(ctx)
	if err != nil {
		return err
	}
	if now.Secret == old.Secret || now.Version != old.Version+1 {
		return fmt.Errorf("version %d is served after version %d, and should be another secret, one number up", now.Version, old.Version)
	}
	if err := d.everywhere(ctx, now.Secret, began); err != nil {
		return err
	}
	d.check("all %d pods are new and run with %s (version %d), which the Secret holds", replicas, mask(now.Secret), now.Version)
	if err := d.accepts(ctx, now.Secret, true); err != nil {
		return err
	}
	if err := d.accepts(ctx, old.Secret, true); err != nil {
		return err
	}
	d.check("Redis accepts %s, and %s (version %d) as well", mask(now.Secret), mask(old.Secret), old.Version)
	d.tally()
	return nil
}

// everywhere shows the pods, and returns an error unless all of them and the
// Kubernetes Secret have password. A pod that is older than since does not count.
func (d *delivery) everywhere(ctx context.Context, password string, since time.Time) error {
	secret, err := d.cluster.Secret(ctx, namespace, secretName)
	if err != nil {
		return err
	}
	pods, err := d.pods(ctx)
	if err != nil {
		return err
	}
	d.blank()
	d.showPods(pods)
	if secret["password"] != password {
		return fmt.Errorf("the Secret holds %s, and should hold %s", mask(secret["password"]), mask(password))
	}
	return allRun(pods, password, since)
}

// accepts logs in to Redis.
func (d *delivery) accepts(ctx context.Context, password string, expected bool) error {
	c := d.node.Client()
	defer func() { _ = c.Close() }()
	err := c.Do(ctx, "AUTH", "app", password).Err()
	switch {
	case err != nil && !strings.HasPrefix(err.Error(), "WRONGPASS"):
		return fmt.Errorf("trying %s: %w", mask(password), err)
	case (err == nil) != expected:
		return fmt.Errorf("%s accepted by Redis: %t, and should be %t", mask(password), err == nil, expected)
	}
	return nil
}

func (d *delivery) refused() error { return noneRefused(d.sim.Total()) }

func (d *delivery) tally() {
	d.check("%s logins so far, 0 refused", grouped(int64(d.sim.Total().Logins)))
}

// goOn lets clients log in some more.
func (d *delivery) goOn(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	enough := d.sim.Total().Logins + 100
	return until(ctx, func() (bool, error) {
		d.progress()
		return d.sim.Total().Logins >= enough, d.refused()
	})
}

func (d *delivery) retire(ctx context.Context) error {
	now, err := d.creds(ctx)
	if err != nil {
		return err
	}
	if _, err := d.run(ctx, []string{"redis/" + role}, "write", "-f", "harmonyflow/retire/redis/"+role); err != nil {
		return err
	}
	if err := d.accepts(ctx, now.Previous, false); err != nil {
		return err
	}
	if err := d.accepts(ctx, now.Secret, true); err != nil {
		return err
	}
	d.blank()
	d.check("Redis refuses %s (version %d) and accepts %s (version %d)", mask(now.Previous), now.Version-1, mask(now.Secret), now.Version)
	if err := d.goOn(ctx); err != nil {
		return err
	}
	d.tally()
	return nil
}

// crash rotates while new pods crash with every password but the present one.
func (d *delivery) crash(ctx context.Context) error {
	old, err := d.creds(ctx)
	if err != nil {
		return err
	}
	d.say("From now on a container of %s crashes when it starts with any other password than", workload)
	d.say("%s: a program whose password is written down in one more place, say.", mask(old.Secret))
	d.blank()
	d.sim.CrashWhen(func(p kube.SimulatedPod) bool { return p.Password != old.Secret })
	defer d.sim.CrashWhen(nil)
	began := time.Now()
	id, err := d.start(ctx)
	if err != nil {
		return err
	}
	var failed string // the password that the first crashed pod had
	if err := d.follow(ctx, id, "rolled_back", func() error {
		if failed == "" {
			failed, err = d.crashed(ctx, old.Secret)
		}
		return errors.Join(err, d.refused())
	}); err != nil {
		return err
	}
	d.wentBack = time.Since(began)
	if failed == "" {
		return errors.New("no pod was seen in CrashLoopBackOff")
	}
	if err := d.everywhere(ctx, old.Secret, time.Time{}); err != nil {
		return err
	}
	d.check("all %d pods run with %s (version %d), which the Secret holds again", replicas, mask(old.Secret), old.Version)
	now, err := d.creds(ctx)
	if err != nil {
		return err
	}
	if now.Secret != old.Secret {
		return fmt.Errorf("creds/%s serves %s, and should serve %s again", role, mask(now.Secret), mask(old.Secret))
	}
	d.check("Vault serves %s again", mask(now.Secret))
	if err := d.accepts(ctx, old.Secret, true); err != nil {
		return err
	}
	if err := d.accepts(ctx, failed, false); err != nil {
		return err
	}
	d.check("Redis accepts %s, as it did all the while, and refuses %s", mask(old.Secret), mask(failed))
	d.tally()
	return nil
}

// crashed returns the password of a pod in CrashLoopBackOff, and shows the pods as
// they are then: the old ones have to run still.
func (d *delivery) crashed(ctx context.Context, old string) (string, error) {
	pods, err := d.pods(ctx)
	if err != nil {
		return "", err
	}
	var password string
	running := 0
	for _, p := range pods {
		if p.waiting == "CrashLoopBackOff" && p.password != "" && p.password != old {
			password = p.password
		}
		if p.ready && p.password == old {
			running++
		}
	}
	if password == "" {
		return "", nil
	}
	d.blank()
	d.showPods(pods)
	if running == 0 {
		return "", errors.New("no old pod runs while the new ones crash")
	}
	if err := errors.Join(d.accepts(ctx, password, true), d.accepts(ctx, old, true)); err != nil {
		return "", err
	}
	d.check("new pods crash; %d old ones log in, and Redis accepts %s and %s", running, mask(old), mask(password))
	d.blank()
	return password, nil
}

func (d *delivery) epilogue() {
	d.blank()
	d.print(bold, d.summary())
	d.blank()
	d.say("make demo          the same engine with a Redis cluster, and its plugin killed half-way")
	d.say("make e2e RUN=kube  what this project claims of clusters, proven")
	d.say("docs/operations.md  how to set this up")
}

func (d *delivery) summary() string {
	f := d.sim.Total()
	return fmt.Sprintf("%d pods moved in %.1f s; after a crash loop everything was back in %.1f s; %s logins, %s refused",
		replicas, d.rotated.Seconds(), d.wentBack.Seconds(), grouped(int64(f.Logins)), grouped(int64(f.Refused)))
}

// wrap breaks text into lines of up to width, and indents all but the first.
func wrap(text string, width int, by string) string {
	var lines []string
	line := ""
	for _, word := range strings.SplitAfter(text, " ") {
		if line != "" && len(line)+len(word) > width {
			lines = append(lines, strings.TrimRight(line, " "))
			line = by
		}
		line += word
	}
	return strings.Join(append(lines, line), "\n")
}
