package api

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// WriteMetrics writes s in the text format of Prometheus, version 0.0.4
// (prometheus.io/docs/instrumenting/exposition_formats). A dozen values made from one status
// don't need the client library's registry.
func WriteMetrics(w io.Writer, s Status) error {
	m := metricWriter{w: bufio.NewWriter(w)}
	m.family("meshhelper_info", "gauge", "What runs here; always 1.")
	m.value("meshhelper_info", 1, "version", s.Version, "platform", s.Platform, "state", s.State)
	m.single("meshhelper_generation", "gauge", "The wanted generation.", s.Generation)
	m.single("meshhelper_enforced_generation", "gauge", "The generation that the host holds.", s.Enforced)
	m.single("meshhelper_enforcing", "gauge", "Whether the wanted state is in force.", one(s.State == Enforcing))
	m.single("meshhelper_repairs_total", "counter", "What was found changed on the host and put right.", s.Repairs)
	m.single("meshhelper_problems", "gauge", "Problems that status lists.", uint64(len(s.Problems)))
	m.single("meshhelper_peers", "gauge", "Known peers.", uint64(len(s.Peers)))
	m.perPeer(s.Peers)
	return m.w.Flush()
}

// perPeer writes the families that have a sample for each peer. All samples of a family must
// stand together.
func (m metricWriter) perPeer(peers []Peer) {
	for _, f := range []struct {
		name, kind, help string
		of               func(Peer) uint64
	}{
		{"meshhelper_peer_receive_bytes_total", "counter", "Encrypted bytes from the peer.", func(p Peer) uint64 { return p.RxBytes }},
		{"meshhelper_peer_transmit_bytes_total", "counter", "Encrypted bytes to the peer.", func(p Peer) uint64 { return p.TxBytes }},
		{"meshhelper_peer_routed_receive_bytes_total", "counter", "Bytes routed from the peer.", func(p Peer) uint64 { return p.Routing.RxBytes }},
		{"meshhelper_peer_routed_transmit_bytes_total", "counter", "Bytes routed to the peer.", func(p Peer) uint64 { return p.Routing.TxBytes }},
		{"meshhelper_peer_routing", "gauge", "Whether the peer routes now.", func(p Peer) uint64 { return one(p.Routing.Now) }},
		{"meshhelper_peer_last_handshake_seconds", "gauge", "Unix time of the last handshake, 0 for none.", lastHandshake},
	} {
		m.family(f.name, f.kind, f.help)
		for _, p := range peers {
			m.value(f.name, f.of(p), "peer", p.Name)
		}
	}
	const permission = "meshhelper_peer_permission"
	m.family(permission, "gauge", "Whether the peer has the permission.")
	for _, p := range peers {
		for i, it := range mesh.AllPermissions {
			m.value(permission, one(p.Permissions[i].Allowed), "peer", p.Name, "permission", it.Name)
		}
	}
	const refused = "meshhelper_peer_refused_packets_total"
	m.family(refused, "counter", "Refused packets of the peer by class.")
	for _, p := range peers {
		for _, c := range p.Refused.byClass() {
			m.value(refused, c.n, "peer", p.Name, "class", c.class)
		}
	}
}

// classCount is the count of refused packets of one class.
type classCount struct {
	class string
	n     uint64
}

// byClass returns the counts with the names of their classes.
func (r Refused) byClass() []classCount {
	return []classCount{
		{"martian", r.Martian}, {"self", r.Self}, {"mesh", r.Mesh},
		{"lan", r.LAN}, {"internet", r.Internet}, {"spoofed", r.Spoofed},
	}
}

// lastHandshake returns the Unix time of the last handshake in seconds, 0 for none.
func lastHandshake(p Peer) uint64 {
	if p.LastHandshake == nil || p.LastHandshake.Unix() < 0 {
		return 0
	}
	return uint64(p.LastHandshake.Unix())
}

// one returns a boolean as Prometheus writes it, 1 or 0.
func one(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

// metricWriter writes lines. The bufio.Writer keeps the first error for Flush.
type metricWriter struct{ w *bufio.Writer }

// family writes the header of a metric; kind is counter or gauge.
func (m metricWriter) family(name, kind, help string) {
	fmt.Fprintf(m.w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// single writes a metric with one sample without labels.
func (m metricWriter) single(name, kind, help string, v uint64) {
	m.family(name, kind, help)
	m.value(name, v)
}

// labelEscaper escapes the value of a label.
var labelEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// value writes one sample. labels alternates names and values.
func (m metricWriter) value(name string, v uint64, labels ...string) {
	var pairs []string
	for i := 0; i < len(labels); i += 2 {
		pairs = append(pairs, labels[i]+`="`+labelEscaper.Replace(labels[i+1])+`"`)
	}
	if len(pairs) > 0 {
		name += "{" + strings.Join(pairs, ",") + "}"
	}
	fmt.Fprintf(m.w, "%s %d\n", name, v)
}
