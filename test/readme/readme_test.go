// Package readme holds the documentation to what the engine does: the commands
// that it shows are typed at a real Vault and a real Redis.
package readme

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const root = "../../"

// redisInDocs is the address that the documentation uses for a Redis.
const redisInDocs = "redis.example.com:6379"

// step is one command of a console block, and the lines that it is shown to
// print.
type step struct {
	command string
	shown   []string
}

var consoleBlock = regexp.MustCompile("(?s)```console\n(.*?)```")

// steps reads the console blocks of a document. A command begins with "$ " and
// goes on after a backslash; what follows is output, cut to the lines that
// matter, with … for what varies.
func steps(t *testing.T, file string) []step {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, file))
	require.NoError(t, err)
	out := stepsOf(t, file, string(text))
	require.NotEmpty(t, out, "%s has no console block", file)
	return out
}

// stepsOf reads those of a part of a document.
func stepsOf(t *testing.T, file, text string) []step {
	t.Helper()
	var out []step
	for _, block := range consoleBlock.FindAllStringSubmatch(text, -1) {
		for line := range strings.Lines(strings.ReplaceAll(block[1], "\\\n", " ")) {
			line = strings.TrimSpace(line)
			if command, ok := strings.CutPrefix(line, "$ "); ok {
				out = append(out, step{command: command})
				continue
			}
			require.NotEmpty(t, out, "%s: a console block begins with output: %s", file, line)
			last := &out[len(out)-1]
			last.shown = append(last.shown, line)
		}
	}
	return out
}

var spaces = regexp.MustCompile(`\s+`)

// prints reports whether output has a line like shown.
func prints(output, shown string) bool {
	pattern := spaces.ReplaceAllString(regexp.QuoteMeta(shown), `\s+`)
	pattern = strings.ReplaceAll(pattern, "…", `\S+`)
	return regexp.MustCompile(`(?m)^\s*` + pattern + `\s*$`).MatchString(output)
}

// shell is a terminal in a folder of its own.
type shell struct {
	dir string
	env []string
}

func (s shell) run(t *testing.T, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.Dir, cmd.Env = s.dir, s.env
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "$ %s\n%s", command, out)
	return string(out)
}

// file writes what the documentation calls NAME, without a new line at its end.
func (s shell) file(t *testing.T, name, content string) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(s.dir, name), []byte(content), 0o600))
}

func newShell(t *testing.T, vault *servers.Vault) shell {
	t.Helper()
	return shell{dir: t.TempDir(), env: append(vault.Env(), "VAULT_CLI_NO_COLOR=1")}
}

// play types all commands, with the address of a server instead of the one that
// the documentation uses.
func (s shell) play(t *testing.T, inDocs, address string, all []step) {
	t.Helper()
	s.playWith(t, strings.NewReplacer(inDocs, address), all)
}

// playWith is play with several of them.
func (s shell) playWith(t *testing.T, addresses *strings.Replacer, all []step) {
	t.Helper()
	for _, st := range all {
		out := s.run(t, addresses.Replace(st.command))
		for _, line := range st.shown {
			require.True(t, prints(out, line), "$ %s\nis shown to print\n\t%s\nand printed\n%s", st.command, line, out)
		}
	}
}

func TestTour(t *testing.T) {
	vault := servers.NewVault(t, servers.VaultOptions{})
	redis := servers.Redis(t, servers.WithUsers("app on >first ~* +@all"))
	sh := newShell(t, vault)
	sh.file(t, "admin.password", servers.RedisAdminPassword)
	sh.file(t, "app.password", "first")
	sh.play(t, redisInDocs, redis.Addr, steps(t, "README.md"))

	t.Run("policy", func(t *testing.T) {
		token, err := vault.TokenFor(t.Context(), "from-the-readme", block(t, "README.md", "hcl"))
		require.NoError(t, err)
		client := vault.Client()
		client.SetToken(token)
		_, err = client.Logical().WriteWithContext(t.Context(), "harmonyflow/rotate/redis/app", map[string]any{"dry_run": true})
		require.NoError(t, err)
		for _, path := range []string{"creds/app", "roles/app", "connections/cache"} {
			_, err = client.Logical().ReadWithContext(t.Context(), "harmonyflow/"+path)
			require.ErrorContains(t, err, "permission denied", path)
		}
		_, err = client.Logical().WriteWithContext(t.Context(), "harmonyflow/rotate/api-key/partner", nil)
		require.ErrorContains(t, err, "permission denied")
	})
}

