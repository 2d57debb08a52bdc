package servers

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
)

// PluginName is the name that the plugin is registered and mounted by.
const PluginName = "vault-plugin-secrets-harmonyflow"

// versionVariable is what the linker sets to the version of a release.
const versionVariable = "github.com/harmonyflow/" + PluginName + "/backend/buildinfo.Version"

// DefaultMount is where users mount the engine.
const DefaultMount = "harmonyflow"

const (
	vaultStartTimeout = 2 * time.Minute
	vaultStopTimeout  = 15 * time.Second
)

// VaultOptions says what Vault to start. The zero value is a dev Vault (in
// memory, unsealed) with the engine mounted at harmonyflow/.
type VaultOptions struct {
	// Raft keeps the data in raft storage on disk, so that Restart finds it
	// again.
	Raft bool
	// NoMount registers the plugin and mounts it nowhere.
	NoMount bool
	// Race builds the plugin with the race detector.
	Race bool
	// LogLevel is the server's; without it "debug".
	LogLevel string
	// RawStorage lets the root token read what is stored, at sys/raw.
	RawStorage bool
	// Binary is the vault program; without it VaultBinary finds one.
	Binary string
	// Plugin is the plugin program; without it BuildPlugin builds one.
	Plugin string
	// PluginEnv is added to the plugin's environment, as KEY=value.
	PluginEnv []string
	// Dir holds everything this Vault writes. It must exist and is left alone
	// by Stop; without it a temporary folder is used and removed.
	Dir string
}

// Vault is a running Vault server that listens on loopback only and audits
// every request. When the process that started it dies, it
// dies.
type Vault struct {
	// Address is the API's URL; it survives Restart.
	Address string
	// Token is the root token.
	Token string
	// LogPath is what the server and its plugins print.
	LogPath string
	// AuditPath is the audit log, with secrets hashed as in production.
	AuditPath string

	options   VaultOptions
	member    *member // of a VaultCluster; nil: it is alone
	dir       string
	pluginDir string
	unsealKey string
	client    *api.Client

	mu        sync.Mutex
	process   *childProcess
	installed []string // files of the plugin in pluginDir, beside PluginName
}

// StartVault starts a Vault that is ready to use: unsealed, audited, the plugin
// registered and, unless told otherwise, mounted. The caller stops it.
func StartVault(options VaultOptions) (_ *Vault, err error) {
	v := &Vault{options: options}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Stop())
		}
	}()
	if err := v.prepare(); err != nil {
		return nil, err
	}
	// Not before the plugin is built: on a machine that never did, that takes
	// minutes.
	ctx, cancel := context.WithTimeout(context.Background(), 2*vaultStartTimeout)
	defer cancel()
	return v, v.begin(ctx)
}

// begin starts a Vault that nobody has used yet.
func (v *Vault) begin(ctx context.Context) error {
	if err := v.listen(ctx); err != nil {
		return err
	}
	if v.options.Raft {
		if err := v.initialise(ctx); err != nil {
			return err
		}
	}
	if err := v.awaitActive(ctx); err != nil {
		return err
	}
	return v.setUp(ctx)
}

// NewVault is StartVault for a test, which fails when it cannot be started and
// stops it at its end. The log is shown when the test failed.
func NewVault(t testing.TB, options VaultOptions) *Vault {
	t.Helper()
	if options.Dir == "" {
		options.Dir = t.TempDir()
	}
	v, err := StartVault(options)
	if err != nil {
		t.Fatalf("starting vault: %v", err)
	}
	t.Cleanup(func() {
		if err := v.Stop(); err != nil {
			t.Errorf("stopping vault: %v", err)
		}
		if t.Failed() {
			t.Logf("end of the vault log:\n%s", v.logTail())
		}
	})
	return v
}

// prepare fills what options leave open and lays out the folder.
func (v *Vault) prepare() (err error) {
	if v.options.Binary == "" {
		if v.options.Binary, err = VaultBinary(); err != nil {
			return err
		}
	}
	if v.options.Plugin == "" {
		if v.options.Plugin, err = BuildPlugin(v.options.Race); err != nil {
			return err
		}
	}
	v.dir = v.options.Dir
	if v.dir == "" {
		if v.dir, err = os.MkdirTemp("", "vault-"); err != nil {
			return err
		}
	}
	// Vault refuses plugins below a symbolic link, which TMPDIR often is.
	if v.dir, err = filepath.EvalSymlinks(v.dir); err != nil {
		return err
	}
	v.pluginDir = filepath.Join(v.dir, "plugins")
	v.LogPath = filepath.Join(v.dir, "vault.log")
	v.AuditPath = filepath.Join(v.dir, "audit.log")
	if v.member != nil { // the path is part of what members share
		v.AuditPath = filepath.Join(filepath.Dir(v.dir), "audit.log")
	}
	for _, name := range []string{"plugins", "data", "bin"} {
		if err := os.MkdirAll(filepath.Join(v.dir, name), 0o700); err != nil {
			return err
		}
	}
	// The CLI under its own name, first on the PATH of Env.
	link := filepath.Join(v.dir, "bin", "vault")
	if err := os.Symlink(v.options.Binary, link); err != nil && !os.IsExist(err) {
		return err
	}
	// A copy of its own tells this Vault's plugin processes from all others.
	return copyFile(filepath.Join(v.pluginDir, PluginName), v.options.Plugin)
}

