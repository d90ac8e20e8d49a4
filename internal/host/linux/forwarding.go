package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"
)

// forwarding switches forwarding on where peers need it, and back to what was found.
//
// IPv4 forwards by the flag of the interface that a packet arrives on (IN_DEV_FORWARD in
// include/linux/inetdevice.h), so only the interfaces that need it are switched on and
// nothing between others starts to be forwarded. The host's global flag
// net.ipv4.ip_forward is never touched: writing it writes the flags of all interfaces,
// and switching it off also resets accept_redirects to 1 (inet_forward_change in
// net/ipv4/devinet.c).
//
// IPv6 has one flag for the whole host, net.ipv6.conf.all.forwarding. Switching it on
// drops the default route of router advertisements, unless accept_ra is 2 there, and adds
// the subnet-router anycast address of each prefix to the host.
type forwarding struct {
	sys sysctls
	// dir is the directory of the journal.
	dir    string
	writer *journalWriter
	boot   string
	j      *journal
	// byIndex returns the current name of an interface; the index survives a rename.
	byIndex func(index int) (name string, ok bool)
	index   func(name string) int
	step    func(string)
}

// need is the required forwarding: of IPv4 packets that arrive on these interfaces, and
// of IPv6 packets.
type need struct {
	ipv4 []string
	ipv6 bool
	// mesh is the mesh interface, which isn't in the journal: its sysctls disappear with
	// it.
	mesh string
}

// meshFlag returns the value for the mesh interface's own flag. It is set explicitly,
// because on a host that forwards the kernel creates interfaces with forwarding on.
func (n need) meshFlag() string {
	if slices.Contains(n.ipv4, n.mesh) {
		return "1"
	}
	return "0"
}

// open reads the journal, which may be a killed helper's.
func (f *forwarding) open() error {
	j, err := readJournal(f.dir, f.boot)
	if err != nil {
		return err
	}
	f.j = j
	return nil
}

// refresh updates the journal after interfaces were renamed or removed. It reports
// whether anything changed.
func (f *forwarding) refresh() (changed bool) {
	before := len(f.j.Changed)
	f.j.Changed = slices.DeleteFunc(f.j.Changed, func(s sysctlChange) bool {
		_, ok := f.byIndex(s.Index)
		return s.Index != 0 && !ok
	})
	changed = len(f.j.Changed) != before
	for i, s := range f.j.Changed {
		if s.Index == 0 {
			continue
		}
		now, _ := f.byIndex(s.Index)
		parts := strings.Split(s.Name, "/")
		f.j.Changed[i].Name = conf(parts[0], now, parts[3])
		changed = changed || f.j.Changed[i].Name != s.Name
	}
	return changed
}

// found4 reports whether the host forwards IPv4 by its global flag. This package never
// writes that flag, so it always tells another program's setting.
func (f *forwarding) found4() bool {
	v, err := f.sys.read("ipv4/ip_forward")
	return err == nil && v != "0"
}

// allForwarding6 is the IPv6 forwarding flag of the host.
const allForwarding6 = "ipv6/conf/all/forwarding"

// found6 reports whether the host forwarded IPv6 before the helper switched it on.
func (f *forwarding) found6() bool {
	if s := f.j.find(allForwarding6); s != nil {
		return s.Found != "0"
	}
	v, err := f.sys.read(allForwarding6)
	return err == nil && v != "0"
}

// apply establishes the required forwarding. It first writes the journal, then sets
// accept_ra, without which the kernel drops the advertised default route as soon as it
// forwards (Documentation/networking/ip-sysctl.rst), and then forwarding.
func (f *forwarding) apply(n need) error {
	f.refresh()
	changes, err := f.changes(n)
	if err != nil {
		return err
	}
	if len(changes) > 0 {
		f.step(StepJournal)
		f.j.Changed = append(f.j.Changed, changes...)
		if err := f.save(); err != nil {
			return err
		}
		f.step(StepJournal)
	}
	for _, key := range []string{"accept_ra", "forwarding"} {
		for _, s := range f.j.Changed {
			if _, k, _ := splitSysctl(s.Name); k == key && f.wanted(n, s.Name) {
				if err := f.set(s); err != nil {
					return err
				}
			}
		}
	}
	if err := f.set(sysctlChange{Name: conf("ipv4", n.mesh, "forwarding"), Set: n.meshFlag()}); err != nil {
		return err
	}
	return f.revert(func(s sysctlChange) bool { return !f.wanted(n, s.Name) })
}

// set ensures a sysctl's value, unless the interface is gone.
func (f *forwarding) set(s sysctlChange) error {
	err := f.ensure(s)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the interface is gone
	}
	return err
}

// ensure writes a sysctl only if its value differs: writing a forwarding flag has side
// effects even if the value stays the same.
func (f *forwarding) ensure(s sysctlChange) error {
	now, err := f.sys.read(s.Name)
	if err != nil || now == s.Set {
		return err
	}
	_, key, _ := splitSysctl(s.Name)
	step := StepForwarding
	if key == "accept_ra" {
		step = StepAcceptRA
	}
	f.step(step)
	err = f.sys.write(s.Name, s.Set)
	f.step(step)
	return err
}

// wanted reports whether a changed sysctl is still needed.
func (f *forwarding) wanted(n need, name string) bool {
	if strings.HasPrefix(name, "ipv6/") {
		return n.ipv6
	}
	iface, _, _ := splitSysctl(name)
	return slices.Contains(n.ipv4, iface)
}

