// Command meshhelper turns this computer into a router for WireGuard peers,
// one toggle per peer and permission. It is the command and, as `meshhelper
// run`, the helper that the command talks to.
package main

import (
	"crypto/rand"
	"os"
	"os/exec"
)

func main() {
	os.Exit(newApp(hosts()).main(os.Args[1:]))
}

// newApp returns the app of this process.
func newApp(p map[string]newHost) *app {
	return &app{
		stdout: os.Stdout, stderr: os.Stderr, stdin: os.Stdin,
		getenv: os.Getenv, random: rand.Reader, hosts: p, service: thisService(),
		terminal: isTerminal(os.Stdout), size: func() (int, int) { return sizeOf(os.Stdout) },
		talkSize: func() (int, int) { return sizeOf(os.Stderr) }, lookPath: exec.LookPath,
	}
}

// isTerminal reports whether f is a character device, which a terminal is and a
// file or pipe isn't; /dev/null is one, too, which has no reader.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
