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

// cutLifetime is how long a cut connection is kept from reviving: longer than pf keeps
// any state (tcp.established of [timeouts]) and than TCP retransmits.
const cutLifetime = 24 * time.Hour

// cutName is the file in the state directory that lists the peers with access to this
// host and those that lost it. Without it, a helper that starts after a crash couldn't
// know which connections were cut, or have to be, while this host goes on sending
// segments of them.
const cutName = "macos-cut.json"

// maxCut is how many addresses are kept: two for each of 10,000 peers. Beyond that,
// those that expire first are dropped.
const maxCut = 20_000

// maxCutFile is the size in bytes up to which the file is read.
const maxCutFile = 4 << 20

// cutFile is the content of the file.
type cutFile struct {
	Version int `json:"version"` // journalVersion
	// Boot is kern.bootsessionuuid: no connection of this host outlives a boot.
	Boot string     `json:"boot"`
	Cut  []cutEntry `json:"cut,omitempty"`
	// Incoming lists the addresses that could open connections to any port of this host
	// under the last ruleset, and Services those that could to a service, by its name.
	Incoming []netip.Addr            `json:"incoming,omitempty"`
	Services map[string][]netip.Addr `json:"services,omitempty"`
}

// access is what a peer's address may open to this host.
type access struct {
	incoming bool
	services policy.Services
}

// without reports whether a has something that b hasn't.
func (a access) without(b access) bool {
	return a.incoming && !b.incoming || a.services&^b.services != 0
}

// A cutEntry is an address that lost access, and when it may be forgotten.
type cutEntry struct {
	Address netip.Addr `json:"address"`
	Until   time.Time  `json:"until"`
}

// A cutRecord records which peers' addresses lost access to this host, in memory and
// on disk. It takes effect from memory at once; the disk may be slow or hang.
type cutRecord struct {
	dir, boot string
	// until has the addresses that lost access, and when each expires.
	until map[netip.Addr]time.Time
	// granted is what addresses could open under the last ruleset, this helper's or an
	// earlier one's.
	granted map[netip.Addr]access
	// inherited marks the addresses of until that an earlier helper recorded. This
	// helper's guard doesn't know their cut connections, so only pf can drop them.
	inherited map[netip.Addr]bool
	// unsaved means that the file is older than until and granted. problem is why the
	// last read or write failed.
	unsaved bool
	problem error
	// saving receives the result of the write in progress; nil if there is none.
	saving chan error
	// write replaces the file; nil is writeCut, and tests let it hang or fail.
	write func(dir string, b []byte) error
}

// load reads what an earlier helper of this boot recorded. A file that can't be read
// is left in place, and reported by cutProblems.
func (c *cutRecord) load(dir, boot string, now time.Time) {
	c.dir, c.boot = dir, boot
	c.until, c.granted, c.inherited = map[netip.Addr]time.Time{}, map[netip.Addr]access{}, map[netip.Addr]bool{}
	f, err := readCut(dir)
	if c.problem = err; err != nil || f.Boot != boot {
		return
	}
	for _, e := range f.Cut {
		// Not beyond cutLifetime from now: the wall clock may have been set back.
		if until := minTime(e.Until, now.Add(cutLifetime)); now.Before(until) {
			c.until[e.Address], c.inherited[e.Address] = until, true
		}
	}
	for _, a := range f.Incoming {
		c.granted[a] = access{incoming: true}
	}
	for _, s := range policy.AllServices {
		for _, a := range f.Services[s.Name] {
			had := c.granted[a]
			had.services |= s.Set
			c.granted[a] = had
		}
	}
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// readCut returns the file's content, an empty one if there is no file.
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

// parseCut decodes and validates the file's content.
func parseCut(b []byte) (*cutFile, error) {
	var f cutFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, err
	}
	if f.Version != journalVersion {
		return nil, fmt.Errorf("version %d is unknown: want %d", f.Version, journalVersion)
	}
	all, most := slices.Clone(f.Incoming), max(len(f.Cut), len(f.Incoming))
	for _, addresses := range f.Services {
		all, most = append(all, addresses...), max(most, len(addresses))
	}
	for _, e := range f.Cut {
		all = append(all, e.Address)
	}
	if most > maxCut {
		return nil, fmt.Errorf("%d addresses: want at most %d", most, maxCut)
	}
	for _, a := range all {
		if !a.IsValid() || a.Zone() != "" {
			return nil, fmt.Errorf("%v is no address of a peer", a)
		}
	}
	return &f, nil
}

