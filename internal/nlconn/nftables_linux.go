package nlconn

import (
	"io"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// Nftables lists the objects of nftables. google/nftables encodes the requests and parses
// the answers, and a Conn makes sure that they are complete.
type Nftables struct {
	library *nftables.Conn
	failed  error // Conn's error of the last request, with its errno
}

// Nftables returns an Nftables that uses c, a Conn of the family unix.NETLINK_NETFILTER.
func (c *Conn) Nftables() (*Nftables, error) {
	n := &Nftables{}
	var err error
	n.library, err = nftables.New(nftables.WithTestDial(func(requests []netlink.Message) ([]netlink.Message, error) {
		m := requests[0] // each method below sends one
		of := m.Header
		m.Header.Sequence, m.Header.PID = 0, 0 // c gives its own
		ms, err := c.Execute(m)
		if err != nil {
			n.failed = err
			return nil, err
		}
		for i := range ms {
			ms[i].Header.Sequence, ms[i].Header.PID = of.Sequence, of.PID
			ms[i].Header.Flags &^= netlink.Multi // nothing follows
		}
		if len(ms) == 0 {
			return nil, io.EOF // the library's test dialer signals an empty list so
		}
		return ms, nil
	}))
	return n, err
}

// list calls do and returns the Conn's error if it has one: the library's error keeps only
// its text.
func list[T any](n *Nftables, do func() (T, error)) (T, error) {
	n.failed = nil
	got, err := do()
	if err != nil && n.failed != nil {
		err = n.failed
	}
	return got, err
}

// ListTables returns the tables of a family, or of all for
// nftables.TableFamilyUnspecified.
func (n *Nftables) ListTables(family nftables.TableFamily) ([]*nftables.Table, error) {
	return list(n, func() ([]*nftables.Table, error) { return n.library.ListTablesOfFamily(family) })
}

// ListChains returns the chains of all tables of a family, or of all for
// nftables.TableFamilyUnspecified.
func (n *Nftables) ListChains(family nftables.TableFamily) ([]*nftables.Chain, error) {
	return list(n, func() ([]*nftables.Chain, error) { return n.library.ListChainsOfTableFamily(family) })
}

// ListFlowtables returns the flow tables of a table.
func (n *Nftables) ListFlowtables(t *nftables.Table) ([]*nftables.Flowtable, error) {
	return list(n, func() ([]*nftables.Flowtable, error) { return n.library.ListFlowtables(t) })
}

// GetSetElements returns the elements of a set. If the set doesn't exist, the error wraps
// os.ErrNotExist.
func (n *Nftables) GetSetElements(s *nftables.Set) ([]nftables.SetElement, error) {
	return list(n, func() ([]nftables.SetElement, error) { return n.library.GetSetElements(s) })
}
