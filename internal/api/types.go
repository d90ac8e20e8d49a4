package api

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// The values of Status.State.
const (
	// Starting: the mesh interface doesn't exist yet, or nothing was enforced yet.
	Starting = "starting"
	// Enforcing: the host holds the wanted state.
	Enforcing = "enforcing"
	// Closed: something couldn't be enforced, so nothing of a peer passes;
	// Problems say why.
	Closed = "closed"
)

// Status is the answer to GET /v1/status.
type Status struct {
	Version string `json:"version"`
	// Name is this host's name: the setting of that key.
	Name string `json:"name"`
	// Endpoint is this host's endpoint in the peers' configurations, or "".
	Endpoint     string         `json:"endpoint"`
	Platform     string         `json:"platform"`
	Interface    string         `json:"interface"`
	PublicKey    string         `json:"publicKey"`
	ListenPort   uint16         `json:"listenPort"`
	Addresses    []netip.Addr   `json:"addresses"`
	MeshPrefixes []netip.Prefix `json:"meshPrefixes"`
	// Generation counts the changes of the wanted state. Enforced is the
	// generation that the host holds; it is lower while that isn't the wanted
	// one, and 0 while none is.
	Generation uint64 `json:"generation"`
	Enforced   uint64 `json:"enforced"`
	State      string `json:"state"`
	// Uplink is the interface of the default route, or "".
	Uplink string `json:"uplink"`
	// Forwarding is whether the host's sysctls allow forwarding now.
	Forwarding Families `json:"forwarding"`
	// RouteVia is the peer that carries this host's own traffic, or "".
	RouteVia string `json:"routeVia"`
	// Repairs counts changes of the host's state by others that the helper undid.
	Repairs  uint64    `json:"repairs"`
	Problems []Problem `json:"problems"`
	Peers    []Peer    `json:"peers"`
}

// Families has a value for each address family.
type Families struct {
	IPv4 bool `json:"ipv4"`
	IPv6 bool `json:"ipv6"`
}

// Problem is a condition that needs a person's attention, with a hint.
type Problem struct {
	Step    string `json:"step"`
	Message string `json:"message"`
	Hint    string `json:"hint"`
}

// Peer is a peer as the socket shows it.
type Peer struct {
	Name      string    `json:"name"`
	PublicKey string    `json:"publicKey"`
	Kind      mesh.Kind `json:"kind"`
	// Addresses are bare, IPv4 first, always both.
	Addresses   []netip.Addr `json:"addresses"`
	Permissions Permissions  `json:"permissions"`
	// Tunnel is what the peer's configuration has to send through the host for what the
	// peer may do now: mesh.TunnelFull, mesh.TunnelNetworks or mesh.TunnelHost.
	Tunnel string `json:"tunnel"`
	// Endpoint is the one that the peer was last heard from, or else the configured one.
	Endpoint string `json:"endpoint"`
	// LastHandshake is null when there was none.
	LastHandshake *time.Time `json:"lastHandshake"`
	// RxBytes and TxBytes count encrypted bytes from and to the peer.
	RxBytes uint64  `json:"rxBytes"`
	TxBytes uint64  `json:"txBytes"`
	Routing Routing `json:"routing"`
	Refused Refused `json:"refused"`
}

// Permissions are the toggles of a peer, one for each permission, in the order of
// [mesh.AllPermissions]. In JSON it is an object with the permissions' names.
type Permissions [len(mesh.AllPermissions)]Permission

// Of returns the toggle of a single permission.
func (p *Permissions) Of(one mesh.Permissions) Permission {
	for i := range mesh.AllPermissions {
		if mesh.AllPermissions[i].Set == one {
			return p[i]
		}
	}
	return Permission{}
}

// MarshalJSON writes an object with the permissions' names.
func (p Permissions) MarshalJSON() ([]byte, error) { return mesh.MarshalPermissions(p[:]) }

// UnmarshalJSON reads what MarshalJSON writes.
func (p *Permissions) UnmarshalJSON(text []byte) error { return mesh.UnmarshalPermissions(text, p[:]) }

// Permission is one toggle.
type Permission struct {
	Allowed bool `json:"allowed"`
	// Until is when the permission ends; zero means never.
	Until time.Time `json:"until,omitzero"`
	// Effective is false if a permission that this one needs is missing, such as routing for
	// lan, and omitted otherwise.
	Effective *bool `json:"effective,omitempty"`
}

