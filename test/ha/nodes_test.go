package ha_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	mountPath  = servers.DefaultMount
	quietMount = "quiet" // keeps the plugin's process through a reload of the other
	older      = "v0.1.7"
	newer      = "v0.2.3"

	grace = 5 * time.Second
	// Of key rings: how old keys are at most when they are used, how long what one
	// has made counts, and how long an earlier one decrypts.
	propagation = 4 * time.Second
	tokenLife   = 4 * time.Second
	retireAfter = 20 * time.Second

	enginePassword = "the-first-password-of-the-engine"
)

// stage is a cluster, what its plugins rotate at, and the roles.
type stage struct {
	cluster  *servers.VaultCluster
	uuid     string // of the mount's part of Vault's storage
	root     []*api.Client
	reader   []*api.Client // with a token that may do nothing but read
	redis    *servers.RedisNode
	postgres *servers.PostgresNode
	rabbit   *servers.RabbitMQNode
	roles    []*role
	toServer map[string][]*servers.Proxy // by kind

	mu      sync.Mutex
	secrets map[string]string // every one that was seen, and whose it is
}

// role is one that rotates without a pause.
type role struct {
	name, kind string
	// users are those that it owns at its server.
	users []string
	swap  bool
	// ring: several keys count at once.
	ring bool
	// lives is how long what was made with a key of a ring counts.
	lives    time.Duration
	settings map[string]any
	// sources are where its clients read.
	sources []source
}

// source is a path, and the names that fields have there.
type source struct {
	path                         string
	user, secret, previous, keys string
}

func (r *role) label() string {
	switch {
	case r.swap:
		return r.kind + " (swap)"
	case len(r.users) == 2:
		return r.kind + " (alternate)"
	}
	return r.kind
}

func creds(name string) source {
	return source{path: "creds/" + name, user: "username", secret: "password"}
}

// allRoles are the roles, with the passwords that their users have before.
func allRoles() []*role {
	return []*role{
		{
			name: "cache", kind: "redis", users: []string{"cache"},
			settings: map[string]any{
				"connection": "redis", "username": "cache", "initial_password": first("cache"), "grace_period": grace.String(),
				"document": "shop/web", "field": "cache-password", "username_field": "cache-user",
			},
			sources: []source{creds("cache"), {path: "data/shop/web", user: "cache-user", secret: "cache-password"}},
		},
		{
			name: "ledger", kind: "postgresql", users: []string{"ledger_a", "ledger_b"},
			settings: map[string]any{
				"connection": "postgresql", "usernames": "ledger_a,ledger_b", "initial_password": first("ledger_a"), "grace_period": grace.String(),
				"document": "shop/ledger", "field": "password", "username_field": "user",
			},
			sources: []source{creds("ledger"), {path: "data/shop/ledger", user: "user", secret: "password"}},
		},
		{
			name: "report", kind: "postgresql", users: []string{"report"}, swap: true,
			settings: map[string]any{"connection": "postgresql", "username": "report", "strategy": "swap", "initial_password": first("report")},
			sources:  []source{creds("report"), creds("report")},
		},
		{
			name: "queue", kind: "rabbitmq", users: []string{"queue_a", "queue_b"},
			settings: map[string]any{"connection": "rabbitmq", "usernames": "queue_a,queue_b", "initial_password": first("queue_a"), "grace_period": grace.String()},
			sources:  []source{creds("queue"), creds("queue")},
		},
		{
			name: "partner", kind: "api-key",
			settings: map[string]any{"grace_period": grace.String(), "document": "shop/web", "field": "key", "previous_field": "key-previous"},
			sources: []source{
				{path: "data/shop/web", secret: "key", previous: "key-previous"},
				{path: "creds/partner", secret: "value", previous: "previous_value"},
			},
		},
		{
			name: "session", kind: "jwt", ring: true, lives: tokenLife,
			settings: map[string]any{"max_token_ttl": tokenLife.String(), "propagation_delay": propagation.String()},
			sources:  []source{{path: "creds/session", secret: "value", keys: "keys"}, {path: "creds/session", secret: "value", keys: "keys"}},
		},
		{
			name: "store", kind: "encryption-key", ring: true, lives: retireAfter - propagation,
			settings: map[string]any{
				"propagation_delay": propagation.String(), "retire_after": retireAfter.String(),
				"document": "shop/store", "field": "encryption-key", "keys_field": "encryption-keys",
			},
			sources: []source{
				{path: "creds/store", secret: "value", keys: "keys"},
				{path: "data/shop/store", secret: "encryption-key", keys: "encryption-keys"},
			},
		},
	}
}

func first(user string) string { return "the-first-password-of-" + user }

func newStage(t *testing.T) *stage {
	t.Helper()
	ctx := t.Context()
	s := &stage{roles: allRoles(), toServer: map[string][]*servers.Proxy{}, secrets: map[string]string{}}
	s.startTargets(t)
	s.cluster = servers.NewVaultCluster(t, servers.VaultOptions{NoMount: true, RawStorage: true, Dir: os.Getenv("SOAK_DIR")}, 3)
	for _, version := range []string{older, newer} {
		require.NoError(t, s.cluster.Install(ctx, version))
	}
	active, err := s.cluster.Active(ctx)
	require.NoError(t, err)
	for _, path := range []string{mountPath, quietMount} {
		require.NoError(t, active.Client().Sys().MountWithContext(ctx, path, &api.MountInput{
			Type: servers.PluginName, Config: api.MountConfigInput{PluginVersion: older},
		}))
	}
	mounts, err := active.Client().Sys().ListMountsWithContext(ctx)
	require.NoError(t, err)
	s.uuid = mounts[mountPath+"/"].UUID
	token, err := active.TokenFor(ctx, "reader", fmt.Sprintf(`
path "%[1]s/creds/*" { capabilities = ["read"] }
path "%[1]s/data/*" { capabilities = ["read"] }`, mountPath))
	require.NoError(t, err)
	for _, v := range s.cluster.Nodes {
		reader := v.Client()
		reader.SetToken(token)
		s.root, s.reader = append(s.root, v.Client()), append(s.reader, reader)
	}
	s.writeConnections(t, active)
	for _, r := range s.roles {
		r.settings["kind"] = r.kind
		_, err := active.Client().Logical().WriteWithContext(ctx, mountPath+"/roles/"+r.name, r.settings)
		require.NoError(t, err, r.name)
	}
	return s
}

