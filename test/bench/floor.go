package main

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// redisFloorLoop sends a Redis what the engine has sent it, each kind of command in one
// pipeline, and then writes the entries.
type redisFloorLoop struct {
	node     *servers.RedisNode
	stage    *stage
	mount    string
	first, n int // its users
	written  writes

	commands map[string]int
	turn     int
}

// counts are how often the Redis was sent each command.
func (f *redisFloorLoop) counts(ctx context.Context) (map[string]int, error) {
	info, err := f.node.Info(ctx, "commandstats")
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	for key, value := range info {
		name, ok := strings.CutPrefix(key, "cmdstat_")
		calls, _, _ := strings.Cut(strings.TrimPrefix(value, "calls="), ",")
		if n, err := strconv.Atoi(calls); ok && err == nil {
			out[name] = n
		}
	}
	return out, nil
}

// learn keeps what was sent since before.
func (f *redisFloorLoop) learn(ctx context.Context, before map[string]int) error {
	now, err := f.counts(ctx)
	if err != nil {
		return err
	}
	f.commands = map[string]int{}
	for name, n := range now {
		if n -= before[name]; n > 0 && name != "info" && name != "client|setinfo" && name != "hello" {
			f.commands[name] = n
		}
	}
	return nil
}

func (f *redisFloorLoop) told() string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(f.commands)) {
		out = append(out, fmt.Sprintf("%s %d", strings.ToUpper(strings.ReplaceAll(name, "|", " ")), f.commands[name]))
	}
	return strings.Join(out, ", ")
}

func (f *redisFloorLoop) costs(ctx context.Context) (cost, error) {
	return f.stage.costing(func() (time.Duration, error) { return f.round(ctx) })
}

func (f *redisFloorLoop) round(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	f.turn++
	c := f.node.Client()
	defer func() { _ = c.Close() }()
	for _, name := range slices.Sorted(maps.Keys(f.commands)) {
		pipe := c.Pipeline()
		for i := range f.commands[name] {
			args, err := f.command(name, i)
			if err != nil {
				return 0, err
			}
			pipe.Do(ctx, args...)
		}
		// One that is no cluster says so, at the same cost.
		if _, err := pipe.Exec(ctx); err != nil && !errors.Is(err, redis.Nil) && name != "cluster|nodes" {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
	}
	commands := time.Since(began)
	puts, err := f.written.store(ctx, f.stage, f.mount, f.n)
	return commands + puts, err
}

// command is number i of a kind.
func (f *redisFloorLoop) command(name string, i int) ([]any, error) {
	who := user(f.first + i%f.n)
	switch name {
	case "acl|setuser":
		// Every other time a password is added, and taken away again.
		modifier := "#"
		if i/f.n%2 == 1 {
			modifier = "!"
		}
		sum := sha256.Sum256(fmt.Appendf(nil, "%d %d", f.turn, i%f.n))
		return []any{"ACL", "SETUSER", who, modifier + hex.EncodeToString(sum[:])}, nil
	case "acl|getuser":
		return []any{"ACL", "GETUSER", who}, nil
	case "auth":
		// The last of them is the admin's own: what follows needs its rights.
		if i == f.commands[name]-1 {
			return []any{"AUTH", servers.RedisAdmin, servers.RedisAdminPassword}, nil
		}
		return []any{"AUTH", who, firstPassword(f.first + i%f.n)}, nil
	case "acl|list", "acl|whoami", "config|rewrite", "acl|users", "acl|save", "cluster|nodes":
		var args []any
		for _, word := range strings.Split(name, "|") {
			args = append(args, word)
		}
		return args, nil
	case "config|get":
		return []any{"CONFIG", "GET", "aclfile"}, nil
	case "acl|cat":
		return []any{"ACL", "CAT"}, nil
	case "client|list":
		return []any{"CLIENT", "LIST"}, nil
	case "client|kill":
		return []any{"CLIENT", "KILL", "USER", who}, nil
	case "command|info":
		return []any{"COMMAND", "INFO", "get"}, nil
	case "ping", "role", "time", "info":
		return []any{name}, nil
	}
	return nil, fmt.Errorf("the engine sends %q, and the floor does not know it: teach it", name)
}

// postgresFloorLoop sends a PostgreSQL as many changes of passwords as rotations need, all on
// one connection, and makes as many logins as the engine has made.
type postgresFloorLoop struct {
	node     *servers.PostgresNode
	stage    *stage
	mount    string
	first, n int
	written  writes
	logins   int
	turn     int
}

// sessions are how many logins there were.
func (f *postgresFloorLoop) sessions(ctx context.Context) (int, error) {
	text, err := f.node.Text(ctx, "SELECT sessions FROM pg_stat_database WHERE datname = 'postgres'")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(text)
}

func (f *postgresFloorLoop) learn(ctx context.Context, before int) error {
	now, err := f.sessions(ctx)
	f.logins = max(now-before, f.n)
	return err
}

func (f *postgresFloorLoop) costs(ctx context.Context) (cost, error) {
	return f.stage.costing(func() (time.Duration, error) { return f.round(ctx) })
}

func (f *postgresFloorLoop) round(ctx context.Context) (time.Duration, error) {
	f.turn++
	began := time.Now()
	admin, err := f.node.Login(ctx, "vault", "vault-secret-of-db")
	if err != nil {
		return 0, err
	}
	defer func() { _ = admin.Close(ctx) }()
	verifiers := make([]string, f.n)
	g := errgroup.Group{}
	g.SetLimit(32)
	for i := range f.n {
		g.Go(func() (err error) {
			verifiers[i], err = verifier(f.password(i))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	batch := &pgx.Batch{}
	for i := range f.n {
		batch.Queue(fmt.Sprintf(`ALTER ROLE "%s" PASSWORD '%s'`, user(f.first+i), verifiers[i]))
	}
	if err := admin.SendBatch(ctx, batch).Close(); err != nil {
		return 0, err
	}
	err = several(ctx, 16, f.logins, func(ctx context.Context, i int) error {
		c, err := f.node.Login(ctx, user(f.first+i%f.n), f.password(i%f.n))
		if err != nil {
			return err
		}
		return c.Close(ctx)
	})
	if err != nil {
		return 0, err
	}
	commands := time.Since(began)
	puts, err := f.written.store(ctx, f.stage, f.mount, f.n)
	return commands + puts, err
}

func (f *postgresFloorLoop) password(i int) string {
	return fmt.Sprintf("password-%d-of-%d", f.turn, i)
}

// verifier is what PostgreSQL stores of a password (RFC 5803).
func verifier(password string) (string, error) {
	const iterations = 4096
	salt := make([]byte, 16)
	_, _ = rand.Read(salt)
	salted, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		return "", err
	}
	sum := func(key []byte, text string) []byte {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(text))
		return h.Sum(nil)
	}
	stored := sha256.Sum256(sum(salted, "Client Key"))
	encode := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations, encode(salt), encode(stored[:]), encode(sum(salted, "Server Key"))), nil
}

// makeOpen makes a folder that other accounts can pass.
func makeOpen(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	return os.Chmod(dir, 0o711)
}
