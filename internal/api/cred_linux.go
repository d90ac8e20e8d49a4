package api

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxPeerGroups is how many groups a process may have for them to be read. Linux allows
// 65536 (NGROUPS_MAX in linux/limits.h); users with more than a few dozen are rare.
const maxPeerGroups = 256

// credentialsOf reads SO_PEERCRED (unix(7)). On the connecting end it has the credentials of
// the process that called listen(2) (unix_listen and unix_stream_connect in
// net/unix/af_unix.c).
func credentialsOf(fd int) (Credentials, error) {
	c, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Credentials{}, err
	}
	return Credentials{UID: c.Uid, GID: c.Gid, PID: c.Pid, Groups: groupsOfPeer(fd)}, nil
}

// groupsOfPeer reads SO_PEERGROUPS (Linux 4.13, sk_getsockopt in net/core/sock.c). It
// returns nil if there are more than maxPeerGroups or the kernel has no such option.
func groupsOfPeer(fd int) []uint32 {
	var groups [maxPeerGroups]uint32
	size := uint32(unsafe.Sizeof(groups))
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&groups)), uintptr(unsafe.Pointer(&size)), 0)
	if e != 0 {
		return nil
	}
	return append([]uint32(nil), groups[:size/4]...)
}
