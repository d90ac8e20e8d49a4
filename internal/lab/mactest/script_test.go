package mactest

// The script that both a real Mac and Linux run.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sync/errgroup"
)

// generous limits the wait for something that must happen. refuse is how long the script
// tries something that must not happen: a refused packet may be answered or not.
const generous, refuse = 60 * time.Second, 3 * time.Second

// settle is how long a packet that was sent before a command returned may still be on
// its way, in queues or retransmitted by TCP. observe is how long after that nothing more
// may arrive.
const settle, observe = time.Second, 4 * time.Second

// peerName is the name of the peer that the script adds.
const peerName = "mactest"

// A world is the host on which the helper runs and the network that it reaches. The script
// accesses both only through it, so it is the same on a Mac and on Linux.
type world struct {
	// command runs a meshhelper command.
	command func(ctx context.Context, args ...string) (stdout, stderr string, status int, err error)
	// do runs a function that opens sockets on the host.
	do func(func() error) error
	// page is an address on the internet that answers GET by HTTP, with any status.
	page *url.URL
	// resolver answers DNS on the internet.
	resolver netip.AddrPort
	// download is a large file on the internet, by HTTP.
	download *url.URL
	// neighbour is an address of a host on the LAN; invalid if there is none.
	neighbour netip.Addr
	// keep saves an output under a file's name.
	keep func(name, text string)
	// look saves the host's configuration at one step of the script. Optional.
	look func(moment string)
	// ping sends an echo request from the host, and fails if there is no answer.
	// Optional.
	ping func(ctx context.Context, a netip.Addr) error
}

// A script is the sequence of checks that runs on each host.
type script struct {
	world
	own  Pair // the host's mesh addresses
	peer *Peer
}

// status has the parts of `status --json` that the script reads.
type status struct {
	Interface string       `json:"interface"`
	Addresses []netip.Addr `json:"addresses"`
	State     string       `json:"state"`
	Problems  []struct {
		Step    string `json:"step"`
		Message string `json:"message"`
		Hint    string `json:"hint"`
	} `json:"problems"`
}

// cli runs a command that must succeed.
func (s *script) cli(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), generous)
	defer cancel()
	stdout, stderr, code, err := s.command(ctx, args...)
	if err != nil || code != 0 {
		t.Fatalf("meshhelper %s: exit status %d, %v\n%s%s", strings.Join(args, " "), code, err, stderr, stdout)
	}
	return stdout
}

func (s *script) status(t *testing.T) status {
	t.Helper()
	var out status
	text := s.cli(t, "status", "--json")
	if err := json.Unmarshal([]byte(text), &out); err != nil || len(out.Addresses) != 2 {
		t.Fatalf("read status: %v\n%s", err, text)
	}
	return out
}