// Routing has a peer's traffic through the host.
type Routing struct {
	// Now says that a packet passed in the last 10 seconds.
	Now     bool   `json:"now"`
	RxBytes uint64 `json:"rxBytes"`
	TxBytes uint64 `json:"txBytes"`
}

// Refused counts a peer's refused packets by the class of their destination.
type Refused struct {
	Martian  uint64 `json:"martian"`
	Self     uint64 `json:"self"`
	Mesh     uint64 `json:"mesh"`
	LAN      uint64 `json:"lan"`
	Internet uint64 `json:"internet"`
	Spoofed  uint64 `json:"spoofed"`
}

// String lists the classes that aren't 0.
func (r Refused) String() string {
	var out []string
	for _, c := range r.byClass() {
		if c.n > 0 {
			what := c.class
			if what == "spoofed" { // harmless by itself: devices also send from link-local addresses
				what = "from other addresses than its own"
			}
			out = append(out, fmt.Sprintf("%d %s", c.n, what))
		}
	}
	if out == nil {
		return "nothing"
	}
	return strings.Join(out, ", ")
}

// NewPeer is the body of POST /v1/peers.
type NewPeer struct {
	Name      string `json:"name"`      // required
	PublicKey string `json:"publicKey"` // required: base64
	// Kind is own or external.
	Kind mesh.Kind `json:"kind,omitempty"` // optional: external
	// Addresses has at most one address per family. A missing one is derived from the key.
	Addresses []string `json:"addresses,omitempty"` // optional
	// Endpoint is host:port.
	Endpoint string `json:"endpoint,omitempty"` // optional
	// Keepalive is a duration in whole seconds, such as "25s".
	Keepalive string `json:"keepalive,omitempty"` // optional
	// Tunnel is full or split: what the peer's configuration sends through the host. Without
	// it, that is everything while the peer may route, and otherwise the host's addresses.
	Tunnel string `json:"tunnel,omitempty"` // optional
	// Permissions are added to the kind's defaults.
	Permissions map[string]PermissionChange `json:"permissions,omitempty"` // optional
}

// PeerChange is the body of PATCH /v1/peers/{name}. Fields that are left out don't change.
type PeerChange struct {
	Name string `json:"name,omitempty"`
	// PublicKey replaces the key. Addresses that were derived from the old one
	// are derived from the new one.
	PublicKey   string                      `json:"publicKey,omitempty"`
	Endpoint    *string                     `json:"endpoint,omitempty"`
	Keepalive   *string                     `json:"keepalive,omitempty"`
	Permissions map[string]PermissionChange `json:"permissions,omitempty"`
}

// PermissionChange sets one permission, with or without an end.
type PermissionChange struct {
	Allowed bool `json:"allowed"`
	// For is a duration, such as "2h", after which the permission ends, by the helper's clock.
	For *string `json:"for,omitempty"` // optional
	// Until is when the permission ends. It excludes For.
	Until *time.Time `json:"until,omitempty"` // optional
}

// Changed is the result of a change that is in force.
type Changed struct {
	Peer Peer
	// Already says that the request changed nothing. On the wire it is the header
	// Meshhelper-Already.
	Already bool
}

// Config is the answer to GET /v1/peers/{name}/config.
type Config struct {
	// Text is the configuration for a stock WireGuard app, with a placeholder
	// for the private key, which the helper doesn't know.
	Text string `json:"config"`
	// Warnings say what the owner of the device should check.
	Warnings []string `json:"warnings"`
}

// Question asks what happens to a packet.
type Question struct {
	// Peer is the sender, by name, address or key.
	Peer string
	// To is the destination.
	To    netip.Addr
	Port  uint16
	Proto string
	// From, if valid, asks about the opposite direction: a packet from there to the peer.
	From netip.Addr
}