// listen starts the process on free ports, again on others when somebody was
// faster, and returns when its API answers.
func (v *Vault) listen(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		port, err := freePort()
		if err != nil {
			return err
		}
		if err := v.useAddress(port); err != nil {
			return err
		}
		err = v.launch(ctx)
		if err == nil || attempt == 5 || !strings.Contains(v.logTail(), "address already in use") {
			return err
		}
		// The failed attempt may have left half a raft folder.
		if err := os.RemoveAll(filepath.Join(v.dir, "data")); err != nil {
			return err
		}
		if err := os.Mkdir(filepath.Join(v.dir, "data"), 0o700); err != nil {
			return err
		}
	}
}

func (v *Vault) useAddress(port int) error {
	v.Address = "http://" + loopback(port)
	if !v.options.Raft {
		v.Token = rand.Text()
	}
	if v.member != nil {
		v.Address = "https://" + loopback(port)
		if err := v.member.listen(port); err != nil {
			return err
		}
	}
	config := api.DefaultConfig()
	if config.Error != nil {
		return config.Error
	}
	config.Address = v.Address
	config.MaxRetries = 0
	if v.member != nil {
		if err := config.ConfigureTLS(&api.TLSConfig{CACertBytes: []byte(v.member.cluster.ca.PEM)}); err != nil {
			return err
		}
	}
	client, err := api.NewClient(config)
	if err != nil {
		return err
	}
	client.ClearNamespace()
	client.SetToken(v.Token)
	v.client = client
	return os.WriteFile(filepath.Join(v.dir, "vault.hcl"), v.config(port), 0o600)
}

func (v *Vault) config(port int) []byte {
	if !v.options.Raft {
		return fmt.Appendf(nil, "disable_mlock = true\nraw_storage_endpoint = %t\n", v.options.RawStorage)
	}
	listen, cluster := loopback(port), loopback(port+10000) // freePort found both free
	if v.member != nil {
		return v.member.config(v, listen, cluster)
	}
	return fmt.Appendf(nil, `
disable_mlock        = true
ui                   = false
raw_storage_endpoint = %t
plugin_directory     = %q
api_addr             = "http://%s"
cluster_addr         = "https://%s"

listener "tcp" {
  address         = %q
  cluster_address = %q
  tls_disable     = true
}

storage "raft" {
  path                   = %q
  node_id                = "only"
  performance_multiplier = 1
}
`, v.options.RawStorage, v.pluginDir, listen, cluster, listen, cluster, filepath.Join(v.dir, "data"))
}

// launch starts the process and returns when its API answers, sealed or not.
func (v *Vault) launch(ctx context.Context) error {
	log, err := os.OpenFile(v.LogPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"server", "-log-level=" + cmp.Or(v.options.LogLevel, "debug"), "-config=" + filepath.Join(v.dir, "vault.hcl")}
	if !v.options.Raft {
		args = append(args, "-dev", "-dev-no-store-token",
			"-dev-listen-address="+strings.TrimPrefix(v.Address, "http://"),
			"-dev-plugin-dir="+v.pluginDir, "-dev-plugin-init=false")
	}
	command := exec.Command(v.options.Binary, args...)
	command.Stdout, command.Stderr = log, log
	command.Dir = v.dir
	command.Env = append(vaultEnvironment(), "VAULT_DEV_ROOT_TOKEN_ID="+v.Token)
	process, err := startChild(command)
	if err != nil {
		return fmt.Errorf("starting %s: %w", v.options.Binary, err)
	}
	v.mu.Lock()
	v.process = process
	v.mu.Unlock()
	return v.await(ctx, func() error {
		_, err := v.client.Sys().SealStatusWithContext(ctx)
		return err
	})
}

