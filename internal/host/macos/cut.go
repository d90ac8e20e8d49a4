package macos

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// deadTime is how long a cut connection stays dead: longer than pf keeps any
// (tcp.established of [timeouts]), and than a host goes on trying.
const cutLifetime = 24 * time.Hour

// cutName is the file in the state directory with the peers that have access to this
// host, and those that lost it: a helper that starts after a crash, or later, knows
// nothing else of the connections that were cut or have to be, of which this host goes
// on sending segments.
const cutName = "macos-cut.json"

// maxCut bounds how many addresses are kept: two for each of 10,000 peers. Of more,
// those that end first are left out.
const maxCut = 20_000

// maxCutFile bounds what is read back, in bytes.
const maxCutFile = 4 << 20

// cutFile is what is on disk.
type cutFile struct {
	Version int `json:"version"`
	// Boot is kern.bootsessionuuid: no connection of this host outlives a boot.
	Boot string     `json:"boot"`
	Cut  []cutEntry `json:"cut,omitempty"`
	// Incoming and DNS are those that could open connections, to this host or to its
	// DNS.
	Incoming []netip.Addr `json:"incoming,omitempty"`
	DNS      []netip.Addr `json:"dns,omitempty"`
}

// access is what a peer's address may open to this host.
type access uint8

const (
	accessIncoming access = 1 << iota
	accessDNS
)

type cutEntry struct {
	Address netip.Addr `json:"address"`
	Until   time.Time  `json:"until"`
}

// A cutBook remembers which peers' addresses lost access to this host, here and on
// disk. What is noted holds at once; writing it down is waited for a short time only.
type cutRecord struct {
	dir, boot string
	until     map[netip.Addr]time.Time
	// open is what the addresses could open under the last ruleset, this helper's or
	// an earlier one's.
	granted map[netip.Addr]access
	// inherited are those that an earlier helper wrote down, so that this one's guard
	// doesn't know which connections were cut.
	inherited map[netip.Addr]bool
	// unsaved says that the disk has less than until; problem is why.
	unsaved bool
	problem error
	// saving gives the outcome of the write that is under way; nil: there is none.
	saving chan error
	// write replaces the file; tests have it hang or fail.
	write func(dir string, b []byte) error
}

