package mesh

import (
	"crypto/ecdh"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// KeySize is the length of a public or private key in bytes.
const KeySize = 32

// keyTextSize is the length of a key in padded standard base64, the form that
// WireGuard's tools print.
const keyTextSize = 44

// ErrBadKey is in the chain of every error about the text or the value of a
// key. Such errors never quote the text: it may be a private key in the wrong
// place.
var ErrBadKey = errors.New("not a WireGuard key")

// PublicKey is a Curve25519 public key: the name by which WireGuard knows a
// peer.
type PublicKey [KeySize]byte

// lowOrder lists the u-coordinates of small order, top bit cleared as X25519
// does (RFC 7748 section 5). With such a "key" every shared secret is zero, so
// no handshake could ever succeed; refused early, the reason can be said.
var lowOrder = [...]PublicKey{
	{},
	{1},
	{
		0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a,
		0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
	},
	{
		0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b,
		0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
	},
	nearPrime(0xec),
	nearPrime(0xed),
	nearPrime(0xee),
}

// nearPrime returns the number that differs from 2^255-19 in its lowest byte
// only.
func nearPrime(low byte) (k PublicKey) {
	for i := range k {
		k[i] = 0xff
	}
	k[0], k[KeySize-1] = low, 0x7f
	return k
}

// ParsePublicKey reads a public key as WireGuard's tools print it: 44
// characters of standard base64. The error wraps ErrBadKey.
func ParsePublicKey(s string) (PublicKey, error) {
	raw, err := decodeKey(s)
	if err != nil {
		return PublicKey{}, fmt.Errorf("parse public key: %w", err)
	}
	masked := PublicKey(raw)
	masked[KeySize-1] &= 0x7f
	for _, weak := range lowOrder {
		if masked == weak {
			return PublicKey{}, fmt.Errorf("parse public key: a point of small order, no handshake can succeed with it: %w", ErrBadKey)
		}
	}
	return PublicKey(raw), nil
}

// decodeKey reads the base64 text of 32 bytes. Strict: trailing bits that
// differ from zero would give one key two spellings.
func decodeKey(s string) (raw [KeySize]byte, err error) {
	if len(s) != keyTextSize {
		return raw, fmt.Errorf("%d characters where base64 of %d bytes has %d: %w", len(s), KeySize, keyTextSize, ErrBadKey)
	}
	// The decoder skips line breaks, so the count of what it wrote is checked
	// as well.
	var buf [keyTextSize]byte
	n, err := base64.StdEncoding.Strict().Decode(buf[:], []byte(s))
	if err != nil || n != KeySize {
		return raw, fmt.Errorf("not standard base64 of %d bytes: %w", KeySize, ErrBadKey)
	}
	return [KeySize]byte(buf[:KeySize]), nil
}

// IsZero reports whether k is the zero value, which is no key.
func (k PublicKey) IsZero() bool { return k == PublicKey{} }

// String returns the 44 characters that WireGuard's tools print.
func (k PublicKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText is String as bytes, so that JSON shows keys as WireGuard does.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText is ParsePublicKey.
func (k *PublicKey) UnmarshalText(text []byte) error {
	parsed, err := ParsePublicKey(string(text))
	if err != nil {
		return err
	}
	*k = parsed
	return nil
}

// PrivateKey is a clamped Curve25519 private key. Nothing prints it by
// accident: every verb of fmt, slog and encoders get a redaction or an error;
// Reveal is the only way to its text.
type PrivateKey [KeySize]byte

// redacted stands wherever a private key would have been printed.
const redacted = "(private key)"

// GeneratePrivateKey draws a key from random, which must be a cryptographic
// source (crypto/rand.Reader outside tests).
func GeneratePrivateKey(random io.Reader) (PrivateKey, error) {
	var k PrivateKey
	if _, err := io.ReadFull(random, k[:]); err != nil {
		return PrivateKey{}, fmt.Errorf("draw private key: %w", err)
	}
	k.clamp()
	return k, nil
}

// ParsePrivateKey reads the base64 text of a private key and clamps it, as
// WireGuard itself does. The error wraps ErrBadKey and never quotes s.
func ParsePrivateKey(s string) (PrivateKey, error) {
	raw, err := decodeKey(s)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("parse private key: %w", err)
	}
	k := PrivateKey(raw)
	if k.IsZero() {
		return PrivateKey{}, fmt.Errorf("parse private key: all zero: %w", ErrBadKey)
	}
	k.clamp()
	return k, nil
}

// clamp sets the bits that RFC 7748 section 5 fixes for X25519 scalars.
func (k *PrivateKey) clamp() {
	k[0] &= 248
	k[31] = k[31]&127 | 64
}

// IsZero reports, in constant time, whether k is the zero value, which is no
// key.
func (k PrivateKey) IsZero() bool { return k.Equal(PrivateKey{}) }

// Equal compares in constant time.
func (k PrivateKey) Equal(other PrivateKey) bool {
	return subtle.ConstantTimeCompare(k[:], other[:]) == 1
}

// Public returns the public key of k, which must not be the zero value.
func (k PrivateKey) Public() (public PublicKey) {
	private, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil {
		panic(err) // only for a length other than KeySize
	}
	copy(public[:], private.PublicKey().Bytes())
	return public
}

// Reveal returns the base64 text of k, for a key file or a configuration that
// is handed to the peer's owner.
func (k PrivateKey) Reveal() string { return base64.StdEncoding.EncodeToString(k[:]) }

// String returns a redaction; see Reveal.
func (k PrivateKey) String() string { return redacted }

// Format writes the redaction for every verb: %x and %d would otherwise reach
// the bytes of the array.
func (k PrivateKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue makes slog print the redaction.
func (k PrivateKey) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText always fails: a private key in a JSON document is a mistake.
func (k PrivateKey) MarshalText() ([]byte, error) {
	return nil, errors.New("marshal private key: refused, a private key is never part of a document")
}
