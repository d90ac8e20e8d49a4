package tunnel

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/curve25519"
)

// testRandom returns a reproducible source of randomness.
func testRandom(seed byte) *rand.ChaCha8 { return rand.NewChaCha8([32]byte{seed}) }

func testKey(t testing.TB, random *rand.ChaCha8) PrivateKey {
	t.Helper()
	k, err := GeneratePrivateKey(random)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestPublicVector takes the key pair of RFC 7748 section 6.1.
func TestPublicVector(t *testing.T) {
	private, err := ParsePrivateKey("dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := private.Public().String(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="; got != want {
		t.Errorf("public key %s, want %s", got, want)
	}
	if private[0]&7 != 0 || private[31]>>6 != 1 {
		t.Errorf("first and last byte %#x %#x aren't clamped", private[0], private[31])
	}
}

func TestParseKeyRefuses(t *testing.T) {
	good := testKey(t, testRandom(1)).Public().String()
	for _, s := range []string{
		"", "=", good[:43], good + "=", good[:42] + "\n=", good[:20] + " " + good[21:],
		strings.Repeat("A", 43) + "=",        // zero
		"AQ" + strings.Repeat("A", 41) + "=", // the point 1
		good[:42] + "B=",                     // bits behind the 256th
	} {
		if k, err := ParsePublicKey(s); !errors.Is(err, ErrBadKey) {
			t.Errorf("ParsePublicKey(%q) = %v, %v", s, k, err)
		}
	}
	if _, err := ParsePrivateKey(strings.Repeat("A", 43) + "="); !errors.Is(err, ErrBadKey) {
		t.Errorf("a zero private key gives %v", err)
	}
}

// TestLowOrder holds the list against X25519 itself, which fails on just these
// points.
func TestLowOrder(t *testing.T) {
	scalar := testKey(t, testRandom(2))
	for _, point := range lowOrder {
		if _, err := curve25519.X25519(scalar[:], point[:]); err == nil {
			t.Errorf("%x is listed but gives a shared secret", point)
		}
		point[31] |= 0x80
		if _, err := ParsePublicKey(point.String()); !errors.Is(err, ErrBadKey) {
			t.Errorf("%x with its top bit set gives %v", point, err)
		}
	}
}

// TestPrivateKeyNeverPrinted tries every way by which a value gets into a log,
// an error or a document.
func TestPrivateKeyNeverPrinted(t *testing.T) {
	key := testKey(t, testRandom(3))
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%b", "%T %v"} {
		fmt.Fprintf(&out, verb+"\n", key, &key, struct{ K PrivateKey }{key}, []PrivateKey{key}, Config{PrivateKey: key})
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("key", "key", key, "in", struct{ K PrivateKey }{key})
	slog.New(slog.NewJSONHandler(&out, nil)).Info("key", "key", key, "in", struct{ K PrivateKey }{key})
	if text, err := json.Marshal(struct{ K PrivateKey }{key}); err == nil {
		t.Errorf("JSON gives %s", text)
	}
	for _, form := range []string{key.Reveal(), key.Reveal()[:12], fmt.Sprintf("%x", key[:]), fmt.Sprintf("%X", key[:6]), fmt.Sprint(key[:])[1:20], fmt.Sprintf("%d %d %d", key[3], key[4], key[5])} {
		if strings.Contains(out.String(), form) {
			t.Errorf("the key appears as %q", form)
		}
	}
	if !strings.Contains(out.String(), redacted) {
		t.Errorf("nothing says that a key was left out: %s", out.String())
	}
}

func TestGenerateShortRandom(t *testing.T) {
	if k, err := GeneratePrivateKey(strings.NewReader("too short")); err == nil || !k.IsZero() {
		t.Errorf("a source that ends gives %v, zero %v", err, k.IsZero())
	}
}

// TestKeyFile reads a key file, also one that isn't the file of that name any more.
func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	first, second := testKey(t, testRandom(4)), testKey(t, testRandom(5))
	for _, k := range []PrivateKey{first, second} {
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
		if got, err := ReadKey(f); err != nil || !got.Equal(k) {
			t.Errorf("the key isn't read back, error %v", err)
		}
	}
}

func TestKeyFileRefused(t *testing.T) {
	text := testKey(t, testRandom(7)).Reveal()
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
			_, err = ReadKey(f)
			if name == "long" {
				// White space behind the key is cut with the rest.
				if err != nil {
					t.Errorf("a key with white space behind it gives %v", err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
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

func FuzzParsePublicKey(f *testing.F) {
	f.Add(testKey(f, testRandom(9)).Public().String())
	f.Add(strings.Repeat("A", 43) + "=")
	f.Add("hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n")
	f.Fuzz(func(t *testing.T, s string) {
		k, err := ParsePublicKey(s)
		if err != nil {
			if !errors.Is(err, ErrBadKey) || !k.IsZero() {
				t.Errorf("error %v with key %v", err, k)
			}
			return
		}
		if k.String() != s {
			t.Errorf("%q reads as %v", s, k)
		}
	})
}
