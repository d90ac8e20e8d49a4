package trial

// A mesh of thousands of peers.

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// TestManyPeers gives the helper a document with 1,000 peers (10,000 with -soak), each
// with every permission. It starts, serves a stock end, answers status and revokes, and
// its memory per peer is limited.
func TestManyPeers(t *testing.T) {
	peers := 1000
	if *soak {
		peers = 10_000
	}
	m := newSilentStage(t)
	start(t, m)
	addPeers(t, m)
	for _, name := range []string{"A", "C", "D"} {
		permit(t, m, name, everything)
	}
	small := loadOf(t, m.Helper.PID()).kilobytes
	stop(t, m)
	crowd(t, m, peers)
	began := time.Now()
	start(t, m)
	ready := time.Since(began)
	serveBoth(t, m.I)
	at := netlab.Addresses()
	if _, err := connect(m.C, at.I.V4); err != nil {
		t.Error("among many peers:", err)
	}
	began = time.Now()
	b := status(t, m)
	asked := time.Since(began)
	if b.State != "enforcing" || len(b.Peers) != peers {
		t.Errorf("status has %d peers and the state %s", len(b.Peers), b.State)
	}
	began = time.Now()
	if _, err := m.Do(t.Context(), "peer", "deny", "C", "routing"); err != nil {
		t.Fatal(err)
	}
	revoked := time.Since(began)
	if _, err := connect(m.C, at.I.V4); err == nil {
		t.Error("C still routes")
	}
	if _, err := connect(m.D, at.I.V4); err != nil {
		t.Error("D after C's deny:", err)
	}
	l := loadOf(t, m.Helper.PID())
	t.Logf("ready after %v, status in %v, deny in %v; memory %d MB, with 3 peers %d MB; %d files, %d threads",
		ready, asked, revoked, l.kilobytes>>10, small>>10, l.fds, l.threads)
	// wireguard-go needs 22 kB for a peer (two queues of 1,024 pointers, two goroutines).
	// The rest is documents, rules and the kernel's answers; while a new ruleset is made,
	// the garbage collector lets the heap reach twice its live size.
	if per := (l.kilobytes - small) / peers; per > 128 {
		t.Errorf("%d kB of memory per peer", per)
	}
}

// crowd gives the document of a stopped helper the wanted number of peers: those that it
// has, and copies of the first one with other keys and addresses.
func crowd(t testing.TB, m *Mesh, peers int) {
	t.Helper()
	file := filepath.Join(m.stateDir, "state.json")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	list := doc["peers"].([]any)
	for n := len(list); n < peers; n++ {
		_, public, err := netlab.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		peer := map[string]any{}
		for name, value := range list[0].(map[string]any) {
			peer[name] = value
		}
		peer["name"] = fmt.Sprint("peer", n)
		peer["publicKey"] = public.String()
		peer["addresses"] = []string{
			netip.AddrFrom4([4]byte{100, 127, byte(n >> 8), byte(n)}).String(),
			fmt.Sprintf("fd6d:6573:6800::ffff:%x", n),
		}
		list = append(list, peer)
	}
	doc["peers"] = list
	if text, err = json.Marshal(doc); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkDeny measures `meshhelper peer deny` as run by a user, among many peers:
// guard, document on the disk, packet filter, running flows, and the command's process.
func BenchmarkDeny(b *testing.B) {
	for _, peers := range []int{60, 10_000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			m := newSilentStage(b)
			start(b, m)
			addPeers(b, m)
			permit(b, m, "A", everything)
			stop(b, m)
			crowd(b, m, peers)
			start(b, m)
			for b.Loop() {
				b.StopTimer()
				permit(b, m, "C", everything)
				b.StartTimer()
				do(b, m, "peer", "deny", "C", "routing")
			}
		})
	}
}
