package darwin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
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

// Run calls changed, which must not block, once it listens and after every change
// until ctx ends. It
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
	for {
		conn, err := w.o.Kernel.OpenRoute()
		if err == nil {
			note() // for what happened while there was no socket
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			err = w.readChanges(conn, note)
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
func (w *Watcher) readChanges(conn io.Reader, note func()) error {
	buf := make([]byte, xnu.MaxRouteMsg)
	for {
		n, err := conn.Read(buf)
		switch {
		case errors.Is(err, syscall.ENOBUFS):
			note() // the kernel dropped messages
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return fmt.Errorf("read routing socket: %w", err)
		case matters(buf[:n]) && w.carries(buf[:n]):
			note()
		}
	}
}

// matters reports whether a message may change what [Network] says to its callers.
// Neighbours' entries and cloned routes come and go with traffic, lookups that
// failed (RTM_MISS) with every unreachable host, in storms on macOS 26.4
// (tailscale#19324), and link-local addresses with their routes many times an hour,
// on awdl0, llw0 and the system's tunnels. Scoped routes only serve sockets that are
// bound to their interface.
func matters(m []byte) bool {
	if len(m) < 4 || m[2] != xnu.RTMVersion {
		return false
	}
	switch m[3] {
	case xnu.RTMIfInfo:
		return true
	case xnu.RTMNewAddr, xnu.RTMDelAddr:
		_, p, _ := parseAddress(m)
		// What can't be read is looked at: better one look too many.
		return !p.IsValid() || !p.Addr().IsLinkLocalUnicast()
	case xnu.RTMAdd, xnu.RTMDelete, xnu.RTMChange:
		if len(m) < xnu.OffRtFlags+4 {
			return true // cut off
		}
		const skip = RouteLLInfo | RouteCloned | RouteLocal | RouteScoped | RouteMulticast
		if RouteFlags(xnu.Order.Uint32(m[xnu.OffRtFlags:]))&skip != 0 {
			return false
		}
		r, ok := parseRoute(m)
		a := r.Dst.Addr()
		return !ok || !a.IsLinkLocalUnicast() && !a.IsMulticast()
	}
	return false
}

// carries reports whether a message, if it is about an interface itself, is about
// one that has an address besides link-local ones. Others carry nothing yet: when
// they get an address, or lose it with themselves, a message of its own tells.
// The message has only the interface's number (rt_ifmsg of xnu bsd/net/rtsock.c).
func (w *Watcher) carries(m []byte) bool {
	if m[3] != xnu.RTMIfInfo {
		return true
	}
	if len(m) < xnu.OffIfIndex+2 {
		return true // cut off
	}
	index := int(xnu.Order.Uint16(m[xnu.OffIfIndex:]))
	b, err := w.o.Kernel.Interfaces()
	if err != nil {
		return true
	}
	list, err := ParseInterfaces(b)
	if err != nil {
		return true
	}
	return slices.ContainsFunc(list, func(i Interface) bool {
		return i.Index == index && slices.ContainsFunc(i.Addresses, func(a Address) bool { return !a.Prefix.Addr().IsLinkLocalUnicast() })
	})
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
