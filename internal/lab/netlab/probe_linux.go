package netlab

// Probes: which host reaches which address, by which protocol, and which hosts saw the
// packet on its way.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// PassWait is how long a probe tries that is expected to pass: far longer than
	// a slow machine needs.
	PassWait = 20 * time.Second
	// RefuseWait is how long a probe tries that is expected to be refused. It is short
	// because each such probe takes all of it. The witnesses still notice what arrives
	// later, see Recheck.
	RefuseWait = 350 * time.Millisecond

	probeRetry     = 100 * time.Millisecond // between two tries of a probe
	probesAtOnce   = 128
	firstProbePort = 20000 // source ports of TCP and UDP probes are drawn from here,
	probePorts     = 40000 // this many
)

// Probe asks whether a host reaches an address.
type Probe struct {
	From  *Host
	To    netip.Addr
	Proto Proto
	Port  uint16        // optional, for TCP and UDP: EchoPort if 0
	Wait  time.Duration // optional: how long to try, PassWait if 0
	Src   netip.Addr    // optional: the source address
}

// String returns the probe in a few words.
func (p Probe) String() string { return fmt.Sprintf("%s to %s by %s", p.From.Name, p.To, p.Proto) }

// Result is the answer to a probe.
type Result struct {
	Probe
	OK      bool           // an answer arrived
	Source  netip.AddrPort // TCP and UDP: the probe's source as the server saw it
	Err     error          // the error that the host received instead; nil for none
	SeenBy  []string       // names of the other serving hosts whose interfaces received it
	Served  bool           // TCP and UDP: a server received it, answered or not
	Took    time.Duration  // until the answer, or until the probe gave up
	token   string
	srcPort uint16
}

// String returns the result in a few words.
func (r Result) String() string {
	word := "refused"
	if r.OK {
		word = "passed"
	}
	if r.Err != nil {
		word += fmt.Sprintf(" (%v)", r.Err)
	}
	return fmt.Sprintf("%s: %s in %s, seen by %v", r.Probe, word, r.Took.Round(time.Millisecond), r.SeenBy)
}

// Probe sends all probes, many at a time, and returns the results in their order. Each is
// repeated until there is an answer or its wait is over.
func (l *Lab) Probe(ctx context.Context, probes ...Probe) []Result {
	results := make([]Result, len(probes))
	var group errgroup.Group
	group.SetLimit(probesAtOnce)
	for i, p := range probes {
		group.Go(func() error {
			results[i] = l.probe(ctx, p)
			return nil
		})
	}
	group.Wait()
	l.Recheck(results)
	return results
}

// Recheck updates the results with what the witnesses have seen by now. Called after the
// last probe of a test, it shows what arrived late.
func (l *Lab) Recheck(results []Result) {
	for i := range results {
		r := &results[i]
		var served bool
		r.SeenBy, served = l.saw(r.token, r.From)
		r.Served = r.Served || served
	}
}

// saw returns which hosts received a token, and whether a server did.
func (l *Lab) saw(token string, but *Host) (by []string, served bool) {
	l.mu.Lock()
	hosts := l.hosts
	l.mu.Unlock()
	for _, h := range hosts {
		if h == but || h.witness == nil {
			continue
		}
		if h.witness.saw(token) {
			by = append(by, h.Name)
		}
		served = served || h.witness.answered(token)
	}
	return by, served
}

// Token returns a unique text for the payload of a forged packet, which serving hosts
// recognise: Saw returns which of them received it, and whether a server did.
func (l *Lab) Token() string { return l.token() }

// Saw returns which hosts received a packet with the token, and whether a server did.
func (l *Lab) Saw(token string) (by []string, served bool) { return l.saw(token, nil) }

// probe sends one probe.
func (l *Lab) probe(ctx context.Context, p Probe) Result {
	if p.Port == 0 {
		p.Port = EchoPort
	}
	if p.Wait == 0 {
		p.Wait = PassWait
	}
	r := Result{Probe: p, token: l.token(), srcPort: uint16(firstProbePort + l.next()%probePorts)}
	ctx, cancel := context.WithTimeout(ctx, p.Wait)
	defer cancel()
	start := time.Now()
	ask := map[Proto]func(context.Context) error{ICMP: r.askICMP, TCP: r.askTCP, UDP: r.askUDP}[p.Proto]
	for ctx.Err() == nil && !r.OK {
		r.Err = ask(ctx)
		if r.Err == nil || errors.Is(r.Err, os.ErrDeadlineExceeded) {
			continue
		}
		select { // refused: wait before the next try
		case <-time.After(probeRetry):
		case <-ctx.Done():
		}
	}
	if errors.Is(r.Err, os.ErrDeadlineExceeded) || errors.Is(r.Err, context.DeadlineExceeded) {
		r.Err = nil
	}
	r.Took = time.Since(start)
	return r
}

