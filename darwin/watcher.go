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

// WatcherOptions are the dependencies and times of a [Watcher].
type WatcherOptions struct {
	// Kernel opens the routing socket. Required.
	Kernel Kernel
	// Log receives the routing socket's errors. Required.
	Log *slog.Logger
	// Settle is how long no change may come for a burst to be over, 200 ms by default.
	// Optional.
	Settle time.Duration
	// Limit is the longest time until a burst is reported, 1 s by default. Optional.
	Limit time.Duration
	// Reopen is the time between attempts to open a socket, 1 s by default.
	// Optional.
	Reopen time.Duration
}

// A Watcher reports changes of interfaces, addresses and routes. When a VPN connects or
// the Wi-Fi changes, dozens of messages arrive in a burst: the Watcher reports the first
// at once and the rest together, at the burst's end.
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

// Run calls changed, which must not block, once it listens and after every change, until
// ctx ends. It survives messages that it doesn't know, an overrun of the socket's buffer,
// and a socket that the system closed: at some sleeps and logouts macOS shuts down
// processes' sockets (pid_shutdown_sockets, seen by Mullvad as ENOTCONN). Since it may
// have missed a change then, it reports one.
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
			note() // changes may have been missed without a socket
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

// matters reports whether a message may change the answers of a [Network]. These don't:
// neighbours' entries and cloned routes come and go with traffic; failed lookups (RTM_MISS)
// come with every unreachable host, in storms on macOS 26.4 (tailscale#19324); link-local
// addresses and their routes change many times an hour on awdl0, llw0 and the system's
// tunnels; and scoped routes only serve sockets that are bound to their interface.
func matters(m []byte) bool {
	if len(m) < 4 || m[2] != xnu.RTMVersion {
		return false
	}
	switch m[3] {
	case xnu.RTMIfInfo:
		return true
	case xnu.RTMNewAddr, xnu.RTMDelAddr:
		_, p, _ := parseAddress(m)
		// A message that can't be parsed counts: a needless Observe is better than a
		// missed change.
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

// carries reports whether a message about an interface is about one with an address that
// isn't link-local; it is true for any other message. An interface without such an address
// carries no traffic yet, and a message of its own reports when it gets or loses one. The
// message holds only the interface's index (rt_ifmsg in xnu bsd/net/rtsock.c).
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

// settle calls changed for the first change at once, and then at most once for each burst.
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

// drain waits until no change has come for Settle, at most for Limit, and reports whether
// there were any changes.
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
