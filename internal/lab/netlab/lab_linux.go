package netlab

// The lab itself: it creates hosts and removes them.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Lab is a set of hosts. Its methods may be called from any goroutine.
type Lab struct {
	dir    string
	ctx    context.Context // ends when the lab closes
	cancel context.CancelFunc
	run    errgroup.Group // every goroutine of the lab

	mu      sync.Mutex
	hosts   []*Host
	closers []func() error // run in reverse order
	closed  bool
	number  uint64                                // the last one that next gave out
	macs    map[*Host]map[string]net.HardwareAddr // of the other ends of links, by interface
}

// New returns a lab without hosts. Its files (logs, programs' state) are in a temporary
// directory that Close removes.
func New() (*Lab, error) {
	if err := Unavailable(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "netlab-")
	if err != nil {
		return nil, fmt.Errorf("make lab directory: %w", err)
	}
	l := &Lab{dir: dir, macs: map[*Host]map[string]net.HardwareAddr{}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l, nil
}

// Dir returns a directory that every host sees, and that Close removes.
func (l *Lab) Dir() string { return l.dir }

// Close stops every program, closes every socket and removes the hosts.
// A second call does nothing.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	closers, hosts := l.closers, l.hosts
	l.mu.Unlock()

	l.cancel()
	var errs []error
	for i := len(closers) - 1; i >= 0; i-- {
		errs = append(errs, closers[i]())
	}
	for _, h := range hosts {
		h.leave()
	}
	errs = append(errs, l.run.Wait())
	for _, h := range hosts {
		h.release()
	}
	errs = append(errs, os.RemoveAll(l.dir))
	return errors.Join(errs...)
}

// onClose registers f to run when the lab closes, before the hosts are removed.
func (l *Lab) onClose(f func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

// next returns a number that is unique in this lab.
func (l *Lab) next() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.number++
	return l.number
}

// neighbour returns the hardware address of the other end of a link; false for a tunnel.
func (l *Lab) neighbour(h *Host, link string) (net.HardwareAddr, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	mac, ok := l.macs[h][link]
	return mac, ok
}

// setNeighbour records the hardware address of the other end of a link.
func (l *Lab) setNeighbour(h *Host, link string, mac net.HardwareAddr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.macs[h] == nil {
		l.macs[h] = map[string]net.HardwareAddr{}
	}
	l.macs[h][link] = mac
}
