package netlab

// Captures of the packets at a host's interfaces.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// watchBuffer is the size in bytes of the kernel's buffer for packets that a watch
	// hasn't read yet.
	watchBuffer = 16 << 20
	// maxWatched bounds the packets that one watch keeps.
	maxWatched = 1 << 16
	// watchSync is how long Sync waits.
	watchSync = 30 * time.Second
)

// Watch collects the packets, sent and received, of all interfaces of a host that a
// predicate picks. It sees incoming packets before the host's packet filter, and outgoing
// ones after it.
type Watch struct {
	host  *Host
	file  *os.File
	pick  func(Packet) bool
	names map[int]string // interfaces by index; only the reader uses it

	mu      sync.Mutex
	packets []Packet
	more    int // how many were picked but not kept
	marks   map[string]chan struct{}
	changed chan struct{} // closed and replaced at each new packet
}

// Watch starts to watch. The predicate is called from one goroutine; the packet's
// slices are its own to keep.
func (h *Host) Watch(pick func(Packet) bool) (*Watch, error) {
	w := &Watch{host: h, pick: pick, names: map[int]string{}, marks: map[string]chan struct{}{}, changed: make(chan struct{})}
	err := h.Do(func() error {
		// With SOCK_DGRAM packets begin with the IP header on every kind of interface.
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(networkOrder(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		w.file = os.NewFile(uintptr(fd), "packet socket")
		// The machine's root may exceed the limit (rmem_max); otherwise take the limit.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, watchBuffer) != nil {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, watchBuffer)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("watch packets of %s: %w", h.Name, err)
	}
	h.lab.run.Go(func() error {
		w.read()
		return nil
	})
	h.lab.onClose(w.Stop)
	return w, nil
}

// Stop ends the watch. The packets stay available.
func (w *Watch) Stop() error {
	if err := w.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

func (w *Watch) read() {
	raw, err := w.file.SyscallConn()
	buf := make([]byte, 1<<17)
	for err == nil {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err = raw.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), buf, 0)
			return recvErr != unix.EAGAIN
		})
		// An interface that goes down is reported once, as an error.
		if err != nil || recvErr != nil {
			continue
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok {
			w.packet(slices.Clone(buf[:n]), ll)
		}
	}
}

func (w *Watch) packet(data []byte, from *unix.SockaddrLinklayer) {
	p, ok := ParsePacket(data)
	if !ok {
		return
	}
	p.Time, p.Out, p.Link = time.Now(), from.Pkttype == unix.PACKET_OUTGOING, w.name(from.Ifindex)
	if p.Link == "lo" && w.mark(p) {
		return
	}
	if !w.pick(p) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.packets) < maxWatched {
		w.packets = append(w.packets, p)
	} else {
		w.more++
	}
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *Watch) name(index int) string {
	if name, ok := w.names[index]; ok {
		return name
	}
	name := fmt.Sprintf("interface %d", index)
	if link, err := w.host.nl.LinkByIndex(index); err == nil {
		name = link.Attrs().Name
	}
	w.names[index] = name
	return name
}

// Packets returns the packets picked so far, in order. It returns an error if some are
// missing, because there were too many or the buffer overflowed.
func (w *Watch) Packets() ([]Packet, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.lost()
	if w.more > 0 {
		err = errors.Join(err, fmt.Errorf("watch %s: %d packets more than were kept", w.host.Name, w.more))
	}
	return slices.Clone(w.packets), err
}

// lost returns an error if the kernel dropped packets for lack of space. Reading the
// statistics clears them (PACKET_STATISTICS, packet(7)), so it returns it once.
func (w *Watch) lost() error {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return nil // stopped
	}
	var drops uint32
	raw.Control(func(fd uintptr) {
		if s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			drops = s.Drops
		}
	})
	if drops > 0 {
		return fmt.Errorf("watch %s: %d packets were lost", w.host.Name, drops)
	}
	return nil
}

// Sync waits until the watch has read every packet that the host's interfaces had before
// the call: it sends a packet to the host itself and waits for it to arrive.
func (w *Watch) Sync() error {
	word := fmt.Sprintf("netlab-mark-%d", w.host.lab.next())
	seen := make(chan struct{})
	w.mu.Lock()
	w.marks[word] = seen
	w.mu.Unlock()
	err := w.host.Do(func() error {
		conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:9")))
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte(word))
		return err
	})
	if err != nil {
		return fmt.Errorf("mark the packets of %s: %w", w.host.Name, err)
	}
	select {
	case <-seen:
		return nil
	case <-time.After(watchSync):
		return fmt.Errorf("mark the packets of %s: the mark didn't come by", w.host.Name)
	}
}

// mark reports whether a packet is one of Sync's.
func (w *Watch) mark(p Packet) bool {
	if p.Proto != protoUDP || p.Out || !bytes.HasPrefix(p.Payload, []byte("netlab-mark-")) {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if seen, ok := w.marks[string(p.Payload)]; ok {
		close(seen)
		delete(w.marks, string(p.Payload))
	}
	return true
}

// Wait waits until at least n packets were picked; it returns an error after the timeout.
func (w *Watch) Wait(n int, timeout time.Duration) error {
	expired := time.After(timeout)
	for {
		w.mu.Lock()
		have, changed := len(w.packets), w.changed
		w.mu.Unlock()
		if have >= n {
			return nil
		}
		select {
		case <-changed:
		case <-expired:
			return fmt.Errorf("wait for %d packets on %s: %d came in %s", n, w.host.Name, have, timeout)
		}
	}
}

// Forge sends a packet unchanged out of an interface to the host at the other end of the
// link. It bypasses the host's own routes and packet filter, so the addresses may be any.
func (h *Host) Forge(link string, packet []byte) error {
	l, err := h.link(link)
	if err != nil {
		return err
	}
	proto := uint16(unix.ETH_P_IP)
	if len(packet) > 0 && packet[0]>>4 == 6 {
		proto = unix.ETH_P_IPV6
	}
	to := &unix.SockaddrLinklayer{Protocol: networkOrder(proto), Ifindex: l.Attrs().Index}
	if mac, ok := h.lab.neighbour(h, link); ok {
		to.Halen = uint8(copy(to.Addr[:], mac))
	}
	fd, err := h.forger()
	if err == nil {
		err = unix.Sendto(fd, packet, 0, to)
	}
	if err != nil {
		return fmt.Errorf("send packet by %s of %s: %w", link, h.Name, err)
	}
	return nil
}

// openForger opens the packet socket of Forge, which receives nothing. All calls share
// one, because closing a packet socket waits for an RCU grace period in the kernel.
func (h *Host) openForger() (fd int, err error) {
	err = h.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err == nil {
		h.lab.onClose(func() error { return unix.Close(fd) })
	}
	return fd, err
}

// networkOrder returns a number whose bytes in memory are v in network byte order.
func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}
