package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/stretchr/testify/require"
)

// TestRelease: two clones in two folders, of which one holds what git does not have,
// the same bytes; and in them what belongs there.
func TestRelease(t *testing.T) {
	const version, uncommitted = "v9.8.7", "this is in no commit"
	here, elsewhere := filepath.Join(t.TempDir(), "here"), filepath.Join(t.TempDir(), "elsewhere")
	commitSources(t, here)
	git(t, here, "clone", "--quiet", here, elsewhere)
	// What lies about in a working tree: a state, a secret, a draft, a program.
	strays := []string{"deploy/terraform.tfstate", "deploy/policies/.env", "docs/drafts/draft.md", "cmd/" + follower + "/stray.go", "README.md"}
	for _, name := range strays {
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(here, name)), 0o700))
		content := "package main\n\nfunc init() { panic(\"" + uncommitted + "\") }\n"
		require.NoError(t, os.WriteFile(filepath.Join(here, name), []byte(content), 0o600))
	}
	git(t, here, "add", "--force", "deploy/terraform.tfstate") // known to git, and not committed

	name := strings.Join([]string{plugin, version, runtime.GOOS, runtime.GOARCH}, "_")
	var sums []string
	var dist string
	var archive map[string][]byte
	for _, repository := range []string{here, elsewhere} {
		out := filepath.Join(t.TempDir(), "dist")
		r := release{repository: repository, commit: "HEAD", out: out, version: version, platforms: []string{runtime.GOOS + "/" + runtime.GOARCH}}
		require.NoError(t, r.make(t.Context()))
		text, err := os.ReadFile(filepath.Join(out, "SHA256SUMS"))
		require.NoError(t, err)
		sums = append(sums, string(text))
		dist = out
		archive = unpack(t, filepath.Join(out, name+".tar.gz"))
		for name, content := range archive {
			require.False(t, bytes.Contains(content, []byte(uncommitted)), name)
		}
		for _, name := range strays[:len(strays)-1] {
			require.NotContains(t, archive, name)
		}
	}
	require.Equal(t, sums[0], sums[1], "a build depends on where it is made, or on what lies there")
	require.Equal(t, 2, strings.Count(sums[0], "\n"))

	for _, name := range []string{plugin, follower, "LICENSE", "README.md", "docs/tutorial.md", "deploy/policies/admin.hcl", "scripts/rotate-secret.sh"} {
		require.NotEmpty(t, archive[name], name)
	}
	bom := cdx.BOM{}
	require.NoError(t, cdx.NewBOMDecoder(bytes.NewReader(archive["sbom/"+plugin+".cdx.json"]), cdx.BOMFileFormatJSON).Decode(&bom))
	require.Equal(t, version, bom.Metadata.Component.Version)
	names := map[string]bool{}
	for _, c := range *bom.Components {
		names[c.Name] = true
	}
	require.True(t, names["std"] && names["github.com/hashicorp/vault/sdk"] && names["github.com/jackc/pgx/v5"], "%v", names)
	require.False(t, names["github.com/getkin/kin-openapi"], "what tests need is in no program")
	program := filepath.Join(t.TempDir(), follower)
	require.NoError(t, os.WriteFile(program, archive[follower], 0o700))
	said, err := exec.CommandContext(t.Context(), program, "--version").Output()
	require.NoError(t, err)
	require.Equal(t, version+"\n", string(said))

	t.Run("image", func(t *testing.T) { testImage(t, dist, archive, version) })
}

// TestRefused: what cannot be released leaves what was made before.
func TestRefused(t *testing.T) {
	repository, out := filepath.Join(t.TempDir(), "repository"), t.TempDir()
	before := filepath.Join(out, "SHA256SUMS")
	require.NoError(t, os.WriteFile(before, nil, 0o600))
	refused := func(commit, version, says string) {
		t.Helper()
		require.ErrorContains(t, release{repository: repository, commit: commit, out: out, version: version}.make(t.Context()), says)
		require.FileExists(t, before)
	}
	refused("HEAD", "1.0", "give one such as v0.1.0")
	git(t, ".", "init", "--quiet", repository)
	refused("v1.0.0", "v1.0.0", "git rev-parse")
	refused("--all", "v1.0.0", "git rev-parse")

	// A link could lead out of the commit.
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(repository, "LICENSE")))
	git(t, repository, "add", "--all")
	git(t, repository, "commit", "--quiet", "--message=link")
	refused("HEAD", "v1.0.0", "LICENSE is neither a file nor a folder")
}

// commitSources makes a repository of what git knows of this one, as it stands.
func commitSources(t *testing.T, to string) {
	t.Helper()
	git(t, ".", "init", "--quiet", to)
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	for _, name := range strings.Split(strings.TrimSuffix(git(t, root, "ls-files", "-z"), "\x00"), "\x00") {
		info, err := os.Stat(filepath.Join(root, name))
		if errors.Is(err, os.ErrNotExist) {
			continue // it is being removed
		}
		require.NoError(t, err)
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(to, name)), 0o700))
		require.NoError(t, copyFile(filepath.Join(root, name), filepath.Join(to, name), info.Mode()))
	}
	git(t, to, "add", "--all")
	git(t, to, "commit", "--quiet", "--message=sources")
}

// git runs git as nobody in particular.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL="+os.DevNull, "GIT_CONFIG_SYSTEM="+os.DevNull,
		"GIT_AUTHOR_NAME=nobody", "GIT_AUTHOR_EMAIL=nobody@localhost", "GIT_COMMITTER_NAME=nobody", "GIT_COMMITTER_EMAIL=nobody@localhost")
	out, err := cmd.Output()
	require.NoError(t, err, "git %v", args)
	return string(out)
}

func unpack(t *testing.T, file string) map[string][]byte {
	t.Helper()
	f, err := os.Open(filepath.Clean(file))
	require.NoError(t, err)
	defer func() { _ = f.Close() }()
	packed, err := gzip.NewReader(f)
	require.NoError(t, err)
	out := map[string][]byte{}
	for r := tar.NewReader(packed); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		require.NoError(t, err)
		require.Zero(t, h.Uid+h.Gid)
		_, name, _ := strings.Cut(h.Name, "/")
		out[name], err = io.ReadAll(r)
		require.NoError(t, err)
	}
}
