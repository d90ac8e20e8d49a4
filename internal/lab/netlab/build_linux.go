package netlab

// Building programs for hosts to run, as they are or with lines of the source
// replaced.

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
)

// buildDir holds the programs that this process built, until Main returns.
var buildDir = sync.OnceValues(func() (string, error) { return os.MkdirTemp("", "netlab-build-") })

// Build builds the program in a package of this module or of a dependency, and returns
// its file, which Main removes when it returns. The working directory must be in the
// module.
func Build(pkg string) (string, error) { return build(pkg, path.Base(pkg)) }

// Edit changes the source of a program for one build.
type Edit struct {
	// File is a path below the module's root; it may be a new one.
	File string // required
	// Old is the text to replace, which the file must have exactly once; it is empty for
	// a new file.
	Old string // required
	// New replaces Old.
	New string // required
}

// BuildEdited builds a program as Build does, under a name, with some of its source
// replaced (go build -overlay). So a test can stop a program at a step, or disable a
// part of it, without code for that in the program. It fails if the source doesn't have
// an edit's Old exactly once.
func BuildEdited(pkg, name string, edits ...Edit) (string, error) {
	overlay, err := writeOverlay(name, edits)
	if err != nil {
		return "", fmt.Errorf("edit %s: %w", pkg, err)
	}
	return build(pkg, name, "-overlay", overlay)
}

func build(pkg, name string, flags ...string) (string, error) {
	dir, err := buildDir()
	if err != nil {
		return "", fmt.Errorf("make directory for %s: %w", pkg, err)
	}
	file := filepath.Join(dir, name)
	args := append([]string{"build", "-trimpath", "-o", file}, flags...)
	cmd := exec.Command("go", append(args, pkg)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return file, nil
}

// writeOverlay writes the edited files, and the overlay file for go build.
func writeOverlay(name string, edits []Edit) (string, error) {
	dir, err := buildDir()
	if err != nil {
		return "", err
	}
	gomod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(gomod)))
	replace := map[string]string{}
	for i, e := range edits {
		file, to := filepath.Join(root, e.File), filepath.Join(dir, fmt.Sprintf("%s.%d.go", name, i))
		from := file
		if earlier, ok := replace[file]; ok {
			from = earlier
		}
		text, err := e.apply(from)
		if err == nil {
			err = os.WriteFile(to, []byte(text), 0o600)
		}
		if err != nil {
			return "", err
		}
		replace[file] = to
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, name+".overlay.json")
	return overlay, os.WriteFile(overlay, list, 0o600)
}

// apply returns the file's text after the edit.
func (e Edit) apply(file string) (string, error) {
	if e.Old == "" {
		return e.New, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(text), e.Old); n != 1 {
		return "", fmt.Errorf("%s has %d times what is to be replaced, want once: %q", e.File, n, e.Old)
	}
	return strings.Replace(string(text), e.Old, e.New, 1), nil
}
