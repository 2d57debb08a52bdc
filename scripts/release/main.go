// Command release makes what is handed out: for each platform an archive with the
// plugin, the follower, a software bill of materials of each, documentation and
// deploy/, beside it the plugin alone, as Vault's plugin directory takes it, and
// SHA256SUMS of all. Everything is made from what git has of a commit, so that the
// same commit gives the same bytes, wherever it is built, and nothing else that lies
// in the working tree gets into an archive.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

const (
	module   = "github.com/harmonyflow/vault-plugin-secrets-harmonyflow"
	plugin   = "vault-plugin-secrets-harmonyflow"
	follower = "harmonyflow"
)

// packed are the files and folders of the commit that an archive holds.
var packed = []string{"LICENSE", "README.md", "CHANGELOG.md", "docs", "deploy", "scripts/rotate-secret.sh", "scripts/rotate-all-secrets.sh"}

// release is what is made, of which commit of which repository, and where.
type release struct {
	repository, commit, out, version string
	platforms                        []string

	sources string    // what git has of the commit
	at      time.Time // of every file
}

func main() {
	r := release{}
	platforms := flag.String("platforms", "linux/amd64 linux/arm64 darwin/amd64 darwin/arm64", "what it is built for")
	flag.StringVar(&r.repository, "repository", ".", "the repository")
	flag.StringVar(&r.commit, "commit", "HEAD", "what is released")
	flag.StringVar(&r.out, "out", "dist", "where it is put")
	flag.StringVar(&r.version, "version", "", "the version, such as v0.1.0")
	flag.Parse()
	r.platforms = strings.Fields(*platforms)
	if err := r.make(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func (r release) make(ctx context.Context) (err error) {
	if !strings.HasPrefix(r.version, "v") {
		return fmt.Errorf("version is %q; give one such as v0.1.0", r.version)
	}
	if r.sources, err = os.MkdirTemp("", "release-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(r.sources)) }()
	if err := r.checkOut(ctx); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(r.out), os.MkdirAll(r.out, 0o750)); err != nil {
		return err
	}
	for _, platform := range r.platforms {
		if err := r.build(ctx, platform); err != nil {
			return fmt.Errorf("%s: %w", platform, err)
		}
	}
	return r.sums()
}

// checkOut puts what git has of the commit into the folder of the sources, and
// says when the working tree has something else.
func (r *release) checkOut(ctx context.Context) error {
	commit, err := r.git(ctx, "rev-parse", "--verify", "--end-of-options", r.commit+"^{commit}")
	if err != nil {
		return err
	}
	r.commit = strings.TrimSpace(string(commit))
	committed, err := r.git(ctx, "show", "--no-patch", "--format=%ct", r.commit)
	if err != nil {
		return err
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(string(committed)), 10, 64)
	if err != nil {
		return err
	}
	r.at = time.Unix(seconds, 0).UTC()
	changed, err := r.git(ctx, "status", "--porcelain")
	if err != nil {
		return err
	}
	if len(changed) > 0 {
		fmt.Fprintf(os.Stderr, "%s is released; these are not, as they stand here:\n%s", r.commit, changed)
	}
	files, err := r.git(ctx, "archive", "--format=tar", r.commit)
	if err != nil {
		return err
	}
	return extract(files, r.sources)
}

func (r *release) git(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir, cmd.Stderr = r.repository, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("git %s: %w", args[0], err)
	}
	return out, nil
}

// extract unpacks what git archive has packed.
func extract(files []byte, to string) error {
	for r := tar.NewReader(bytes.NewReader(files)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !filepath.IsLocal(h.Name) && h.Typeflag != tar.TypeXGlobalHeader {
			return fmt.Errorf("%q is not below the repository", h.Name)
		}
		name := filepath.Join(to, filepath.FromSlash(h.Name))
		switch h.Typeflag {
		case tar.TypeXGlobalHeader: // the commit
		case tar.TypeDir:
			err = os.MkdirAll(name, 0o750)
		case tar.TypeReg:
			var content []byte
			if content, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(name, content, fs.FileMode(h.Mode)&0o700)
			}
		default:
			err = fmt.Errorf("%s is neither a file nor a folder, and cannot be released", h.Name)
		}
		if err != nil {
			return err
		}
	}
}

