package trial

import (
	"os"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

func TestMain(m *testing.M) { os.Exit(netlab.Main(m.Run)) }
