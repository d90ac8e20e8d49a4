package macos

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

func addresses100(n int) (out []netip.Addr) {
	for i := range n {
		out = append(out, netip.AddrFrom4([4]byte{100, 64 + byte(i>>16), byte(i >> 8), byte(i)}))
	}
	return out
}

func mayConnect(n int) map[netip.Addr]access {
	out := map[netip.Addr]access{}
	for _, a := range addresses100(n) {
		out[a] = access{incoming: true}
	}
	return out
}

// TestCutBookKnowsWhatWasOpen has access end while no helper runs, or after a helper that
// was killed before it cut: the next helper takes the lost access as cut, and not the
// access that remains.
func TestCutBookKnowsWhatWasOpen(t *testing.T) {
	dir, now := t.TempDir(), time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC)
	c := &cutRecord{}
	c.load(dir, "A", now)
	open := mayConnect(3)
	dns := addresses100(4)[3]
	open[dns] = access{services: policy.DNS}
	c.update(open, now, true)
	if c.save(time.Minute); c.problem != nil || len(c.until) != 0 {
		t.Fatalf("the record isn't saved, or has cuts: %+v", c)
	}
	c = &cutRecord{}
	c.load(dir, "A", now.Add(48*time.Hour))
	c.update(mayConnect(2), now.Add(48*time.Hour), true)
	if got := c.addresses(); len(got) != 2 || got[0] != addresses100(3)[2] || got[1] != dns || !c.inherited[dns] {
		t.Errorf("cut: %v, inherited %v", got, c.inherited)
	}
	c.update(mayConnect(3), now.Add(49*time.Hour), false)
	if got := c.addresses(); len(got) != 1 || got[0] != dns {
		t.Errorf("cut after the peer may connect again: %v", got)
	}
}

// TestCutBook checks that cuts are kept for a day and no longer, in a file of bounded
// size, and for helpers of the same boot only.
func TestCutBook(t *testing.T) {
	dir, now := t.TempDir(), time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC)
	fresh := func(boot string, now time.Time) *cutRecord {
		t.Helper()
		c := &cutRecord{}
		c.load(dir, boot, now)
		if c.problem != nil {
			t.Fatal(c.problem)
		}
		return c
	}
	c := fresh("A", now)
	lose := func(c *cutRecord, n int, now time.Time) {
		c.update(mayConnect(n), now, false)
		c.update(nil, now, false)
		c.save(time.Minute)
	}
	lose(c, 3, now)
	lose(c, 1, now.Add(time.Hour))
	if c.problem != nil || c.unsaved {
		t.Fatalf("the record isn't saved: %+v", c)
	}
	if got := fresh("B", now); len(got.until) != 0 {
		t.Errorf("cuts of another boot: %v", got.until)
	}
	got := fresh("A", now.Add(2*time.Hour))
	if len(got.until) != 3 || len(got.inherited) != 3 || got.addresses()[0] != addresses100(1)[0] {
		t.Errorf("read back %v", got.until)
	}
	got = fresh("A", now.Add(cutLifetime))
	if len(got.until) != 1 {
		t.Errorf("cuts after a day: %v", got.until)
	}
	if got = fresh("A", now.Add(-100*time.Hour)); !got.until[addresses100(1)[0]].Equal(now.Add(cutLifetime - 100*time.Hour)) {
		t.Errorf("cuts with the clock set back: %v", got.until)
	}
	got.expire(now.Add(48 * time.Hour))
	got.save(time.Minute)
	if _, err := os.Stat(filepath.Join(dir, cutName)); !os.IsNotExist(err) {
		t.Errorf("nothing is cut, but the file exists: %v", err)
	}
	lose(c, 3*maxCut, now)
	if got := fresh("A", now); len(got.until) != maxCut {
		t.Errorf("%d read back, want %d", len(got.until), maxCut)
	}
	if info, err := os.Stat(filepath.Join(dir, cutName)); err != nil || info.Size() > maxCutFile/2 {
		t.Errorf("the file is too large: %v, %v", info, err)
	}
}

// TestCutBookOddFiles loads files that no helper writes: the helper starts anyway and
// reports the problem.
func TestCutBookOddFiles(t *testing.T) {
	for name, text := range map[string]string{
		"no JSON": "{", "another version": `{"version":9}`, "no address": `{"version":1,"cut":[{"address":""}]}`,
		"a zone": `{"version":1,"cut":[{"address":"fe80::1%en0"}]}`, "too large": strings.Repeat(" ", maxCutFile+1),
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, cutName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c := &cutRecord{}
		if c.load(dir, "A", time.Now()); c.problem == nil || len(c.until) != 0 {
			t.Errorf("%s: the file was used: %+v", name, c)
		}
		c.update(mayConnect(1), time.Now(), false)
		if c.save(time.Minute); c.problem != nil {
			t.Errorf("%s: the next save failed: %v", name, c.problem)
		}
	}
}

// TestCutWaitsForNoDisk has the disk hang and then fail while a peer loses incoming: its
// connections still end within about a second, and the problem is reported until the cut
// is on disk.
func TestCutWaitsForNoDisk(t *testing.T) { synctest.Test(t, testCutWaitsForNoDisk) }

func testCutWaitsForNoDisk(t *testing.T) {
	g := newRig(t)
	g.open()
	old := g.enforce(testMesh(2, everything, everything))
	g.must(g.p.Cut(t.Context(), old, policy.Diff(nil, old)))
	disk := make(chan error)
	g.p.cuts.write = func(string, []byte) error { return <-disk }
	g.arrives(g.p.name, first, "100.64.0.1", simmac.Delivered)
	r := g.enforce(testMesh(2, mesh.Routing, everything))
	began := time.Now()
	g.must(g.p.Cut(t.Context(), r, policy.Diff(old, r)))
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the cut took %v", took)
	}
	segment := syn("100.64.0.1", first)
	segment.SrcPort, segment.DstPort, segment.Flags = 443, 4000, 0x10
	if o := g.mac.Send(segment); o.Fate != simmac.Dropped {
		t.Errorf("the Mac's segment was %v", o.Fate)
	}
	for range 3 {
		if ps := g.inspect(r).Problems; len(ps) != 1 || ps[0].Step != StepCut {
			t.Errorf("problems %v", ps)
		}
	}
	disk <- fmt.Errorf("no space left on device")
	synctest.Wait()
	if ps := g.inspect(r).Problems; len(ps) != 1 || !strings.Contains(ps[0].Message, "no space") {
		t.Errorf("problems %v", ps)
	}
	g.p.cuts.write = writeCut
	if g.inspect(r); g.p.cuts.problem != nil { // the next try
		t.Error(g.p.cuts.problem)
	}
	g.clean(r)
	g.renew()
	g.open()
	if got := g.p.cuts.addresses(); len(got) != 2 {
		t.Errorf("the next helper knows of %v", got)
	}
}

func FuzzParseCut(f *testing.F) {
	f.Add([]byte(`{"version":1,"boot":"A","cut":[{"address":"100.64.0.2","until":"2026-11-26T08:00:00Z"}]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseCut(b)
		if err != nil {
			return
		}
		for _, e := range got.Cut {
			if !e.Address.IsValid() {
				t.Errorf("%v", e)
			}
		}
	})
}
