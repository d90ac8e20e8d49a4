package netlab

// Long-lived flows: both ends keep sending, and what arrived is compared with when it
// was sent, to show that a cut flow really carries nothing.

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Way is a direction of a flow.
type Way int

const (
	// Forth is from the end that opened the flow.
	Forth Way = iota
	// Back is from the other end.
	Back
)

// String is "forth" or "back".
func (w Way) String() string { return [...]string{"forth", "back"}[w] }

// FlowOptions describes a flow.
type FlowOptions struct {
	From  *Host         // required: the host that opens it
	To    *Host         // required: the host that has Addr
	Addr  netip.Addr    // required: the destination
	Proto Proto         // required
	Every time.Duration // optional: between two packets of each end; 5 ms if 0
	// BackSize is the size of each packet back in bytes, to make the flow a download. It
	// is optional: 0 means the size of a packet forth. For UDP and ping it is at most 1200,
	// to fit any path.
	BackSize int
}

// Flow is a flow whose two ends keep sending, regardless of what they receive, until it
// is stopped. Each packet has a number and the time when it was sent, on one clock for
// both ends, so that the test knows when a packet that arrived was sent. A ping flow
// has echo requests forth, and echo replies back that answer no request; the kernel's
// replies aren't counted.
type Flow struct {
	options FlowOptions
	id      uint32
	epoch   time.Time
	ctx     context.Context // ends with the flow
	cancel  context.CancelFunc
	pace    context.Context // ends when the ends stop sending
	pause   context.CancelFunc
	done    sync.WaitGroup // all parts of the flow
	sending sync.RWMutex   // held for reading while a packet is sent
	ways    [2]wayLog
	near    atomic.Pointer[netip.AddrPort] // the opener's address, once it is known
}

// Arrival is a packet of a flow that reached the other end.
type Arrival struct {
	Number         uint64 // counted by the sender from 1
	Sent, Received time.Time
}

// wayLog records one direction of a flow.
type wayLog struct {
	sent     atomic.Uint64
	mu       sync.Mutex
	arrivals []Arrival
	changed  chan struct{}
}

const (
	flowMark   = "netlabfl"
	flowRecord = 40      // bytes: mark, flow, way, number, time
	flowBuffer = 2 << 20 // bytes
	firstPort  = 61000
	flowPorts  = 4000
)

// Flow starts a flow and returns at once; WaitBothWays waits until it runs.
func (l *Lab) Flow(options FlowOptions) (*Flow, error) {
	if options.Every == 0 {
		options.Every = 5 * time.Millisecond
	}
	f := &Flow{options: options, id: uint32(l.next()), epoch: time.Now()}
	f.ctx, f.cancel = context.WithCancel(l.ctx)
	f.pace, f.pause = context.WithCancel(f.ctx)
	for i := range f.ways {
		f.ways[i].changed = make(chan struct{})
	}
	start := map[Proto]func() error{ICMP: f.startICMP, TCP: f.startTCP, UDP: f.startUDP}[options.Proto]
	if err := start(); err != nil {
		f.cancel()
		return nil, fmt.Errorf("start %s flow from %s to %s: %w", options.Proto, options.From.Name, options.Addr, err)
	}
	l.onClose(func() error {
		f.Stop()
		return nil
	})
	return f, nil
}

// Stop stops both ends and waits for them. The record of what arrived stays.
func (f *Flow) Stop() {
	f.cancel()
	f.done.Wait()
}

// String is the flow in a few words.
func (f *Flow) String() string {
	return fmt.Sprintf("%s flow from %s to %s", f.options.Proto, f.options.From.Name, f.options.Addr)
}

// Opener returns the source address and port of the flow, or the zero value before they
// are known. A ping's port is its identifier.
func (f *Flow) Opener() netip.AddrPort {
	if near := f.near.Load(); near != nil {
		return *near
	}
	return netip.AddrPort{}
}

// Target returns the destination address and port of the flow.
func (f *Flow) Target() netip.AddrPort { return netip.AddrPortFrom(f.options.Addr, f.port()) }

// opened records the opener's address.
func (f *Flow) opened(addr net.Addr) {
	near := unmap(netip.MustParseAddrPort(addr.String()))
	f.near.Store(&near)
}

// Sent returns how many packets were sent in a direction.
func (f *Flow) Sent(w Way) uint64 { return f.ways[w].sent.Load() }

// Arrivals returns the packets that arrived, in order of arrival.
func (f *Flow) Arrivals(w Way) []Arrival {
	f.ways[w].mu.Lock()
	defer f.ways[w].mu.Unlock()
	return slices.Clone(f.ways[w].arrivals)
}

// SentAfter returns the packets that were sent after a time and arrived.
func (f *Flow) SentAfter(w Way, when time.Time) []Arrival {
	return slices.DeleteFunc(f.Arrivals(w), func(a Arrival) bool { return !a.Sent.After(when) })
}