// run runs all steps. They are subtests that depend only on the first one.
func (s *script) run(t *testing.T) {
	at := s.status(t)
	s.own = Pair{V4: at.Addresses[0], V6: at.Addresses[1]}
	s.addPeer(t)
	t.Cleanup(func() {
		if err := s.peer.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("handshake", s.handshake)
	t.Run("own-address", s.ownAddress)
	t.Run("nothing-without-permission", s.nothing)
	t.Run("incoming", s.incoming)
	t.Run("routing", s.routing)
	t.Run("lan", s.lan)
	t.Run("incoming-taken-in-mid-download", s.incomingTaken)
	t.Run("routing-taken-in-mid-download", s.routingTaken)
	t.Run("no-problems", s.noProblems)
}

// addPeer adds the peer, external and without permissions, and starts it. Its
// configuration contains its private key and isn't saved.
func (s *script) addPeer(t *testing.T) {
	t.Helper()
	var added struct {
		Config string `json:"config"`
	}
	text := s.cli(t, "peer", "add", peerName, "--external", "--tunnel", "full", "--json")
	if err := json.Unmarshal([]byte(text), &added); err != nil {
		t.Fatal("read answer of peer add:", err)
	}
	// The peer is on this host, and its WireGuard doesn't resolve names.
	config := strings.Replace(added.Config, "Endpoint = localhost:", "Endpoint = 127.0.0.1:", 1)
	p, err := NewPeer(PeerOptions{Config: config, Do: s.do})
	if err != nil {
		t.Fatal(err)
	}
	s.peer = p
}

// permit gives the peer exactly these permissions.
func (s *script) permit(t *testing.T, permissions ...string) {
	t.Helper()
	s.cli(t, "peer", "deny", peerName, "incoming", "routing", "lan")
	if len(permissions) > 0 {
		s.cli(t, append([]string{"peer", "allow", peerName}, permissions...)...)
	}
}

// handshake has the peer send something and waits for its handshake.
func (s *script) handshake(t *testing.T) {
	began := time.Now().Truncate(time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), generous)
	defer cancel()
	for ctx.Err() == nil {
		one, stop := context.WithTimeout(ctx, 200*time.Millisecond)
		s.peer.Ping(one, s.own.V4) // it need not be answered
		stop()
		last, err := s.peer.LastHandshake()
		if err != nil {
			t.Fatal(err)
		}
		if !last.Before(began) {
			return
		}
	}
	t.Fatal("no handshake: is the helper's port open to this host itself?")
}

// listener opens a TCP listener on a mesh address of the host.
func (s *script) listener(t *testing.T, a netip.Addr) net.Listener {
	t.Helper()
	var l net.Listener
	err := s.do(func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func addrOf(l net.Listener) netip.AddrPort {
	at := l.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// helloServer opens a listener that sends hello on each connection.
func (s *script) helloServer(t *testing.T, a netip.Addr) netip.AddrPort {
	t.Helper()
	l := s.listener(t, a)
	var run errgroup.Group
	t.Cleanup(func() {
		l.Close()
		run.Wait()
	})
	run.Go(func() error {
		for {
			c, err := l.Accept()
			if err != nil {
				return nil // closed
			}
			c.SetDeadline(time.Now().Add(generous))
			io.WriteString(c, hello)
			c.Close()
		}
	})
	return addrOf(l)
}

const hello = "hello from the host\n"

// readHello reads hello from a connection that dial opens.
func readHello(ctx context.Context, dial func(context.Context) (net.Conn, error)) error {
	c, err := dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	end, _ := ctx.Deadline()
	c.SetDeadline(end)
	got, err := io.ReadAll(c)
	if string(got) != hello {
		return fmt.Errorf("read %q: %w", got, errors.Join(err, io.ErrUnexpectedEOF))
	}
	return nil
}

// ownAddress connects from the host to its own mesh addresses: on a Mac the route
// to the IPv4 one leads into the tunnel's interface.
func (s *script) ownAddress(t *testing.T) {
	for _, a := range s.own.List() {
		t.Run(family(a), func(t *testing.T) {
			at := s.helloServer(t, a)
			ctx, cancel := context.WithTimeout(t.Context(), 3*refuse)
			defer cancel()
			err := readHello(ctx, func(ctx context.Context) (c net.Conn, err error) {
				err = s.do(func() (err error) {
					c, err = (&net.Dialer{}).DialContext(ctx, "tcp", at.String())
					return err
				})
				return c, err
			})
			if err != nil {
				t.Errorf("the host can't reach its own mesh address %v by TCP: %v", a, err)
			}
			if s.ping == nil {
				return
			}
			if err := s.ping(ctx, a); err != nil {
				t.Errorf("the host can't ping its own mesh address %v: %v", a, err)
			}
		})
	}
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "ipv4"
	}
	return "ipv6"
}

// answers reports whether the peer can read hello within a time.
func (s *script) answers(t *testing.T, at netip.AddrPort, within time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	return readHello(ctx, func(ctx context.Context) (net.Conn, error) { return s.peer.DialTCP(ctx, at) })
}

// mustBeRefused tries to reach addresses by TCP and with echo requests, and fails if a
// packet from one of them comes out of the tunnel.
func (s *script) mustBeRefused(t *testing.T, all ...netip.AddrPort) {
	t.Helper()
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), refuse)
	defer cancel()
	var tries errgroup.Group
	for _, at := range all {
		tries.Go(func() error {
			if c, err := s.peer.DialTCP(ctx, at); err == nil {
				c.Close()
			}
			return nil
		})
		tries.Go(func() error {
			s.peer.Ping(ctx, at.Addr())
			return nil
		})
	}
	tries.Wait()
	for _, at := range all {
		got := s.peer.Arrived(at.Addr(), began)
		t.Logf("%d packets came from %v", got.Packets, at)
		if got.Packets > 0 {
			t.Errorf("the peer reaches %v, which it may not", at.Addr())
		}
	}
	t.Logf("%d ICMP errors came", s.peer.Refusals(began))
}

// nothing tries everything that a peer without permissions must not reach.
func (s *script) nothing(t *testing.T) {
	s.permit(t)
	all := []netip.AddrPort{s.helloServer(t, s.own.V4), s.helloServer(t, s.own.V6), s.resolver}
	if s.neighbour.IsValid() {
		all = append(all, netip.AddrPortFrom(s.neighbour, 53))
	}
	s.mustBeRefused(t, all...)
}

// incoming checks that the host's own mesh address answers the peer, and the internet
// doesn't.
func (s *script) incoming(t *testing.T) {
	s.permit(t, "incoming")
	for _, a := range s.own.List() {
		if err := s.answers(t, s.helloServer(t, a), generous); err != nil {
			t.Errorf("with incoming %v doesn't answer: %v", a, err)
		}
	}
	s.mustBeRefused(t, s.resolver)
	s.permit(t)
	s.mustBeRefused(t, s.helloServer(t, s.own.V4), s.helloServer(t, s.own.V6))
}

// hostReaches skips the test if the host itself can't reach an address.
func (s *script) hostReaches(t *testing.T, at string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*refuse)
	defer cancel()
	err := s.do(func() error {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", at)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err != nil {
		t.Skipf("the host itself can't reach %s, so it can't for a peer: %v", at, err)
	}
}

// endOf returns the address and port of a page, as the host resolves its name. A Mac may
// not have IPv6 to the internet, so IPv4 comes first.
func (s *script) endOf(t *testing.T, u *url.URL) netip.AddrPort {
	t.Helper()
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := netip.ParseAddr(u.Hostname()); err == nil {
		return netip.AddrPortFrom(a, uint16(n))
	}
	all, err := net.DefaultResolver.LookupNetIP(t.Context(), "ip4", u.Hostname())
	if err != nil || len(all) == 0 {
		t.Skipf("the host itself can't resolve %s: %v", u.Hostname(), err)
	}
	return netip.AddrPortFrom(all[0].Unmap(), uint16(n))
}

// client returns an HTTP client whose connections come from the peer.
func (s *script) client(at netip.AddrPort) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return s.peer.DialTCP(ctx, at) },
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// routing checks that the peer reaches the internet through the host: a page, and a
// resolver by UDP.
func (s *script) routing(t *testing.T) {
	at := s.endOf(t, s.page)
	s.hostReaches(t, at.String())
	s.permit(t, "routing")
	s.keep("rules-with-routing.txt", s.cli(t, "rules"))
	s.keep("status-with-routing.json", s.cli(t, "status", "--json"))
	if s.look != nil {
		s.look("while-routing")
	}
	t.Run("http", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), generous)
		defer cancel()
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.page.String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := s.client(at).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
		t.Logf("%s: %s, %d bytes, %v", s.page, answer.Status, len(body), err)
	})
	t.Run("dns", func(t *testing.T) {
		if err := s.resolve(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("own-address-still-refused", func(t *testing.T) {
		s.mustBeRefused(t, s.helloServer(t, s.own.V4))
	})
	t.Run("host-reaches-itself", s.ownAddress)
}

// resolve asks the resolver for a name until it answers.
func (s *script) resolve(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, generous)
	defer cancel()
	question := dnsmessage.Message{
		Header: dnsmessage.Header{ID: 0x6d65, RecursionDesired: true},
		Questions: []dnsmessage.Question{{
			Name: dnsmessage.MustNewName("example.com."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := question.Pack()
	if err != nil {
		return err
	}
	c, err := s.peer.DialUDP(s.resolver)
	if err != nil {
		return err
	}
	defer c.Close()
	for ctx.Err() == nil {
		if _, err := c.Write(b); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		buf := make([]byte, 2048)
		n, err := c.Read(buf)
		if err != nil {
			continue
		}
		var answer dnsmessage.Parser
		if header, err := answer.Start(buf[:n]); err == nil && header.Response && header.ID == question.ID {
			return nil
		}
	}
	return fmt.Errorf("ask %v for example.com: no answer: %w", s.resolver, context.Cause(ctx))
}

// lan tries to reach a host on the LAN with and without the permission.
func (s *script) lan(t *testing.T) {
	if !s.neighbour.IsValid() {
		t.Skip("the host has no neighbour to try: no router by IPv4")
	}
	s.permit(t, "routing")
	t.Run("denied", func(t *testing.T) { s.mustBeRefused(t, netip.AddrPortFrom(s.neighbour, 53)) })
	s.permit(t, "routing", "lan")
	t.Run("allowed", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*refuse)
		defer cancel()
		began := time.Now()
		var tries errgroup.Group
		tries.Go(func() error {
			s.peer.Ping(ctx, s.neighbour)
			return nil
		})
		tries.Go(func() error {
			if c, err := s.peer.DialTCP(ctx, netip.AddrPortFrom(s.neighbour, 53)); err == nil {
				c.Close()
			}
			return nil
		})
		tries.Wait()
		if s.peer.Arrived(s.neighbour, began).Packets > 0 {
			return
		}
		if s.refusesAll(t) {
			t.Skipf("%v answers the host itself neither, so the refusal above proves nothing", s.neighbour)
		}
		t.Errorf("with lan %v doesn't answer", s.neighbour)
	})
	s.permit(t, "routing")
	t.Run("denied-again", func(t *testing.T) { s.mustBeRefused(t, netip.AddrPortFrom(s.neighbour, 53)) })
}

// refusesAll reports whether the host itself gets no answer from the neighbour, neither a
// connection nor a refusal.
func (s *script) refusesAll(t *testing.T) bool {
	ctx, cancel := context.WithTimeout(t.Context(), refuse)
	defer cancel()
	err := s.do(func() error {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(s.neighbour, 53).String())
		if err == nil {
			c.Close()
		}
		return err
	})
	return err != nil && ctx.Err() != nil
}

// incomingTaken revokes incoming while the host sends to the peer: a stream of TCP, and
// datagrams that contain the time at which they were sent.
func (s *script) incomingTaken(t *testing.T) {
	for _, a := range s.own.List() {
		t.Run(family(a), func(t *testing.T) {
			s.permit(t, "incoming")
			l := s.listener(t, a)
			var run errgroup.Group
			t.Cleanup(func() {
				l.Close()
				run.Wait()
			})
			run.Go(func() error {
				c, err := l.Accept()
				if err != nil {
					return nil // closed
				}
				defer c.Close()
				context.AfterFunc(t.Context(), func() { c.Close() })
				for block := make([]byte, 16<<10); ; {
					if _, err := c.Write(block); err != nil {
						return nil
					}
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), generous)
			defer cancel()
			c, err := s.peer.DialTCP(ctx, addrOf(l))
			if err != nil {
				t.Fatal(err)
			}
			stamps := s.startStamps(t, a)
			d := startDownload(t, c)
			d.waitFor(t, 256<<10)
			stamps.waitFor(t, 20)
			s.cli(t, "peer", "deny", peerName, "incoming")
			returned := time.Now()
			s.mustEnd(t, a, d, returned)
			stamps.mustEnd(t, returned)
			if err := s.answers(t, s.helloServer(t, a), refuse); err == nil {
				t.Error("a new connection passes")
			}
		})
	}
}

// routingTaken revokes routing during a download from the internet.
func (s *script) routingTaken(t *testing.T) {
	at := s.endOf(t, s.download)
	s.hostReaches(t, at.String())
	s.permit(t, "routing")
	ctx, cancel := context.WithTimeout(t.Context(), 2*generous)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.download.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := s.client(at).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	if answer.StatusCode != http.StatusOK {
		t.Skipf("%s answers %s", s.download, answer.Status)
	}
	d := startDownload(t, answer.Body)
	d.waitFor(t, 256<<10)
	s.cli(t, "peer", "deny", peerName, "routing")
	s.mustEnd(t, at.Addr(), d, time.Now())
	s.mustBeRefused(t, at)
}

// mustEnd watches the tunnel after a permission was revoked: no more of a download, whose
// reader continues to read, may arrive.
func (s *script) mustEnd(t *testing.T, from netip.Addr, d *download, returned time.Time) {
	t.Helper()
	time.Sleep(time.Until(returned.Add(settle + observe)))
	d.mustBeRunning(t)
	first, late := s.peer.Arrived(from, returned), s.peer.Arrived(from, returned.Add(settle))
	t.Logf("%d bytes were read; %d bytes in %d packets, sent before, arrived in the %v after the command returned",
		d.read.Load(), first.Bytes-late.Bytes, first.Packets-late.Packets, settle)
	if late.Packets > 0 {
		t.Errorf("%d packets with %d bytes arrived later, the last %v after the command returned",
			late.Packets, late.Bytes, late.Last.Sub(returned))
	}
}

// A download reads until it is closed. Its pace is limited, so that it isn't complete
// before the command that cuts it.
type download struct {
	body io.ReadCloser
	read atomic.Int64 // bytes
	run  errgroup.Group
	done chan struct{} // closed when reading ended
	err  error         // why, once it has
}

// downloadPace is how long the reader pauses after each block of 16 KiB, for about
// 1.6 MB/s.
const downloadPace = 10 * time.Millisecond

func startDownload(t *testing.T, body io.ReadCloser) *download {
	d := &download{body: body, done: make(chan struct{})}
	d.run.Go(func() error {
		defer close(d.done)
		for buf := make([]byte, 16<<10); ; time.Sleep(downloadPace) {
			n, err := d.body.Read(buf)
			d.read.Add(int64(n))
			if err != nil {
				d.err = err
				return nil
			}
		}
	})
	t.Cleanup(func() {
		d.body.Close()
		d.run.Wait()
	})
	return d
}

// waitFor waits until that many bytes have been read.
func (d *download) waitFor(t *testing.T, bytes int64) {
	t.Helper()
	for end := time.Now().Add(generous); d.read.Load() < bytes; time.Sleep(downloadPace) {
		d.mustBeRunning(t)
		if time.Now().After(end) {
			t.Fatalf("only %d of %d bytes arrived in %v", d.read.Load(), bytes, generous)
		}
	}
}

// mustBeRunning fails if the download has ended: cutting it would then prove nothing.
func (d *download) mustBeRunning(t *testing.T) {
	t.Helper()
	select {
	case <-d.done:
		if errors.Is(d.err, io.EOF) {
			t.Fatalf("the download ended after %d bytes", d.read.Load())
		}
	default:
	}
}

// stamps are datagrams that the host sends to the peer, each with the time at which it was
// sent.
type stamps struct {
	mu      sync.Mutex
	arrived []time.Time // when those that arrived had been sent
	sent    atomic.Int64
}

// stampPace is the time between two datagrams.
const stampPace = 5 * time.Millisecond

// startStamps has the peer open a flow to a socket of the host, which then keeps sending.
func (s *script) startStamps(t *testing.T, a netip.Addr) *stamps {
	t.Helper()
	var host *net.UDPConn
	err := s.do(func() (err error) {
		host, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	at := host.LocalAddr().(*net.UDPAddr).AddrPort()
	peer, err := s.peer.DialUDP(netip.AddrPortFrom(a, at.Port()))
	if err != nil {
		t.Fatal(err)
	}
	out := &stamps{}
	epoch := time.Now()
	var run errgroup.Group
	t.Cleanup(func() {
		host.Close()
		peer.Close()
		run.Wait()
	})
	run.Go(func() error {
		buf := make([]byte, 64)
		for {
			n, err := peer.Read(buf)
			if err != nil {
				return nil // closed
			}
			if d, err := time.ParseDuration(string(buf[:n])); err == nil {
				out.mu.Lock()
				out.arrived = append(out.arrived, epoch.Add(d))
				out.mu.Unlock()
			}
		}
	})
	if _, err := peer.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	host.SetReadDeadline(time.Now().Add(generous))
	_, to, err := host.ReadFromUDPAddrPort(make([]byte, 64))
	if err != nil {
		t.Fatal("the peer's datagram doesn't arrive:", err)
	}
	run.Go(func() error {
		for tick := time.NewTicker(stampPace); ; <-tick.C {
			// The time is taken first: what bears a later one than a command's end was
			// sent after it.
			_, err := host.WriteToUDPAddrPort([]byte(time.Since(epoch).String()), to)
			out.sent.Add(1)
			if errors.Is(err, net.ErrClosed) {
				tick.Stop()
				return nil
			}
		}
	})
	return out
}

func (s *stamps) waitFor(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(generous); ; time.Sleep(stampPace) {
		s.mu.Lock()
		have := len(s.arrived)
		s.mu.Unlock()
		if have >= n {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d of %d datagrams arrived, %d were sent", have, n, s.sent.Load())
		}
	}
}

// mustEnd reports datagrams that arrived though they were sent after a time. No
// allowance is made: each bears its own.
func (s *stamps) mustEnd(t *testing.T, returned time.Time) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	late := 0
	for _, at := range s.arrived {
		if at.After(returned) {
			late++
		}
	}
	t.Logf("of %d datagrams that the host sent, %d arrived", s.sent.Load(), len(s.arrived))
	if late > 0 {
		t.Errorf("%d datagrams arrived that were sent after the command returned", late)
	}
}

// noProblems reports what the helper itself finds wrong at the end.
func (s *script) noProblems(t *testing.T) {
	s.permit(t, "routing")
	at := s.status(t)
	if at.State != "enforcing" {
		t.Errorf("the state is %q", at.State)
	}
	for _, p := range at.Problems {
		t.Logf("a problem: %s: %s; %s", p.Step, p.Message, p.Hint)
	}
	s.permit(t)
}
