//go:build !unix

package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// endSignals end every command in order.
var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM}

func handleSignals(ctx context.Context) (context.Context, func()) { return ctx, func() {} }

func endingBy(ctx context.Context, signals ...os.Signal) (_ context.Context, stop func()) {
	return signal.NotifyContext(ctx, signals...)
}

// surviveClosedPipe does nothing: where a pipe is closed, a write to it only fails.
func surviveClosedPipe() {}
