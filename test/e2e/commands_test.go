package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// commandTimeout bounds one command; Vault itself gives up after 90 s.
const commandTimeout = 5 * time.Minute

// call is one use of a command in a script.
type call struct {
	*script
	ts   *testscript.TestScript
	args []string // without the command's name
	out  io.Writer
}

// command writes what it has to say to c.out. Its error goes to stderr, and is
// what `!` expects.
type command func(ctx context.Context, c call) error

// commands are the commands that README.md describes.
func commands() map[string]func(*testscript.TestScript, bool, []string) {
	repeatable := map[string]command{
		"vault": runVault,
		// What it shows on a terminal is tested beside it.
		"harmonyflow":        runFollower(""),
		"rotate-secret":      runFollower("../../scripts/rotate-secret.sh"),
		"rotate-all-secrets": runFollower("../../scripts/rotate-all-secrets.sh"),

		"redis": runRedis,
		"http":  runHTTP,

		"rabbitmq": runRabbitMQ,

		"postgresql": runPostgreSQL,
	}
	all := map[string]command{
		"redis-start":   startRedis,
		"redis-kill":    onNode((*servers.RedisNode).Kill),
		"redis-pause":   onNode((*servers.RedisNode).Pause),
		"redis-resume":  onNode((*servers.RedisNode).Resume),
		"redis-restart": onNode(func(n *servers.RedisNode) error { return n.Restart(context.Background()) }),

		"rabbitmq-start":      startRabbitMQ,
		"rabbitmq-password":   setRabbitMQPassword,
		"rabbitmq-pause":      onBroker(func(b *broker) error { return b.Pause() }),
		"rabbitmq-resume":     onBroker(func(b *broker) error { return b.Resume() }),
		"rabbitmq-lose-reply": onBroker(func(b *broker) error { b.http.LoseReplyTo("PUT /api/users/"); return nil }),
		"rabbitmq-heal":       onBroker(func(b *broker) error { b.http.Heal(); return nil }),

		"postgresql-start":      startPostgreSQL,
		"postgresql-kill":       onDatabase(func(d *database) error { return d.nodes[0].Kill() }),
		"postgresql-restart":    onDatabase(func(d *database) error { return d.nodes[0].Start(context.Background()) }),
		"postgresql-pause":      onDatabase(func(d *database) error { return d.nodes[0].Pause() }),
		"postgresql-resume":     onDatabase(func(d *database) error { return d.nodes[0].Resume() }),
		"postgresql-lose-reply": onDatabase(losePostgreSQLReplies),
		"postgresql-heal":       onDatabase(healPostgreSQL),
		"postgresql-log":        searchPostgreSQLLogs,

		"own-vault":     ownVault,
		"plugin-kill":   killPlugin,
		"vault-kill":    killVault,
		"vault-restart": restartVault,
		"vault-unseal":  unsealVault,
		"field":         takeField,
		"capture":       takeOutput,
		"secret":        rememberSecrets,
		"cron-soon":     cronSoon,
		"eventually":    eventually(repeatable),
	}
	cmds := map[string]func(*testscript.TestScript, bool, []string){}
	for _, set := range []map[string]command{repeatable, all} {
		for name, command := range set {
			cmds[name] = adapt(name, command)
		}
	}
	return cmds
}

// speaks are the commands whose silence, too, is the last output.
var speaks = map[string]bool{"vault": true, "harmonyflow": true, "rotate-secret": true, "rotate-all-secrets": true, "redis": true, "http": true, "rabbitmq": true, "postgresql": true, "eventually": true}

func adapt(name string, command command) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		defer cancel()
		// Not ts.Stdout at once: it forgets the last output, which field and
		// capture look at.
		var out strings.Builder
		err := command(ctx, call{script: ts.Value(scriptKey{}).(*script), ts: ts, args: args, out: &out})
		if speaks[name] || out.Len() > 0 || err != nil {
			fmt.Fprint(ts.Stdout(), out.String())
		}
		if err != nil {
			fmt.Fprintln(ts.Stderr(), err)
		}
		switch {
		case err != nil && !neg:
			ts.Fatalf("%s: %v", name, err)
		case err == nil && neg:
			ts.Fatalf("%s succeeded unexpectedly", name)
		}
	}
}

