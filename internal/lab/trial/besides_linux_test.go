package trial

// The cost of forwarding and of the helper beside another program's large block list.

import (
	"encoding/base64"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// blockList is the number of addresses in another program's block list.
const blockList = 58_000

// addBlockList loads a table that drops packets from a list of addresses.
func addBlockList(t testing.TB, b *netlab.Host) {
	t.Helper()
	if err := b.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "blocklist"})
		set := &nftables.Set{Table: table, Name: "bad", KeyType: nftables.TypeIPAddr}
		if err := c.AddSet(set, nil); err != nil {
			return err
		}
		accept := nftables.ChainPolicyAccept
		for name, hook := range map[string]*nftables.ChainHook{"in": nftables.ChainHookInput, "through": nftables.ChainHookForward} {
			chain := c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &accept})
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{2}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
				&expr.Lookup{SourceRegister: 1, SetName: set.Name},
				&expr.Verdict{Kind: expr.VerdictDrop},
			}})
		}
		if err := c.Flush(); err != nil {
			return err
		}
		for from := 0; from < blockList; from += 1000 {
			var some []nftables.SetElement
			for i := from; i < from+1000; i++ {
				some = append(some, nftables.SetElement{Key: []byte{45, byte(i >> 16), byte(i >> 8), byte(i)}})
			}
			if err := c.SetAddElements(set, some); err != nil {
				return err
			}
			if err := c.Flush(); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkBesideBlockList measures a revocation, the repair of a deleted table, and the
// idle helper, with 20 peers, without and with another program's block list of 58,000
// addresses. Runs without and with the list alternate; the ratios are meaningful, the
// absolute times depend on the machine.
func BenchmarkBesideBlockList(b *testing.B) {
	m := newMesh(b)
	for i := range 17 { // plus three with a WireGuard end
		key := make([]byte, 32)
		key[0] = byte(i + 9)
		do(b, m, "peer", "add", fmt.Sprintf("p%d", i), "--public-key", base64.StdEncoding.EncodeToString(key))
	}
	permit(b, m, "C", mesh.Routing)
	client := m.client(b)
	for _, with := range []bool{false, true} {
		name := "alone"
		if with {
			name = "beside"
			addBlockList(b, m.B)
		}
		b.Run("deny/"+name, func(b *testing.B) {
			for range b.N {
				b.StopTimer()
				if err := ask(client, "PATCH", "/v1/peers/C", toggle("routing", true), new(any)); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if err := ask(client, "PATCH", "/v1/peers/C", toggle("routing", false), new(any)); err != nil {
					b.Fatal(err)
				}
			}
		})
		permit(b, m, "C", mesh.Routing)
		b.Run("return/"+name, func(b *testing.B) {
			h := &hurt{Mesh: m}
			there := func() bool {
				found := false
				if err := h.nft(func(c *nftables.Conn, t *nftables.Table) error {
					all, err := c.ListTablesOfFamily(t.Family)
					for _, one := range all {
						found = found || one.Name == t.Name
					}
					return err
				}); err != nil {
					b.Fatal(err)
				}
				return found
			}
			for range b.N {
				if err := h.nft(func(c *nftables.Conn, t *nftables.Table) error { c.DelTable(t); return nil }); err != nil {
					b.Fatal(err)
				}
				for deadline := time.Now().Add(generous); !there(); time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						b.Fatal("the table isn't restored")
					}
				}
			}
		})
		b.Run("idle/"+name, func(b *testing.B) {
			const watched = 10 * time.Second
			var ticks int
			for range b.N {
				before := cpuTicks(b, m.Helper.PID())
				time.Sleep(watched)
				ticks += cpuTicks(b, m.Helper.PID()) - before
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(ticks)/userHz/watched.Seconds()/float64(b.N)*100, "%core")
		})
	}
}

// userHz is the unit of times in /proc (USER_HZ, proc_pid_stat(5)), in ticks per second.
const userHz = 100

// cpuTicks returns a process's CPU time in user and kernel mode, in ticks.
func cpuTicks(t testing.TB, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest) // the third field and the ones after it
	sum := 0
	for _, at := range []int{14, 15} {
		n, err := strconv.Atoi(fields[at-3])
		if err != nil {
			t.Fatal(err)
		}
		sum += n
	}
	return sum
}
