//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/stock"
)

// fullDisk is a helper of which a change is in force and can't be saved, or isn't
// made at all.
type fullDisk struct {
	api.Service
	peer    api.Peer
	changes bool
}

var notSaved = api.Errorf(api.CodeNotSaved, "in force now, but not saved: after a restart it is back: no space left on device").
	WithHint("make room; it is saved then")

func (f *fullDisk) Status() api.Status {
	p := mesh.DefaultPrefixes()
	return api.Status{State: api.Enforcing, MeshPrefixes: []netip.Prefix{p.V4, p.V6}, Peers: []api.Peer{f.peer}}
}

func (f *fullDisk) Peer(string) (api.Peer, error) { return f.peer, nil }

func (f *fullDisk) Config(string) (api.Config, error) {
	return api.Config{Text: "[Interface]\nPrivateKey = " + stock.KeyPlaceholder + "\nAddress = 100.64.0.9/32\n\n" +
		"[Peer]\nPublicKey = 4+kGYe2dVTRjEBG9/eVGCXT1Y2OY5tjp2j3GIYuBrkg=\nAllowedIPs = 0.0.0.0/0\nEndpoint = 203.0.113.1:51820\n"}, nil
}

func (f *fullDisk) ChangePeer(_ context.Context, _ string, c api.PeerChange) (api.Changed, error) {
	if f.changes && c.PublicKey != "" {
		f.peer.PublicKey = c.PublicKey
	}
	return api.Changed{}, notSaved
}

// command runs a command on the helper and returns its status and what it printed.
func (f *fullDisk) command(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "half")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	l, err := api.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	server := api.NewServer(api.ServerOptions{Listener: l, Service: f, Logger: slog.New(slog.DiscardHandler),
		Access: api.Access{Operator: uint32(os.Getuid())}})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- server.Run(ctx) }()
	var out, talk bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &talk, random: rand.Reader,
		getenv: func(name string) string { return map[string]string{"MESHHELPER_SOCKET": path}[name] }}
	status = a.main(args)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	return status, out.String(), talk.String()
}

// TestInForceButNotSaved takes a permission and a key from a peer while the disk is
// full: the command fails, says what holds and what to do, and shows a new key that
// is in force, also as JSON.
func TestInForceButNotSaved(t *testing.T) {
	old := api.Peer{Name: "phone", PublicKey: "4+kGYe2dVTRjEBG9/eVGCXT1Y2OY5tjp2j3GIYuBrkg=", Kind: mesh.External,
		Addresses: []netip.Addr{netip.MustParseAddr("100.64.0.9"), netip.MustParseAddr("fd6d:6573:6800::9")}}
	const says = "meshhelper: in force now, but not saved: after a restart it is back: no space left on device; make room; it is saved then\n"
	const saysJSON = `{"error":{"code":"not_saved","message":"in force now, but not saved: after a restart it is back: no space left on device","hint":"make room; it is saved then"}}` + "\n"
	for _, c := range []struct {
		args    string
		changes bool
		key     bool // whether a private key is shown
	}{
		{"peer deny phone routing", true, false},
		{"peer deny phone routing --json", true, false},
		{"peer rekey phone", true, true},
		{"peer rekey phone --json", true, true},
		{"peer rekey phone", false, false},
	} {
		f := &fullDisk{peer: old, changes: c.changes}
		status, stdout, stderr := f.command(t, strings.Fields(c.args)...)
		want := says
		if strings.HasSuffix(c.args, "--json") {
			want = saysJSON
		}
		if status != exitFailed || !strings.HasSuffix(stderr, want) {
			t.Errorf("%s: status %d, %q", c.args, status, stderr)
		}
		shown := strings.Contains(stdout, "PrivateKey = ") && !strings.Contains(stdout, stock.KeyPlaceholder)
		if shown != c.key || !c.key && stdout != "" {
			t.Errorf("%s, in force %t: printed %q", c.args, c.changes, stdout)
		}
	}
}

// TestQRCodeNeedsRoom prints a QR code on a terminal that is too narrow for it: it
// would break at the edge, and no camera reads it then.
func TestQRCodeNeedsRoom(t *testing.T) {
	key, err := mesh.GeneratePrivateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	own := mesh.Addresses{netip.MustParseAddr("100.64.0.9"), netip.MustParseAddr("fd6d:6573:6800::9")}
	config := stock.ForPeer(key, own, key.Public(), mesh.Endpoint{Host: "203.0.113.1", Port: 51820}, stock.Everything(), nil)
	for rows, whole := range map[int]bool{0: true, 24: false, 80: true} {
		var out, talk bytes.Buffer
		a := &app{stdout: &out, stderr: &talk, columns: 80, rows: rows, getenv: func(string) string { return "" }}
		a.printQR(config, "phone")
		if said := strings.Contains(talk.String(), "this terminal has 24, so a camera may not see all of it") &&
			strings.Contains(talk.String(), "meshhelper peer rekey phone --output FILE"); said == whole || out.Len() == 0 {
			t.Errorf("%d rows: printed %d bytes, says %q", rows, out.Len(), talk.String())
		}
	}
	for columns, drawn := range map[int]bool{0: true, 60: false, 80: true} {
		var out, talk bytes.Buffer
		a := &app{stdout: &out, stderr: &talk, columns: columns, getenv: func(string) string { return "" }}
		a.printQR(config, "phone")
		if (out.Len() > 0) != drawn {
			t.Errorf("%d columns: printed %d bytes", columns, out.Len())
		}
		if said := strings.Contains(talk.String(), "this terminal 60, so it isn't printed"); said == drawn ||
			!drawn && !strings.Contains(talk.String(), "meshhelper peer rekey phone --qr, or for a file instead: meshhelper peer rekey phone --output FILE") {
			t.Errorf("%d columns: says %q", columns, talk.String())
		}
	}
}
