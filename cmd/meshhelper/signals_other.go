//go:build !unix

package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// endSignals end every command in an orderly way. On Windows os.Interrupt is Ctrl-C, and
// SIGTERM the closing of the console (os/signal).
var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM}

// handleSignals does nothing: endSignals are all there are.
func handleSignals(ctx context.Context) (context.Context, func()) { return ctx, func() {} }

// endingBy returns a context that ends with one of the signals, until stop is called.
func endingBy(ctx context.Context, signals ...os.Signal) (_ context.Context, stop func()) {
	return signal.NotifyContext(ctx, signals...)
}

// surviveClosedPipe does nothing: without SIGPIPE a write to a closed pipe only fails.
func surviveClosedPipe() {}
