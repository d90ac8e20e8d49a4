package tunnel

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// PeerStats is what the device knows about a peer's session.
type PeerStats struct {
	Endpoint      netip.AddrPort // where the device sends: last heard from, or configured; zero if unknown
	LastHandshake time.Time      // wall clock; zero if never
	RxBytes       uint64         // encrypted bytes received since the peer was added
	TxBytes       uint64         // encrypted bytes sent since the peer was added
	Spoofed       uint64         // packets dropped because their source isn't among the allowed IPs
}

// statsCostFactor bounds the share of time that goes into statistics to 1/statsCostFactor,
// 2 %, however many peers there are: wireguard-go prints all of them as text each time.
const statsCostFactor = 50

// stats caches the statistics of all peers.
type stats struct {
	now      func() time.Time
	interval time.Duration                                // the least age at which get reads again
	read     func() (map[mesh.PublicKey]PeerStats, error) // Device.readStats outside tests

	mu    sync.Mutex // held while reading, so that concurrent callers cause one read
	until time.Time  // when cache expires
	cache map[mesh.PublicKey]PeerStats
}

// get returns the cached statistics. It reads them again once they are older than both the
// interval and statsCostFactor times the duration of the last read.
func (s *stats) get() (map[mesh.PublicKey]PeerStats, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	start := s.now()
	if s.cache != nil && start.Before(s.until) {
		return s.cache, nil
	}
	fresh, err := s.read()
	if err != nil {
		return nil, fmt.Errorf("read WireGuard statistics: %w", err)
	}
	end := s.now()
	s.cache, s.until = fresh, end.Add(max(s.interval, statsCostFactor*end.Sub(start)))
	return fresh, nil
}

// Stats returns the statistics of all peers; the caller must not modify the map. They may be
// up to Options.StatsInterval old, or more with thousands of peers: reading 10,000 takes
// 15 ms, so it is done less often. A
// closed device has no peers, so the map is empty.
func (d *Device) Stats() (map[mesh.PublicKey]PeerStats, error) { return d.stats.get() }

// readStats reads the statistics of all peers from the device.
func (d *Device) readStats() (map[mesh.PublicKey]PeerStats, error) {
	r := newStatsReader()
	if err := d.wg.IpcGetOperation(r); err != nil {
		return nil, err
	}
	for key, s := range r.peers {
		s.Spoofed = d.spoofedBy(key)
		r.peers[key] = s
	}
	return r.peers, nil
}

// statsReader is an io.Writer that parses the answer to a get operation as wireguard-go
// writes it. The answer contains the private key, of which it makes no copy.
type statsReader struct {
	port  uint16                       // UDP, that the device listens on
	peers map[mesh.PublicKey]PeerStats // all peers so far

	key       mesh.PublicKey // the peer whose lines are being read; zero before the first
	current   PeerStats      // its statistics so far, without LastHandshake
	sec, nsec int64          // its last handshake, as Unix time
	leftover  []byte         // the start of a line that continues in the next Write
}

func newStatsReader() *statsReader {
	return &statsReader{peers: make(map[mesh.PublicKey]PeerStats)}
}

// Write parses the lines in p. It never fails, and skips lines that it doesn't know: a newer
// wireguard-go may add some.
func (r *statsReader) Write(p []byte) (int, error) {
	n := len(p)
	for {
		line, rest, complete := bytes.Cut(p, []byte("\n"))
		if !complete {
			r.leftover = append(r.leftover, line...)
			break
		}
		if len(r.leftover) > 0 {
			line = append(r.leftover, line...)
			r.leftover = r.leftover[:0]
		}
		key, value, _ := bytes.Cut(line, []byte("="))
		r.line(key, value)
		p = rest
	}
	r.flush()
	return n, nil
}

// line parses one line key=value of the configuration protocol
// (https://www.wireguard.com/xplatform/). Each public_key starts another peer.
func (r *statsReader) line(key, value []byte) {
	switch string(key) {
	case "listen_port":
		port, _ := strconv.ParseUint(string(value), 10, 16)
		r.port = uint16(port)
	case "public_key":
		r.flush()
		r.begin(value)
	case "endpoint":
		r.current.Endpoint, _ = netip.ParseAddrPort(string(value))
	case "last_handshake_time_sec":
		r.sec, _ = strconv.ParseInt(string(value), 10, 64)
	case "last_handshake_time_nsec":
		r.nsec, _ = strconv.ParseInt(string(value), 10, 64)
	case "rx_bytes":
		r.current.RxBytes, _ = strconv.ParseUint(string(value), 10, 64)
	case "tx_bytes":
		r.current.TxBytes, _ = strconv.ParseUint(string(value), 10, 64)
	}
}

// begin starts a peer with a public key in hexadecimal.
func (r *statsReader) begin(value []byte) {
	r.key, r.current, r.sec, r.nsec = mesh.PublicKey{}, PeerStats{}, 0, 0
	if len(value) == hex.EncodedLen(mesh.KeySize) {
		_, _ = hex.Decode(r.key[:], value)
	}
}

// flush stores the current peer, if there is one. Its remaining lines may come with the next
// Write, and flush then stores it again.
func (r *statsReader) flush() {
	if r.key.IsZero() {
		return
	}
	r.current.LastHandshake = time.Time{}
	if r.sec != 0 || r.nsec != 0 {
		r.current.LastHandshake = time.Unix(r.sec, r.nsec)
	}
	r.peers[r.key] = r.current
}
