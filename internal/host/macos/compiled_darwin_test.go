//go:build mactest

package macos

import (
	"os"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
)

// TestCompiledOnThisMac needs root. It keeps pfctl's output in the directory named by
// MESHHELPER_ARTIFACTS.
func TestCompiledOnThisMac(t *testing.T) {
	checkCompiled(t, darwin.Exec{}, darwin.System{}, os.Getenv("MESHHELPER_ARTIFACTS"))
}
