//go:build !unix

package main

import (
	"context"
	"os"
	"syscall"
)

// endSignals end every command in an orderly way. On Windows os.Interrupt is Ctrl-C, and
// SIGTERM the closing of the console (os/signal).
var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM}

// handleSignals does nothing: endSignals are all there are.
func handleSignals(ctx context.Context) (context.Context, func()) { return ctx, func() {} }

// surviveClosedPipe does nothing: where a pipe is closed, a write to it only fails.
func surviveClosedPipe() {}
