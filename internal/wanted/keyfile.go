package wanted

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// keyFileLimit limits what is read from a key file, in bytes: 44 for the key in base64, and
// room for white space.
const keyFileLimit = 256

// errExposedKey is in the chain of readPrivateKey's error when the file's mode gives its
// group or others any access.
var errExposedKey = errors.New("others than the owner have access")

// readPrivateKey reads a private key, in base64 with optional white space around it, from
// an open file. The file must be a regular one that its group and others have no access to.
// The caller checks its owner, on f and not by name: another file may have the name by then.
func readPrivateKey(f *os.File) (mesh.PrivateKey, error) {
	text, err := readPrivate(f)
	if err != nil {
		return mesh.PrivateKey{}, fmt.Errorf("read key file: %w", err)
	}
	key, err := mesh.ParsePrivateKey(strings.TrimSpace(text))
	if err != nil {
		return mesh.PrivateKey{}, fmt.Errorf("read key file %q: %w", f.Name(), err)
	}
	return key, nil
}

// readPrivate returns the first keyFileLimit bytes of a file that only its owner may
// access.
func readPrivate(f *os.File) (string, error) {
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%q is not a regular file", f.Name())
	}
	// Windows has no such mode bits; os.Stat derives them from the read-only attribute.
	if exposed := info.Mode().Perm() & 0o077; exposed != 0 && runtime.GOOS != "windows" {
		return "", fmt.Errorf("%q has mode %v: %w", f.Name(), info.Mode().Perm(), errExposedKey)
	}
	text, err := io.ReadAll(io.LimitReader(f, keyFileLimit))
	return string(text), err
}
