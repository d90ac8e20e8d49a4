//go:build mactest

package macos

import (
	"os"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
)

// TestCompiledOnThisMac needs root. What pfctl printed is kept in the directory
// that MESHHELPER_ARTIFACTS names.
func TestCompiledOnThisMac(t *testing.T) {
	checkCompiled(t, darwin.Exec{}, darwin.System{}, os.Getenv("MESHHELPER_ARTIFACTS"))
}
