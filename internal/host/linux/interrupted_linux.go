package linux

import (
	"errors"
	"time"

	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lookTries is how often the host is looked at while it changes. Between tries grow
// pauses, of 190 ms together.
const lookTries = 20

// whole does look again where the kernel's lists changed while they were read
// (NLM_F_DUMP_INTR, linux/netlink.h), so that an entry may be missing or there twice.
func whole(look func() error) error {
	for try := range lookTries - 1 {
		if err := look(); !isInterrupted(err) {
			return err
		}
		time.Sleep(time.Duration(try) * time.Millisecond)
	}
	return look()
}

func isInterrupted(err error) bool {
	return errors.Is(err, netlink.ErrDumpInterrupted) || errors.Is(err, unix.EINTR)
}

// checkWhole returns an error for [whole] where a list was interrupted.
func checkWhole(ms []mdlayher.Message) error {
	for _, m := range ms {
		if m.Header.Flags&mdlayher.DumpInterrupted != 0 {
			return netlink.ErrDumpInterrupted
		}
	}
	return nil
}
