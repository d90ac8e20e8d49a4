package tunnel

import (
	"bytes"
	"encoding/hex"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/mesh/meshtest"
)

func TestRedactKeys(t *testing.T) {
	key := meshtest.Key(t, 40)
	base, hexed := key.Reveal(), hex.EncodeToString(key[:])
	for in, want := range map[string]string{
		"":                                 "",
		"peer(abcd…efgh) - Starting":       "peer(abcd…efgh) - Starting",
		"failed to parse line " + hexed:    "failed to parse line " + hexed[:4] + "…",
		`line "private_key=` + hexed + `"`: `line "private_key=` + hexed[:4] + `…"`,
		base + " and " + base:              base[:4] + "…= and " + base[:4] + "…=",
		strings.Repeat("word ", 30):        strings.Repeat("word ", 30),
	} {
		if got := redactKeys(in); got != want {
			t.Errorf("redactKeys(%q) = %q, want %q", in, got, want)
		}
	}
}

// TestLoggerBounded has the device report an error for each packet: at most logBurst lines a
// second are logged, and the first line of the next second has the number of those left out.
func TestLoggerBounded(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1_700_000_000, 0)
	l := &logger{slog: slog.New(slog.NewTextHandler(&out, nil)), now: func() time.Time { return now }}
	for range 1000 {
		l.error("write packet: %v", "no buffer space")
	}
	if got := strings.Count(out.String(), "no buffer space"); got != logBurst {
		t.Errorf("%d lines in a second, want %d", got, logBurst)
	}
	now = now.Add(time.Second)
	l.error("once more")
	if !strings.Contains(out.String(), "once more") || !strings.Contains(out.String(), "suppressed=980") {
		t.Errorf("the first line of the next second is %q", out.String()[strings.LastIndex(out.String(), "time="):])
	}
	out.Reset()
	l.verbose("Receiving keepalive packet")
	if out.Len() != 0 {
		t.Errorf("a verbose message is logged at level info: %s", &out)
	}
}

// TestStatsCached checks that statistics are read at most once per interval, and less often
// when reading takes long.
func TestStatsCached(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	reads, cost := 0, time.Millisecond
	s := &stats{now: func() time.Time { return now }, interval: time.Second, read: func() (map[mesh.PublicKey]PeerStats, error) {
		reads++
		now = now.Add(cost)
		return map[mesh.PublicKey]PeerStats{}, nil
	}}
	get := func(after time.Duration, want int) {
		t.Helper()
		now = now.Add(after)
		if _, err := s.get(); err != nil || reads != want {
			t.Errorf("%d reads, want %d, error %v", reads, want, err)
		}
	}
	get(0, 1)
	get(0, 1)
	get(999*time.Millisecond, 1)
	cost = 100 * time.Millisecond
	get(time.Millisecond, 2)
	get(4*time.Second, 2)
	get(time.Second, 3)
}

// TestStatsReader writes the device's configuration in two parts, cut at every byte: the
// statistics are the same, and unknown lines and peers with an invalid key are left out.
func TestStatsReader(t *testing.T) {
	key := meshtest.Key(t, 41).Public()
	text := "private_key=00\nlisten_port=51820\npublic_key=" + hex.EncodeToString(key[:]) +
		"\npreshared_key=00\nprotocol_version=1\nendpoint=[2001:db8::1]:7\nlast_handshake_time_sec=5\nlast_handshake_time_nsec=6\n" +
		"tx_bytes=8\nrx_bytes=9\nnew_line=1\nallowed_ip=10.0.0.1/32\npublic_key=zz\nrx_bytes=10\n"
	for cut := range len(text) {
		r := newStatsReader()
		_, _ = r.Write([]byte(text[:cut]))
		_, _ = r.Write([]byte(text[cut:]))
		got := r.peers[key]
		if r.port != 51820 || len(r.peers) != 1 || got.RxBytes != 9 || got.TxBytes != 8 || got.Endpoint.Port() != 7 || got.LastHandshake != time.Unix(5, 6) {
			t.Fatalf("cut at %d: port %d, %+v", cut, r.port, r.peers)
		}
	}
}
