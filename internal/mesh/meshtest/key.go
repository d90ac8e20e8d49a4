// Package meshtest makes values of package mesh for tests.
package meshtest

import (
	"math/rand/v2"
	"testing"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Key returns a private key that is the same for the same seed.
func Key(t testing.TB, seed byte) mesh.PrivateKey {
	t.Helper()
	k, err := mesh.GeneratePrivateKey(rand.NewChaCha8([32]byte{seed}))
	if err != nil {
		t.Fatal(err)
	}
	return k
}
