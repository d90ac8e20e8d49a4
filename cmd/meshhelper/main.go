// Command meshhelper turns this computer into a router for WireGuard peers, with one
// toggle per peer and permission. The same binary is the helper, as `meshhelper run`, and
// the command, which asks the helper over a Unix socket (internal/api).
//
// Each command has a newXCommand function that declares its flags, and a function that
// does its work with an app, which tests fill with their own input, output and host. The
// answer goes to stdout (app.say, app.print), remarks and errors to stderr (app.talk). The
// exit statuses are in app.go. docs/cli.md is the reference of commands and flags.
package main

import (
	"crypto/rand"
	"os"
	"os/exec"
)

func main() {
	os.Exit(newApp(hosts()).main(os.Args[1:]))
}

// newApp returns the app of this process, whose helper can run on the hosts in p.
func newApp(p map[string]newHost) *app {
	return &app{
		stdout: os.Stdout, stderr: os.Stderr, stdin: os.Stdin,
		getenv: os.Getenv, random: rand.Reader, hosts: p, service: thisService(),
		root: os.Geteuid() == 0, terminal: isTerminal(os.Stdout), size: func() (int, int) { return sizeOf(os.Stdout) },
		talkSize: func() (int, int) { return sizeOf(os.Stderr) }, lookPath: exec.LookPath,
	}
}

// isTerminal reports whether f is a character device, as a terminal is and a file or pipe
// isn't. /dev/null is one, too, but text that is written there has no reader.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
