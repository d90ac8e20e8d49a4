// Package systemd notifies systemd that a service has started, is alive or is stopping, with
// the protocol of sd_notify(3): datagrams to the Unix socket that the environment variable
// NOTIFY_SOCKET names. [FromEnvironment] reads the environment, [Notifier.Notify] sends.
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

// The notifications of sd_notify(3) that the helper sends.
const (
	// Ready means that the service has started (Type=notify, systemd.service(5)).
	Ready = "READY=1"
	// Stopping means that the service has begun to stop.
	Stopping = "STOPPING=1"
	// Alive resets the watchdog (WatchdogSec=, systemd.service(5)).
	Alive = "WATCHDOG=1"
)

// sendLimit bounds how long a datagram waits for space in the socket's queue, which only a
// service manager that doesn't read fills up.
const sendLimit = time.Second

// A Notifier sends notifications to the service manager. The methods of a nil *Notifier do
// nothing, for a process that no service manager started.
type Notifier struct {
	conn *net.UnixConn
	// watchdog is the time within which Alive must be sent again; 0 without a watchdog.
	watchdog time.Duration
}

// FromEnvironment returns the Notifier that the environment describes, or nil if
// NOTIFY_SOCKET isn't set. NOTIFY_SOCKET is an absolute path, or a name in Linux's
// abstract namespace after an @ (sd_notify(3)). WATCHDOG_USEC is in microseconds and
// applies to the process WATCHDOG_PID, or to any if that isn't set
// (sd_watchdog_enabled(3)). pid is this process's ID.
func FromEnvironment(getenv func(string) string, pid int) (*Notifier, error) {
	address := getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil, nil
	}
	if !filepath.IsAbs(address) && (!strings.HasPrefix(address, "@") || len(address) == 1) {
		return nil, fmt.Errorf("NOTIFY_SOCKET %q is neither an absolute path nor an abstract name", address)
	}
	watchdog, err := watchdogTime(getenv, pid)
	if err != nil {
		return nil, err
	}
	// Package net, too, takes a leading @ for the abstract namespace (syscall.SockaddrUnix).
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("connect to the service manager at NOTIFY_SOCKET: %w", err)
	}
	return &Notifier{conn: conn, watchdog: watchdog}, nil
}

// watchdogTime returns the watchdog's time as the environment gives it, or 0 without one for
// this process.
func watchdogTime(getenv func(string) string, pid int) (time.Duration, error) {
	text := getenv("WATCHDOG_USEC")
	if watched := getenv("WATCHDOG_PID"); text == "" || watched != "" && watched != strconv.Itoa(pid) {
		return 0, nil
	}
	us, err := strconv.ParseInt(text, 10, 64)
	if err != nil || us <= 0 || us > int64(maxWatchdog/time.Microsecond) {
		return 0, fmt.Errorf("WATCHDOG_USEC %q is not a number of microseconds up to %v", text, maxWatchdog)
	}
	return time.Duration(us) * time.Microsecond, nil
}

// maxWatchdog exceeds any useful watchdog time, and fits a time.Duration.
const maxWatchdog = 365 * 24 * time.Hour

// Watchdog returns the time within which Alive must be sent again, or systemd ends the
// service; 0 without a watchdog.
func (n *Notifier) Watchdog() time.Duration {
	if n == nil {
		return 0
	}
	return n.watchdog
}

// Notify sends notifications, such as Ready, in one datagram. It takes at most a second.
func (n *Notifier) Notify(lines ...string) error {
	if n == nil {
		return nil
	}
	err := n.conn.SetWriteDeadline(time.Now().Add(sendLimit))
	if err == nil {
		_, err = n.conn.Write([]byte(strings.Join(lines, "\n")))
	}
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	return nil
}

// Close closes the socket. Sending fails afterwards; a second Close does nothing.
func (n *Notifier) Close() error {
	if n == nil {
		return nil
	}
	if err := n.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
