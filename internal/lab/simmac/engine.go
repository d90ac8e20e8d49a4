package simmac

// The connection between pf's evaluator and the simulated kernel.

import (
	"crypto/md5"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// An engine is the simulated pf: pfsim's machine, whose interfaces and clock follow the
// simulated kernel's.
type engine struct {
	kernel *darwintest.Kernel
	random *rand.Rand

	mu      sync.Mutex
	machine *pfsim.PF
	last    time.Time
	busy    int    // how many of the next loads fail
	loaded  string // the main ruleset as it was last loaded
	network *darwin.Network
	changes int // the kernel's count of changes when network was read
}

func newEngine(k *darwintest.Kernel, r *rand.Rand) *engine {
	e := &engine{kernel: k, random: r}
	e.boot()
	return e
}

// boot replaces pf by a new one and loads Apple's rulesets.
func (e *engine) boot() {
	e.mu.Lock()
	e.machine = pfsim.NewPF(pfsim.Options{Rand: e.random})
	e.network = nil
	e.last = time.Now()
	e.mu.Unlock()
	for anchor, text := range map[string]string{"": StockMain, "com.apple": stockApple} {
		if err := e.Load(anchor, text); err != nil {
			panic("stock ruleset of macOS: " + err.Error())
		}
	}
}

// do runs f while no other goroutine uses the machine.
func (e *engine) do(f func(*pfsim.PF)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.update()
	f(e.machine)
}

// update brings interfaces and time up to date.
func (e *engine) update() {
	now := time.Now()
	if d := now.Sub(e.last).Truncate(time.Second); d > 0 {
		e.machine.Advance(d)
		e.last = e.last.Add(d)
	}
	// The count is read first: a change after it is noticed the next time.
	changes := e.kernel.Changes()
	if e.network != nil && changes == e.changes {
		return
	}
	n, err := darwin.Observe(e.kernel)
	if err != nil {
		panic("simulated kernel: " + err.Error())
	}
	e.network, e.changes = n, changes
	e.mirror(n)
}

// mirror gives the machine the kernel's interfaces, without the IPv6 addresses that (if)
// leaves out: temporary, deprecated and tentative ones (pfi_instance_add in xnu
// bsd/net/pf_if.c). The machine leaves out link-local ones itself.
func (e *engine) mirror(n *darwin.Network) {
	for _, i := range n.Interfaces {
		pi := pfconf.Interface{Name: i.Name}
		settled := map[netip.Addr]bool{}
		for _, a := range e.kernel.Addresses6(i.Name) {
			settled[a.Prefix.Addr()] = a.IsSettled() || a.Prefix.Addr().IsLinkLocalUnicast()
		}
		for _, a := range i.Addresses {
			if a.Prefix.Addr().Is4() || settled[a.Prefix.Addr()] {
				pi.Addresses = append(pi.Addresses, a.Prefix)
			}
		}
		e.machine.AddInterface(pi)
	}
	for _, i := range e.machine.Interfaces() {
		if n.Interface(i.Name) == nil {
			e.machine.RemoveInterface(i.Name)
		}
	}
}

// observe returns the network as it is now.
func (e *engine) observe() *darwin.Network {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.update()
	return e.network
}

// SetEnabled implements darwintest.Engine.
func (e *engine) SetEnabled(on bool) {
	e.do(func(m *pfsim.PF) {
		if m.Enabled() == on {
			return
		}
		if on {
			m.Enable()
		} else {
			m.Disable()
		}
	})
}

// Load implements darwintest.Engine.
func (e *engine) Load(anchor, text string) error {
	rules, err := pfconf.Parse(text)
	var syntax *pfconf.SyntaxError
	if errors.As(err, &syntax) {
		return &darwintest.SyntaxError{Line: syntax.Line}
	}
	if err != nil {
		return err
	}
	e.do(func(m *pfsim.PF) {
		e.mirror(e.network) // a load looks at the addresses anew
		switch {
		case e.busy > 0:
			e.busy--
			err = darwin.ErrBusy
		case anchor == "":
			if err = m.LoadMain(rules); err == nil {
				e.loaded = rules.String()
			}
		default:
			err = m.LoadAnchor(anchor, rules)
		}
	})
	return err
}

// Checksum implements darwintest.Engine.
func (e *engine) Checksum() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return fmt.Sprintf("%x", md5.Sum([]byte(e.loaded)))
}