// startTargets starts the servers, each with the users of its roles.
func (s *stage) startTargets(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	s.redis = servers.Redis(t, servers.WithUsers("cache on >"+first("cache")+" ~* +@all -@admin", "engine on >"+enginePassword+" ~* &* +@all"))
	s.postgres = servers.Postgres(t)
	require.NoError(t, s.postgres.Exec(ctx, "CREATE ROLE engine LOGIN CREATEROLE PASSWORD '"+enginePassword+"'",
		"GRANT pg_read_all_stats TO engine", "GRANT SELECT (rolname, rolpassword) ON pg_authid TO engine",
		"CREATE ROLE owner NOLOGIN", "CREATE ROLE ledger_a LOGIN IN ROLE owner PASSWORD '"+first("ledger_a")+"'",
		"ALTER ROLE ledger_a SET role TO owner", "CREATE ROLE report LOGIN PASSWORD '"+first("report")+"'"))
	s.rabbit = servers.RabbitMQ(t)
	require.NoError(t, s.rabbit.SetUser(ctx, "queue_a", first("queue_a"), ""))
	require.NoError(t, s.rabbit.SetUser(ctx, "engine", enginePassword, "administrator"))
}

func (s *stage) writeConnections(t *testing.T, active *servers.Vault) {
	t.Helper()
	through := func(kind, address string) string {
		p, err := s.cluster.ToTarget(address)
		require.NoError(t, err)
		s.toServer[kind] = append(s.toServer[kind], p)
		return p.Addr()
	}
	for kind, data := range map[string]map[string]any{
		"redis": {"addresses": through("redis", s.redis.Addr)},
		"postgresql": {
			"connection_url": "postgresql://{{username}}:{{password}}@" + through("postgresql", s.postgres.Addr) + "/postgres?sslmode=disable",
		},
		"rabbitmq": {
			"management_urls": "http://" + through("rabbitmq", s.rabbit.ManagementAddr), "amqp_urls": "amqp://" + through("rabbitmq", s.rabbit.Addr),
		},
	} {
		data["type"], data["allowed_roles"], data["username"], data["password"] = kind, "*", "engine", enginePassword
		_, err := active.Client().Logical().WriteWithContext(t.Context(), mountPath+"/connections/"+kind, data)
		require.NoError(t, err, kind)
	}
}

// know adds a secret that no log may hold.
func (s *stage) know(what, secret string) {
	if secret == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets[secret] = what
}

// anybody is a node by chance: a standby forwards what it is asked.
func (s *stage) anybody() int { return rand.IntN(len(s.cluster.Nodes)) }

// ask has one request answered by the active node, whichever that is by then.
func (s *stage) ask(ctx context.Context, request func(context.Context, *api.Client) error) error {
	return until(ctx, 3*time.Minute, func(ctx context.Context) error {
		active, err := s.cluster.Active(ctx)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 35*time.Second)
		defer cancel()
		for i, v := range s.cluster.Nodes {
			if v == active {
				err = request(ctx, s.root[i])
			}
		}
		return err
	})
}

// read reads a path of the mount from the active node.
func (s *stage) read(ctx context.Context, path string, query map[string][]string) (data map[string]any, err error) {
	err = s.ask(ctx, func(ctx context.Context, c *api.Client) error {
		data, err = dataOf(c.Logical().ReadWithDataWithContext(ctx, mountPath+"/"+path, query))
		return err
	})
	return data, err
}

// raw reads what stands at a key of the mount's storage; errMissing: nothing does.
func (s *stage) raw(ctx context.Context, key string, into any) error {
	missing := false
	err := s.ask(ctx, func(ctx context.Context, c *api.Client) error {
		err := s.rawAt(ctx, c, key, into)
		if missing = errors.Is(err, errMissing); missing {
			return nil
		}
		return err
	})
	if missing {
		return fmt.Errorf("%s: %w", key, errMissing)
	}
	return err
}

var errMissing = errors.New("not found")

func (s *stage) rawAt(ctx context.Context, c *api.Client, key string, into any) error {
	data, err := dataOf(c.Logical().ReadWithContext(ctx, "sys/raw/logical/"+s.uuid+"/"+key))
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return json.Unmarshal([]byte(data["value"].(string)), into)
}

// stored reads a role as it is in Vault's storage.
func (s *stage) stored(ctx context.Context, name string) (*rotation.Role, error) {
	r := &rotation.Role{}
	return r, s.raw(ctx, "role/"+name, r)
}

func dataOf(s *api.Secret, err error) (map[string]any, error) {
	switch {
	case err != nil:
		return nil, err
	case s == nil:
		return nil, errMissing
	}
	return s.Data, nil
}
