//go:build linux

package systemd

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// env returns an environment.
func env(kv ...string) func(string) string {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return func(k string) string { return m[k] }
}

// listen is a service manager that listens at name.
func listen(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestTell(t *testing.T) {
	for name, address := range map[string]string{
		"path":     filepath.Join(t.TempDir(), "n"),
		"abstract": fmt.Sprintf("@meshhelper-test-%d", os.Getpid()),
	} {
		t.Run(name, func(t *testing.T) {
			manager := listen(t, address)
			n, err := FromEnvironment(env("NOTIFY_SOCKET", address, "WATCHDOG_USEC", "2000000", "WATCHDOG_PID", "7"), 7)
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			if got := n.Watchdog(); got != 2*time.Second {
				t.Errorf("watchdog %v, want 2s", got)
			}
			if err := n.Notify(Ready, "STATUS=well"); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			k, err := manager.Read(b)
			if got := string(b[:k]); err != nil || got != "READY=1\nSTATUS=well" {
				t.Errorf("the manager got %q, %v", got, err)
			}
		})
	}
}

// TestTellFullQueue has a manager that reads nothing: telling ends with an error.
func TestTellFullQueue(t *testing.T) {
	address := filepath.Join(t.TempDir(), "n")
	listen(t, address)
	n, err := FromEnvironment(env("NOTIFY_SOCKET", address), 7)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for range 100_000 { // net.unix.max_dgram_qlen is 10 to 512, mostly
		if err = n.Notify(Alive); err != nil {
			return
		}
	}
	t.Error("a full queue took everything")
}

func TestNotifications(t *testing.T) {
	if n, err := FromEnvironment(env("WATCHDOG_USEC", "5"), 7); n != nil || err != nil {
		t.Errorf("without NOTIFY_SOCKET: %v, %v", n, err)
	}
	address := filepath.Join(t.TempDir(), "n")
	listen(t, address)
	for _, tt := range []struct {
		env  []string
		want time.Duration
		bad  bool
	}{
		{env: []string{"NOTIFY_SOCKET", "relative"}, bad: true},
		{env: []string{"NOTIFY_SOCKET", "@"}, bad: true},
		{env: []string{"NOTIFY_SOCKET", "vsock:2:1234"}, bad: true},
		{env: []string{"NOTIFY_SOCKET", address + "x"}, bad: true},
		{env: []string{"NOTIFY_SOCKET", address}},
		{env: []string{"NOTIFY_SOCKET", address, "WATCHDOG_USEC", "5", "WATCHDOG_PID", "8"}},
		{env: []string{"NOTIFY_SOCKET", address, "WATCHDOG_USEC", "5"}, want: 5 * time.Microsecond},
		{env: []string{"NOTIFY_SOCKET", address, "WATCHDOG_USEC", "-5"}, bad: true},
		{env: []string{"NOTIFY_SOCKET", address, "WATCHDOG_USEC", "9223372036854775807"}, bad: true},
	} {
		n, err := FromEnvironment(env(tt.env...), 7)
		if (err != nil) != tt.bad || n.Watchdog() != tt.want {
			t.Errorf("%q: %v, %v", tt.env, n.Watchdog(), err)
		}
		n.Close()
	}
	var none *Notifier
	if err := none.Notify(Ready); err != nil || none.Watchdog() != 0 {
		t.Errorf("a Notifier that isn't: %v, %v", err, none.Watchdog())
	}
}

func FuzzNotifications(f *testing.F) {
	f.Add("5", "7")
	f.Add("", "")
	f.Fuzz(func(t *testing.T, usec, pid string) {
		d, err := watchdogTime(env("WATCHDOG_USEC", usec, "WATCHDOG_PID", pid), 7)
		if d < 0 || err != nil && d != 0 {
			t.Errorf("%v, %v", d, err)
		}
	})
}
