package trial

// A peer that opens as many flows as it can, and the effect on other peers.

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// flooder sends packets out of a host's tunnel as fast as the tunnel accepts them.
type flooder struct {
	fd    int
	index int
	mac   net.HardwareAddr // the next hop's, on Ethernet
	sent  atomic.Uint64
}

func newFlooder(t *testing.T, h *netlab.Host, link string) *flooder {
	t.Helper()
	l, err := h.Netlink().LinkByName(link)
	if err != nil {
		t.Fatal(err)
	}
	f := &flooder{index: l.Attrs().Index}
	if err := h.Do(func() (err error) {
		f.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(f.fd) })
	return f
}

// run sends the packets that next returns until ctx ends.
func (f *flooder) run(ctx context.Context, next func(n uint64) []byte) error {
	to := [2]*unix.SockaddrLinklayer{}
	for i, proto := range []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6} {
		to[i] = &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, proto)), Ifindex: f.index}
		to[i].Halen = uint8(copy(to[i].Addr[:], f.mac))
	}
	for n := uint64(0); ctx.Err() == nil; n++ {
		p := next(n)
		dst := to[0]
		if p[0]>>4 == 6 {
			dst = to[1]
		}
		err := unix.Sendto(f.fd, p, 0, dst)
		switch {
		case err == nil:
			f.sent.Add(1)
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EAGAIN):
			time.Sleep(100 * time.Microsecond)
		default:
			return fmt.Errorf("flood: %w", err)
		}
	}
	return nil
}

// newFlows makes each packet the first of another flow: datagrams, half-open connections,
// echoes and first fragments, to the internet, the LAN and the host.
func newFlows(from netlab.Pair, to []netlab.Pair) func(uint64) []byte {
	payload := make([]byte, 32)
	return func(n uint64) []byte {
		family := int(n % 2)
		src, dst := from.List()[family], to[n/2%uint64(len(to))].List()[family]
		port := uint16(1024 + n/8%64000)
		at, target := netip.AddrPortFrom(src, port), netip.AddrPortFrom(dst, uint16(netlab.EchoPort+n/512000))
		switch n / 2 % 8 {
		case 0, 1, 2, 3:
			return netlab.UDPPacket(at, target, payload)
		case 4, 5:
			return netlab.TCPPacket(at, target, netlab.SYN, uint32(n), 0, nil)
		case 6:
			return netlab.EchoPacket(src, dst, false, port, 1, payload)
		}
		p := netlab.UDPPacket(at, target, make([]byte, 1000))
		if family == 0 {
			binary.BigEndian.PutUint16(p[4:], port) // identification
			p[6] |= 0x20                            // more fragments
			p[10], p[11] = 0, 0
			sum := uint32(0)
			for i := 0; i < 20; i += 2 {
				sum += uint32(binary.BigEndian.Uint16(p[i:]))
			}
			binary.BigEndian.PutUint16(p[10:], ^uint16(sum+sum>>16))
		}
		return p
	}
}

// oneFlow makes all packets part of one flow.
func oneFlow(from, to netlab.Pair) func(uint64) []byte {
	p := netlab.UDPPacket(netip.AddrPortFrom(from.V4, 5000), netip.AddrPortFrom(to.V4, netlab.EchoPort), make([]byte, 32))
	return func(uint64) []byte { return p }
}

// serveBoth answers connections and datagrams on a host's echo port without keeping
// state, for the colluding server and for all other hosts.
func serveBoth(t *testing.T, h *netlab.Host) {
	t.Helper()
	var l net.Listener
	var u net.PacketConn
	if err := h.Do(func() (err error) {
		if l, err = net.Listen("tcp", fmt.Sprint(":", netlab.EchoPort)); err != nil {
			return err
		}
		u, err = net.ListenPacket("udp", fmt.Sprint(":", netlab.EchoPort))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var serving errgroup.Group
	serving.Go(func() error {
		for {
			c, err := l.Accept()
			if err != nil {
				return nil
			}
			serving.Go(func() error {
				defer c.Close()
				c.SetDeadline(time.Now().Add(generous))
				io.Copy(c, c)
				return nil
			})
		}
	})
	serving.Go(func() error {
		b := make([]byte, 2048)
		for {
			n, from, err := u.ReadFrom(b)
			if err != nil {
				return nil
			}
			u.WriteTo(b[:n], from)
		}
	})
	t.Cleanup(func() {
		l.Close()
		u.Close()
		serving.Wait()
	})
}

// connect opens a connection, exchanges one message, and returns the time that took.
func connect(h *netlab.Host, to netip.Addr) (time.Duration, error) {
	start := time.Now()
	var c net.Conn
	err := h.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", netip.AddrPortFrom(to, netlab.EchoPort).String(), generous)
		return err
	})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(generous))
	if _, err := c.Write([]byte("hello")); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}

