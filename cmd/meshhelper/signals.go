package main

import (
	"context"
	"os"
	"os/signal"
	"slices"
)

// endingBy returns a context that ends with the first of the signals, or with stop. It leaves
// out what the caller has this process ignore, as nohup does with SIGHUP, and a shell
// with SIGINT for what it starts with & (of others, Go keeps no record). A signal
// that comes later doesn't cut the command's end short, not even after stop: the end is
// bounded by itself, and there is SIGKILL. [signal.NotifyContext] would let it end a helper
// that has put everything back as one that was killed.
func endingBy(ctx context.Context, signals ...os.Signal) (_ context.Context, stop func()) {
	signals = slices.DeleteFunc(slices.Clone(signals), signal.Ignored)
	if len(signals) == 0 { // Notify takes it for all signals
		return ctx, func() {}
	}
	heard := make(chan os.Signal, 1)
	signal.Notify(heard, signals...)
	ctx, stop = context.WithCancel(ctx)
	go func() {
		select {
		case <-heard:
			stop()
		case <-ctx.Done():
		}
	}()
	return ctx, stop
}
