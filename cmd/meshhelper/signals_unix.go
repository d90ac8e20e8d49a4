//go:build unix

package main

import (
	"context"
	"os"
	"os/signal"
	"slices"
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

// endingBy returns a context that ends with one of the signals, until stop is called. A
// signal that the parent process set to be ignored stays ignored: nohup does that with
// SIGHUP, and a shell with SIGINT for a command in the background. Go knows that of these
// two only (runtime.initsig). A further signal doesn't cut the command's end short: the end
// is bounded in time, and SIGKILL remains.
func endingBy(ctx context.Context, signals ...os.Signal) (_ context.Context, stop func()) {
	signals = slices.DeleteFunc(slices.Clone(signals), signal.Ignored)
	if len(signals) == 0 { // Notify takes it for all signals
		return ctx, func() {}
	}
	return signal.NotifyContext(ctx, signals...)
}
