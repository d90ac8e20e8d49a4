package api

import "golang.org/x/sys/unix"

// credentialsOf reads SO_PEERCRED (unix(7)).
func credentialsOf(fd int) (Credentials, error) {
	c, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Credentials{}, err
	}
	return Credentials{UID: c.Uid, GID: c.Gid, PID: c.Pid}, nil
}
