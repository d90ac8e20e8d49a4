package netlab

// Runs the tests of this package in a user namespace if they have no root.

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) { os.Exit(Main(m.Run)) }
