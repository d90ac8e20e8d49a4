package api

import (
	"errors"

	"golang.org/x/sys/unix"
)

// credentialsOf reads LOCAL_PEERCRED (macOS unix(4)): the effective user and
// its groups, at most 16, of which the first is the effective group. On the connecting end
// it has the credentials of the process that called listen(2) (unp_connect in xnu
// bsd/kern/uipc_usrreq.c).
func credentialsOf(fd int) (Credentials, error) {
	c, err := unix.GetsockoptXucred(fd, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	if err != nil {
		return Credentials{}, err
	}
	// XUCRED_VERSION in sys/ucred.h is 0; a struct of another version has another layout.
	if c.Version != 0 {
		return Credentials{}, errors.New("LOCAL_PEERCRED: unknown version")
	}
	got := Credentials{UID: c.Uid}
	if n := min(int(c.Ngroups), len(c.Groups)); n > 0 {
		got.GID = c.Groups[0]
		got.Groups = append(got.Groups, c.Groups[:n]...)
	}
	return got, nil
}
