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

// logBurst is how many errors of wireguard-go are logged per second. Some occur for each
// packet, so a peer could otherwise fill the disk with them.
const logBurst = 20

// logger passes the log messages of wireguard-go on to slog, without keys. It also counts
// the packets that wireguard-go drops for their source: a message is their only trace.
type logger struct {
	slog    *slog.Logger
	now     func() time.Time
	dropped func(peer *device.Peer) // called for each packet whose source isn't the peer's

	mu         sync.Mutex
	second     time.Time    // the start of the current second
	logged     int          // errors in that second, suppressed ones included
	suppressed atomic.Int64 // errors since the last that was logged
}

// device returns l as wireguard-go's type.
func (l *logger) device() *device.Logger {
	return &device.Logger{Verbosef: l.verbose, Errorf: l.error}
}

// verbose logs a message at debug level. wireguard-go calls it for single packets, so it
// checks whether the message is needed before it formats it.
func (l *logger) verbose(format string, args ...any) {
	// The text is that of RoutineSequentialReceiver in wireguard-go's device/receive.go;
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

// error logs at most logBurst errors a second. The next one that it logs has the number of
// suppressed ones.
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

// admit counts an error, and reports whether fewer than logBurst came before it in this
// second.
func (l *logger) admit() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if second := l.now().Truncate(time.Second); !second.Equal(l.second) {
		l.second, l.logged = second, 0
	}
	l.logged++
	return l.logged <= logBurst
}

// keyRun is the least number of consecutive key characters that redactKeys shortens: base64
// of 32 bytes without padding, which is shorter than hexadecimal.
const keyRun = (mesh.KeySize*8 + 5) / 6

// redactKeys shortens everything that could be a key in base64 or hexadecimal to its first
// four characters. wireguard-go already abbreviates the keys of peers, but an error about
// its configuration may quote a line with a key.
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
