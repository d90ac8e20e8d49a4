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

// ErrBadKey is wrapped by every error about the text or the value of a key. Such errors never
// quote the text: it may be a private key in the wrong place.
var ErrBadKey = errors.New("not a WireGuard key")

// ErrWeakKey is in the chain of the error for a public key of small order: the text is that
// of a key, but no device has it. It wraps ErrBadKey.
var ErrWeakKey = fmt.Errorf("a point of small order, no handshake can succeed with it: %w", ErrBadKey)

// PublicKey is a Curve25519 public key, by which WireGuard identifies a peer.
type PublicKey [KeySize]byte

// lowOrder lists the u-coordinates of points of small order, with the top bit cleared as
// X25519 does (RFC 7748 sections 5 and 6.1; the values are those of Curve25519's
// https://cr.yp.to/ecdh.html#validate). With such a key every shared secret is zero, so no
// handshake can succeed. Refusing it when it is added gives the reason.
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

// nearPrime returns 2^255-19 with the lowest byte replaced by low, in little endian. 0xed
// gives the prime itself, which X25519 reduces to 0.
func nearPrime(low byte) (k PublicKey) {
	for i := range k {
		k[i] = 0xff
	}
	k[0], k[KeySize-1] = low, 0x7f
	return k
}

// ParsePublicKey parses a public key as WireGuard's tools print it: 44 characters of
// standard base64. It refuses keys of small order. The error wraps ErrBadKey.
func ParsePublicKey(s string) (PublicKey, error) {
	raw, err := decodeKey(s)
	if err != nil {
		return PublicKey{}, fmt.Errorf("parse public key: %w", err)
	}
	masked := PublicKey(raw)
	masked[KeySize-1] &= 0x7f
	for _, weak := range lowOrder {
		if masked == weak {
			return PublicKey{}, fmt.Errorf("parse public key: %w", ErrWeakKey)
		}
	}
	return PublicKey(raw), nil
}

// decodeKey decodes the base64 text of a key. It is strict, since with trailing bits other
// than zero one key would have several spellings.
func decodeKey(s string) (raw [KeySize]byte, err error) {
	if len(s) != keyTextSize {
		return raw, fmt.Errorf("%d characters where base64 of %d bytes has %d: %w", len(s), KeySize, keyTextSize, ErrBadKey)
	}
	// The decoder skips line breaks, so the number of decoded bytes is checked as well.
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

// MarshalText returns String as bytes, so that JSON has keys in WireGuard's form.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText parses text with ParsePublicKey.
func (k *PublicKey) UnmarshalText(text []byte) error {
	parsed, err := ParsePublicKey(string(text))
	if err != nil {
		return err
	}
	*k = parsed
	return nil
}

// PrivateKey is a clamped Curve25519 private key. It can't be printed by accident: fmt and
// slog print a redaction, encoders fail, and only Reveal returns its text.
type PrivateKey [KeySize]byte

// redacted is printed in place of a private key.
const redacted = "(private key)"

// GeneratePrivateKey generates a key from random, which must be a cryptographic source
// (crypto/rand.Reader outside tests).
func GeneratePrivateKey(random io.Reader) (PrivateKey, error) {
	var k PrivateKey
	if _, err := io.ReadFull(random, k[:]); err != nil {
		return PrivateKey{}, fmt.Errorf("generate private key: %w", err)
	}
	k.clamp()
	return k, nil
}

// ParsePrivateKey parses the base64 text of a private key and clamps it, as WireGuard
// itself does. The error wraps ErrBadKey and never quotes s.
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

// Equal reports, in constant time, whether k and other are the same key.
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

// Reveal returns the base64 text of k, for a key file or for the configuration that the
// peer's owner gets.
func (k PrivateKey) Reveal() string { return base64.StdEncoding.EncodeToString(k[:]) }

// String returns a redaction; Reveal returns the text.
func (k PrivateKey) String() string { return redacted }

// Format implements fmt.Formatter with the redaction for every verb: %x and %d would
// otherwise print the bytes of the array.
func (k PrivateKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue makes slog print the redaction.
func (k PrivateKey) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText always returns an error: a private key in a JSON document is a mistake.
func (k PrivateKey) MarshalText() ([]byte, error) {
	return nil, errors.New("marshal private key: refused, a private key is never part of a document")
}