// source is the probe's local address; the family's unspecified one if not given.
func (r *Result) source() netip.AddrPort {
	src := r.Src
	if !src.IsValid() {
		src = netip.IPv4Unspecified()
		if r.To.Is6() {
			src = netip.IPv6Unspecified()
		}
	}
	return netip.AddrPortFrom(src, r.srcPort)
}

// answered parses the server's answer.
func (r *Result) answered(line []byte) error {
	word, from, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
	if word != r.token {
		return fmt.Errorf("ask %s: heard %q", r.To, line)
	}
	var err error
	r.Source, err = netip.ParseAddrPort(from)
	r.OK = err == nil
	return err
}

// askTCP connects for as long as the context allows. It tries again only if it is
// refused: the kernel retransmits the SYN after a second, and the source port identifies
// the probe for the witnesses.
func (r *Result) askTCP(ctx context.Context) error {
	var conn *net.TCPConn
	deadline, _ := ctx.Deadline()
	try := time.Now().Add(2 * time.Second)
	if deadline.Before(try) {
		try = deadline
	}
	err := r.From.Do(func() error {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(r.source()), Deadline: try, Control: tokenInSYN}
		c, err := dialer.Dial("tcp", netip.AddrPortFrom(r.To, r.Port).String())
		if err == nil {
			conn = c.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetLinger(0) // no TIME_WAIT, since another probe may draw the port
	conn.SetDeadline(try)
	if _, err := conn.Write([]byte(r.token + "\n")); err != nil {
		return err
	}
	buf := make([]byte, 256)
	n := 0
	for n < len(buf) && !bytes.Contains(buf[:n], []byte("\n")) {
		more, err := conn.Read(buf[n:])
		if err != nil {
			return err
		}
		n += more
	}
	return r.answered(buf[:n])
}

// tokenInSYN makes the SYN wait for the first write and carry its data: TCP Fast Open
// without a cookie (TCP_FASTOPEN_CONNECT and TCP_FASTOPEN_NO_COOKIE, linux/tcp.h). So a
// host that receives the SYN can identify the probe even if NAT changed its source. A
// server that ignores data in a SYN receives it again after the handshake (RFC 7413,
// 4.2).
func tokenInSYN(network, address string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		for _, option := range []int{unix.TCP_FASTOPEN_NO_COOKIE, unix.TCP_FASTOPEN_CONNECT} {
			failed = errors.Join(failed, unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, option, 1))
		}
	})
	return errors.Join(reuseAddr(network, address, c), err, failed)
}

func reuseAddr(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	})
	return errors.Join(err, failed)
}

func (r *Result) askUDP(ctx context.Context) error {
	var conn *net.UDPConn
	err := r.From.Do(func() (err error) {
		to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(r.To, r.Port))
		conn, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(r.source()), to)
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(r.token)); err != nil {
		return err
	}
	conn.SetReadDeadline(retryAt(ctx))
	buf := make([]byte, 256)
	n, err := conn.Read(buf)
	if err != nil {
		return err
	}
	return r.answered(buf[:n])
}

// askICMP sends an echo request. An error message that quotes it is an error.
func (r *Result) askICMP(ctx context.Context) error {
	conn, err := r.From.openICMP(r.To, r.Src)
	if err != nil {
		return err
	}
	defer conn.Close()
	id := r.srcPort
	if err := conn.echo(r.To, id, 1, []byte(r.token)); err != nil {
		return err
	}
	conn.SetReadDeadline(retryAt(ctx))
	for {
		m, err := conn.read()
		if err != nil {
			return err
		}
		switch {
		case m.isReply() && m.id == id && bytes.Contains(m.body, []byte(r.token)) && m.from == r.To:
			r.OK = true
			return nil
		case m.quotes(r.To, id):
			return fmt.Errorf("icmp type %d code %d from %s", m.kind, m.code, m.from)
		}
	}
}

func retryAt(ctx context.Context) time.Time {
	at := time.Now().Add(probeRetry)
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(at) {
		return deadline
	}
	return at
}