// await repeats ready until it succeeds, this Vault's own process has ended, or
// it took too long.
func (v *Vault) await(ctx context.Context, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, vaultStartTimeout)
	defer cancel()
	for {
		// Whoever else answers at the address is not this Vault.
		process := v.current()
		if process == nil {
			return errors.New("vault was killed while it started")
		}
		select {
		case <-process.done:
			return fmt.Errorf("vault ended by itself; the end of its log:\n%s", v.logTail())
		default:
		}
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("vault was not ready in time: %w; the end of its log:\n%s", err, v.logTail())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (v *Vault) initialise(ctx context.Context) error {
	answer, err := v.client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return fmt.Errorf("initialising vault: %w", err)
	}
	v.unsealKey, v.Token = answer.Keys[0], answer.RootToken
	v.client.SetToken(v.Token)
	return v.Unseal(ctx)
}

// awaitActive returns when the node takes writes.
func (v *Vault) awaitActive(ctx context.Context) error {
	return v.await(ctx, func() error {
		health, err := v.client.Sys().HealthWithContext(ctx)
		if err == nil && (health.Sealed || health.Standby || !health.Initialized) {
			err = fmt.Errorf("sealed: %t, standby: %t", health.Sealed, health.Standby)
		}
		return err
	})
}

// setUp enables the audit device, registers the plugin and mounts it.
func (v *Vault) setUp(ctx context.Context) error {
	audit := &api.EnableAuditOptions{
		Type:    "file",
		Options: map[string]string{"file_path": v.AuditPath, "log_raw": "false"},
	}
	if err := v.client.Sys().EnableAuditWithOptionsWithContext(ctx, "file", audit); err != nil {
		return fmt.Errorf("enabling the audit log: %w", err)
	}
	sum, err := fileSHA256(filepath.Join(v.pluginDir, PluginName))
	if err != nil {
		return err
	}
	err = v.client.Sys().RegisterPluginWithContext(ctx, &api.RegisterPluginInput{
		Name: PluginName, Type: api.PluginTypeSecrets, Command: PluginName, SHA256: sum, Env: v.options.PluginEnv,
	})
	if err != nil {
		return fmt.Errorf("registering the plugin: %w", err)
	}
	if v.options.NoMount {
		return nil
	}
	return v.Mount(ctx, DefaultMount)
}

// Install builds the plugin as a release of that version and registers it in
// the catalog, beside the one that is mounted.
func (v *Vault) Install(ctx context.Context, version string) error {
	return release(ctx, v, []*Vault{v}, version)
}

// InstallBuilt registers the plugin at path, which was built as a release of that
// version, beside the one that is mounted.
func (v *Vault) InstallBuilt(ctx context.Context, version, path string) error {
	return install(ctx, v, []*Vault{v}, path, PluginName+"-"+version, &api.RegisterPluginInput{Name: PluginName, Version: version})
}

// release puts a release of that version into the plugin folder of every node, and
// registers it at one of them.
func release(ctx context.Context, at *Vault, nodes []*Vault, version string) error {
	built, err := goBuild("plugin-"+version, "./cmd/"+PluginName, "CGO_ENABLED=0", "-trimpath", "-ldflags=-X "+versionVariable+"="+version)
	if err != nil {
		return err
	}
	return install(ctx, at, nodes, built, PluginName+"-"+version, &api.RegisterPluginInput{Name: PluginName, Version: version})
}

// MountOther registers another secrets engine, the program at path, and mounts it
// at name.
func (v *Vault) MountOther(ctx context.Context, name, path string) error {
	if err := install(ctx, v, []*Vault{v}, path, name, &api.RegisterPluginInput{Name: name}); err != nil {
		return err
	}
	if err := v.client.Sys().MountWithContext(ctx, name, &api.MountInput{Type: name}); err != nil {
		return fmt.Errorf("mounting %s: %w", name, err)
	}
	return nil
}

// install puts a program beside the plugin of every node, and registers it at one of
// them as in.
func install(ctx context.Context, at *Vault, nodes []*Vault, path, command string, in *api.RegisterPluginInput) error {
	sum, err := fileSHA256(path)
	if err != nil {
		return err
	}
	for _, v := range nodes {
		if err := copyFile(filepath.Join(v.pluginDir, command), path); err != nil {
			return err
		}
		v.mu.Lock()
		v.installed = append(v.installed, command)
		v.mu.Unlock()
	}
	in.Type, in.Command, in.SHA256, in.Env = api.PluginTypeSecrets, command, sum, at.options.PluginEnv
	if err := at.client.Sys().RegisterPluginWithContext(ctx, in); err != nil {
		return fmt.Errorf("registering %s: %w", command, err)
	}
	return nil
}

