//go:build unix && !linux

package main

import (
	"fmt"
	"os"
)

// inNamespace stands for what only Linux has.
func inNamespace() {
	fmt.Fprintln(os.Stderr, "netns: this isn't Linux")
	os.Exit(1)
}