// Flush implements darwintest.Engine.
func (e *engine) Flush(anchor string) (ok bool) {
	e.do(func(m *pfsim.PF) {
		if _, err := m.Snapshot(anchor); err == nil {
			m.FlushAll(anchor)
			ok = true
			if anchor == "" {
				e.loaded = ""
			}
		}
	})
	return ok
}

// Rules implements darwintest.Engine.
func (e *engine) Rules(anchor string) ([]pfsim.CountedRule, bool) {
	return e.counted(anchor, (*pfsim.PF).CountedRules)
}

// NAT implements darwintest.Engine.
func (e *engine) NAT(anchor string) ([]pfsim.CountedRule, bool) {
	return e.counted(anchor, (*pfsim.PF).CountedNat)
}

func (e *engine) counted(anchor string, show func(*pfsim.PF, string) ([]pfsim.CountedRule, error)) (rules []pfsim.CountedRule, ok bool) {
	e.do(func(m *pfsim.PF) {
		var err error
		rules, err = show(m, anchor)
		ok = err == nil
	})
	return rules, ok
}

// Anchors implements darwintest.Engine.
func (e *engine) Anchors(anchor string) (names []string, ok bool) {
	e.do(func(m *pfsim.PF) {
		_, err := m.Snapshot(anchor)
		names, ok = m.Anchors(anchor), err == nil
	})
	return names, ok
}

// Tables implements darwintest.Engine.
func (e *engine) Tables(anchor string) (tables map[string][]string, ok bool) {
	e.do(func(m *pfsim.PF) {
		if _, err := m.Snapshot(anchor); err != nil {
			return
		}
		tables, ok = map[string][]string{}, true
		for _, name := range m.Tables(anchor) {
			t, err := m.Table(anchor, name)
			if err != nil {
				panic("simulated pf: " + err.Error())
			}
			tables[name] = t.Entries()
		}
	})
	return tables, ok
}

// AddToTable implements darwintest.Engine.
func (e *engine) AddToTable(anchor, table string, entries []pfconf.Address) (err error) {
	e.do(func(m *pfsim.PF) { _, err = m.AddToTable(anchor, table, entries) })
	return err
}

// DeleteFromTable implements darwintest.Engine.
func (e *engine) DeleteFromTable(anchor, table string, entries []pfconf.Address) (err error) {
	e.do(func(m *pfsim.PF) { _, err = m.DeleteFromTable(anchor, table, entries) })
	return err
}

// ReplaceTable implements darwintest.Engine.
func (e *engine) ReplaceTable(anchor, table string, entries []pfconf.Address) (err error) {
	e.do(func(m *pfsim.PF) { err = m.ReplaceTable(anchor, table, entries) })
	return err
}

// TestTable implements darwintest.Engine.
func (e *engine) TestTable(anchor, table string, a netip.Addr) (in bool, err error) {
	e.do(func(m *pfsim.PF) { in, err = m.TestTable(anchor, table, a) })
	return in, err
}

// Kill implements darwintest.Engine.
func (e *engine) Kill(src, dst netip.Prefix) (n int) {
	e.do(func(m *pfsim.PF) { n = m.KillStates(src, dst) })
	return n
}

// States implements darwintest.Engine.
func (e *engine) States() (states []pfsim.State) {
	e.do(func(m *pfsim.PF) { states = m.States() })
	return states
}

// Counters implements darwintest.Engine.
func (e *engine) Counters() (totals map[string]uint64) {
	e.do(func(m *pfsim.PF) { totals = m.Counters() })
	return totals
}

// Interfaces implements darwintest.Engine.
func (e *engine) Interfaces() map[string]bool {
	skipped := map[string]bool{"ALL": false}
	e.do(func(m *pfsim.PF) {
		for _, i := range m.Interfaces() {
			skipped[i.Name] = false
		}
		for _, name := range m.Skipped() {
			skipped[name] = true
		}
	})
	return skipped
}

// dump prints everything that is loaded.
func (e *engine) dump() string {
	var b strings.Builder
	e.do(func(m *pfsim.PF) { dumpAnchor(&b, m, "") })
	return b.String()
}

func dumpAnchor(b *strings.Builder, m *pfsim.PF, anchor string) {
	l, err := m.Snapshot(anchor)
	if err != nil {
		return
	}
	lines := append(l.ShowNat(), l.ShowRules()...)
	for _, t := range l.Tables {
		lines = append(lines, t.String())
	}
	if len(lines) > 0 {
		b.WriteString("[" + anchor + "]\n" + strings.Join(lines, "\n") + "\n")
	}
	for _, child := range m.Anchors(anchor) {
		dumpAnchor(b, m, child)
	}
}