// changes lists the sysctls that have to change and aren't in the journal yet.
func (f *forwarding) changes(n need) ([]sysctlChange, error) {
	var out []sysctlChange
	for _, iface := range n.ipv4 {
		name := conf("ipv4", iface, "forwarding")
		if iface == n.mesh || f.j.find(name) != nil {
			continue
		}
		now, err := f.sys.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if now == "0" {
			out = append(out, sysctlChange{name, f.index(iface), now, "1"})
		}
	}
	if !n.ipv6 || f.found6() {
		return out, nil
	}
	more, err := f.changes6()
	return append(out, more...), err
}

// changes6 lists the forwarding flags of all interfaces, whether they change or not,
// because writing the host's flag writes all of them. Where router advertisements are
// accepted (accept_ra 1), they must be accepted although the host forwards (2).
// Interfaces that appear later are handled by a later call.
func (f *forwarding) changes6() ([]sysctlChange, error) {
	names, err := f.sys.interfaces("ipv6")
	if err != nil {
		return nil, err
	}
	// The host's flag comes last, after everything that it overwrites is recorded.
	slices.SortFunc(names, func(a, b string) int { return hostFlagLast(a) - hostFlagLast(b) })
	open := f.j.find(allForwarding6) != nil
	var out []sysctlChange
	for _, iface := range names {
		for _, want := range [...]struct{ key, to string }{{"accept_ra", "2"}, {"forwarding", "1"}} {
			key, to := want.key, want.to
			name := conf("ipv6", iface, key)
			if f.j.find(name) != nil {
				continue
			}
			now, err := f.sys.read(name)
			if err != nil {
				continue // the interface is gone, or has no IPv6
			}
			if key == "forwarding" && !open || key == "accept_ra" && now == "1" && f.index(iface) != 0 && iface != "lo" {
				out = append(out, sysctlChange{name, f.index(iface), now, to})
			}
		}
	}
	return out, nil
}

// hostFlagLast orders "all" after the interfaces.
func hostFlagLast(iface string) int {
	if iface == "all" {
		return 1
	}
	return 0
}

// save writes the journal and returns once it is on disk.
func (f *forwarding) save() error { return <-f.writer.write(f.j) }

// revertSaveLimit is how long a change that closes waits for the disk.
const revertSaveLimit = 2 * time.Second

// revert restores the changed sysctls that which selects and removes them from the
// journal. It doesn't wait long for the disk: a leftover entry of a restored sysctl does
// no harm, and narrowing must not wait.
func (f *forwarding) revert(which func(sysctlChange) bool) error {
	changed, err := f.restoreMatching(which)
	if !changed {
		return err
	}
	t := time.NewTimer(revertSaveLimit)
	defer t.Stop()
	select {
	case failed := <-f.writer.write(f.j):
		return errors.Join(err, failed)
	case <-t.C:
		return err
	}
}

// restoreMatching restores the changed sysctls that which selects and reports whether the
// journal changed. It keeps what another program has changed in the meantime.
func (f *forwarding) restoreMatching(which func(sysctlChange) bool) (changed bool, err error) {
	refreshed := f.refresh()
	var errs []error
	var kept []sysctlChange
	// The host's IPv6 flag goes first, because it writes the others; then forwarding, and
	// then accept_ra, or the advertised default route would be lost.
	order := slices.Clone(f.j.Changed)
	slices.SortStableFunc(order, func(a, b sysctlChange) int { return restoreRank(a) - restoreRank(b) })
	for _, s := range order {
		if !which(s) {
			kept = append(kept, s)
			continue
		}
		if err := f.restore(s); err != nil {
			kept = append(kept, s)
			errs = append(errs, err)
		}
	}
	if changed = refreshed || len(kept) != len(f.j.Changed); changed {
		f.j.Changed = kept
	}
	return changed, errors.Join(errs...)
}

// restoreRank is the order of restoring.
func restoreRank(s sysctlChange) int {
	iface, key, _ := splitSysctl(s.Name)
	switch {
	case key == "accept_ra":
		return 2
	case iface == "all":
		return 0
	}
	return 1
}

// restore writes the found value, if the sysctl still has the value that was written or
// that the host's flag changed it to.
func (f *forwarding) restore(s sysctlChange) error {
	if strings.HasPrefix(s.Name, "ipv4/") && f.found4() {
		return nil // another program switched the host's forwarding on, which stays
	}
	now, err := f.sys.read(s.Name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && now == s.Found {
		return nil
	}
	if err != nil {
		return err
	}
	_, key, _ := splitSysctl(s.Name)
	if now != s.Set && key == "accept_ra" {
		return nil // another program changed it
	}
	f.step(StepRestore)
	err = f.sys.write(s.Name, s.Found)
	f.step(StepRestore)
	if err != nil {
		return fmt.Errorf("restore %s to %s: %w", s.Name, s.Found, err)
	}
	return nil
}

// drift describes the sysctls that differ from what is required.
func (f *forwarding) drift(n need) []string {
	var out []string
	check := func(name, want string) {
		now, err := f.sys.read(name)
		if err == nil && now != want {
			out = append(out, fmt.Sprintf("%s is %s instead of %s", name, now, want))
		}
	}
	check(conf("ipv4", n.mesh, "forwarding"), n.meshFlag())
	for _, iface := range n.ipv4 {
		if iface != n.mesh {
			check(conf("ipv4", iface, "forwarding"), "1")
		}
	}
	if n.ipv6 {
		check(allForwarding6, "1")
	}
	for _, s := range f.j.Changed {
		if _, key, _ := splitSysctl(s.Name); key == "accept_ra" && n.ipv6 {
			check(s.Name, s.Set)
		}
	}
	return out
}
