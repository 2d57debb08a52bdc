package consumers_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/kube"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const firstPassword = "the-first-password"

// failing is a scenario whose rotation has to go back. Pods of web log in at the
// primary, those of worker at its replica, all the time.
type failing struct {
	*scene
	set     *servers.RedisSet
	began   time.Time
	version string // that is served before
	failed  login  // what the rotation served
}

type login struct{ username, password string }

func (s *scene) failing(role, consumer map[string]any) *failing {
	s.t.Helper()
	f := &failing{scene: s, set: servers.RedisReplicated(s.t, 1, servers.WithUsers("app on >"+firstPassword+" ~* +@all -@admin"))}
	s.must("connections/cache", map[string]any{
		"type": "redis", "addresses": strings.Join(f.set.Addrs(), ","), "username": servers.RedisAdmin, "password": servers.RedisAdminPassword,
		"allowed_roles": "*",
	})
	data := map[string]any{
		"kind": "redis", "connection": "cache", "username": "app", "initial_password": firstPassword,
		"document": "app", "field": "password", "username_field": "username", "grace_period": "1h",
	}
	for k, v := range role {
		if data[k] = v; v == nil {
			delete(data, k)
		}
	}
	s.must("roles/app", data)
	f.deployIn(s)
	s.consumer(consumer, []string{"web", "worker"})
	s.must("roles/app", map[string]any{"consumers": "web"})
	return f
}

func (f *failing) deployIn(s *scene) {
	f.t.Helper()
	s.synced("app")
	s.deploy(s.cluster, "Deployment", "web", 2, toRedis(f.set.Nodes[0]))
	s.deploy(s.cluster, "Deployment", "worker", 1, toRedis(f.set.Nodes[1]))
}

// renewed reports whether a pod runs with something else than the first password.
func renewed(p kube.SimulatedPod) bool { return p.Password != "" && p.Password != firstPassword }

// rotate begins a rotation, and keeps what it serves.
func (f *failing) rotate() string {
	f.t.Helper()
	before, err := f.read("creds/app")
	require.NoError(f.t, err)
	f.version, f.began = fmt.Sprint(before["version"]), time.Now()
	id := f.must("rotate/redis/app", nil)["rotation_id"].(string)
	now, err := f.read("creds/app")
	require.NoError(f.t, err)
	f.failed = login{now["username"].(string), now["password"].(string)}
	require.NotEqual(f.t, firstPassword, f.failed.password, "it was promoted")
	return id
}

// loginAt reports whether a node takes a login.
func (f *failing) loginAt(n *servers.RedisNode, l login) bool {
	c := n.Client()
	defer func() { _ = c.Close() }()
	return c.Do(f.ctx, "AUTH", l.username, l.password).Err() == nil
}

// bothAccepted: what was served before and what is served since are taken by each node.
func (f *failing) bothAccepted() {
	f.t.Helper()
	for _, n := range f.set.Nodes {
		require.True(f.t, f.loginAt(n, login{"app", firstPassword}), n.Addr)
		require.True(f.t, f.loginAt(n, f.failed), n.Addr)
	}
}

// passwords is how many passwords a node knows of a user.
func (f *failing) passwords(n *servers.RedisNode, user string) int {
	f.t.Helper()
	c := n.Client()
	defer func() { _ = c.Close() }()
	answer, err := c.Do(f.ctx, "ACL", "GETUSER", user).Slice()
	require.NoError(f.t, err)
	at := slices.Index(answer, any("passwords"))
	require.True(f.t, at >= 0 && at+1 < len(answer), "%v", answer)
	list, ok := answer[at+1].([]any)
	require.True(f.t, ok, "%v", answer)
	return len(list)
}

// isBack waits until a rotation has rolled back, and looks at everything that it
// touched. says is what it tells of why.
func (f *failing) isBack(what, id string, says ...string) {
	t := f.t
	t.Helper()
	told := f.until(id, "rolled_back")
	took := time.Since(f.began)
	reason := fmt.Sprint(told["roles"])
	for _, text := range says {
		require.Contains(t, reason, text)
	}
	creds, err := f.read("creds/app")
	require.NoError(t, err)
	require.Equal(t, login{"app", firstPassword}, login{creds["username"].(string), creds["password"].(string)})
	require.NotEqual(t, f.version, fmt.Sprint(creds["version"]), "under a new number")
	for _, n := range f.set.Nodes {
		require.True(t, f.loginAt(n, login{"app", firstPassword}), n.Addr)
		require.False(t, f.loginAt(n, f.failed), n.Addr)
		require.Equal(t, 1, f.passwords(n, "app"), n.Addr)
		if f.failed.username != "app" {
			require.Zero(t, f.passwords(n, f.failed.username), n.Addr)
		}
	}
	f.consumerIsBack(f.cluster, f.sim)
	role, err := f.read("roles/app")
	require.NoError(t, err)
	require.Equal(t, "suspended", role["state"])
	require.Contains(t, fmt.Sprint(role["versions"]), "stage:failed", "the failed version is kept, and labelled")
	total := f.sim.Total()
	figure(t, "%s: everything is back on the old password in %.0f s, %d logins, %d refused", what, took.Seconds(), total.Logins, total.Refused)
	require.Zero(t, total.Refused)
	require.Zero(t, total.Failed)
}