// Finish stops sending at both ends, waits up to the timeout for packets in transit,
// stops the flow, and returns how many packets of each direction never arrived.
func (f *Flow) Finish(timeout time.Duration) (forth, back int) {
	f.pause()
	// The lock is free once the last packet was written. With a full TCP buffer the
	// writer would block for ever.
	stuck := time.AfterFunc(timeout, f.cancel)
	f.sending.Lock()
	//lint:ignore SA2001 acquiring the lock waits for the writers
	f.sending.Unlock()
	stuck.Stop()
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); time.Sleep(probeRetry / 10) {
		if f.missing(Forth)+f.missing(Back) == 0 {
			break
		}
	}
	f.Stop()
	return f.missing(Forth), f.missing(Back)
}

// Gaps returns the arrivals before which at least one packet is missing. They show when
// the missing packets were sent.
func (f *Flow) Gaps(w Way) (gaps []Arrival) {
	arrivals := f.Arrivals(w)
	slices.SortFunc(arrivals, func(a, b Arrival) int { return cmp.Compare(a.Number, b.Number) })
	last := uint64(0)
	for _, a := range arrivals {
		if a.Number > last+1 {
			gaps = append(gaps, a)
		}
		last = a.Number
	}
	return gaps
}

// missing returns how many packets were sent and haven't arrived.
func (f *Flow) missing(w Way) int {
	sent := f.Sent(w)
	return int(sent) - len(f.Arrivals(w))
}

// WaitBothWays waits until n more packets have arrived in each direction; it returns an
// error after the timeout.
func (f *Flow) WaitBothWays(n int, timeout time.Duration) error {
	return errors.Join(f.Wait(Forth, n, timeout), f.Wait(Back, n, timeout))
}

// Wait waits until n more packets have arrived in one direction.
func (f *Flow) Wait(w Way, n int, timeout time.Duration) error {
	way := &f.ways[w]
	first := -1
	for expired := time.After(timeout); ; {
		way.mu.Lock()
		have, changed := len(way.arrivals), way.changed
		way.mu.Unlock()
		if first < 0 {
			first = have
		}
		if have-first >= n {
			return nil
		}
		select {
		case <-changed:
		case <-expired:
			return fmt.Errorf("wait for %s: %d of %d packets came %s in %s", f, have-first, n, w, timeout)
		}
	}
}

// send calls write with one record after another, at the flow's pace. A packet that the
// kernel refuses counts as sent, and sending continues.
func (f *Flow) send(w Way, write func([]byte) error) {
	tick := time.NewTicker(f.options.Every)
	defer tick.Stop()
	for {
		select {
		case <-f.pace.Done():
			return
		case <-tick.C:
		}
		if !f.sendOne(w, write) {
			return
		}
	}
}

// sendOne sends the next record, unless the flow has ended.
func (f *Flow) sendOne(w Way, write func([]byte) error) bool {
	f.sending.RLock()
	defer f.sending.RUnlock()
	if f.pace.Err() != nil {
		return false
	}
	b := f.record(w)
	f.ways[w].sent.Add(1)
	return !errors.Is(write(b), net.ErrClosed)
}

// record returns the next packet's payload. Its time is taken before it is sent, so a
// record with a time after a change was sent after the change.
func (f *Flow) record(w Way) []byte {
	b := make([]byte, f.size(w))
	copy(b, flowMark)
	binary.BigEndian.PutUint32(b[8:], f.id)
	binary.BigEndian.PutUint32(b[12:], uint32(w))
	binary.BigEndian.PutUint64(b[16:], f.ways[w].sent.Load()+1)
	binary.BigEndian.PutUint64(b[24:], uint64(time.Since(f.epoch)))
	return b
}

// size returns the payload size of a direction's packets in bytes.
func (f *Flow) size(w Way) int {
	if w == Back {
		return max(flowRecord, f.options.BackSize)
	}
	return flowRecord
}

// received records an arrival, and returns false if b isn't a record of that direction.
func (f *Flow) received(w Way, b []byte) bool {
	if len(b) < flowRecord || string(b[:8]) != flowMark ||
		binary.BigEndian.Uint32(b[8:]) != f.id || binary.BigEndian.Uint32(b[12:]) != uint32(w) {
		return false
	}
	a := Arrival{
		Number:   binary.BigEndian.Uint64(b[16:]),
		Sent:     f.epoch.Add(time.Duration(binary.BigEndian.Uint64(b[24:]))),
		Received: time.Now(),
	}
	way := &f.ways[w]
	way.mu.Lock()
	defer way.mu.Unlock()
	way.arrivals = append(way.arrivals, a)
	close(way.changed)
	way.changed = make(chan struct{})
	return true
}

// run starts a goroutine of the flow, which must end when the flow's sockets close.
func (f *Flow) run(part func()) {
	f.done.Add(1)
	f.options.From.lab.run.Go(func() error {
		defer f.done.Done()
		part()
		return nil
	})
}

