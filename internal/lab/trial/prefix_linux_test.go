package trial

// A peer whose endpoint is in the mesh prefix.

import (
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// TestOuterAddressInTheMeshPrefix gives C's host an outer address in the mesh prefix: the
// handshake completes, because the table doesn't block WireGuard's own packets, C reaches
// the host, and status and doctor report the overlap with a remedy.
func TestOuterAddressInTheMeshPrefix(t *testing.T) {
	m := newStage(t)
	const outer = "100.90.5.2"
	on := func(h *netlab.Host, args ...string) {
		t.Helper()
		if _, talk, status, err := h.Run(t.Context(), "", "ip", args...); err != nil || status != 0 {
			t.Fatalf("ip %s: status %d, %v: %s", strings.Join(args, " "), status, err, talk)
		}
	}
	on(m.C, "addr", "add", outer+"/32", "dev", "eth0")
	on(m.C, "route", "replace", "default", "via", "198.51.100.17", "src", outer)
	on(m.W, "route", "add", outer+"/32", "via", netlab.Addresses().C.V4.String())
	start(t, m)
	if _, err := m.AddPeer(t.Context(), "C", m.C, "--allow", "incoming"); err != nil {
		t.Fatal(err)
	}
	host := status(t, m).Address()
	for _, r := range m.Lab.Probe(t.Context(), netlab.Probe{From: m.C, To: host.V4, Proto: netlab.ICMP, Wait: generous},
		netlab.Probe{From: m.C, To: host.V6, Proto: netlab.ICMP, Wait: generous}) {
		if !r.OK {
			t.Errorf("C doesn't reach the host: %v", r)
		}
	}
	const want = "C is reached at " + outer + ", inside the mesh prefix 100.64.0.0/10"
	for end := time.Now().Add(generous); ; time.Sleep(100 * time.Millisecond) {
		o, _ := m.Do(t.Context(), "status", "--json")
		named := strings.Contains(o.Stdout, want) && strings.Contains(o.Stdout, "meshhelper settings mesh-prefix4 ")
		// doctor's exit status is an error if it reports a problem.
		d, err := m.Do(t.Context(), "doctor", "--json")
		if named && err != nil && strings.Contains(d.Stdout, want) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("status says:\n%s\ndoctor says:\n%s", o.Stdout, d.Stdout)
		}
	}
}