// runVault: vault ARGS...
func runVault(ctx context.Context, c call) error {
	cmd := exec.CommandContext(ctx, c.vault.Binary(), c.args...)
	cmd.Dir = c.ts.MkAbs(".")
	for _, name := range c.variables {
		if value := c.ts.Getenv(name); value != "" {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = c.out, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w\n%s", err, stderr.String())
	}
	return nil
}

// runFollower: harmonyflow ARGS..., or a script that calls it.
func runFollower(script string) command {
	return func(ctx context.Context, c call) error {
		program, err := follower()
		if err != nil {
			return err
		}
		path := os.Getenv("PATH")
		if script != "" {
			path = filepath.Dir(program) + string(os.PathListSeparator) + path
			if program, err = filepath.Abs(script); err != nil {
				return err
			}
		}
		cmd := exec.CommandContext(ctx, program, c.args...)
		cmd.Dir = c.ts.MkAbs(".")
		for _, name := range append(slices.Clone(c.variables), "HOME") {
			if value := c.ts.Getenv(name); value != "" && name != "PATH" {
				cmd.Env = append(cmd.Env, name+"="+value)
			}
		}
		cmd.Env = append(cmd.Env, "HARMONYFLOW_MOUNT="+c.ts.Getenv("MOUNT"), "PATH="+path)
		var stderr strings.Builder
		cmd.Stdout, cmd.Stderr = c.out, &stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s%w", stderr.String(), err)
		}
		return nil
	}
}

// followerFolder is where the command is built; the test that runs the scripts makes it.
var followerFolder string

// follower builds the command once.
var follower = sync.OnceValues(func() (string, error) {
	path := filepath.Join(followerFolder, "harmonyflow")
	out, err := exec.Command("go", "build", "-o", path, "../../cmd/harmonyflow").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return path, nil
})

