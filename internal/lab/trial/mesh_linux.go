package trial

// The helper on B, its peers, and its commands.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

const (
	program    = "github.com/meshhelper/meshhelper/cmd/meshhelper"
	listenPort = 51820
	// startWait is how long the helper may take to be ready.
	startWait = 60 * time.Second
	// commandWait bounds a command; the product's own limit is far below it.
	commandWait = 60 * time.Second
)

// Mesh is the helper on B and the peers that were added to it.
type Mesh struct {
	*netlab.Picture
	Helper *netlab.Process // the running helper; nil before Start and after Stop
	Peers  map[string]*Peer

	binary   string
	helper   string // the program that Start starts: binary, or an edited one
	env      []string
	stateDir string
}

// Peer is a peer of the mesh with a stock WireGuard end.
type Peer struct {
	Name      string
	Host      *netlab.Host
	Addresses netlab.Pair
	Config    string // as the command printed it
	End       *netlab.Tunnel
}

// New builds the program. No helper runs yet.
func New(p *netlab.Picture) (*Mesh, error) {
	binary, err := netlab.Build(program)
	if err != nil {
		return nil, err
	}
	return &Mesh{Picture: p, Peers: map[string]*Peer{}, binary: binary, helper: binary,
		stateDir: filepath.Join(p.Lab.Dir(), "state")}, nil
}

// Start starts the helper and waits until it is ready.
func (m *Mesh) Start(ctx context.Context, args ...string) error {
	endpoint := netip.AddrPortFrom(netlab.Addresses().BUplink.V4, listenPort)
	all := append([]string{"run", "--state-dir", m.stateDir, "--listen-port", fmt.Sprint(listenPort),
		"--endpoint", endpoint.String()}, args...)
	p, err := m.B.Start(m.env, m.helper, all...)
	if err != nil {
		return err
	}
	m.Helper = p
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	for {
		status, err := m.Status(ctx)
		if err == nil && status.State != "starting" {
			return nil
		}
		select {
		case <-p.Done():
			return fmt.Errorf("start helper: it ended: %v\n%s", p.Err(), p.Output())
		case <-ctx.Done():
			return fmt.Errorf("start helper: not ready: %w\n%s", errors.Join(err, ctx.Err()), p.Output())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Stop stops the helper with SIGTERM and waits for its end.
func (m *Mesh) Stop() error {
	p := m.Helper
	m.Helper = nil
	if err := p.Stop(); err != nil {
		return fmt.Errorf("stop helper: %w\n%s", err, p.Output())
	}
	return nil
}

// Output is a command's output and exit status.
type Output struct {
	Args           []string
	Stdout, Stderr string
	Status         int
}

// Do runs a command on B and returns its output, with an error for an exit status other
// than 0.
func (m *Mesh) Do(ctx context.Context, args ...string) (Output, error) {
	ctx, cancel := context.WithTimeout(ctx, commandWait)
	defer cancel()
	o := Output{Args: args}
	var err error
	if o.Stdout, o.Stderr, o.Status, err = m.B.Run(ctx, "", m.binary, args...); err != nil {
		return o, err
	}
	if o.Status != 0 {
		return o, fmt.Errorf("meshhelper %s: status %d: %s", strings.Join(args, " "), o.Status, strings.TrimSpace(o.Stderr+o.Stdout))
	}
	return o, nil
}

// Status is the part of `status --json` that the tests use.
type Status struct {
	Interface  string       `json:"interface"`
	PublicKey  string       `json:"publicKey"`
	Addresses  []netip.Addr `json:"addresses"`
	State      string       `json:"state"`
	Generation int          `json:"generation"`
	Enforced   int          `json:"enforced"`
	Forwarding struct {
		IPv4 bool `json:"ipv4"`
		IPv6 bool `json:"ipv6"`
	} `json:"forwarding"`
	Problems []struct {
		Step    string `json:"step"`
		Message string `json:"message"`
		Hint    string `json:"hint"`
	} `json:"problems"`
	Uplink  string `json:"uplink"`
	Repairs int    `json:"repairs"`
	Peers   []struct {
		Name        string           `json:"name"`
		Addresses   []netip.Addr     `json:"addresses"`
		Permissions map[string]Grant `json:"permissions"`
		Refused     map[string]int   `json:"refused"` // packets, by class
	} `json:"peers"`
}

// Grant is one permission of a peer, and when it ends by itself.
type Grant struct {
	Allowed bool      `json:"allowed"`
	Until   time.Time `json:"until"`
}

// Status returns the helper's status.
func (m *Mesh) Status(ctx context.Context) (Status, error) {
	var s Status
	o, err := m.Do(ctx, "status", "--json")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal([]byte(o.Stdout), &s); err != nil {
		return s, fmt.Errorf("read status: %w\n%s", err, o.Stdout)
	}
	if len(s.Addresses) != 2 {
		return s, fmt.Errorf("read status: %d addresses of the host, want 2\n%s", len(s.Addresses), o.Stdout)
	}
	return s, nil
}

// Address returns the host's mesh address of each family.
func (s Status) Address() netlab.Pair { return netlab.Pair{V4: s.Addresses[0], V6: s.Addresses[1]} }

// AddPeer adds a peer to the mesh and starts WireGuard on its host with the
// configuration that the command printed. flags are those of `peer add`. The
// configuration routes everything into the tunnel whatever the peer's permissions, so that
// the host has to enforce them.
func (m *Mesh) AddPeer(ctx context.Context, name string, h *netlab.Host, flags ...string) (*Peer, error) {
	o, err := m.Do(ctx, append([]string{"peer", "add", name, "--json", "--tunnel", "full"}, flags...)...)
	if err != nil {
		return nil, err
	}
	var added struct {
		Peer struct {
			Addresses []netip.Addr `json:"addresses"`
		} `json:"peer"`
		Config string `json:"config"`
	}
	if err := json.Unmarshal([]byte(o.Stdout), &added); err != nil || len(added.Peer.Addresses) != 2 {
		return nil, fmt.Errorf("read answer of peer add: %w\n%s", err, o.Stdout)
	}
	p := &Peer{Name: name, Host: h, Config: added.Config,
		Addresses: netlab.Pair{V4: added.Peer.Addresses[0], V6: added.Peer.Addresses[1]}}
	if p.End, err = h.WireGuard("wg0", p.Config); err != nil {
		return nil, err
	}
	m.Peers[name] = p
	return p, nil
}

// Permit sets a peer's permissions to exactly these, with the commands that a person would
// type.
func (m *Mesh) Permit(ctx context.Context, name string, may mesh.Permissions) error {
	allow, deny := []string{"peer", "allow", name}, []string{"peer", "deny", name}
	for _, p := range mesh.AllPermissions {
		if may.Has(p.Set) {
			allow = append(allow, p.Name)
		} else {
			deny = append(deny, p.Name)
		}
	}
	for _, args := range [][]string{deny, allow} {
		if len(args) == 3 {
			continue
		}
		if _, err := m.Do(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}
