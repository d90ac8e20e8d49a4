package daemon

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host/hostfake"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/reconcile"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// BenchmarkToggle measures one permission of one peer from the change to its
// being in force, with the disk and without a packet filter.
func BenchmarkToggle(b *testing.B) {
	for _, peers := range []int{60, 10000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			d := benchDaemon(b, peers)
			for i := 0; b.Loop(); i++ {
				_, err := d.ChangePeer(b.Context(), "p1", api.PeerChange{
					Permissions: map[string]api.PermissionChange{"routing": {Allowed: i%2 == 0}},
				})
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkDeny measures a permission that is taken away, as BenchmarkToggle does: the
// disk's part is that of fsync(2), which TMPDIR on a tmpfs leaves out.
func BenchmarkDeny(b *testing.B) {
	for _, peers := range []int{60, 10000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			d := benchDaemon(b, peers)
			set := func(on bool) {
				if _, err := d.ChangePeer(b.Context(), "p1", api.PeerChange{
					Permissions: map[string]api.PermissionChange{"routing": {Allowed: on}},
				}); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				b.StopTimer()
				set(true)
				b.StartTimer()
				set(false)
			}
		})
	}
}

// BenchmarkStatus measures what a look at the status costs.
func BenchmarkStatus(b *testing.B) {
	for _, peers := range []int{60, 10000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			d := benchDaemon(b, peers)
			for b.Loop() {
				if len(d.Status().Peers) != peers {
					b.Fatal("peers are missing")
				}
			}
		})
	}
}

// benchDaemon runs a daemon with some peers.
func benchDaemon(b *testing.B, peers int) *Daemon {
	d, err := New(Options{
		Host: hostfake.New().Host(), StateDir: b.TempDir(), Logger: slog.New(slog.DiscardHandler),
		NewTunnel: func(dev tun.Device, _ mesh.PrivateKey, _ uint16) (reconcile.Tunnel, error) {
			return &fakeTunnel{dev: dev, done: make(chan struct{})}, nil
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	_, err = d.wanted.Edit(b.Context(), func(doc *wanted.Document, _ time.Time) (mesh.PublicKey, error) {
		taken := map[netip.Addr]bool{}
		for i := range peers {
			key := mesh.PublicKey{1: 1}
			binary.BigEndian.PutUint32(key[4:], uint32(i))
			free, err := d.id.Prefixes.Propose(key, func(a netip.Addr) bool { return a == d.id.Own[0] || taken[a] })
			if err != nil {
				return key, err
			}
			taken[free[0]] = true
			doc.Peers = append(doc.Peers, mesh.Peer{
				Name: fmt.Sprint("p", i), PublicKey: key, Kind: mesh.External, Addresses: mesh.Addresses{free[0], free[1]},
			})
		}
		return mesh.PublicKey{}, nil
	})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error)
	go func() { ended <- d.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			b.Error(err)
		}
		d.Close()
	})
	if err := d.awaitEnforced(ctx, d.wanted.Document().Generation, time.Now().Add(time.Minute)); err.why != "" {
		b.Fatal(err)
	}
	return d
}