// lookUp sends a datagram until it is answered, once a second as resolvers do.
func lookUp(h *netlab.Host, to netip.Addr) error {
	var c net.Conn
	if err := h.Do(func() (err error) {
		c, err = net.Dial("udp", netip.AddrPortFrom(to, netlab.EchoPort).String())
		return err
	}); err != nil {
		return err
	}
	defer c.Close()
	var err error
	for range 5 {
		if _, err = c.Write([]byte("name?")); err != nil {
			continue
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		if _, err = io.ReadFull(c, make([]byte, 5)); err == nil {
			return nil
		}
	}
	return err
}

// others holds the results of other devices during a flood.
type others struct {
	took      []time.Duration // times of D's new connections
	failed    []error
	ownFailed []error // errors of the host's own connections
	entries   int     // conntrack's maximum
	memory    []int   // samples of the helper's, in kB
}

// observe has D and B itself open connections and send queries, until all connections
// were tried and the time is over.
func (o *others) observe(t *testing.T, m *Mesh, connections int, lasts time.Duration) {
	t.Helper()
	at := netlab.Addresses()
	end := time.Now().Add(lasts)
	for n := 0; n < connections || time.Now().Before(end); n++ {
		if n < connections {
			took, err := connect(m.D, at.I.List()[n%2])
			if err != nil {
				o.failed = append(o.failed, err)
			} else {
				o.took = append(o.took, took)
			}
			if _, err := connect(m.B, at.I.List()[n%2]); err != nil {
				o.ownFailed = append(o.ownFailed, fmt.Errorf("connect: %w", err))
			}
			if err := lookUp(m.B, at.I.List()[n%2]); err != nil {
				o.ownFailed = append(o.ownFailed, fmt.Errorf("ask: %w", err))
			}
		} else {
			time.Sleep(100 * time.Millisecond)
		}
		o.entries = max(o.entries, entriesOf(t, m))
		if n%20 == 0 {
			o.memory = append(o.memory, loadOf(t, m.Helper.PID()).kilobytes)
		}
	}
}

func (o *others) p99() time.Duration {
	slices.Sort(o.took)
	return o.took[len(o.took)*99/100]
}

func entriesOf(t *testing.T, m *Mesh) int {
	t.Helper()
	text, err := m.B.Sysctl("net/netfilter/nf_conntrack_count")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestFloodOfOnePeer has a peer with every permission, and a server that answers it, open
// flows as fast as they can. Other devices aren't affected: each new connection of
// another peer and of the host itself succeeds, conntrack holds no more entries than the
// peer's share, and the helper's memory doesn't grow.
func TestFloodOfOnePeer(t *testing.T) {
	lasts, connections := 10*time.Second, 20
	if *soak {
		lasts, connections = 3*time.Minute, 200
	}
	m := newSilentStage(t)
	start(t, m)
	addPeers(t, m)
	permit(t, m, "C", everything)
	permit(t, m, "D", everything)
	at := netlab.Addresses()
	for _, h := range []*netlab.Host{m.I, m.L, m.B} {
		serveBoth(t, h)
	}
	flood := func(from *netlab.Host, link string, connections int, next func(uint64) []byte) (others, float64) {
		f := newFlooder(t, from, link)
		ctx, cancel := context.WithCancel(t.Context())
		var sending errgroup.Group
		began := time.Now()
		sending.Go(func() error { return f.run(ctx, next) })
		var o others
		o.observe(t, m, connections, lasts)
		cancel()
		if err := sending.Wait(); err != nil {
			t.Error(err)
		}
		return o, float64(f.sent.Load()) / time.Since(began).Seconds()
	}
	before, link := entriesOf(t, m), m.Peers["C"].End.Name
	one, oneRate := flood(m.C, link, connections, oneFlow(m.Peers["C"].Addresses, at.I))
	share := flowsShare(t, m)
	all, allRate := flood(m.C, link, connections, newFlows(m.Peers["C"].Addresses, []netlab.Pair{at.I, at.L, status(t, m).Address(), at.I}))
	for name, o := range map[string]others{"one flow": one, "new flows": all} {
		if len(o.failed) > 0 || len(o.ownFailed) > 0 {
			t.Errorf("during %s: %d of %d connections of D failed (%v), and %d of the host's own (%v)",
				name, len(o.failed), connections, errors.Join(o.failed...), len(o.ownFailed), errors.Join(o.ownFailed...))
		}
	}
	// The entries of other devices and of the host itself are few.
	if limit := before + share + 10*connections; all.entries > limit {
		t.Errorf("conntrack holds %d entries, want at most %d: %d from before, the peer's share of %d, and those of other devices", all.entries, limit, before, share)
	}
	helper := loadOf(t, m.Helper.PID()).kilobytes
	t.Logf("one flow: %.0f packets/s, p99 %v; new flows: %.0f packets/s, p99 %v, at most %d entries of a share of %d; the helper's memory %v MB",
		oneRate, one.p99(), allRate, all.p99(), all.entries, share, megabytes(all.memory))
	if *soak {
		if all.p99() > 2*one.p99() {
			t.Errorf("p99 of D's connections is %v during new flows, and %v during one flow", all.p99(), one.p99())
		}
		half := all.memory[len(all.memory)/2]
		if helper > half+half/5 {
			t.Errorf("the helper's memory grows: %v MB", megabytes(all.memory))
		}
		// A receiving end needs more memory than a sending one, and more over time. The
		// stock end now receives as much for as long as the helper did. No other device
		// connects meanwhile, because the host's own flood fills their path.
		b := status(t, m)
		var rates []float64
		for range 2 {
			_, rate := flood(m.B, b.Interface, 0, oneFlow(b.Address(), m.Peers["C"].Addresses))
			rates = append(rates, rate)
		}
		stock := loadOf(t, m.Peers["C"].End.Process.PID()).kilobytes
		t.Logf("the helper has %d MB, the stock end %d after %.0f packets/s", helper>>10, stock>>10, rates)
		if helper > stock+stock/5 {
			t.Errorf("the helper has %d MB, the stock end %d", helper>>10, stock>>10)
		}
	}
}

func megabytes(list []int) []int {
	var out []int
	for _, n := range list {
		out = append(out, n>>10)
	}
	return out
}

// TestEchoCodes has a peer send echoes that differ only in the code, which no ordinary
// program sets. The kernel keeps a flow for each, so the guard must count each, and
// refuse those over the peer's rate.
func TestEchoCodes(t *testing.T) {
	m := newSilentStage(t)
	start(t, m)
	addPeers(t, m)
	permit(t, m, "C", everything)
	before, at := entriesOf(t, m), netlab.Addresses()
	began := time.Now()
	const ids = 8
	for i, kind := range []uint8{8, 128} {
		from, to := m.Peers["C"].Addresses.List()[i], at.I.List()[i]
		for n := range ids << 8 {
			if err := m.C.Forge(m.Peers["C"].End.Name, netlab.ICMPPacket(from, to, kind, uint8(n), uint32(n>>8)<<16, nil)); err != nil {
				t.Fatal(err)
			}
			if n%256 == 255 {
				time.Sleep(time.Millisecond) // to lose only a few
			}
		}
	}
	held := 0
	for range 20 { // packets in flight arrive
		held = max(held, entriesOf(t, m)-before)
		time.Sleep(50 * time.Millisecond)
	}
	// The host's own entries and the test's are few.
	if most := 1000 + int(200*time.Since(began).Seconds()) + 20; held > most || held < 500 {
		t.Errorf("conntrack has %d entries for %d echoes, want 500 to %d", held, 2*ids<<8, most)
	}
}

var shareOf = regexp.MustCompile(`of the (\d+) entries`)

// flowsShare returns how many flows one peer may have, as printed by doctor.
func flowsShare(t *testing.T, m *Mesh) int {
	t.Helper()
	o, err := m.Do(t.Context(), "doctor", "--json")
	if err != nil && o.Stdout == "" {
		t.Fatal(err)
	}
	var checks []struct{ Name, Message string }
	if err := json.Unmarshal([]byte(o.Stdout), &checks); err != nil {
		t.Fatal(err)
	}
	for _, c := range checks {
		if c.Name != "flows" {
			continue
		}
		if found := shareOf.FindStringSubmatch(c.Message); found != nil {
			n, err := strconv.Atoi(found[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		t.Fatalf("doctor says %q of flows", c.Message)
	}
	t.Fatalf("doctor has no check of flows: %s", o.Stdout)
	return 0
}
