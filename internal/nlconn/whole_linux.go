package nlconn

import (
	"errors"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tries is how often a dump is requested while the host keeps changing. The pauses between
// them grow by a millisecond each and add up to 171 ms.
const tries = 20

// ErrInterrupted is the error of a dump during which the list changed. [Conn.Each] returns
// it at once, all others only if every retry was interrupted, too.
var ErrInterrupted = netlink.ErrDumpInterrupted

// whole calls look until its dump isn't interrupted, at most tries times. The kernel also
// fails a dump with EINTR if it can't go on with it.
func whole[T any](look func() (T, error)) (T, error) {
	for try := range tries - 1 {
		got, err := look()
		if !errors.Is(err, ErrInterrupted) && !errors.Is(err, unix.EINTR) {
			return got, err
		}
		time.Sleep(time.Duration(try) * time.Millisecond)
	}
	return look()
}
