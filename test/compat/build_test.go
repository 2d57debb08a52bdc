package compat

import (
	"debug/buildinfo"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	sdkModule = "github.com/hashicorp/vault/sdk"
	// pluginVersion is what the plugins are built and registered as.
	pluginVersion  = "v0.2.0"
	versionPackage = "github.com/harmonyflow/" + servers.PluginName + "/backend/buildinfo"
)

// builds makes each program once, when it is first asked for.
type builds struct {
	dir  string
	mu   sync.Mutex
	done map[string]built
}

type built struct {
	path string
	err  error
}

func newBuilds(dir string) *builds { return &builds{dir: dir, done: map[string]built{}} }

func (b *builds) once(name string, build func() (string, error)) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.done[name]; !ok {
		path, err := build()
		b.done[name] = built{path, err}
	}
	return b.done[name].path, b.done[name].err
}

// vault is the program of a host.
func (b *builds) vault(h host) (string, error) {
	return b.once(h.module, func() (string, error) {
		command := exec.Command(root+"scripts/ensure-vault-at.sh", h.module)
		command.Stderr = os.Stderr // how far it is, and why it ended
		out, err := command.Output()
		if err != nil {
			return "", fmt.Errorf("Vault %s could not be built from %s: %w; the reason stands above", h.minor, h.module, err)
		}
		return strings.TrimSpace(string(out)), nil
	})
}

// plugin is the plugin, built with a version of the sdk. The tree stays as it is:
// another version is asked for by a copy of go.mod.
func (b *builds) plugin(sdk string) (string, error) {
	return b.once(sdk, func() (string, error) {
		pinned, err := required("go.mod", sdkModule)
		if err != nil {
			return "", err
		}
		out := filepath.Join(b.dir, "plugin-"+sdk)
		args := []string{"build", "-buildvcs=false", "-trimpath", "-ldflags=-X " + versionPackage + ".Version=" + pluginVersion, "-o", out}
		if sdk != pinned {
			mod, err := b.modFile(sdk)
			if err != nil {
				return "", err
			}
			args = append(args, "-mod=mod", "-modfile="+mod)
		}
		if err := run("go", append(args, "./cmd/"+servers.PluginName)...); err != nil {
			return "", fmt.Errorf("the plugin does not build with sdk %s: %w", sdk, err)
		}
		if has, err := sdkOf(out); err != nil || has != sdk {
			return "", errors.Join(fmt.Errorf("the plugin was built with sdk %s, and not %s", has, sdk), err)
		}
		return out, nil
	})
}

// modFile is go.mod with another sdk.
func (b *builds) modFile(sdk string) (string, error) {
	mod := filepath.Join(b.dir, sdk+".mod")
	for _, name := range []string{"mod", "sum"} {
		text, err := os.ReadFile(root + "go." + name)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(b.dir, sdk+"."+name), text, 0o600); err != nil {
			return "", err
		}
	}
	return mod, run("go", "mod", "edit", "-replace="+sdkModule+"="+sdkModule+"@"+sdk, mod)
}

// sdkOf is the version of the sdk that is in a program.
func sdkOf(path string) (string, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return "", err
	}
	for _, dep := range info.Deps {
		if dep.Path == sdkModule {
			if dep.Replace != nil {
				return dep.Replace.Version, nil
			}
			return dep.Version, nil
		}
	}
	return "", errors.New("there is no sdk in it")
}

// run runs a command at the root of the checkout.
func run(name string, args ...string) error {
	command := exec.Command(name, args...)
	command.Dir = root
	command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=", "GOARCH=", "GOFLAGS=", "GOWORK=off")
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
