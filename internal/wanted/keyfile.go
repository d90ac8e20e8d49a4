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

// keyFileLimit bounds what is read from a key file, in bytes: the key and
// some white space.
const keyFileLimit = 256

// errExposedKey is in the chain of readPrivateKey's error when others than the owner
// may read or write the file.
var errExposedKey = errors.New("others than the owner have access")

// readPrivateKey reads a private key, in base64 and with white space around it, from an
// open file, and refuses what isn't a regular file and a file that group or others may
// access. Whose file it is, the caller has to check, and on f, for another one may have
// the name by then.
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

func readPrivate(f *os.File) (string, error) {
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%q is not a regular file", f.Name())
	}
	// Windows has no such mode bits; Go makes them up there.
	if exposed := info.Mode().Perm() & 0o077; exposed != 0 && runtime.GOOS != "windows" {
		return "", fmt.Errorf("%q has mode %v: %w", f.Name(), info.Mode().Perm(), errExposedKey)
	}
	text, err := io.ReadAll(io.LimitReader(f, keyFileLimit))
	return string(text), err
}
