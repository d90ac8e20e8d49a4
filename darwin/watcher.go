package darwin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// WatcherOptions of NewWatcher.
type WatcherOptions struct {
	// Kernel opens the routing socket. Required.
	Kernel Kernel
	// Log gets what went wrong with the socket. Required.
	Log *slog.Logger
	// Settle is the quiet that ends a burst of changes, 200 ms by default. Optional.
	Settle time.Duration
	// Limit is the longest that a burst is held back, 1 s by default. Optional.
	Limit time.Duration
	// Reopen is the time between attempts to open a socket, 1 s by default.
	// Optional.
	Reopen time.Duration
}

// A Watcher follows changes of interfaces, addresses and routes. A VPN that
// connects or a Wi-Fi that changes gives dozens of messages: the first is
// reported at once, those that follow it together, when they end.
type Watcher struct{ o WatcherOptions }

// NewWatcher returns a Watcher.
func NewWatcher(o WatcherOptions) *Watcher {
	if o.Settle <= 0 {
		o.Settle = 200 * time.Millisecond
	}
	if o.Limit <= 0 {
		o.Limit = time.Second
	}
	if o.Reopen <= 0 {
		o.Reopen = time.Second
	}
	return &Watcher{o}
}

// Run calls changed, which must not block, after every change until ctx ends. It
// survives messages that it doesn't know, an overrun of the socket's buffer, and
// a socket that the system closed: at some sleeps and logouts macOS shuts
// processes' sockets (pid_shutdown_sockets, seen by Mullvad as ENOTCONN). What
// may have been missed meanwhile counts as a change.
func (w *Watcher) Run(ctx context.Context, changed func()) error {
	g, ctx := errgroup.WithContext(ctx)
	seen := make(chan struct{}, 1)
	g.Go(func() error { return w.follow(ctx, seen) })
	g.Go(func() error { return w.settle(ctx, seen, changed) })
	return g.Wait()
}

// follow reads sockets, one after the other, and notes changes in seen.
func (w *Watcher) follow(ctx context.Context, seen chan<- struct{}) error {
	note := func() {
		select {
		case seen <- struct{}{}:
		default:
		}
	}
	for first := true; ; first = false {
		conn, err := w.o.Kernel.OpenRoute()
		if err == nil {
			if !first {
				note() // for what happened while there was no socket
			}
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			err = readChanges(conn, note)
			stop()
			conn.Close()
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		w.o.Log.Warn("routing socket failed, opening another", "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(w.o.Reopen):
		}
	}
}

// readChanges reads messages until the socket fails, and calls note for those
// that matter.
func readChanges(conn io.Reader, note func()) error {
	buf := make([]byte, maxRouteMsg)
	for {
		n, err := conn.Read(buf)
		switch {
		case errors.Is(err, syscall.ENOBUFS):
			note() // the kernel dropped messages
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return fmt.Errorf("read routing socket: %w", err)
		case matters(buf[:n]):
			note()
		}
	}
}

// matters reports whether a message may change what Observe returns. Neighbours'
// entries and cloned routes come and go with traffic, and lookups that failed
// (RTM_MISS) with every unreachable host.
func matters(m []byte) bool {
	if len(m) < 4 || m[2] != rtmVersion {
		return false
	}
	switch m[3] {
	case rtmIfInfo, rtmNewAddr, rtmDelAddr:
		return true
	case rtmAdd, rtmDelete, rtmChange:
		if len(m) < offRtFlags+4 {
			return true // cut off: better one look too many
		}
		return RouteFlags(order.Uint32(m[offRtFlags:]))&(RouteLLInfo|RouteCloned) == 0
	}
	return false
}

// settle reports the first change at once and then at most one for each burst.
func (w *Watcher) settle(ctx context.Context, seen <-chan struct{}, changed func()) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-seen:
			changed()
		}
		more, err := w.drain(ctx, seen)
		if err != nil {
			return err
		}
		if more {
			changed()
		}
	}
}

// drain waits for Settle without a change, or until Limit, and reports whether
// there were any.
func (w *Watcher) drain(ctx context.Context, seen <-chan struct{}) (more bool, err error) {
	limit := time.After(w.o.Limit)
	for {
		select {
		case <-ctx.Done():
			return more, ctx.Err()
		case <-limit:
			return more, nil
		case <-time.After(w.o.Settle):
			return more, nil
		case <-seen:
			more = true
		}
	}
}
