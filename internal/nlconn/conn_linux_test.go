package nlconn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	library "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespace runs the rest of the test in a network namespace of its own, on a thread
// that ends with the test.
func inNamespace(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root makes network namespaces")
	}
	runtime.LockOSThread() // and never unlocked
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("network namespaces: %v", err)
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// message encodes a message as the kernel sends it.
func message(kind, flags uint16, sequence uint32, data ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, sequence)
	return append(binary.NativeEndian.AppendUint32(b, 1234), data...)
}

// TestAnswer parses dumps part by part.
func TestAnswer(t *testing.T) {
	const entry, changed = unix.RTM_NEWROUTE, unix.NLM_F_DUMP_INTR
	errno := func(e unix.Errno) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e))) }
	done := message(unix.NLMSG_DONE, unix.NLM_F_MULTI, 7, 0, 0, 0, 0)
	for name, c := range map[string]struct {
		parts   [][]byte
		entries int
		done    bool
		err     error
	}{
		"whole":                          {[][]byte{message(entry, unix.NLM_F_MULTI, 7, 1, 2, 3, 4), message(entry, unix.NLM_F_MULTI, 7), done}, 2, true, nil},
		"empty":                          {[][]byte{done}, 0, true, nil},
		"an end without an error number": {[][]byte{message(unix.NLMSG_DONE, unix.NLM_F_MULTI, 7)}, 0, true, nil},
		"in one part":                    {[][]byte{slices.Concat(message(entry, unix.NLM_F_MULTI, 7), message(entry, unix.NLM_F_MULTI, 7), done)}, 2, true, nil},
		"without an end":                 {[][]byte{message(entry, unix.NLM_F_MULTI, 7)}, 1, false, nil},
		"interrupted":                    {[][]byte{message(entry, unix.NLM_F_MULTI, 7), message(entry, unix.NLM_F_MULTI|changed, 7), done}, 2, true, ErrInterrupted},
		"interrupted at the end alone":   {[][]byte{message(entry, unix.NLM_F_MULTI, 7), message(unix.NLMSG_DONE, unix.NLM_F_MULTI|changed, 7, 0, 0, 0, 0)}, 1, true, ErrInterrupted},
		"interrupted and empty":          {[][]byte{message(unix.NLMSG_DONE, unix.NLM_F_MULTI|changed, 7)}, 0, true, ErrInterrupted},
		"refused":                        {[][]byte{message(unix.NLMSG_ERROR, 0, 7, errno(unix.EPERM)...)}, 0, true, unix.EPERM},
		"failed at its end":              {[][]byte{message(entry, unix.NLM_F_MULTI, 7), message(unix.NLMSG_DONE, unix.NLM_F_MULTI, 7, errno(unix.ENOMEM)...)}, 1, true, unix.ENOMEM},
		"behind an earlier answer":       {[][]byte{message(entry, changed, 6), message(unix.NLMSG_DONE, 0, 6), message(entry, unix.NLM_F_MULTI, 7), done}, 1, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			entries := 0
			a := answer{sequence: 7, do: func(netlink.Header, []byte) { entries++ }}
			for _, p := range c.parts {
				must(t, a.read(p))
			}
			if entries != c.entries || a.done != c.done || !errors.Is(a.err(), c.err) || (a.err() == nil) != (c.err == nil) {
				t.Errorf("%d entries, done %v, error %v", entries, a.done, a.err())
			}
		})
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(message(unix.RTM_NEWROUTE, unix.NLM_F_MULTI, 7, 1, 2, 3, 4))
	f.Add(message(unix.NLMSG_DONE, unix.NLM_F_MULTI|unix.NLM_F_DUMP_INTR, 7, 0, 0, 0, 0))
	f.Add([]byte{255, 255, 255, 255, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		bytes := 0
		a := answer{sequence: 7, do: func(_ netlink.Header, data []byte) { bytes += unix.SizeofNlMsghdr + len(data) }}
		if _ = a.read(b); bytes > len(b) {
			t.Errorf("%d bytes gave entries of %d", len(b), bytes)
		}
	})
}

// TestWhole retries until a dump is complete, but not for ever.
func TestWhole(t *testing.T) {
	for name, c := range map[string]struct {
		errs  []error // of the dumps; the last one repeats
		looks int
		err   error
	}{
		"at once":              {[]error{nil}, 1, nil},
		"interrupted twice":    {[]error{ErrInterrupted, fmt.Errorf("list: %w", ErrInterrupted), nil}, 3, nil},
		"broken off":           {[]error{os.NewSyscallError("netlink", unix.EINTR), nil}, 2, nil},
		"refused":              {[]error{unix.EPERM, nil}, 1, unix.EPERM},
		"refused after a time": {[]error{ErrInterrupted, unix.EPERM, nil}, 2, unix.EPERM},
		"always interrupted":   {[]error{ErrInterrupted}, tries, ErrInterrupted},
	} {
		t.Run(name, func(t *testing.T) {
			looks := 0
			got, err := whole(func() (int, error) {
				looks++
				return looks, c.errs[min(looks, len(c.errs))-1]
			})
			if looks != c.looks || got != looks || !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Errorf("%d looks, got %d, %v", looks, got, err)
			}
		})
	}
}

