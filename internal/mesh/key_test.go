package mesh

import (
	"bytes"
	"crypto/ecdh"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
)

// testRandom returns a source of reproducible random bytes.
func testRandom(seed byte) *rand.ChaCha8 { return rand.NewChaCha8([32]byte{seed}) }

func testKey(t testing.TB, random *rand.ChaCha8) PrivateKey {
	t.Helper()
	k, err := GeneratePrivateKey(random)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestPublicVector checks the key pair of RFC 7748, section 6.1.
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
		strings.Repeat("A", 43) + "=",        // the zero key
		"AQ" + strings.Repeat("A", 41) + "=", // the point 1, of low order
		good[:42] + "B=",                     // bits set after the 256th
	} {
		if k, err := ParsePublicKey(s); !errors.Is(err, ErrBadKey) {
			t.Errorf("ParsePublicKey(%q) = %v, %v", s, k, err)
		}
	}
	if _, err := ParsePrivateKey(strings.Repeat("A", 43) + "="); !errors.Is(err, ErrBadKey) {
		t.Errorf("a zero private key gives %v", err)
	}
}

// TestLowOrder checks the list of points of low order against X25519, which returns an error
// for each of them.
func TestLowOrder(t *testing.T) {
	scalar := testKey(t, testRandom(2))
	private, err := ecdh.X25519().NewPrivateKey(scalar[:])
	if err != nil {
		t.Fatal(err)
	}
	for _, point := range lowOrder {
		public, err := ecdh.X25519().NewPublicKey(point[:])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := private.ECDH(public); err == nil {
			t.Errorf("%x is listed but gives a shared secret", point)
		}
		point[31] |= 0x80
		if _, err := ParsePublicKey(point.String()); !errors.Is(err, ErrBadKey) {
			t.Errorf("%x with its top bit set gives %v", point, err)
		}
	}
}

// TestPrivateKeyNeverPrinted prints a private key in every way in which a value gets into a
// log, an error or a document: none reveals the key.
func TestPrivateKeyNeverPrinted(t *testing.T) {
	key := testKey(t, testRandom(3))
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%b", "%T %v"} {
		fmt.Fprintf(&out, verb+"\n", key, &key, struct{ K PrivateKey }{key}, []PrivateKey{key})
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
		t.Errorf("the log doesn't show that a key was left out: %s", out.String())
	}
}

func TestGenerateShortRandom(t *testing.T) {
	if k, err := GeneratePrivateKey(strings.NewReader("too short")); err == nil || !k.IsZero() {
		t.Errorf("a random source that ends early gives %v, zero key %v", err, k.IsZero())
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
			t.Errorf("%q is parsed as %v", s, k)
		}
	})
}