// Mount mounts the engine at path.
func (v *Vault) Mount(ctx context.Context, path string) error {
	if err := v.client.Sys().MountWithContext(ctx, path, &api.MountInput{Type: PluginName}); err != nil {
		return fmt.Errorf("mounting the plugin at %s/: %w", path, err)
	}
	return nil
}

// Unmount removes the mount at path and what it stored.
func (v *Vault) Unmount(ctx context.Context, path string) error {
	return v.client.Sys().UnmountWithContext(ctx, path)
}

// Client returns a new API client with the root token. It repeats nothing by
// itself.
func (v *Vault) Client() *api.Client {
	client, err := v.client.CloneWithHeaders()
	if err != nil {
		panic(err) // the same configuration made a client before
	}
	client.SetToken(v.Token)
	return client
}

// TokenFor returns a token that may do what policy (HCL) says and nothing else.
func (v *Vault) TokenFor(ctx context.Context, name, policy string) (string, error) {
	if err := v.client.Sys().PutPolicyWithContext(ctx, name, policy); err != nil {
		return "", err
	}
	secret, err := v.client.Auth().Token().CreateWithContext(ctx, &api.TokenCreateRequest{
		Policies: []string{name}, NoDefaultPolicy: true, NoParent: true,
	})
	if err != nil {
		return "", err
	}
	return secret.Auth.ClientToken, nil
}

// Env is the environment in which `vault …` talks to this Vault as root.
func (v *Vault) Env() []string {
	path := filepath.Join(v.dir, "bin") + string(os.PathListSeparator) + os.Getenv("PATH")
	env := append(vaultEnvironment(), "VAULT_ADDR="+v.Address, "VAULT_TOKEN="+v.Token, "PATH="+path)
	if v.member != nil {
		env = append(env, "VAULT_CACERT="+v.member.file("ca.pem"))
	}
	return env
}

// Binary is the vault program.
func (v *Vault) Binary() string { return v.options.Binary }

// CLI runs `vault args…` and returns what it prints.
func (v *Vault) CLI(ctx context.Context, args ...string) (string, error) {
	command := exec.CommandContext(ctx, v.options.Binary, args...)
	command.Env = v.Env()
	out, err := command.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("vault %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// Unseal unseals with the key that StartVault kept.
func (v *Vault) Unseal(ctx context.Context) error {
	if _, err := v.client.Sys().UnsealWithContext(ctx, v.unsealKey); err != nil {
		return fmt.Errorf("unsealing vault: %w", err)
	}
	return nil
}

// PID is the server's process id, 0 when it does not run.
func (v *Vault) PID() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.process == nil {
		return 0
	}
	return v.process.pid()
}

// PluginPIDs are the processes that run the plugin for this Vault. There is
// none before its first request, and none after a crash until the next one.
func (v *Vault) PluginPIDs() ([]int, error) {
	pids, err := v.pluginProcesses()
	if err != nil {
		return nil, err
	}
	server := v.PID()
	var children []int
	for _, p := range pids {
		if p.parent == server {
			children = append(children, p.pid)
		}
	}
	return children, nil
}

// KillPlugin sends SIGKILL to the plugin and returns how many processes it
// killed, when Vault has reaped them. Vault starts a new one at the next
// request; requests that it was handling, and now and then one that comes
// within the next millisecond, get an answer 500, which the CLI repeats.
func (v *Vault) KillPlugin() (int, error) {
	pids, err := v.PluginPIDs()
	if err != nil {
		return 0, err
	}
	return len(pids), killAll(pids, true)
}

// Kill sends SIGKILL to Vault, not to its plugin, which is what an
// out-of-memory kill does.
func (v *Vault) Kill() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.process == nil {
		return errors.New("vault does not run")
	}
	err := v.process.kill()
	v.process = nil
	return err
}

// Restart starts Vault again on the same data and address, and unseals it. A
// member of a cluster need not become its active node. One that still runs is stopped first. The plugins of the one before are gone when
// Restart returns, as they are on a machine that came up anew.
func (v *Vault) Restart(ctx context.Context) error {
	if !v.options.Raft {
		return errors.New("a dev vault keeps nothing over a restart: start it with VaultOptions.Raft")
	}
	if err := v.halt(); err != nil {
		return err
	}
	if err := v.launch(ctx); err != nil {
		return err
	}
	if err := v.Unseal(ctx); err != nil {
		return err
	}
	if v.member != nil {
		return v.awaitUnsealed(ctx)
	}
	return v.awaitActive(ctx)
}

