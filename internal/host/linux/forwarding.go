package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"
)

// forwarding switches forwarding on where peers need it and back to what was
// found. IPv4 forwards by the interface that a packet comes in on, so only the
// interfaces that need it are opened and the host's global flag is never
// touched. IPv6 has one flag for the host.
type forwarding struct {
	sys    sysctls
	dir    string // of the journal
	writer *journalWriter
	boot   string
	j      *journal
	// byIndex names an interface by its index, which survives a renaming.
	byIndex func(index int) (name string, ok bool)
	index   func(name string) int
	step    func(string)
}

// need says what is to be forwarded: IPv4 packets that come in by these
// interfaces, and IPv6 ones.
type need struct {
	ipv4 []string
	ipv6 bool
	// mesh is left out of the journal: it goes away with its settings.
	mesh string
}

// meshFlag is the mesh interface's own flag, which is ours alone: it may have
// been made with forwarding on, where the host forwards.
func (n need) meshFlag() string {
	if slices.Contains(n.ipv4, n.mesh) {
		return "1"
	}
	return "0"
}

// open reads the journal, which may be that of a helper that was killed.
func (f *forwarding) open() error {
	j, err := readJournal(f.dir, f.boot)
	if err != nil {
		return err
	}
	f.j = j
	return nil
}

// refresh brings the journal's names up to date: interfaces are renamed, and go
// away with their settings. It reports whether something has changed.
func (f *forwarding) refresh() (moved bool) {
	before := len(f.j.Changed)
	f.j.Changed = slices.DeleteFunc(f.j.Changed, func(s sysctlChange) bool {
		_, ok := f.byIndex(s.Index)
		return s.Index != 0 && !ok
	})
	moved = len(f.j.Changed) != before
	for i, s := range f.j.Changed {
		if s.Index == 0 {
			continue
		}
		now, _ := f.byIndex(s.Index)
		parts := strings.Split(s.Name, "/")
		f.j.Changed[i].Name = conf(parts[0], now, parts[3])
		moved = moved || f.j.Changed[i].Name != s.Name
	}
	return moved
}

// found4 reports whether the host forwards IPv4 by itself. This package never
// writes the global flag, so that what it says is always another program's.
func (f *forwarding) found4() bool {
	v, err := f.sys.read("ipv4/ip_forward")
	return err == nil && v != "0"
}

// allForwarding6 is the flag of the host for IPv6.
const allForwarding6 = "ipv6/conf/all/forwarding"

// found6 reports whether the host forwarded IPv6 before we did.
func (f *forwarding) found6() bool {
	if s := f.j.find(allForwarding6); s != nil {
		return s.Found != "0"
	}
	v, err := f.sys.read(allForwarding6)
	return err == nil && v != "0"
}

// apply makes forwarding be as needed. First what is to be changed goes to disk;
// then accept_ra, without which the kernel forgets the advertised default route
// the moment it forwards; then forwarding.
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

func (f *forwarding) set(s sysctlChange) error {
	err := f.ensure(s)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the interface is gone
	}
	return err
}

// ensure writes a sysctl unless it is so: writing a forwarding flag has effects
// even where the value stays the same.
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

// wanted reports whether a changed sysctl still has to be as we set it.
func (f *forwarding) wanted(n need, name string) bool {
	if strings.HasPrefix(name, "ipv6/") {
		return n.ipv6
	}
	iface, _, _ := splitSysctl(name)
	return slices.Contains(n.ipv4, iface)
}

// changes lists what has to be changed and isn't in the journal yet.
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

// changes6 lists every interface's forwarding flag, changed or not, because the
// flag of the host writes them all, to and fro. Where router advertisements are believed (1), they have to be
// believed although the host forwards (2); interfaces that come later are seen
// to when they come.
func (f *forwarding) changes6() ([]sysctlChange, error) {
	names, err := f.sys.interfaces("ipv6")
	if err != nil {
		return nil, err
	}
	// The host's flag comes last, when all that it writes is known.
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
				continue // gone, or without IPv6
			}
			if key == "forwarding" && !open || key == "accept_ra" && now == "1" && f.index(iface) != 0 && iface != "lo" {
				out = append(out, sysctlChange{name, f.index(iface), now, to})
			}
		}
	}
	return out, nil
}

func hostFlagLast(iface string) int {
	if iface == "all" {
		return 1
	}
	return 0
}

// save writes the journal and returns when it is on disk.
func (f *forwarding) save() error { return <-f.writer.write(f.j) }

// forgetLimit is how long a change that closes waits for the disk.
const revertSaveLimit = 2 * time.Second

// giveBack restores the changed sysctls that which picks and forgets them. The disk
// may take its time: an entry of what has been restored does no harm, so that what
// narrows doesn't wait for it.
func (f *forwarding) revert(which func(sysctlChange) bool) error {
	moved, err := f.restoreMatching(which)
	if !moved {
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

// restoreThose restores the changed sysctls that which picks, last change first, and
// reports whether the journal has changed. What another program has changed
// meanwhile stays as it is.
func (f *forwarding) restoreMatching(which func(sysctlChange) bool) (changed bool, err error) {
	moved := f.refresh()
	var errs []error
	var kept []sysctlChange
	// The host's IPv6 flag goes first: it writes the others. Then forwarding,
	// then accept_ra, or the advertised route would be lost.
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
	if changed = moved || len(kept) != len(f.j.Changed); changed {
		f.j.Changed = kept
	}
	return changed, errors.Join(errs...)
}

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

// restore writes what was found, where what we wrote, or what the host's flag
// made of it, is still there.
func (f *forwarding) restore(s sysctlChange) error {
	if strings.HasPrefix(s.Name, "ipv4/") && f.found4() {
		return nil // another program switched the whole host on: it stays so
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
		return nil // another program's choice
	}
	f.step(StepRestore)
	err = f.sys.write(s.Name, s.Found)
	f.step(StepRestore)
	if err != nil {
		return fmt.Errorf("restore %s to %s: %w", s.Name, s.Found, err)
	}
	return nil
}

// drift names what isn't as needed.
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