// consumerIsBack: the Secret and every pod of a cluster hold the first password.
func (f *failing) consumerIsBack(c *kube.Cluster, sim *kube.Simulator) {
	t := f.t
	t.Helper()
	secret, err := c.Secret(f.ctx, f.ns, "app")
	require.NoError(t, err)
	require.Equal(t, map[string]string{"username": "app", "password": firstPassword}, secret)
	for name, pods := range map[string]int{"web": 2, "worker": 1} {
		require.NoError(t, sim.Wait(f.ctx, f.ns, name, func(all []kube.SimulatedPod) bool {
			living := 0
			for _, p := range all {
				if !p.Gone {
					living++
				}
			}
			return living == pods
		}))
		for _, p := range sim.Pods(f.ns, name) {
			require.True(t, p.Gone || p.Username == "app" && p.Password == firstPassword && p.Ready, "pod %s", p.Name)
		}
	}
}

// crashesWithOverlap and crashesInTurn: new pods crash.
func crashesWithOverlap(s *scene) { crashes(s, "crash loop, overlap", nil) }

func crashesInTurn(s *scene) {
	crashes(s, "crash loop, alternate", map[string]any{"username": nil, "usernames": "app,app_b"})
}

func crashes(s *scene, what string, role map[string]any) {
	f := s.failing(role, nil)
	s.sim.CrashWhen(renewed)
	id := f.rotate()
	f.bothAccepted()
	f.isBack(what, id, "CrashLoopBackOff", "kubectl logs")
}

// health is a server that says of new pods that they are not well.
func (s *scene) health() (url string) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for _, p := range s.sim.Pods(s.ns, "web") {
			if !p.Gone && renewed(p) {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
		}
	}))
	s.t.Cleanup(server.Close)
	s.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	return server.URL + "/health"
}

// unhealthy: new pods start, and what the health URL of the service says is wrong.
func unhealthy(s *scene) {
	health := s.health()
	f := s.failing(nil, map[string]any{"checks": `[{"type":"http","url":"` + health + `","times":2,"timeout":"3s"}]`})
	f.isBack("failing health URL", f.rotate(), "check 1 (http)", "answered with 500, and 2xx is expected")
}

// stuck: new pods are never ready, and the time of the rollout passes.
func stuck(s *scene) {
	f := s.failing(nil, map[string]any{"rollout_timeout": "8s"})
	s.sim.HangWhen(renewed)
	f.isBack("stuck rollout", f.rotate(), "not in time", "rollout_timeout")
}

// stuckSet: a StatefulSet replaces no pod while one is not ready, so that the way
// back waits for somebody to delete the one that hangs, and says so.
func stuckSet(s *scene) {
	f := s.failing(nil, nil)
	s.deploy(s.cluster, "StatefulSet", "db", 2, toRedis(f.set.Nodes[1]))
	s.consumer(map[string]any{"rollout_timeout": "8s"}, []string{"web", "worker", "StatefulSet/db"})
	s.sim.HangWhen(func(p kube.SimulatedPod) bool { return p.Workload == "db" && renewed(p) })
	id := f.rotate()
	f.says(id, []string{"rolling_back"}, "kubectl delete pod -n "+s.ns+" db-1")
	f.bothAccepted()
	_, err := s.cluster.Kubectl(s.ctx, "delete", "pod", "-n", s.ns, "db-1")
	require.NoError(s.t, err)
	f.isBack("stuck StatefulSet, one pod deleted by hand", id, "not in time", "StatefulSet "+s.ns+"/db")
	require.Equal(s.t, map[string]int{firstPassword: 2}, s.running("db"))
}

// stalled: new pods are never ready, and Kubernetes itself gives up on the rollout.
func stalled(s *scene) {
	f := s.failing(nil, nil)
	for _, name := range []string{"web", "worker"} {
		_, err := s.cluster.Kubectl(s.ctx, "patch", "deployment", name, "-n", s.ns, "-p", `{"spec":{"progressDeadlineSeconds":4}}`)
		require.NoError(s.t, err)
		require.NoError(s.t, s.cluster.WaitRollout(s.ctx, "deployment", s.ns, name))
	}
	s.sim.HangWhen(renewed)
	f.isBack("stalled rollout", f.rotate(), "ProgressDeadlineExceeded")
}

