package nlconn

import (
	"errors"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tries is how often a list is asked for while the host changes. Between them are pauses
// that grow, of 190 ms together.
const tries = 20

// ErrInterrupted is the error of a list that changed each time while it was read.
var ErrInterrupted = netlink.ErrDumpInterrupted

// whole does a look, again where what it looks at changed meanwhile. The kernel says so by
// EINTR, too, where it can't go on with a list.
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