// Stop ends Vault and its plugins, and removes its folder when it was a
// temporary one. Stopping twice is fine.
func (v *Vault) Stop() error {
	err := v.halt()
	if v.options.Dir == "" && v.dir != "" {
		err = errors.Join(err, os.RemoveAll(v.dir))
	}
	return err
}

func (v *Vault) halt() error {
	v.mu.Lock()
	process := v.process
	v.process = nil
	v.mu.Unlock()
	var err error
	if process != nil {
		err = process.terminate(vaultStopTimeout)
	}
	if v.pluginDir == "" {
		return err
	}
	orphans, listErr := v.pluginProcesses()
	var pids []int
	for _, p := range orphans {
		pids = append(pids, p.pid)
	}
	return errors.Join(err, listErr, killAll(pids, false))
}

func (v *Vault) current() *childProcess {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.process
}

func (v *Vault) pluginProcesses() ([]processInfo, error) {
	v.mu.Lock()
	commands := append([]string{PluginName}, v.installed...)
	v.mu.Unlock()
	var all []processInfo
	for _, command := range commands {
		some, err := processesOf(filepath.Join(v.pluginDir, command))
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// Log is everything the server and its plugins have printed.
func (v *Vault) Log() (string, error) {
	log, err := os.ReadFile(v.LogPath)
	return string(log), err
}

func (v *Vault) logTail() string {
	log, err := v.Log()
	if err != nil {
		return err.Error()
	}
	lines := strings.SplitAfter(log, "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "")
}

// VaultBinary is the vault program to test with: HARMONYFLOW_VAULT, or what
// scripts/ensure-vault.sh finds or builds.
func VaultBinary() (string, error) {
	if path := os.Getenv("HARMONYFLOW_VAULT"); path != "" {
		return path, nil
	}
	return findVault()
}

var findVault = sync.OnceValues(func() (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	command := exec.Command(filepath.Join(root, "scripts", "ensure-vault.sh"))
	command.Stderr = os.Stderr
	out, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("scripts/ensure-vault.sh: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
})

// BuildPlugin builds the plugin of this checkout, with the race detector or
// without, at most once a process, and returns where it is.
// HARMONYFLOW_PLUGIN names one to take instead.
func BuildPlugin(race bool) (string, error) {
	if path := os.Getenv("HARMONYFLOW_PLUGIN"); path != "" {
		return path, nil
	}
	if race {
		return buildRacePlugin()
	}
	return buildPlugin()
}

var (
	buildPlugin     = sync.OnceValues(func() (string, error) { return goBuild("plugin", "./cmd/"+PluginName, "CGO_ENABLED=0", "-trimpath") })
	buildRacePlugin = sync.OnceValues(func() (string, error) { return goBuild("plugin-race", "./cmd/"+PluginName, "CGO_ENABLED=1", "-race") })
)

// Build builds a program of this checkout, the package at path (./cmd/…), and
// returns where it is.
func Build(name, path string) (string, error) {
	return goBuild(name, path, "CGO_ENABLED=0", "-trimpath")
}

// goBuild builds into the user's cache, in a folder that belongs to this
// checkout. Test processes that build at the same time each rename a whole
// file into place. With -race it compiles as the tests are compiled, and otherwise
// as a release is, so that what one has compiled the other finds.
func goBuild(name, path, cgo string, flags ...string) (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	checkout := sha256.Sum256([]byte(root))
	dir := filepath.Join(cache, "harmonyflow", "test-"+hex.EncodeToString(checkout[:6]))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	temporary, err := os.CreateTemp(dir, name+"-")
	if err != nil {
		return "", err
	}
	temporary.Close()
	defer os.Remove(temporary.Name())
	args := append([]string{"build", "-buildvcs=false", "-o", temporary.Name()}, flags...)
	command := exec.Command("go", append(args, path)...)
	command.Dir = root
	command.Env = append(os.Environ(), cgo, "GOOS=", "GOARCH=")
	if out, err := command.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", path, err, out)
	}
	built := filepath.Join(dir, name)
	return built, os.Rename(temporary.Name(), built)
}

// moduleRoot is the folder of the go.mod above the working directory, which is
// the package's own in tests.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	file := strings.TrimSpace(string(out))
	if filepath.Base(file) != "go.mod" {
		return "", errors.New("run this inside a checkout: there is no go.mod above the working directory")
	}
	return filepath.Dir(file), nil
}

// vaultEnvironment is this process's environment without what would make vault
// talk to, or log in at, another server.
func vaultEnvironment() []string {
	var env []string
	for _, variable := range os.Environ() {
		if !strings.HasPrefix(variable, "VAULT_") {
			env = append(env, variable)
		}
	}
	return env
}

func fileSHA256(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

func copyFile(to, from string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}