// silent: the store belongs to a controller that is not there, so that nobody reacts
// to force-sync, and nobody says so.
func silent(s *scene) {
	f := s.failing(nil, nil)
	_, err := s.cluster.Kubectl(s.ctx, "patch", "secretstore", "harmonyflow", "-n", s.ns, "--type=merge", "-p", `{"spec":{"controller":"another"}}`)
	require.NoError(s.t, err)
	id := f.rotate()
	f.bothAccepted()
	f.isBack("ExternalSecret that ignores force-sync", id, "not in time", "ExternalSecrets have not synced yet: app", "SecretStore")
}

// killedOnTheWay: the plugin is killed in each phase of a rotation that fails its
// last check, there and back. The secret is published to another mount, which does
// not answer for a while, so that it is killed in publish too.
func killedOnTheWay(s *scene) {
	t := s.t
	proxy, err := servers.NewProxy(strings.TrimPrefix(s.vault.Address, "http://"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = proxy.Close() })
	kv := s.ns + "-kv"
	s.mountKV(kv)
	s.must("connections/kv", map[string]any{
		"type": "vault", "address": "http://" + proxy.Addr(), "token": s.vault.Token, "allowed_roles": "*", "allowed_publish_paths": kv + "/app",
	})
	require.NoError(t, s.cluster.ApplyVaultStore(s.ctx, kube.VaultStore{
		Namespace: s.ns, Name: "harmonyflow", Address: s.vault.Address, Mount: kv, Token: s.vault.Token,
	}))
	health := s.health()
	f := s.failing(map[string]any{
		"document": nil, "publish_connection": "kv", "publish_mount": kv, "publish_path": "app",
	}, map[string]any{
		"stabilization": "5s", // pods are well for less than that when check begins
		"checks":        `[{"type":"http","url":"` + health + `","timeout":"2s"}]`,
	})
	id := f.rotate()
	generation := s.revision("deployment", "web")
	kills := 0
	for _, at := range []struct {
		phase string
		back  bool
	}{
		{"sync", false},
		{"restart", false},
		{"check", false},
		{"publish", true},
		{"sync", true},
		{"restart", true},
		{"check", true},
	} {
		if at.phase == "check" && !at.back {
			proxy.Blackhole(true)
		}
		s.inPhase(id, at.phase, at.back)
		f.bothAccepted()
		n, err := s.vault.KillPlugin()
		require.NoError(t, err)
		require.Positive(t, n)
		kills++
		if at.phase == "publish" {
			proxy.Heal()
		}
	}
	f.isBack(fmt.Sprintf("plugin killed %d times, in each phase of a failing rotation", kills), id, "answered with 500")
	require.Equal(t, "1", generation)
	require.Equal(t, "3", s.revision("deployment", "web"), "restarted once each way")
}

// mountKV mounts a KV version 2, which takes a moment to be one.
func (s *scene) mountKV(path string) {
	s.t.Helper()
	require.NoError(s.t, s.c.Sys().MountWithContext(s.ctx, path, &api.MountInput{Type: "kv", Options: map[string]string{"version": "2"}}))
	s.t.Cleanup(func() { _ = s.c.Sys().UnmountWithContext(context.WithoutCancel(s.ctx), path) })
	require.NoError(s.t, kube.Until(s.ctx, func(ctx context.Context) error {
		_, err := s.c.KVv2(path).Put(ctx, "probe", map[string]any{"a": "b"})
		return err
	}))
}

// inPhase waits until the rotation is in a phase of its way there, or back.
func (s *scene) inPhase(id, phase string, back bool) {
	s.t.Helper()
	require.NoError(s.t, kube.Until(s.ctx, func(context.Context) error {
		told, err := s.read("rotations/" + id)
		if err != nil {
			return err
		}
		isBack := strings.HasPrefix(fmt.Sprint(told["state"]), "roll")
		if told["phase"] != phase || isBack != back {
			return fmt.Errorf("it is %v in %v: %v", told["state"], told["phase"], told["roles"])
		}
		return nil
	}))
}

// goesBackOnLog: a line in the logs of new pods that must not be there.
func goesBackOnLog(s *scene) {
	t := s.t
	f := s.failing(nil, map[string]any{"checks": `[{"type":"logs","selector":"app=web","forbid":"authentication failed","timeout":"3s"}]`})
	logged := make(chan error, 1)
	go func() {
		name := ""
		err := s.sim.Wait(s.ctx, s.ns, "web", func(pods []kube.SimulatedPod) bool {
			for _, p := range pods {
				if renewed(p) {
					name = p.Name
				}
			}
			return name != ""
		})
		if err == nil && name == "" {
			err = errors.New("no pod was renewed")
		}
		s.cluster.Log(s.ns, name, "authentication failed for user app")
		logged <- err
	}()
	id := f.rotate()
	require.NoError(t, <-logged)
	f.isBack("forbidden log line", id, "lines with what is forbidden")
}
