package tunnel

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// logBurst is how many errors of the WireGuard device are logged per second.
// Some come once per packet, so a peer could fill the disk with them.
const logBurst = 20

// logger turns what the WireGuard device logs into records of slog, without
// keys, and picks out of it the only trace of packets that die inside the
// device.
type logger struct {
	slog    *slog.Logger
	now     func() time.Time
	dropped func(peer *device.Peer) // a packet with a source that isn't the peer's

	mu         sync.Mutex
	second     time.Time // the second that logged counts in
	logged     int
	suppressed atomic.Int64
}

// device returns l in the form that the WireGuard device takes.
func (l *logger) device() *device.Logger {
	return &device.Logger{Verbosef: l.verbose, Errorf: l.error}
}

// verbose is called for some packets, so it looks at the format before it
// spends anything.
func (l *logger) verbose(format string, args ...any) {
	// The text is that of RoutineSequentialReceiver in the device's receive.go;
	// TestDisallowedSource fails if it changes.
	if strings.HasSuffix(format, "disallowed source address from %v") && len(args) == 1 {
		if peer, ok := args[0].(*device.Peer); ok {
			l.dropped(peer)
		}
		return
	}
	if !l.slog.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	l.slog.Debug(redactKeys(fmt.Sprintf(format, args...)))
}

// error logs at most logBurst errors a second and says how many it left out.
func (l *logger) error(format string, args ...any) {
	if !l.admit() {
		l.suppressed.Add(1)
		return
	}
	message := redactKeys(fmt.Sprintf(format, args...))
	if n := l.suppressed.Swap(0); n > 0 {
		l.slog.Error(message, "suppressed", n)
		return
	}
	l.slog.Error(message)
}

// admit reports whether this second still has room for an error.
func (l *logger) admit() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if second := l.now().Truncate(time.Second); !second.Equal(l.second) {
		l.second, l.logged = second, 0
	}
	l.logged++
	return l.logged <= logBurst
}

// keyRun is the shortest run of key characters that redactKeys cuts: base64 of
// 32 bytes without its padding.
const keyRun = (mesh.KeySize*8 + 5) / 6

// redactKeys shortens everything that could be a key in base64 or hexadecimal
// to its first four characters. The device's messages name peers in short form
// already; errors about its configuration could quote a line with a key.
func redactKeys(s string) string {
	if len(s) < keyRun {
		return s
	}
	var out strings.Builder
	start := 0 // of the run of key characters that ends at i
	for i := 0; i <= len(s); i++ {
		if i < len(s) && isKeyByte(s[i]) {
			continue
		}
		if i-start >= keyRun {
			out.WriteString(s[start:start+4] + "…")
		} else {
			out.WriteString(s[start:i])
		}
		if i < len(s) {
			out.WriteByte(s[i])
		}
		start = i + 1
	}
	return out.String()
}

// isKeyByte reports whether c occurs in base64 or hexadecimal, padding aside.
func isKeyByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '+' || c == '/'
}