// block is the first block of a document in a language.
func block(t *testing.T, file, language string) string {
	t.Helper()
	return blocks(t, file, language)[0]
}

// blocks are all of them.
func blocks(t *testing.T, file, language string) (all []string) {
	t.Helper()
	text, err := os.ReadFile(root + file)
	require.NoError(t, err)
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllSubmatch(text, -1) {
		all = append(all, string(m[1]))
	}
	require.NotEmpty(t, all, "%s has no %s block", file, language)
	return all
}

// TestInstallation registers and mounts the plugin as the README says, with
// the built plugin where make plugin puts it and where Vault looks for it.
func TestInstallation(t *testing.T) {
	dir := t.TempDir()
	vault := servers.NewVault(t, servers.VaultOptions{NoMount: true, Dir: dir})
	sh := newShell(t, vault)
	require.NoError(t, os.Symlink(filepath.Join(dir, "plugins"), filepath.Join(sh.dir, "bin")))
	sh.run(t, "set -e\n"+block(t, "README.md", "sh"))
	require.Contains(t, sh.run(t, "vault path-help harmonyflow/"), "rotate/")
}

// adminRule is the line of docs/reference/redis.md that makes an admin user.
var adminRule = regexp.MustCompile(`(?m)^ACL SETUSER vault (.*)$`)

const redisReference = "docs/reference/redis.md"

// adminRights are those of the user vault, whose password is admin.
func adminRights(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(root + redisReference)
	require.NoError(t, err)
	rule := adminRule.FindStringSubmatch(strings.ReplaceAll(string(text), "\\\n", " "))
	require.NotNil(t, rule, "%s does not say how to make the user vault", redisReference)
	return strings.Replace(rule[1], "PASSWORD", "admin", 1)
}

// TestRedisReference makes the admin user that the reference calls sufficient,
// and does with it what the reference shows: on one server and on a cluster.
func TestRedisReference(t *testing.T) {
	users := servers.WithUsers("vault "+adminRights(t), "app on >first ~* +@all")

	vault := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	// A mount that stays: Vault ends the plugin's process with the last mount, and
	// who mounts at that moment would meet its end.
	require.NoError(t, vault.Mount(t.Context(), "stays"))
	_, err := vault.Client().Logical().ReadWithContext(t.Context(), "stays/config")
	require.NoError(t, err)
	for name, addr := range map[string]string{
		"standalone": servers.Redis(t, users).Addr,
		"aclfile":    servers.Redis(t, users, servers.WithACLFile()).Addr,
		"cluster":    servers.RedisCluster(t, users).Addrs()[0],
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, vault.Mount(t.Context(), servers.DefaultMount))
			t.Cleanup(func() { require.NoError(t, vault.Unmount(context.Background(), servers.DefaultMount)) })
			sh := newShell(t, vault)
			sh.file(t, "admin.password", "admin")
			sh.file(t, "app.password", "first")
			sh.play(t, redisInDocs, addr, steps(t, redisReference))
		})
	}
}

// TestMakeTargets looks up every make target that the README names.
func TestMakeTargets(t *testing.T) {
	text, err := os.ReadFile(root + "README.md")
	require.NoError(t, err)
	makefile, err := os.ReadFile(root + "Makefile")
	require.NoError(t, err)
	for _, m := range regexp.MustCompile("`make ([a-z]+)`").FindAllStringSubmatch(string(text), -1) {
		require.Regexp(t, fmt.Sprintf(`(?m)^%s:`, m[1]), string(makefile), "README.md names make %s", m[1])
	}
}

// TestLinks follows every relative link between documents.
func TestLinks(t *testing.T) {
	var files []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md", "test/*/*.md", "deploy/*/*/*.md"} {
		found, err := filepath.Glob(root + pattern)
		require.NoError(t, err)
		files = append(files, found...)
	}
	require.NotEmpty(t, files)
	for _, file := range files {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(string(text), -1) {
			link, err := url.Parse(m[1])
			require.NoError(t, err, "%s: %s", file, m[1])
			if link.IsAbs() || link.Path == "" {
				continue
			}
			require.FileExists(t, filepath.Join(filepath.Dir(file), link.Path), "%s links to %s", file, m[1])
		}
	}
}
