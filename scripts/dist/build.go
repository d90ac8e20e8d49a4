package main

import (
	"context"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// A platform is an operating system and a processor, by Go's names.
type platform struct{ os, arch string }

// packages are the archives of a release. Executables of several platforms are joined.
var packages = []pkg{
	{"darwin-universal", []platform{{"darwin", "amd64"}, {"darwin", "arm64"}}},
	{"linux-amd64", []platform{{"linux", "amd64"}}},
	{"linux-arm64", []platform{{"linux", "arm64"}}},
}

type pkg struct {
	name   string
	slices []platform
}

// A builder builds one version.
type builder struct {
	version string    // "" until it is known
	time    time.Time // of the commit
}

// common returns the files that all archives have. It builds the command for this machine,
// since the completions are the same on every platform.
func (b *builder) common(ctx context.Context) ([]file, error) {
	dir, err := os.MkdirTemp("", "dist")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "meshhelper")
	if err := b.build(ctx, platform{runtime.GOOS, runtime.GOARCH}, program); err != nil {
		return nil, err
	}
	if err := b.identify(ctx, program); err != nil {
		return nil, err
	}
	files, err := completions(ctx, program)
	if err != nil {
		return nil, err
	}
	text, err := pages()
	return append(files, text...), err
}

// identify finds the version that was built, and the time of its commit.
func (b *builder) identify(ctx context.Context, program string) error {
	if b.version == "" {
		out, err := exec.CommandContext(ctx, program, "version").Output()
		words := strings.Fields(string(out))
		if err != nil || len(words) < 2 {
			return fmt.Errorf("ask %s for its version: %q, %w", program, out, err)
		}
		b.version = words[1]
	}
	if err := checkVersion(b.version); err != nil {
		return err
	}
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return err
	}
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	b.time, err = releaseTime(os.Getenv("SOURCE_DATE_EPOCH"), settings["vcs.time"])
	return err
}

// releaseTime returns the time that all files get: SOURCE_DATE_EPOCH where a
// packager sets it (reproducible-builds.org), else the commit's, else 1970.
func releaseTime(epoch, commit string) (time.Time, error) {
	if epoch != "" {
		n, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil || n < 0 {
			return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH %q: not a number of seconds", epoch)
		}
		return time.Unix(n, 0).UTC(), nil
	}
	if commit == "" {
		return time.Unix(0, 0).UTC(), nil
	}
	return time.Parse(time.RFC3339, commit)
}

// completions has the command write its completions, under the names that shells look for.
func completions(ctx context.Context, program string) (files []file, err error) {
	for _, c := range []struct{ shell, name string }{{"bash", "meshhelper.bash"}, {"zsh", "_meshhelper"}, {"fish", "meshhelper.fish"}} {
		text, err := exec.CommandContext(ctx, program, "completion", c.shell).Output()
		if err != nil || len(text) == 0 {
			return nil, fmt.Errorf("make completions for %s: %d bytes, %w", c.shell, len(text), err)
		}
		files = append(files, file{"completions/" + c.name, 0o644, text})
	}
	return files, nil
}

// program builds the executable of a package.
func (b *builder) program(ctx context.Context, p pkg) ([]byte, error) {
	var slices [][]byte
	for _, s := range p.slices {
		data, err := b.slice(ctx, s)
		if err != nil {
			return nil, err
		}
		slices = append(slices, data)
	}
	if len(slices) == 1 {
		return slices[0], nil
	}
	return join(slices)
}

// slice builds the executable of one platform, and checks its signature if macOS requires
// one.
func (b *builder) slice(ctx context.Context, p platform) ([]byte, error) {
	dir, err := os.MkdirTemp("", "dist")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "meshhelper")
	if err := b.build(ctx, p, program); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	if p == (platform{"darwin", "arm64"}) {
		if err := checkSignature(data); err != nil {
			return nil, fmt.Errorf("check the signature for %s/%s: %w", p.os, p.arch, err)
		}
	}
	return data, nil
}

// build runs the compiler. The symbol table and DWARF are left out, which halves
// the size; stack traces don't need them. The build's id stays: the Mach-O's
// LC_UUID is made from it, by which macOS tells programs apart.
func (b *builder) build(ctx context.Context, p platform, program string) error {
	flags := "-s -w"
	if b.version != "" {
		flags += " -X main.version=" + b.version
	}
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", flags, "-o", program, "github.com/meshhelper/meshhelper/cmd/meshhelper")
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+p.os, "GOARCH="+p.arch)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("build for %s/%s: %w\n%s", p.os, p.arch, err, out)
	}
	return nil
}
