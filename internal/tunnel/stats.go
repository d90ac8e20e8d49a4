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
	Endpoint      netip.AddrPort // where the peer was last heard, or is tried; zero if never
	LastHandshake time.Time      // wall clock; zero if never
	RxBytes       uint64         // encrypted bytes received since the peer was added
	TxBytes       uint64         // encrypted bytes sent since the peer was added
	Spoofed       uint64         // packets dropped for a source that isn't the peer's
}

// statsCostFactor keeps the share of time that is spent on statistics below
// 1/statsCostFactor, however many peers there are: the device prints all of
// them as text each time.
const statsCostFactor = 50

// stats caches the device's answer.
type stats struct {
	now      func() time.Time
	interval time.Duration
	read     func() (map[mesh.PublicKey]PeerStats, error)

	mu    sync.Mutex // held while reading, so that a crowd of callers costs one read
	until time.Time  // when cache is too old
	cache map[mesh.PublicKey]PeerStats
}

// get returns the cache, or reads anew when it is older than the interval or
// than statsCostFactor times what the last reading took.
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

// Stats returns every peer's statistics, not to be changed by the caller. They
// may be old by Options.StatsInterval, or by more with thousands of peers: the
// device takes 15 ms to print 10,000, which is then done less often.
func (d *Device) Stats() (map[mesh.PublicKey]PeerStats, error) { return d.stats.get() }

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

// statsReader takes the device's answer to a get operation as it is written,
// so that no copy of the private key in it is made.
type statsReader struct {
	port  uint16
	peers map[mesh.PublicKey]PeerStats

	key      mesh.PublicKey // of the peer whose lines are being read
	current  PeerStats
	sec      int64
	nsec     int64
	leftover []byte // the start of a line whose end comes with the next Write
}

func newStatsReader() *statsReader {
	return &statsReader{peers: make(map[mesh.PublicKey]PeerStats)}
}

// Write reads the lines in p. It never fails: a line that isn't understood is
// one that a newer device added.
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

// line reads one line, by the configuration protocol of
// https://www.wireguard.com/xplatform/.
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

func (r *statsReader) begin(value []byte) {
	r.key, r.current, r.sec, r.nsec = mesh.PublicKey{}, PeerStats{}, 0, 0
	if len(value) == hex.EncodedLen(mesh.KeySize) {
		_, _ = hex.Decode(r.key[:], value)
	}
}

// flush stores what was read of the current peer. Storing it again after more
// lines is harmless.
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
