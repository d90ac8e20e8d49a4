package wanted

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/mesh/meshtest"
)

// TestKeyFile reads an open key file whose path was removed: the key is that of the open file.
func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	first, second := meshtest.Key(t, 4), meshtest.Key(t, 5)
	for _, k := range []mesh.PrivateKey{first, second} {
		if err := os.WriteFile(path+".new", []byte(k.Reveal()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if got, err := readPrivateKey(f); err != nil || !got.Equal(k) {
			t.Errorf("the key isn't read back, error %v", err)
		}
	}
}

// TestKeyFileRefused reads key files with the wrong mode, type or content, and checks that
// the error doesn't quote the key.
func TestKeyFileRefused(t *testing.T) {
	text := meshtest.Key(t, 7).Reveal()
	write := func(mode os.FileMode, content string) func(string) error {
		return func(path string) error {
			if err := os.WriteFile(path, []byte(content), mode); err != nil {
				return err
			}
			return os.Chmod(path, mode)
		}
	}
	for name, make := range map[string]func(path string) error{
		"group may read": write(0o640, text),
		"others write":   write(0o602, text),
		"empty":          write(0o600, ""),
		"damaged":        write(0o600, text[:30]),
		"long":           write(0o600, text+strings.Repeat(" ", keyFileLimit)+"x"),
		"folder":         func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "key")
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadFile(path)
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, err = readPrivateKey(f)
			if name == "long" {
				// The read stops at its limit, within the white space after the key.
				if err != nil {
					t.Errorf("a key followed by white space is refused: %v", err)
				}
				return
			}
			if err == nil {
				t.Fatal("the file is accepted")
			}
			if len(text) > 0 && strings.Contains(err.Error(), text[:20]) {
				t.Errorf("the error quotes the key: %v", err)
			}
			if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
				t.Error("the file was changed")
			}
		})
	}
}
