package trial

// Each signal that ends the helper leaves the host as it was found.

import (
	"errors"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestSignalsLeaveTheHost ends the helper while it forwards, by each signal that a closed
// terminal, a user or the system sends: the host is restored.
func TestSignalsLeaveTheHost(t *testing.T) {
	// A signal that this process ignores, as under nohup, is ignored by the helper, too.
	heeded := make(chan os.Signal, 1)
	signal.Notify(heeded, syscall.SIGHUP, syscall.SIGINT)
	defer signal.Stop(heeded)
	m := newStage(t)
	before := snapshot(t, m.B)
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT} {
		start(t, m)
		if len(m.Peers) == 0 {
			addPeers(t, m)
		}
		permit(t, m, "C", mesh.Routing)
		if now := status(t, m); !now.Forwarding.IPv4 {
			t.Fatalf("before %v the host doesn't forward, so the test proves nothing", s)
		}
		p := m.Helper
		m.Helper = nil
		if err := p.Signal(s); err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.Done():
		case <-time.After(generous):
			t.Fatalf("%v doesn't end the helper", s)
		}
		if err := p.Err(); err != nil {
			t.Errorf("%v: the helper ended with %v\n%s", s, err, p.Output())
		}
		leftAlone(t, before, m)
		err := m.B.Do(func() error {
			_, err := os.Lstat(socketPath)
			return err
		})
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v: the socket still exists: %v", s, err)
		}
	}
}
