//go:build !linux

// Command demo needs network namespaces, which only Linux has.
package main

import (
	"fmt"
	"os"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

func main() {
	fmt.Fprintln(os.Stderr, "demo:", netlab.Unavailable())
	os.Exit(1)
}
