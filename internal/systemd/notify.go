// Package systemd is what a service says to systemd, and the unit that systemd is given.
//
// It has its own few lines for sd_notify(3), of which only datagrams to a unix socket are
// needed.
package systemd

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// What a service tells, sd_notify(3). Each is one datagram.
const (
	// Ready: the start is complete.
	Ready = "READY=1"
	// Stopping: the service begins to end.
	Stopping = "STOPPING=1"
	// Alive keeps the watchdog from ending the service.
	Alive = "WATCHDOG=1"
)

// sendLimit bounds how long a datagram waits for room in the socket's queue.
const sendLimit = time.Second

// A Notifier tells the service manager how the service is. A nil *Notifier tells nothing,
// for where there is no service manager.
type Notifier struct {
	conn *net.UnixConn
	// watchdog is the time within which Alive is to be sent again; 0: never.
	watchdog time.Duration
}

// Notifications returns the Notifier for what the environment says: NOTIFY_SOCKET is a
// path from the root, or after an @ a name in Linux's abstract space (sd_notify(3));
// WATCHDOG_USEC are microseconds, which count for the process that WATCHDOG_PID names,
// where it names one (sd_watchdog_enabled(3)). It is nil without NOTIFY_SOCKET. pid is
// this process's.
func Notifications(getenv func(string) string, pid int) (*Notifier, error) {
	address := getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil, nil
	}
	if !filepath.IsAbs(address) && (!strings.HasPrefix(address, "@") || len(address) == 1) {
		return nil, fmt.Errorf("NOTIFY_SOCKET %q is neither a path from the root nor an abstract name", address)
	}
	watchdog, err := watchdogTime(getenv, pid)
	if err != nil {
		return nil, err
	}
	// net takes the @ for the abstract space, too (syscall.SockaddrUnix).
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("reach the service manager at NOTIFY_SOCKET: %w", err)
	}
	return &Notifier{conn: conn, watchdog: watchdog}, nil
}

func watchdogTime(getenv func(string) string, pid int) (time.Duration, error) {
	text := getenv("WATCHDOG_USEC")
	if of := getenv("WATCHDOG_PID"); text == "" || of != "" && of != strconv.Itoa(pid) {
		return 0, nil
	}
	us, err := strconv.ParseInt(text, 10, 64)
	if err != nil || us <= 0 || us > int64(maxWatchdog/time.Microsecond) {
		return 0, fmt.Errorf("WATCHDOG_USEC %q is not a number of microseconds up to %v", text, maxWatchdog)
	}
	return time.Duration(us) * time.Microsecond, nil
}

// maxWatchdog is longer than any sensible time between two signs of life.
const maxWatchdog = 365 * 24 * time.Hour

// Watchdog returns the time within which Alive is to be sent again; 0: it needn't be.
func (n *Notifier) Watchdog() time.Duration {
	if n == nil {
		return 0
	}
	return n.watchdog
}

// Tell sends lines of what holds, such as Ready. It takes sendLimit at most.
func (n *Notifier) Tell(lines ...string) error {
	if n == nil {
		return nil
	}
	err := n.conn.SetWriteDeadline(time.Now().Add(sendLimit))
	if err == nil {
		_, err = n.conn.Write([]byte(strings.Join(lines, "\n")))
	}
	if err != nil {
		return fmt.Errorf("tell the service manager: %w", err)
	}
	return nil
}

// Close closes the way to the service manager. It may be called after the last Tell.
func (n *Notifier) Close() error {
	if n == nil {
		return nil
	}
	if err := n.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
