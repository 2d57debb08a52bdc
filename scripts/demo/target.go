package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"os/exec"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// errRefused is a login that was answered with no, and not one that failed
// some other way.
var errRefused = errors.New("refused")

// target is where a credential is used.
type target interface {
	// places is how many servers there are to log in to.
	places() int
	// noun is what one of them is called.
	noun() string
	// login uses c on a fresh connection to one of them.
	login(ctx context.Context, place int, c credential) error
}

// loginTimeout is far longer than a login takes: slow is not refused.
const loginTimeout = 10 * time.Second

func init() {
	redis.SetLogger(quiet{log.New(io.Discard, "", 0)})
}

type quiet struct{ *log.Logger }

func (quiet) Printf(context.Context, string, ...any) {}

// cluster is a Redis cluster of three primaries and three replicas. The engine
// reaches the first one through a proxy, which can lose replies.
type cluster struct {
	set     *servers.RedisSet
	proxy   *servers.Proxy
	version string
}

func haveRedis() bool {
	_, err := exec.LookPath("redis-server")
	return err == nil
}

func startCluster(ctx context.Context, dir, password string) (*cluster, error) {
	set, err := servers.StartCluster(ctx, dir,
		servers.WithUsers("default off", "app on >"+password+" ~app:* +@all -@admin -@dangerous"),
		servers.WithReplicationUser("replica", rand.Text()))
	if err != nil {
		return nil, err
	}
	c := &cluster{set: set}
	if c.proxy, err = servers.NewProxy(set.Nodes[0].Addr); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	info, err := set.Nodes[0].Info(ctx, "server")
	if err != nil {
		return nil, errors.Join(err, c.stop())
	}
	c.version = info["redis_version"]
	return c, nil
}

func (c *cluster) places() int  { return len(c.set.Nodes) }
func (c *cluster) noun() string { return "node" }

func (c *cluster) login(ctx context.Context, place int, cred credential) error {
	client := redis.NewClient(&redis.Options{
		Addr: c.set.Nodes[place].Addr, Username: cred.Username, Password: cred.Secret,
		Protocol: 2, PoolSize: 1, MaxRetries: -1, DialerRetries: 1, DisableIdentity: true,
		DialTimeout: loginTimeout, ReadTimeout: loginTimeout, WriteTimeout: loginTimeout,
	})
	defer client.Close()
	err := client.Ping(ctx).Err()
	if err != nil && strings.HasPrefix(err.Error(), "WRONGPASS") {
		return fmt.Errorf("%w at %s: %w", errRefused, c.set.Nodes[place].Addr, err)
	}
	return err
}

// passwords is how many passwords a node accepts for a user.
func (c *cluster) passwords(ctx context.Context, place int, user string) (int, error) {
	reply, err := c.set.Nodes[place].Do(ctx, "ACL", "GETUSER", user)
	if err != nil {
		return 0, err
	}
	list, _ := reply.([]any)
	for i := 0; i+1 < len(list); i += 2 {
		if hashes, ok := list[i+1].([]any); ok && list[i] == "passwords" {
			return len(hashes), nil
		}
	}
	return 0, fmt.Errorf("ACL GETUSER %s answered without passwords", user)
}

func (c *cluster) stop() error {
	var err error
	if c.proxy != nil {
		err = c.proxy.Close()
	}
	return errors.Join(err, c.set.Kill())
}

// service stands in for Redis where there is none: it accepts an API key that
// creds/ serves as the current or the previous one, and goes by what it read
// last while Vault does not answer.
type service struct {
	read func(context.Context) (credential, error)
	last atomic.Pointer[credential]
}

func (*service) places() int  { return 1 }
func (*service) noun() string { return "service" }

func (s *service) login(ctx context.Context, _ int, c credential) error {
	if now, err := s.read(ctx); err == nil {
		s.last.Store(&now)
	}
	if accepted := s.last.Load(); accepted != nil && (c.Secret == accepted.Secret || c.Secret == accepted.Previous) {
		return nil
	}
	return errRefused
}
