//go:build unix

package api

import (
	"io/fs"
	"syscall"
)

// openFiles returns how many files this process may have open. Package os has raised the
// soft limit to the hard one at the start of the program.
func openFiles() uint64 {
	var l syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) != nil {
		return 1024 // the usual soft limit
	}
	return uint64(l.Cur)
}

// ownersOf returns the uid and gid of a file, and whether they are known.
func ownersOf(info fs.FileInfo) (uid, gid uint32, known bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, false
	}
	return st.Uid, st.Gid, true
}