// Explanation is the answer to GET /v1/explain.
type Explanation struct {
	Peer  string `json:"peer"`
	From  string `json:"from"`
	To    string `json:"to"`
	Port  uint16 `json:"port"`
	Proto string `json:"proto"`
	Pass  bool   `json:"pass"`
	// Class is the class of the destination, as in Refused.
	Class string `json:"class"`
	// Policy is the line of the policy that decides.
	Policy string `json:"policy"`
	// Loaded is the rule of the loaded ruleset that decides, if the host can tell.
	Loaded string `json:"loaded"`
	// Command is the command that would change the verdict, or "".
	Command string `json:"command"`

	// Direction is FromPeer, AnswerToPeer or ToPeer.
	Direction string `json:"direction"`
	// Name is the host name that the client resolved to To, or "".
	Name string `json:"name,omitempty"`
	// Until is when the permission by which it passes ends; zero means never.
	Until time.Time `json:"until,omitzero"`
	// Stops are what stops a packet that the policy lets pass, or its answer, the first in
	// its way first. Pass is true where none of them stops the packet itself.
	Stops []Stop `json:"stops,omitempty"`
	// Unclear says that the packet may pass although Pass is false: every stop is unclear.
	Unclear bool `json:"unclear,omitempty"`
}

// The values of Explanation.Direction.
const (
	FromPeer     = "from-peer" // what the peer sends
	AnswerToPeer = "answer"    // the answer to what the peer sends
	ToPeer       = "to-peer"   // what another host, or this one, sends to the peer unasked
)

// Stop is something other than the policy that stops a packet.
type Stop struct {
	// Message is a clause such as "chain FORWARD of table ip filter drops it"; Hint says
	// what to do about it.
	Message string `json:"message"`
	Hint    string `json:"hint"`
	// Answer says that it stops the answer and not the packet itself.
	Answer bool `json:"answer,omitempty"`
	// Unclear says that it isn't known whether it stops the packet.
	Unclear bool `json:"unclear,omitempty"`
}

// The values of Setting.Source: where the effective value comes from.
const (
	SettingDefault = "default" // it was never set
	SettingKept    = "setting" // PATCH /v1/settings, in the state folder
	SettingFlag    = "flag"    // a flag of run, which overrides a saved value
)

// Setting is a key with its value.
type Setting struct {
	Key string `json:"key"`
	// Value is in force now; "" is none.
	Value string `json:"value"`
	// Source is default, setting or flag.
	Source string `json:"source"`
	// Kept is what the state folder has; it counts after a restart, unless a flag
	// overrides it. "" is nothing.
	Kept string `json:"kept"`
}

// Settings is the answer to GET and PATCH /v1/settings. The body of a PATCH is an object
// of keys with texts, and null for those that are to be as if never set.
type Settings struct {
	Settings []Setting `json:"settings"`
	// Restart has the changed keys that take effect after a restart, Overridden those that a
	// flag of run overrides with another value.
	Restart    []string `json:"restart"`
	Overridden []string `json:"overridden"`
	// Renumbered has the peers that get other addresses at the restart, after a change of the
	// mesh prefixes.
	Renumbered []Renumbered `json:"renumbered,omitempty"`
	// Outdated has the names of peers whose devices may have a configuration with the old
	// endpoint, port or resolvers.
	Outdated []string `json:"outdated,omitempty"`
	// Problems has other uses of a new mesh prefix on the host.
	Problems []Problem `json:"problems,omitempty"`
	// Already says that the request changed nothing; see Changed.Already.
	Already bool `json:"-"`
}

// Of returns one setting, and whether the helper knows the key.
func (s Settings) Of(key string) (Setting, bool) {
	for _, one := range s.Settings {
		if one.Key == key {
			return one, true
		}
	}
	return Setting{}, false
}

// Rules is the answer to GET /v1/rules: the rules as loaded.
type Rules struct {
	Platform string `json:"platform"`
	Anchor   string `json:"anchor"`
	Text     string `json:"text"`
}

// Renumbered is a peer whose addresses or configuration change with the mesh prefixes.
type Renumbered struct {
	Name string `json:"name"`
	// Was and Is are its mesh addresses, IPv4 first.
	Was []netip.Addr `json:"was"`
	Is  []netip.Addr `json:"is"`
	// Lines are those of its configuration that change.
	Lines []ChangedLine `json:"lines"`
}

// ChangedLine is a line of a WireGuard configuration, as it is and as it has to be.
type ChangedLine struct {
	// Section is the line's, such as "[Interface]".
	Section string `json:"section"`
	Was     string `json:"was"`
	Is      string `json:"is"`
}

// Check is the result of one check of GET /v1/doctor.
type Check struct {
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
	Message string `json:"message"`
	Hint    string `json:"hint"`
	// Follows is the name of the check whose problem causes this one, which then needs no
	// action of its own; "" for a problem of its own.
	Follows string `json:"follows,omitempty"`
}
