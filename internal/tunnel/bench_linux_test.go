package tunnel

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun/tuntest"
)

// BenchmarkBind carries datagrams over loopback in batches, with the sockets of this package,
// which check each source against the addresses of 10,000 peers, and with those of
// wireguard-go.
func BenchmarkBind(b *testing.B) {
	ours := func() conn.Bind {
		var inside loopFilter
		for _, p := range benchPeers(10_000) {
			inside.addPrefixes(p.AllowedIPs)
		}
		s := NewSockets(slog.New(slog.DiscardHandler))
		s.Attach(inside.loops, func() {})
		return s
	}
	for _, size := range []int{128, 1420} {
		for _, batch := range []int{1, 64} {
			for name, bind := range map[string]func() conn.Bind{"ours": ours, "stock": conn.NewDefaultBind} {
				b.Run(fmt.Sprintf("size=%d/batch=%d/%s", size, batch, name), func(b *testing.B) { benchBind(b, bind, size, batch) })
			}
		}
	}
}

func benchBind(b *testing.B, bind func() conn.Bind, size, batch int) {
	from, to := bind(), bind()
	if _, _, err := from.Open(0); err != nil {
		b.Fatal(err)
	}
	receivers, port, err := to.Open(0)
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		for _, bind := range []conn.Bind{from, to} {
			if s, ok := bind.(*Sockets); ok {
				s.Release()
			} else {
				_ = bind.Close()
			}
		}
	}()
	ep, err := from.ParseEndpoint(fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		b.Fatal(err)
	}
	bufs := make([][]byte, min(batch, from.BatchSize()))
	for i := range bufs {
		bufs[i] = make([]byte, size, 1<<16)
	}
	space, sizes, eps := make([][]byte, to.BatchSize()), make([]int, to.BatchSize()), make([]conn.Endpoint, to.BatchSize())
	for i := range space {
		space[i] = make([]byte, 1<<16-1)
	}
	b.SetBytes(int64(size * len(bufs)))
	b.ReportAllocs()
	for b.Loop() {
		for i := range bufs {
			bufs[i] = bufs[i][:size]
		}
		if err := from.Send(bufs, ep); err != nil {
			b.Fatal(err)
		}
		for left := len(bufs); left > 0; {
			n, err := receivers[0](space, sizes, eps)
			if err != nil {
				b.Fatal(err)
			}
			left -= n
		}
	}
}

// BenchmarkTunnel carries packets through two devices over loopback, with the
// sockets of this package and with those of wireguard-go.
func BenchmarkTunnel(b *testing.B) {
	for name, bind := range map[string]func() conn.Bind{
		"ours":  func() conn.Bind { return nil },
		"stock": conn.NewDefaultBind,
	} {
		b.Run(name, func(b *testing.B) {
			a, c := benchPair(b, bind)
			ping(b, a, c)
			packet := make([]byte, 1400)
			copy(packet, tuntest.Ping(c.addr[0], a.addr[0]))
			packet[2], packet[3] = byte(len(packet)>>8), byte(len(packet)&0xff)
			const window = 64
			b.SetBytes(int64(len(packet)))
			b.ReportAllocs()
			inFlight, before := 0, cpuTime(b)
			for b.Loop() {
				a.send(b, packet)
				if inFlight++; inFlight == window {
					for ; inFlight > window/2; inFlight-- {
						c.receive(b)
					}
				}
			}
			for ; inFlight > 0; inFlight-- {
				c.receive(b)
			}
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
		})
	}
}

// cpuTime returns the CPU time of the process, which doesn't depend on other load as the
// elapsed time does.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchPair is like newPair, with ends that use the given Bind.
func benchPair(b *testing.B, bind func() conn.Bind) (x, y *end) {
	b.Helper()
	x, y = newEndOn(b, 20, bind()), newEndOn(b, 21, bind())
	if x.Set(y.peer()) != nil || y.Set(x.peer()) != nil {
		b.Fatal("the device refuses the peers")
	}
	return x, y
}
