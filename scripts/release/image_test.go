package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const imageGuide = "docs/howto/image.md"

// testImage plays docs/howto/image.md with the downloads of a release, up to the
// step that takes a container engine; and of the image's Dockerfile what takes none.
func testImage(t *testing.T, out string, archive map[string][]byte, version string) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("an image is of Linux")
	}
	guide := strings.NewReplacer("v0.1.0", version, "linux_amd64", "linux_"+runtime.GOARCH).Replace(string(archive[imageGuide]))
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(guide, -1)
	require.Len(t, blocks, 2, "to build, to register")
	bin := t.TempDir()
	called := filepath.Join(bin, "called")
	docker := fmt.Sprintf("#!/bin/sh\npwd >'%[1]s'\nprintf '%%s\\n' \"$@\" >>'%[1]s'\n", called)
	require.NoError(t, os.WriteFile(filepath.Join(bin, "docker"), []byte(docker), 0o700))
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", blocks[0][1])
	cmd.Dir, cmd.Env = out, append(os.Environ(), "PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	said, err := cmd.CombinedOutput()
	require.NoError(t, err, string(said))
	text, err := os.ReadFile(called)
	require.NoError(t, err)
	args := strings.Split(strings.TrimSpace(string(text)), "\n")
	context := args[0]
	require.Equal(t, []string{"build", "-f", "deploy/image/Dockerfile"}, args[1:4])
	require.Equal(t, ".", args[len(args)-1])
	given := map[string]string{}
	for i, arg := range args {
		if arg == "--build-arg" {
			name, value, _ := strings.Cut(args[i+1], "=")
			given[name] = value
		}
	}
	sum, err := digest(filepath.Join(context, plugin))
	require.NoError(t, err)
	require.Equal(t, map[string]string{"VERSION": version, "PLUGIN_SHA256": sum}, given)

	image, err := buildImage(t, context, given)
	require.NoError(t, err)
	// Where the plugin lies is what the catalog, the configuration and the guide say.
	const plugins = "/opt/vault/plugins"
	name := plugin + "-" + version
	require.Equal(t, archive[plugin], image.files[plugins+"/"+name])
	require.Contains(t, string(image.files["/vault/config/plugins.hcl"]), fmt.Sprintf("plugin_directory = %q", plugins))
	require.Equal(t, "100:1000", image.user)
	for _, says := range []string{"-command=" + name, "-version=" + version, plugins + "/" + name} {
		require.Contains(t, blocks[1][1], says)
	}

	for why, change := range map[string][2]string{
		"another file":   {"PLUGIN_SHA256", strings.Repeat("0", len(sum))},
		"no sum":         {"PLUGIN_SHA256", ""},
		"no version":     {"VERSION", ""},
		"more than lies": {"PLUGIN_SHA256", sum + "  LICENSE\n" + sum},
	} {
		args := maps.Clone(given)
		args[change[0]] = change[1]
		_, err := buildImage(t, context, args)
		require.Error(t, err, why)
	}

	// The next image has both versions.
	next := maps.Clone(given)
	next["VERSION"], next["PREVIOUS_IMAGE"] = "v10.0.0", "the one before"
	image, err = buildImage(t, context, next, map[string][]byte{plugins + "/" + name: []byte("the version before")})
	require.NoError(t, err)
	require.Equal(t, "the version before", string(image.files[plugins+"/"+name]))
	require.Equal(t, archive[plugin], image.files[plugins+"/"+plugin+"-v10.0.0"])
}

// stage is a stage of a Dockerfile as far as it can be built without an engine.
type stage struct {
	root  string
	files map[string][]byte // by their full name
	dir   string
	env   []string
	user  string
}

// buildImage follows the Dockerfile in a folder: it copies, and runs. What it stands
// on is empty, but for the files of the previous image.
func buildImage(t *testing.T, context string, args map[string]string, previous ...map[string][]byte) (*stage, error) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(context, "deploy", "image", "Dockerfile"))
	require.NoError(t, err)
	defaults := map[string]string{}
	stages := map[string]*stage{}
	var now *stage
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		require.False(t, strings.HasSuffix(line, `\`), "an instruction of more than a line: %s", line)
		instruction, rest, _ := strings.Cut(line, " ")
		words := strings.Fields(rest)
		switch instruction {
		case "ARG":
			name, value, _ := strings.Cut(rest, "=")
			if given, ok := args[name]; ok {
				value = given
			}
			if now == nil {
				defaults["${"+name+"}"] = value
			} else {
				now.env = append(now.env, name+"="+value)
			}
		case "FROM":
			now = &stage{root: t.TempDir(), files: map[string][]byte{}, dir: "/"}
			switch base := stages[defaults[words[0]]]; {
			case base != nil:
				now.files = maps.Clone(base.files)
			case words[0] == "${PREVIOUS_IMAGE}":
				now.files = previous[0]
			default:
				require.Regexp(t, `^hashicorp/vault:\d+\.\d+\.\d+$`, defaults[words[0]])
			}
			if len(words) == 3 {
				stages[words[2]] = now
			}
		case "COPY":
			now.copy(t, context, stages, words)
		case "WORKDIR":
			now.dir = rest
		case "RUN":
			if err := now.run(t, rest); err != nil {
				return nil, fmt.Errorf("%s: %w", rest, err)
			}
		case "USER":
			now.user = rest
		case "ENV", "CMD":
		default:
			t.Fatalf("what is %s?", line)
		}
	}
	return now, nil
}

// copy takes files out of the archive, or out of another stage.
func (s *stage) copy(t *testing.T, context string, stages map[string]*stage, words []string) {
	t.Helper()
	from := -1
	for i, word := range words {
		if strings.HasPrefix(word, "--from=") {
			from = i
		}
	}
	var source *stage
	if from >= 0 {
		source = stages[strings.TrimPrefix(words[from], "--from=")]
		require.NotNil(t, source, "%v: no such stage", words)
	}
	words = slices.DeleteFunc(slices.Clone(words), func(word string) bool { return strings.HasPrefix(word, "--") })
	require.Len(t, words, 2)
	what, to := words[0], path.Join(s.dir, words[1])
	if path.IsAbs(words[1]) {
		to = words[1]
	}
	require.True(t, strings.HasSuffix(words[1], "/"), "%v: a folder is meant", words)
	if source == nil {
		content, err := os.ReadFile(filepath.Join(context, what))
		require.NoError(t, err, "%v: the archive has no such file", words)
		s.files[path.Join(to, path.Base(what))] = content
		return
	}
	copied := 0
	for name, content := range source.files {
		if strings.HasPrefix(name, what) {
			s.files[path.Join(to, strings.TrimPrefix(name, what))] = content
			copied++
		}
	}
	require.Positive(t, copied, "%v: nothing to copy", words)
}

// run runs a command where the files of the stage are, below a folder that stands
// for its root.
func (s *stage) run(t *testing.T, command string) error {
	t.Helper()
	for name, content := range s.files {
		file := filepath.Join(s.root, filepath.FromSlash(name))
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o700))
		require.NoError(t, os.WriteFile(file, content, 0o600))
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", strings.ReplaceAll(command, `"/`, `"`+s.root+"/"))
	cmd.Dir, cmd.Env = filepath.Join(s.root, s.dir), append(slices.Clone(s.env), "PATH="+os.Getenv("PATH"))
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(said))
	}
	return filepath.WalkDir(s.root, func(file string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(file)
		s.files[strings.TrimPrefix(file, s.root)] = content
		return err
	})
}
