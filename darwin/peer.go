package darwin

import (
	"errors"
	"fmt"
	"os/user"
	"slices"
	"strconv"
)

// AdminGID is the group of users who may administer a Mac (opendirectoryd's
// `admin`).
const AdminGID = 80

// A Peer is the process at the other end of a unix socket, as the kernel recorded it
// when the connection was made (LOCAL_PEERCRED, xnu bsd/kern/uipc_usrreq.c). A
// process started through sudo is user 0. The process id isn't offered: it can
// have been given to another process since.
type Peer struct {
	UID uint32
	GID uint32
}

// ErrNoCredentials: the kernel gave credentials of a form that isn't known.
var ErrNoCredentials = errors.New("peer credentials of unknown form")

// IsMember reports whether a user belongs to a group, also through other groups
// and directory services: the kernel's list in the credentials holds 16 at most
// and knows neither. Root isn't special here.
func IsMember(uid, gid uint32) (bool, error) {
	return isMember(uid, gid, func(uid string) ([]string, error) {
		u, err := user.LookupId(uid)
		if err != nil {
			return nil, err
		}
		return u.GroupIds()
	})
}

func isMember(uid, gid uint32, groups func(uid string) ([]string, error)) (bool, error) {
	ids, err := groups(strconv.FormatUint(uint64(uid), 10))
	var unknown user.UnknownUserIdError
	if errors.As(err, &unknown) {
		return false, nil // an account that was deleted belongs nowhere
	}
	if err != nil {
		return false, fmt.Errorf("look up groups of user %d: %w", uid, err)
	}
	return slices.Contains(ids, strconv.FormatUint(uint64(gid), 10)), nil
}
