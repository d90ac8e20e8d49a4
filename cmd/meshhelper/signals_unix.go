//go:build unix

package main

import (
	"context"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

// endSignals end every command in order. SIGHUP is what a closed terminal sends.
var endSignals = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}

// handleSignals has the helper survive and hear what would end it where it stands,
// with the packet filter, forwarding and the socket left behind. SIGABRT still ends
// it so, and prints what each goroutine does.
func handleSignals(ctx context.Context) (context.Context, func()) {
	surviveClosedPipe()
	// A terminal with `stty tostop` stops the background process that writes to it.
	// Where it is ignored the write succeeds (termios(3), TOSTOP); a handler would run
	// again and again.
	signal.Ignore(syscall.SIGTTOU)
	return endingBy(ctx, syscall.SIGQUIT)
}

// surviveClosedPipe has a write to a closed pipe fail, and this process go on: with
// standard output or error a closed pipe, Go ends a program for which no other handler is
// set (os/signal, SIGPIPE). A handler and not SIG_IGN, which the programs that the helper
// runs would inherit.
func surviveClosedPipe() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// endingBy returns a context that ends with a signal, until stop is called. It leaves
// out what the caller has this process ignore, as nohup does with SIGHUP, and a shell
// with SIGINT for what it starts with & (of others, Go keeps no record). A signal
// that comes later doesn't cut the command's end short: that is bounded by itself,
// and there is SIGKILL.
func endingBy(ctx context.Context, signals ...os.Signal) (_ context.Context, stop func()) {
	signals = slices.DeleteFunc(slices.Clone(signals), signal.Ignored)
	if len(signals) == 0 { // Notify takes it for all signals
		return ctx, func() {}
	}
	return signal.NotifyContext(ctx, signals...)
}
