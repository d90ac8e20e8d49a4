package trial

// A local user that binds the ports that peers' flows could leave from.

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestLocalUserTakesPorts has an unprivileged user bind a UDP port in each 512, and then
// bind and release others, during several of the helper's inspections: a peer's routing
// goes on, and nothing is repaired.
func TestLocalUserTakesPorts(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing)
	to := netlab.Addresses().I.V4
	if !m.reaches(t, m.C, to, true) {
		t.Fatal("C doesn't reach I")
	}
	bind := func(ports ...int) (out []net.PacketConn) {
		t.Helper()
		if err := m.B.Do(func() error {
			// The credentials of this thread only, which ends with the function.
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); e != 0 {
				return e
			}
			for _, port := range ports {
				c, err := net.ListenPacket("udp4", fmt.Sprintf("127.0.0.1:%d", port))
				if err != nil {
					return err
				}
				out = append(out, c)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	var apart []int
	for port := 1024 + 511; port < 65535; port += 512 {
		if port < 32768 || port > 60999 {
			apart = append(apart, port)
		}
	}
	before := status(t, m).Repairs
	for _, c := range bind(apart...) {
		defer c.Close()
	}
	for _, port := range []int{16000, 24000, 10000} {
		c := bind(port, port+4000)
		time.Sleep(3500 * time.Millisecond) // one inspection
		if s := status(t, m); !s.Forwarding.IPv4 || s.Repairs != before {
			t.Errorf("forwarding %+v, %d repairs", s.Forwarding, s.Repairs-before)
		}
		if !m.reaches(t, m.C, to, true) {
			t.Error("C doesn't reach I any more")
		}
		for _, c := range c {
			c.Close()
		}
	}
	for _, p := range status(t, m).Problems {
		if strings.Contains(p.Message, "ports in a row") {
			t.Errorf("problem: %v", p)
		}
	}
}