// runHTTP: http [-header 'NAME: VALUE'] PATH
func runHTTP(ctx context.Context, c call) error {
	flags := flag.NewFlagSet("http", flag.ContinueOnError)
	flags.SetOutput(c.out)
	header := flags.String("header", "", "a header of the request, 'NAME: VALUE'")
	if err := flags.Parse(c.args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("usage: http [-header 'NAME: VALUE'] PATH")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.ts.Getenv("VAULT_ADDR")+"/v1/"+flags.Arg(0), nil)
	if err != nil {
		return err
	}
	if name, value, ok := strings.Cut(*header, ": "); ok {
		req.Header.Set(name, value)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	fmt.Fprintln(c.out, resp.Status)
	for _, name := range slices.Sorted(maps.Keys(resp.Header)) {
		if name != "Date" {
			fmt.Fprintf(c.out, "%s: %s\n", name, strings.Join(resp.Header[name], ", "))
		}
	}
	fmt.Fprintln(c.out)
	_, err = io.Copy(c.out, resp.Body)
	return err
}

// startRedis: redis-start [FLAGS] NAME [standalone|replicated|cluster]
func startRedis(ctx context.Context, c call) error {
	flags := flag.NewFlagSet("redis-start", flag.ContinueOnError)
	flags.SetOutput(c.out)
	var options []servers.RedisOption
	flags.Func("user", "an ACL user as in redis.conf: 'app on >secret ~* +@all'", func(user string) error {
		options = append(options, servers.WithUsers(user))
		return nil
	})
	flags.Func("config", "a line of redis.conf", func(line string) error {
		options = append(options, servers.WithConfig(line))
		return nil
	})
	requirePass := flags.String("requirepass", "", "password of the default user")
	aclFile := flags.Bool("aclfile", false, "keep users in an ACL file")
	if err := flags.Parse(c.args); err != nil {
		return err
	}
	if *requirePass != "" {
		options = append(options, servers.WithRequirePass(*requirePass))
	}
	if *aclFile {
		options = append(options, servers.WithACLFile())
	}
	name, topology := flags.Arg(0), flags.Arg(1)
	if name == "" || flags.NArg() > 2 {
		return errors.New("usage: redis-start [FLAGS] NAME [standalone|replicated|cluster]")
	}
	set, err := startTopology(ctx, filepath.Join(c.dir, ".redis-"+name), topology, options)
	if err != nil {
		return err
	}
	c.redis[name] = set
	c.ts.Setenv(strings.ToUpper(name)+"_ADDRS", strings.Join(set.Addrs(), ","))
	c.ts.Setenv(strings.ToUpper(name)+"_ADDR", set.Nodes[0].Addr)
	return nil
}

func startTopology(ctx context.Context, dir, topology string, options []servers.RedisOption) (*servers.RedisSet, error) {
	switch topology {
	case "", "standalone":
		node, err := servers.StartRedis(ctx, dir, options...)
		if err != nil {
			return nil, err
		}
		return &servers.RedisSet{Nodes: []*servers.RedisNode{node}}, nil
	case "replicated":
		return servers.StartReplicated(ctx, dir, 2, options...)
	case "cluster":
		return servers.StartCluster(ctx, dir, options...)
	}
	return nil, fmt.Errorf("topology %q: use standalone, replicated or cluster", topology)
}

// node finds NAME, its first node, or NAME.N, the one at index N.
func (s *script) node(text string) (*servers.RedisNode, error) {
	name, number, _ := strings.Cut(text, ".")
	index := 0
	if number != "" {
		var err error
		if index, err = strconv.Atoi(number); err != nil {
			return nil, fmt.Errorf("node %q: %w", text, err)
		}
	}
	set := s.redis[name]
	if set == nil || index < 0 || index >= len(set.Nodes) {
		return nil, fmt.Errorf("there is no redis node %q: start it with redis-start", text)
	}
	return set.Nodes[index], nil
}

func onNode(do func(*servers.RedisNode) error) command {
	return func(_ context.Context, c call) error {
		if len(c.args) != 1 {
			return errors.New("name one node: NAME or NAME.INDEX")
		}
		node, err := c.node(c.args[0])
		if err != nil {
			return err
		}
		return do(node)
	}
}

// runRedis: redis [-as USER:PASSWORD] NODE COMMAND...
func runRedis(ctx context.Context, c call) error {
	flags := flag.NewFlagSet("redis", flag.ContinueOnError)
	flags.SetOutput(c.out)
	as := flags.String("as", "", "log in as USER:PASSWORD instead of the administrator")
	if err := flags.Parse(c.args); err != nil {
		return err
	}
	if flags.NArg() < 2 {
		return errors.New("usage: redis [-as USER:PASSWORD] NODE COMMAND...")
	}
	node, err := c.node(flags.Arg(0))
	if err != nil {
		return err
	}
	client := node.Client()
	if *as != "" {
		options := *client.Options()
		client.Close()
		options.Username, options.Password, _ = strings.Cut(*as, ":")
		client = redis.NewClient(&options)
	}
	defer client.Close()
	var words []any
	for _, word := range flags.Args()[1:] {
		words = append(words, word)
	}
	answer, err := client.Do(ctx, words...).Result()
	if err != nil {
		return err
	}
	printReply(c.out, answer)
	return nil
}

// printReply prints one value a line, as redis-cli does without a terminal.
func printReply(out io.Writer, reply any) {
	list, ok := reply.([]any)
	if !ok {
		fmt.Fprintln(out, reply)
		return
	}
	for _, item := range list {
		printReply(out, item)
	}
}

// ownVault: own-vault [dev|raft|full]
func ownVault(ctx context.Context, c call) error {
	options := servers.VaultOptions{NoMount: true, Race: raceEnabled, Dir: filepath.Join(c.dir, ".vault")}
	switch strings.Join(c.args, " ") {
	case "raft":
		options.Raft = true
	case "full":
		options.Binary = os.Getenv(fullVault)
	case "dev", "":
	default:
		return errors.New("usage: own-vault [dev|raft|full]")
	}
	if c.ownsVault() {
		return errors.New("this script has a vault of its own already")
	}
	if err := os.Mkdir(options.Dir, 0o700); err != nil {
		return err
	}
	vault, err := servers.StartVault(options)
	if err != nil {
		return err
	}
	c.vault = vault
	c.useVault(c.ts.Setenv)
	return vault.Mount(ctx, c.mount)
}

var errShared = errors.New("other scripts are in the middle of something in this vault: use own-vault first")

// killPlugin: plugin-kill
func killPlugin(_ context.Context, c call) error {
	if !c.ownsVault() {
		return errShared
	}
	killed, err := c.vault.KillPlugin()
	if err == nil && killed == 0 {
		err = errors.New("no plugin process runs")
	}
	return err
}

// killVault: vault-kill
func killVault(_ context.Context, c call) error {
	if !c.ownsVault() {
		return errShared
	}
	return c.vault.Kill()
}

// restartVault: vault-restart
func restartVault(ctx context.Context, c call) error {
	if !c.ownsVault() {
		return errShared
	}
	return c.vault.Restart(ctx)
}

// unsealVault: vault-unseal
func unsealVault(ctx context.Context, c call) error {
	if !c.ownsVault() {
		return errShared
	}
	return c.vault.Unseal(ctx)
}

// cronSoon: cron-soon VARIABLE. The cron fires once a day, at the next full
// minute that is not about to begin.
func cronSoon(_ context.Context, c call) error {
	if len(c.args) != 1 {
		return errors.New("usage: cron-soon VARIABLE")
	}
	at := time.Now().UTC().Add(70 * time.Second)
	c.ts.Setenv(c.args[0], fmt.Sprintf("%d %d * * *", at.Minute(), at.Hour()))
	return nil
}

// takeField: field NAME VARIABLE. The last command printed JSON or a table of
// keys and values.
func takeField(_ context.Context, c call) error {
	if len(c.args) != 2 {
		return errors.New("usage: field NAME VARIABLE")
	}
	name, variable := c.args[0], c.args[1]
	value, ok := fieldOf(c.ts.ReadFile("stdout"), name)
	if !ok {
		return fmt.Errorf("the last output has no field %q", name)
	}
	c.ts.Setenv(variable, value)
	return nil
}

func fieldOf(output, name string) (string, bool) {
	var answer map[string]any
	decoder := json.NewDecoder(strings.NewReader(output))
	decoder.UseNumber()
	if decoder.Decode(&answer) == nil {
		if data, ok := answer["data"].(map[string]any); ok {
			answer = data
		}
		switch value := answer[name].(type) {
		case nil:
			return "", false
		case string:
			return value, true
		case json.Number:
			return value.String(), true
		default:
			text, err := json.Marshal(value)
			return string(text), err == nil
		}
	}
	for line := range strings.Lines(output) {
		if key, value, ok := strings.Cut(line, " "); ok && key == name {
			return strings.TrimSpace(value), true
		}
	}
	return "", false
}

// takeOutput: capture VARIABLE
func takeOutput(_ context.Context, c call) error {
	if len(c.args) != 1 {
		return errors.New("usage: capture VARIABLE")
	}
	c.ts.Setenv(c.args[0], strings.TrimSpace(c.ts.ReadFile("stdout")))
	return nil
}

// rememberSecrets: secret VALUE...
func rememberSecrets(_ context.Context, c call) error {
	if len(c.args) == 0 || slices.Contains(c.args, "") {
		return errors.New("usage: secret VALUE... (an empty value would be found everywhere)")
	}
	c.run.remember(c.args...)
	return nil
}

// eventually: eventually [-within 1m] [-stdout REGEXP] [!] COMMAND...
func eventually(repeatable map[string]command) command {
	return func(ctx context.Context, c call) error {
		flags := flag.NewFlagSet("eventually", flag.ContinueOnError)
		flags.SetOutput(c.out)
		within := flags.Duration("within", time.Minute, "how long to go on")
		pattern := flags.String("stdout", "", "what the command must print in the end")
		if err := flags.Parse(c.args); err != nil {
			return err
		}
		want, err := regexp.Compile("(?m)" + *pattern)
		if err != nil {
			return err
		}
		args := flags.Args()
		fail := len(args) > 0 && args[0] == "!"
		if fail {
			args = args[1:]
		}
		if len(args) == 0 || repeatable[args[0]] == nil {
			return errors.New("usage: eventually [-within 1m] [-stdout REGEXP] [!] vault|redis|http|rabbitmq|postgresql ARGS...")
		}
		ctx, cancel := context.WithTimeout(ctx, *within)
		defer cancel()
		for {
			var out strings.Builder
			err := repeatable[args[0]](ctx, call{script: c.script, ts: c.ts, args: args[1:], out: &out})
			if ctx.Err() == nil && (err != nil) == fail && want.MatchString(out.String()) {
				fmt.Fprint(c.out, out.String())
				return nil
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("not within %s; the last time it printed %q, error: %w", *within, out.String(), err)
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
}