// load takes over what an earlier helper of this boot wrote down. What can't be read
// is left alone, and said.
func (c *cutRecord) load(dir, boot string, now time.Time) {
	c.dir, c.boot = dir, boot
	c.until, c.granted, c.inherited = map[netip.Addr]time.Time{}, map[netip.Addr]access{}, map[netip.Addr]bool{}
	f, err := readCut(dir)
	if c.problem = err; err != nil || f.Boot != boot {
		return
	}
	for _, e := range f.Cut {
		// The wall clock may have been set back since.
		if until := minTime(e.Until, now.Add(cutLifetime)); now.Before(until) {
			c.until[e.Address], c.inherited[e.Address] = until, true
		}
	}
	for _, a := range f.Incoming {
		c.granted[a] |= accessIncoming
	}
	for _, a := range f.DNS {
		c.granted[a] |= accessDNS
	}
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// readCut returns what is on disk, nothing if there is no file.
func readCut(dir string) (*cutFile, error) {
	path := filepath.Join(dir, cutName)
	b, err := owned.Read(path, maxCutFile)
	if errors.Is(err, fs.ErrNotExist) {
		return &cutFile{}, nil
	}
	var f *cutFile
	if err == nil {
		f, err = parseCut(b)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return f, nil
}

// parseCut reads the content of the file.
func parseCut(b []byte) (*cutFile, error) {
	var f cutFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, err
	}
	if f.Version != journalVersion {
		return nil, fmt.Errorf("version %d is unknown: want %d", f.Version, journalVersion)
	}
	all := slices.Concat(f.Incoming, f.DNS)
	for _, e := range f.Cut {
		all = append(all, e.Address)
	}
	if n := max(len(f.Cut), len(f.Incoming), len(f.DNS)); n > maxCut {
		return nil, fmt.Errorf("%d addresses: want at most %d", n, maxCut)
	}
	for _, a := range all {
		if !a.IsValid() || a.Zone() != "" {
			return nil, fmt.Errorf("%v is no address of a peer", a)
		}
	}
	return &f, nil
}

// forget drops those whose time is up.
func (c *cutRecord) expire(now time.Time) {
	maps.DeleteFunc(c.until, func(a netip.Addr, until time.Time) bool {
		if now.Before(until) {
			return false
		}
		delete(c.inherited, a)
		c.unsaved = true
		return true
	})
}

// take makes open what addresses may open now. Those that lost something are to be
// kept dead, with earlier also for this helper's guard; those that may connect to this
// host are no longer.
func (c *cutRecord) update(open map[netip.Addr]access, now time.Time, earlier bool) {
	for a, had := range c.granted {
		if had&^open[a] != 0 {
			c.until[a] = now.Add(cutLifetime)
			if delete(c.inherited, a); earlier {
				c.inherited[a] = true
			}
		}
	}
	for a, may := range open {
		if may&accessIncoming != 0 {
			delete(c.until, a)
			delete(c.inherited, a)
		}
	}
	c.unsaved = c.unsaved || !maps.Equal(c.granted, open)
	c.granted = open
	if surplus := len(c.until) - maxCut; surplus > 0 {
		for _, a := range slices.SortedFunc(maps.Keys(c.until), func(a, b netip.Addr) int {
			return cmp.Or(c.until[a].Compare(c.until[b]), a.Compare(b))
		})[:surplus] {
			delete(c.until, a)
			delete(c.inherited, a)
		}
	}
}

// addresses returns those that are to be kept dead, sorted.
func (c *cutRecord) addresses() []netip.Addr {
	return slices.SortedFunc(maps.Keys(c.until), netip.Addr.Compare)
}

// begin starts to write down what isn't on disk yet, and doesn't wait.
func (c *cutRecord) startSave() {
	if c.dir == "" || c.saving != nil || !c.unsaved {
		return
	}
	b, err := c.encode()
	if err != nil {
		c.problem = err
		return
	}
	write, dir, done := c.write, c.dir, make(chan error, 1)
	if write == nil {
		write = writeCut
	}
	c.saving, c.unsaved = done, false
	go func() { done <- write(dir, b) }()
}

// save writes it down and waits for that, for a time at most: a disk that hangs holds
// up nothing. What couldn't be written is tried again by the next call, and is in
// problem.
func (c *cutRecord) save(limit time.Duration) {
	t := time.NewTimer(limit)
	defer t.Stop()
	// Twice, where an older content was being written.
	for range 2 {
		if c.startSave(); c.saving == nil {
			return
		}
		select {
		case err := <-c.saving:
			if c.saving, c.problem = nil, err; err != nil {
				c.unsaved = true
				return
			}
		case <-t.C:
			c.problem = fmt.Errorf("write %s: not done yet", filepath.Join(c.dir, cutName))
			return
		}
	}
}

// encode returns the content of the file, nil for none.
func (c *cutRecord) encode() ([]byte, error) {
	if len(c.until)+len(c.granted) == 0 {
		return nil, nil
	}
	f := cutFile{Version: journalVersion, Boot: c.boot}
	for a, until := range c.until {
		f.Cut = append(f.Cut, cutEntry{a, until.Round(0)})
	}
	slices.SortFunc(f.Cut, func(a, b cutEntry) int {
		return cmp.Or(b.Until.Compare(a.Until), a.Address.Compare(b.Address))
	})
	for _, a := range slices.SortedFunc(maps.Keys(c.granted), netip.Addr.Compare) {
		if c.granted[a]&accessIncoming != 0 {
			f.Incoming = append(f.Incoming, a)
		}
		if c.granted[a]&accessDNS != 0 {
			f.DNS = append(f.DNS, a)
		}
	}
	f.Incoming, f.DNS = f.Incoming[:min(len(f.Incoming), maxCut)], f.DNS[:min(len(f.DNS), maxCut)]
	b, err := json.Marshal(f)
	return append(b, '\n'), err
}

// writeCut replaces the file, or removes it.
func writeCut(dir string, b []byte) error {
	path := filepath.Join(dir, cutName)
	if b == nil {
		err := os.Remove(path)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if err := owned.Replace(path, b); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// How long flows that are to end wait for the book, and how long is waited for it
// after that and at the end.
const (
	saveBeforeCut = 100 * time.Millisecond
	saveLimit     = time.Second
)

// noteCut notes which peers lost access to this host since the ruleset before, by
// incoming or by its DNS. Before the first ruleset of this helper that is one of an
// earlier helper's time: what ended while there was none, or between its saving and its
// being enforced, is cut now. It forgets those whose time is up.
func (b *Backend) recordCuts(r *policy.Ruleset) {
	now, open := b.o.Now(), map[netip.Addr]access{}
	b.cuts.expire(now)
	for _, peer := range r.Peers() {
		var may access
		if peer.Permissions.Has(mesh.Incoming) {
			may |= accessIncoming
		}
		if peer.Permissions.Has(mesh.Routing) && r.Mesh().DNS {
			may |= accessDNS
		}
		for _, a := range peer.Addresses {
			if may != 0 {
				open[a] = may
			}
		}
	}
	b.cuts.update(open, now, b.enforced == nil)
	b.cuts.startSave()
	b.enforced = r
}

// inheritsCut reports whether connections that were cut by an earlier helper have to
// be kept dead, those of peers that still may not connect to this host.
func (b *Backend) hasInheritedCuts(r *policy.Ruleset) bool {
	now := b.o.Now()
	for a := range b.cuts.inherited {
		i, known := r.PeerByAddr(a)
		if known && now.Before(b.cuts.until[a]) && !r.Peers()[i].Permissions.Has(mesh.Incoming) {
			return true
		}
	}
	return false
}

// cutProblems says what of the book isn't on disk.
func (b *Backend) cutProblems() []host.Problem {
	if b.cuts.problem == nil {
		return nil
	}
	return []host.Problem{{
		Step: StepCut, Message: "which connections were cut isn't on disk: " + b.cuts.problem.Error(),
		Hint: "they are dead; after a crash of the helper this host's own packets may revive them. The state directory has to be writable and not full",
	}}
}
