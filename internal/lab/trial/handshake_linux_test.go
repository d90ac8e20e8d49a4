package trial

// A flood of WireGuard handshakes from a host that isn't a peer.

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.zx2c4.com/wireguard/device"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// initiations returns handshake initiations to a host's key, in datagrams from the given
// sources. Each has a valid first MAC and random contents otherwise, as any host that
// knows the public key can make them (WireGuard whitepaper, 5.3 and 5.4.4).
func initiations(t *testing.T, key string, sources []netip.Addr, to netip.AddrPort) [][]byte {
	t.Helper()
	public, err := netlab.ParseKey(key)
	if err != nil {
		t.Fatal(err)
	}
	var macs device.CookieGenerator
	macs.Init(device.NoisePublicKey(public))
	out := make([][]byte, 0, len(sources))
	for i, from := range sources {
		message := make([]byte, device.MessageInitiationSize)
		rand.Read(message)
		binary.LittleEndian.PutUint32(message, device.MessageInitiationType)
		clear(message[len(message)-16:])
		macs.AddMacs(message)
		out = append(out, netlab.UDPPacket(netip.AddrPortFrom(from, uint16(1024+i)), to, message))
	}
	return out
}

// TestHandshakeFlood has a host that isn't a peer, but knows the public key, send
// initiations as fast as it can, from one address and from many forged ones. A peer's
// session goes on, another peer completes a new handshake, and the helper's memory grows
// by no more than the device's handshake queue.
func TestHandshakeFlood(t *testing.T) {
	m := newSilentStage(t)
	start(t, m)
	addPeers(t, m)
	permit(t, m, "C", everything)
	permit(t, m, "D", everything)
	at := netlab.Addresses()
	serveBoth(t, m.B)
	to := status(t, m).Address()
	near, err := m.R.Netlink().LinkByName("i0")
	if err != nil {
		t.Fatal(err)
	}
	// A device queues 1,024 handshakes, each in a buffer of 64 KiB (QueueHandshakeSize
	// and MaxSegmentSize of wireguard-go). Pools and the garbage collector keep the same
	// amount again.
	const queue = 1024 * 64 // kB
	const messages = 4096
	start := loadOf(t, m.Helper.PID()).kilobytes
	one, many := make([]netip.Addr, messages), make([]netip.Addr, messages)
	for i := range messages {
		one[i] = at.I.V4
		many[i] = netip.AddrFrom4([4]byte{198, 51, byte(101 + i>>8), byte(i)})
	}
	for name, sources := range map[string][]netip.Addr{"one source": one, "forged sources": many} {
		t.Run(name, func(t *testing.T) {
			packets := initiations(t, status(t, m).PublicKey, sources, netip.AddrPortFrom(at.BUplink.V4, listenPort))
			if _, err := connect(m.C, to.V4); err != nil {
				t.Fatal("before the flood:", err)
			}
			before := loadOf(t, m.Helper.PID()).kilobytes
			f := newFlooder(t, m.I, "eth0")
			f.mac = near.Attrs().HardwareAddr
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var sending errgroup.Group
			began := time.Now()
			sending.Go(func() error { return f.run(ctx, func(n uint64) []byte { return packets[n%messages] }) })
			old, err := m.Peers["D"].End.LastHandshake()
			if err != nil {
				t.Fatal(err)
			}
			var running []time.Duration
			for range 20 {
				took, err := connect(m.C, to.V4)
				if err != nil {
					t.Error("a peer's session during the flood:", err)
				}
				running = append(running, took)
			}
			if err := m.Peers["D"].End.Renew(); err != nil {
				t.Fatal(err)
			}
			renewed := time.Now()
			for {
				if _, err := connect(m.D, to.V4); err == nil {
					break
				}
				if time.Since(renewed) > time.Minute {
					t.Fatal("no new handshake during the flood in a minute")
				}
			}
			took := time.Since(renewed)
			if now, err := m.Peers["D"].End.LastHandshake(); err != nil || !now.After(old) {
				t.Errorf("D's last handshake is %v, before it was %v, %v", now, old, err)
			}
			sent := f.sent.Load()
			lasted := time.Since(began)
			cancel()
			if err := sending.Wait(); err != nil {
				t.Fatal(err)
			}
			after := loadOf(t, m.Helper.PID()).kilobytes
			if after > start+3*queue {
				t.Errorf("the helper has %d MB, %d MB before any flood", after>>10, start>>10)
			}
			slices.Sort(running)
			t.Logf("%.0f messages/s; a session's connections took at most %v, a new session %v; memory %d MB, before %d MB",
				float64(sent)/lasted.Seconds(), running[len(running)-1], took, after>>10, before>>10)
		})
	}
}
