//go:build unix

package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// endSignals end every command in an orderly way, so that it cleans up what it began. A
// terminal that is closed sends SIGHUP.
var endSignals = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}

// handleSignals handles the signals that would otherwise end the helper at once and leave
// the packet filter, forwarding and the socket as they are. The context that it returns
// ends with SIGQUIT. SIGABRT isn't handled, so that it still prints all goroutines and
// exits.
func handleSignals(ctx context.Context) (context.Context, func()) {
	surviveClosedPipe()
	// A terminal with `stty tostop` stops the background process that writes to it.
	// With SIGTTOU ignored the write succeeds (termios(3), TOSTOP). With a handler the
	// kernel would send the signal again for each attempt to write.
	signal.Ignore(syscall.SIGTTOU)
	return endingBy(ctx, syscall.SIGQUIT)
}

// surviveClosedPipe makes a write to a closed pipe fail with EPIPE instead of ending the
// process. Without it, Go ends a program that writes to a closed pipe on standard output or
// standard error (os/signal, SIGPIPE). It sets a handler rather than SIG_IGN, because the
// programs that the helper runs would inherit SIG_IGN (execve(2)).
func surviveClosedPipe() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }
