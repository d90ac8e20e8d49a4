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

	"github.com/meshhelper/meshhelper/internal/platform"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// deadTime is how long a cut connection stays dead: longer than pf keeps any
// (tcp.established of [timeouts]), and than a host goes on trying.
const deadTime = 24 * time.Hour

// cutName is the file in the state directory with the peers that lost access to this
// host: a helper that starts after a crash knows nothing else of the connections that
// were cut, of which this host goes on sending segments.
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
	Cut  []cutEntry `json:"cut"`
}

type cutEntry struct {
	Address netip.Addr `json:"address"`
	Until   time.Time  `json:"until"`
}

// A cutBook remembers which peers' addresses lost access to this host, here and on
// disk. What is noted holds at once; writing it down is waited for a short time only.
type cutBook struct {
	dir, boot string
	until     map[netip.Addr]time.Time
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
func (c *cutBook) load(dir, boot string, now time.Time) {
	c.dir, c.boot = dir, boot
	c.until, c.inherited = map[netip.Addr]time.Time{}, map[netip.Addr]bool{}
	f, err := readCut(dir)
	if c.problem = err; err != nil || f.Boot != boot {
		return
	}
	for _, e := range f.Cut {
		// The wall clock may have been set back since.
		if until := minTime(e.Until, now.Add(deadTime)); now.Before(until) {
			c.until[e.Address], c.inherited[e.Address] = until, true
		}
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
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &cutFile{}, nil
	}
	if err == nil && info.Size() > maxCutFile {
		err = fmt.Errorf("it has %d bytes: want at most %d", info.Size(), maxCutFile)
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(path)
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
	if len(f.Cut) > maxCut {
		return nil, fmt.Errorf("%d addresses: want at most %d", len(f.Cut), maxCut)
	}
	for _, e := range f.Cut {
		if !e.Address.IsValid() || e.Address.Zone() != "" {
			return nil, fmt.Errorf("%v is no address of a peer", e.Address)
		}
	}
	return &f, nil
}

// forget drops those whose time is up.
func (c *cutBook) forget(now time.Time) {
	maps.DeleteFunc(c.until, func(a netip.Addr, until time.Time) bool {
		if now.Before(until) {
			return false
		}
		delete(c.inherited, a)
		c.unsaved = true
		return true
	})
}

// note adds addresses that lost access now.
func (c *cutBook) note(as []netip.Addr, now time.Time) {
	for _, a := range as {
		c.until[a] = now.Add(deadTime)
		delete(c.inherited, a)
		c.unsaved = true
	}
}

// revive takes out addresses that may open connections again.
func (c *cutBook) revive(as []netip.Addr) {
	for _, a := range as {
		if _, cut := c.until[a]; cut {
			delete(c.until, a)
			delete(c.inherited, a)
			c.unsaved = true
		}
	}
}

// addresses returns those that are to be kept dead, sorted.
func (c *cutBook) addresses() []netip.Addr {
	return slices.SortedFunc(maps.Keys(c.until), netip.Addr.Compare)
}

// save writes down what isn't on disk yet and waits for it, for a time at most: a disk
// that hangs holds up nothing. What couldn't be written is tried again by the next
// call, and is in problem.
func (c *cutBook) save(limit time.Duration) {
	if c.dir == "" || c.saving == nil && !c.unsaved {
		return
	}
	if c.saving == nil {
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
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case err := <-c.saving:
		c.saving, c.problem = nil, err
		c.unsaved = c.unsaved || err != nil
	case <-t.C:
		c.problem = fmt.Errorf("write %s: not done yet", filepath.Join(c.dir, cutName))
	}
}

// encode returns the content of the file, nil for none.
func (c *cutBook) encode() ([]byte, error) {
	if len(c.until) == 0 {
		return nil, nil
	}
	f := cutFile{Version: journalVersion, Boot: c.boot}
	for a, until := range c.until {
		f.Cut = append(f.Cut, cutEntry{a, until.Round(0)})
	}
	slices.SortFunc(f.Cut, func(a, b cutEntry) int {
		return cmp.Or(b.Until.Compare(a.Until), a.Address.Compare(b.Address))
	})
	f.Cut = f.Cut[:min(len(f.Cut), maxCut)]
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
	if err := replaceFile(path, b); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// How long flows that are to end wait for the book, and how long is waited for it
// after that.
const (
	saveBeforeCut = 100 * time.Millisecond
	saveLimit     = time.Second
)

// noteCut notes which peers lost access to this host since the ruleset before, by
// incoming or by its DNS, and forgets those whose time is up and those that may connect
// again: their connections are no longer to be kept dead.
func (p *Platform) noteCut(r *policy.Ruleset) {
	now := p.o.Now()
	p.cuts.forget(now)
	for _, peer := range r.Peers() {
		if peer.Permissions.Has(policy.Incoming) {
			p.cuts.revive(peer.Addresses)
		}
	}
	for _, n := range policy.Diff(p.enforced, r) {
		if n.Lost.Has(policy.Incoming) || n.Lost.Has(policy.Routing) && p.enforced.Mesh().DNS {
			p.cuts.note(n.Addresses, now)
		}
	}
	p.enforced = r
}

// inheritsCut reports whether connections that were cut by an earlier helper have to
// be kept dead, those of peers that still may not connect to this host.
func (p *Platform) inheritsCut(r *policy.Ruleset) bool {
	now := p.o.Now()
	for a := range p.cuts.inherited {
		i, known := r.PeerByAddr(a)
		if known && now.Before(p.cuts.until[a]) && !r.Peers()[i].Permissions.Has(policy.Incoming) {
			return true
		}
	}
	return false
}

// cutProblems says what of the book isn't on disk.
func (p *Platform) cutProblems() []platform.Problem {
	if p.cuts.problem == nil {
		return nil
	}
	return []platform.Problem{{
		Step: StepCut, Message: "which connections were cut isn't on disk: " + p.cuts.problem.Error(),
		Hint: "they are dead; after a crash of the helper this host's own packets may revive them. The state directory has to be writable and not full",
	}}
}