// closeAtEnd closes a socket when the flow stops.
func (f *Flow) closeAtEnd(c io.Closer) { context.AfterFunc(f.ctx, func() { c.Close() }) }

func (f *Flow) port() uint16 { return uint16(firstPort + uint64(f.id)%flowPorts) }

func (f *Flow) startUDP() error {
	at := netip.AddrPortFrom(f.options.Addr, f.port())
	var near, far *net.UDPConn
	if err := f.options.To.Do(func() (err error) {
		far, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}); err != nil {
		return err
	}
	f.closeAtEnd(far)
	if err := f.options.From.Do(func() (err error) {
		near, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(at))
		return err
	}); err != nil {
		return err
	}
	f.closeAtEnd(near)
	f.opened(near.LocalAddr())

	learned := make(chan netip.AddrPort, 1)
	f.run(func() { f.send(Forth, func(b []byte) error { return wrote(near.Write(b)) }) })
	f.run(func() { f.receiveUDP(near, Back, nil) })
	f.run(func() { f.receiveUDP(far, Forth, learned) })
	f.run(func() {
		select {
		case from := <-learned:
			f.send(Back, func(b []byte) error { return wrote(far.WriteToUDPAddrPort(b, from)) })
		case <-f.ctx.Done():
		}
	})
	return nil
}

// wrote returns the error of a write.
func wrote(_ int, err error) error { return err }

// receiveUDP reads until the flow stops, and sends the first record's source to learned.
func (f *Flow) receiveUDP(conn *net.UDPConn, w Way, learned chan<- netip.AddrPort) {
	buf := make([]byte, 2048)
	for f.ctx.Err() == nil {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			continue // an ICMP error, or closed: then the context has ended
		}
		if f.received(w, buf[:n]) && learned != nil {
			learned <- from
			learned = nil
		}
	}
}

func (f *Flow) startTCP() error {
	at := netip.AddrPortFrom(f.options.Addr, f.port())
	var listener *net.TCPListener
	if err := f.options.To.Do(func() (err error) {
		listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	}); err != nil {
		return err
	}
	f.closeAtEnd(listener)
	f.run(func() {
		if conn, err := listener.AcceptTCP(); err == nil {
			f.runTCP(conn, Back, Forth)
		}
	})
	f.run(func() {
		var conn net.Conn
		err := f.options.From.Do(func() (err error) {
			dialer := net.Dialer{Timeout: PassWait}
			conn, err = dialer.DialContext(f.ctx, "tcp", at.String())
			return err
		})
		if err == nil {
			f.opened(conn.LocalAddr())
			f.runTCP(conn.(*net.TCPConn), Forth, Back)
		}
	})
	return nil
}

// runTCP sends and receives on one end. All records of a direction have one size, by
// which the receiver splits the stream.
func (f *Flow) runTCP(conn *net.TCPConn, out, in Way) {
	conn.SetLinger(0)
	// A large buffer, so that writes continue on a flow that was cut and whose other
	// end acknowledges nothing. In a user namespace setting it may fail.
	if control(conn, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, flowBuffer)
	}) != nil {
		conn.SetWriteBuffer(flowBuffer)
	}
	f.closeAtEnd(conn)
	f.run(func() { f.send(out, func(b []byte) error { return wrote(conn.Write(b)) }) })
	buf := make([]byte, f.size(in))
	for {
		if _, err := io.ReadFull(conn, buf); err != nil {
			return
		}
		f.received(in, buf)
	}
}

func (f *Flow) startICMP() error {
	near, err := f.options.From.openICMP(f.options.Addr, netip.Addr{})
	if err != nil {
		return err
	}
	f.closeAtEnd(near)
	far, err := f.options.To.openICMP(f.options.Addr, f.options.Addr)
	if err != nil {
		return err
	}
	f.closeAtEnd(far)
	f.run(func() {
		seq := uint16(0)
		f.send(Forth, func(b []byte) error {
			seq++
			return near.echo(f.options.Addr, f.port(), seq, b)
		})
	})
	f.run(func() { f.receiveICMP(near, Back, icmpMessage.isReply, nil) })
	learned := make(chan icmpMessage, 1)
	f.run(func() { f.receiveICMP(far, Forth, icmpMessage.isRequest, learned) })
	f.run(func() {
		select {
		case to := <-learned:
			seq := uint16(1 << 15)
			f.send(Back, func(b []byte) error {
				seq++
				return far.reply(to.from, to.id, seq, b)
			})
		case <-f.ctx.Done():
		}
	})
	return nil
}

func (f *Flow) receiveICMP(conn *icmpConn, w Way, want func(icmpMessage) bool, learned chan<- icmpMessage) {
	for f.ctx.Err() == nil {
		m, err := conn.read()
		if err != nil {
			continue
		}
		if want(m) && f.received(w, m.body) && learned != nil {
			learned <- m
			learned = nil
		}
	}
}
