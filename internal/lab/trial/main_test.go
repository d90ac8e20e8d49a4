package trial

// Runs the tests of this package in a user namespace if they have no root.

import (
	"os"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

func TestMain(m *testing.M) { os.Exit(netlab.Main(m.Run)) }