// expire drops the addresses whose time is up.
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

// update replaces granted. Addresses that lost some access are added to until,
// and are marked inherited if the former granted is an earlier helper's. Addresses that
// may connect to this host again are removed.
func (c *cutRecord) update(granted map[netip.Addr]access, now time.Time, inherited bool) {
	for a, had := range c.granted {
		if had.without(granted[a]) {
			c.until[a] = now.Add(cutLifetime)
			if delete(c.inherited, a); inherited {
				c.inherited[a] = true
			}
		}
	}
	for a, may := range granted {
		if may.incoming {
			delete(c.until, a)
			delete(c.inherited, a)
		}
	}
	c.unsaved = c.unsaved || !maps.Equal(c.granted, granted)
	c.granted = granted
	if surplus := len(c.until) - maxCut; surplus > 0 {
		for _, a := range slices.SortedFunc(maps.Keys(c.until), func(a, b netip.Addr) int {
			return cmp.Or(c.until[a].Compare(c.until[b]), a.Compare(b))
		})[:surplus] {
			delete(c.until, a)
			delete(c.inherited, a)
		}
	}
}

// addresses returns [AnchorOptions.Cut], sorted.
func (c *cutRecord) addresses() []netip.Addr {
	return slices.SortedFunc(maps.Keys(c.until), netip.Addr.Compare)
}

// startSave starts to write what isn't on disk yet, unless a write is in progress.
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

// save writes what isn't on disk yet and waits up to limit, because the disk may hang.
// An error goes to problem, and the next call tries again.
func (c *cutRecord) save(limit time.Duration) {
	t := time.NewTimer(limit)
	defer t.Stop()
	// The first round may wait for the write of an older content.
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

// encode returns the content of the file, or nil if there should be no file.
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
		if c.granted[a].incoming && len(f.Incoming) < maxCut {
			f.Incoming = append(f.Incoming, a)
		}
		for _, s := range c.granted[a].services.List() {
			if f.Services == nil {
				f.Services = map[string][]netip.Addr{}
			}
			if len(f.Services[s.Name]) < maxCut {
				f.Services[s.Name] = append(f.Services[s.Name], a)
			}
		}
	}
	b, err := json.Marshal(f)
	return append(b, '\n'), err
}

// writeCut replaces the file; it removes it if b is nil.
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

const (
	// saveBeforeCut is how long Cut waits for the file before it kills states: short,
	// as each millisecond delays a narrowing.
	saveBeforeCut = 100 * time.Millisecond
	// saveLimit is how long Cut, Inspect and Close wait for the file afterwards.
	saveLimit = time.Second
)

// recordCuts records which peers lost access to this host since the last ruleset, by
// incoming or to a service. For the first ruleset of this helper, the last one is an
// earlier helper's: that covers permissions that ended while no helper ran, or that
// were revoked on disk when the helper was killed before enforcing them.
func (b *Backend) recordCuts(r *policy.Ruleset) {
	now, granted := b.o.Now(), map[netip.Addr]access{}
	b.cuts.expire(now)
	for _, peer := range r.Peers() {
		may := access{incoming: peer.Permissions.Has(mesh.Incoming)}
		for _, s := range r.Mesh().Serves.List() {
			if peer.Permissions.Has(s.Needs) {
				may.services |= s.Set
			}
		}
		for _, a := range peer.Addresses {
			if may != (access{}) {
				granted[a] = may
			}
		}
	}
	b.cuts.update(granted, now, b.enforced == nil)
	b.cuts.startSave()
	b.enforced = r
}

// hasInheritedCuts reports whether pf is needed to keep connections from reviving that
// an earlier helper cut: those of peers that still may not connect to this host.
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

// cutProblems reports that the file couldn't be read or written.
func (b *Backend) cutProblems() []host.Problem {
	if b.cuts.problem == nil {
		return nil
	}
	return []host.Problem{{
		Step: StepCut, Message: "the list of cut connections isn't on disk: " + b.cuts.problem.Error(),
		Hint: "they are cut, but after a crash of the helper this host's own packets may revive them; the state directory must be writable and not full",
	}}
}