// build makes the archive of one platform.
func (r release) build(ctx context.Context, platform string) (err error) {
	goos, goarch, ok := strings.Cut(platform, "/")
	if !ok {
		return errors.New("a platform is written as linux/amd64")
	}
	work, err := os.MkdirTemp("", "release-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	name := fmt.Sprintf("%s_%s_%s_%s", plugin, r.version, goos, goarch)
	files := map[string]string{} // in the archive, and where they are
	for _, program := range []string{plugin, follower} {
		binary := filepath.Join(work, program)
		if err := r.compile(ctx, program, binary, goos, goarch); err != nil {
			return err
		}
		files[program] = binary
		bom := binary + ".cdx.json"
		if err := billOfMaterials(binary, program, r.version, bom); err != nil {
			return err
		}
		files["sbom/"+program+".cdx.json"] = bom
		if program == plugin {
			if err := copyFile(binary, filepath.Join(r.out, name), 0o755); err != nil {
				return err
			}
		}
	}
	for _, what := range packed {
		err := filepath.WalkDir(filepath.Join(r.sources, what), func(file string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				rel, err := filepath.Rel(r.sources, file)
				files[filepath.ToSlash(rel)] = file
				return err
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	fmt.Println(filepath.Join(r.out, name+".tar.gz"))
	return r.archive(filepath.Join(r.out, name+".tar.gz"), name, files)
}

func (r release) compile(ctx context.Context, program, to, goos, goarch string) error {
	flags := "-s -w -X " + module + "/backend/buildinfo.Version=" + r.version
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", to, "./cmd/"+program)
	cmd.Dir, cmd.Stdout, cmd.Stderr = r.sources, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+goos, "GOARCH="+goarch, "GOFLAGS=-mod=readonly")
	return cmd.Run()
}

// archive packs files, the same ones into the same bytes.
func (r release) archive(to, folder string, files map[string]string) (err error) {
	f, err := os.Create(filepath.Clean(to))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	zipped := gzip.NewWriter(f)
	out := tar.NewWriter(zipped)
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := r.add(out, path.Join(folder, name), files[name]); err != nil {
			return err
		}
	}
	return errors.Join(out.Close(), zipped.Close())
}

func (r release) add(out *tar.Writer, name, from string) error {
	content, err := os.ReadFile(filepath.Clean(from))
	if err != nil {
		return err
	}
	mode := int64(0o644)
	if info, err := os.Stat(from); err != nil {
		return err
	} else if info.Mode()&0o100 != 0 {
		mode = 0o755
	}
	header := &tar.Header{Name: name, Mode: mode, Size: int64(len(content)), ModTime: r.at, Typeflag: tar.TypeReg, Format: tar.FormatPAX}
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	_, err = out.Write(content)
	return err
}

// billOfMaterials lists what a program was built from, as the program itself says.
func billOfMaterials(binary, name, version, to string) error {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return err
	}
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Component: &cdx.Component{
		BOMRef: name, Type: cdx.ComponentTypeApplication, Name: name, Version: version, PackageURL: "pkg:golang/" + module + "@" + version,
		Licenses:   &cdx.Licenses{{License: &cdx.License{ID: "MPL-2.0"}}},
		Properties: &[]cdx.Property{{Name: "go:version", Value: info.GoVersion}},
	}}
	parts := []cdx.Component{{BOMRef: "std", Type: cdx.ComponentTypeLibrary, Name: "std", Version: info.GoVersion, PackageURL: "pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go")}}
	refs := []string{"std"}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		url := "pkg:golang/" + m.Path + "@" + m.Version
		parts = append(parts, cdx.Component{
			BOMRef: url, Type: cdx.ComponentTypeLibrary, Name: m.Path, Version: m.Version, PackageURL: url,
			Properties: &[]cdx.Property{{Name: "go:sum", Value: m.Sum}},
		})
		refs = append(refs, url)
	}
	bom.Components, bom.Dependencies = &parts, &[]cdx.Dependency{{Ref: name, Dependencies: &refs}}
	f, err := os.Create(filepath.Clean(to))
	if err != nil {
		return err
	}
	return errors.Join(cdx.NewBOMEncoder(f, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom), f.Close())
}

func copyFile(from, to string, mode fs.FileMode) error {
	content, err := os.ReadFile(filepath.Clean(from))
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, mode)
}

// sums writes SHA256SUMS, as sha256sum -c reads it.
func (r release) sums() error {
	entries, err := os.ReadDir(r.out)
	if err != nil {
		return err
	}
	var text strings.Builder
	for _, e := range entries {
		sum, err := digest(filepath.Join(r.out, e.Name()))
		if err != nil {
			return err
		}
		fmt.Fprintf(&text, "%s  %s\n", sum, e.Name())
	}
	return os.WriteFile(filepath.Join(r.out, "SHA256SUMS"), []byte(text.String()), 0o600)
}

func digest(file string) (sum string, err error) {
	f, err := os.Open(filepath.Clean(file))
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