// TestListsWhileTheyChange adds and removes addresses and rules until the library's own
// dumps were interrupted. None of ours is, and each has all the entries that stay.
func TestListsWhileTheyChange(t *testing.T) {
	inNamespace(t)
	const stay = 2000 // in several parts
	h, err := NewHandle(unix.NETLINK_ROUTE)
	must(t, err)
	defer h.Close()
	c, err := Dial(unix.NETLINK_ROUTE)
	must(t, err)
	defer c.Close()
	lo, err := h.LinkByName("lo")
	must(t, err, h.LinkSetUp(lo))
	address := func(i int) *library.Addr {
		return &library.Addr{IPNet: &net.IPNet{IP: net.IPv4(127, 1, byte(i>>8), byte(i)), Mask: net.CIDRMask(32, 32)}}
	}
	for i := range stay {
		must(t, h.AddrAdd(lo, address(i)))
	}
	other, err := NewHandle(unix.NETLINK_ROUTE) // in this namespace, whatever thread uses it
	must(t, err)
	defer other.Close()
	quit, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-quit:
				ended <- nil
				return
			default:
			}
			if err := errors.Join(other.AddrAdd(lo, address(stay)), other.AddrDel(lo, address(stay))); err != nil {
				ended <- err
				return
			}
			runtime.Gosched()
		}
	}()
	request := netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETADDR, Flags: netlink.Request | netlink.Dump}, Data: make([]byte, unix.SizeofIfAddrmsg),
	}
	interrupted, raw := 0, 0
	for looks := 0; looks < 20 || interrupted == 0 || raw == 0; looks++ {
		if _, err := h.handle.AddrList(nil, library.FAMILY_V4); errors.Is(err, ErrInterrupted) {
			interrupted++
		}
		if err := c.Each(request, func(netlink.Header, []byte) {}); errors.Is(err, ErrInterrupted) {
			raw++
		}
		list, err := h.AddrList(nil, library.FAMILY_V4)
		if errors.Is(err, ErrInterrupted) {
			continue // it changes faster than it can be read
		}
		must(t, err)
		n := 0
		for _, a := range list {
			if a.IP[len(a.IP)-3] == 1 && (int(a.IP[len(a.IP)-2])<<8|int(a.IP[len(a.IP)-1])) < stay {
				n++
			}
		}
		if n != stay {
			t.Fatalf("look %d: %d addresses of %d that stay", looks, n, stay)
		}
	}
	close(quit)
	must(t, <-ended)
	t.Logf("the library's lists were interrupted %d times, single ones here %d times", interrupted, raw)
}

// TestListEndsWithItsDeadline waits for a kernel that doesn't answer.
func TestListEndsWithItsDeadline(t *testing.T) {
	c, err := Dial(unix.NETLINK_ROUTE)
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(10*time.Millisecond)))
	err = c.list(1, func(netlink.Header, []byte) { t.Error("there is an entry") })
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

// TestEachRoute starts each try with nothing.
func TestEachRoute(t *testing.T) {
	inNamespace(t)
	h, err := NewHandle(unix.NETLINK_ROUTE)
	must(t, err)
	defer h.Close()
	lo, err := h.LinkByName("lo")
	must(t, err, h.LinkSetUp(lo))
	for i := range 300 {
		must(t, h.RouteAdd(&library.Route{LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4(10, 0, byte(i>>8), byte(i)).To4(), Mask: net.CIDRMask(32, 32)}}))
	}
	begins, routes := 0, 0
	must(t, h.EachRoute(unix.AF_INET, &library.Route{Table: unix.RT_TABLE_MAIN}, library.RT_FILTER_TABLE,
		func() { begins++; routes = 0 }, func(library.Route) { routes++ }))
	if begins == 0 || routes != 300 {
		t.Errorf("%d routes after %d beginnings", routes, begins)
	}
}

// TestNftables reads nftables through a connection: existing objects, missing ones, and
// errors.
func TestNftables(t *testing.T) {
	inNamespace(t)
	c, err := Dial(unix.NETLINK_NETFILTER)
	must(t, err)
	defer c.Close()
	lists, err := c.Nftables()
	must(t, err)
	if ts, err := lists.ListTables(nftables.TableFamilyUnspecified); err != nil || len(ts) != 0 {
		t.Errorf("of an empty ruleset: %v, %v", ts, err)
	}
	change, err := nftables.New()
	must(t, err)
	table := change.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "one"})
	set := &nftables.Set{Table: table, Name: "ports", KeyType: nftables.TypeInetService}
	var want []nftables.SetElement
	for port := range uint16(5000) { // in several parts
		want = append(want, nftables.SetElement{Key: binary.BigEndian.AppendUint16(nil, port+1)})
	}
	must(t, change.AddSet(set, nil))
	for some := range slices.Chunk(want, 400) {
		must(t, change.SetAddElements(set, some))
	}
	change.AddChain(&nftables.Chain{Name: "empty", Table: table})
	must(t, change.Flush())
	ts, err := lists.ListTables(nftables.TableFamilyUnspecified)
	if err != nil || len(ts) != 1 || ts[0].Name != "one" {
		t.Errorf("tables %v, %v", ts, err)
	}
	cs, err := lists.ListChains(nftables.TableFamilyINet)
	if err != nil || len(cs) != 1 || cs[0].Name != "empty" {
		t.Errorf("chains %v, %v", cs, err)
	}
	es, err := lists.GetSetElements(set)
	if err != nil || len(es) != len(want) {
		t.Errorf("%d elements of %d, %v", len(es), len(want), err)
	}
	if fs, err := lists.ListFlowtables(table); err != nil || len(fs) != 0 {
		t.Errorf("flow tables %v, %v", fs, err)
	}
	if _, err := lists.GetSetElements(&nftables.Set{Table: table, Name: "none"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a set that doesn't exist: %v", err)
	}
	if ts, err := lists.ListTables(nftables.TableFamilyUnspecified); err != nil || len(ts) != 1 {
		t.Errorf("after that: %v, %v", ts, err)
	}
}
