package api

import (
	"os/user"
	"slices"
	"strconv"
)

// Credentials are those of the process at the other end of a connection, as the
// kernel noted when it was made. A process that passes its socket on passes its
// rights on.
type Credentials struct {
	UID uint32
	GID uint32
	// PID is 0 where the kernel doesn't tell.
	PID int32
	// Groups are those that the kernel tells of, and may be fewer than the user has.
	Groups []uint32
}

// Access says which users may read and which may change. Root always may both.
type Access struct {
	// Operator may change, too; NoOperator when only root may.
	Operator uint32
	// AdminGroups are the names of the groups whose members may read. One that
	// doesn't exist has no members.
	AdminGroups []string // optional
	// Groups returns the names of the groups of a user.
	Groups func(uid uint32) ([]string, error) // optional: the host's user database
}

// NoOperator is no user: (uid_t)-1 is reserved (POSIX chown(2) takes it for "no
// change").
const NoOperator = ^uint32(0)

// MayChange reports whether the user may change the wanted state.
func (a Access) MayChange(c Credentials) bool {
	return c.UID == 0 || c.UID == a.Operator && a.Operator != NoOperator
}

// MayRead reports whether the user may see the mesh. A user whose groups can't
// be found out may not.
func (a Access) MayRead(c Credentials) bool {
	if a.MayChange(c) {
		return true
	}
	lookup := a.Groups
	if lookup == nil {
		lookup = groupsOf
	}
	names, err := lookup(c.UID)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(names, func(n string) bool { return slices.Contains(a.AdminGroups, n) })
}

// groupsOf asks the host's user database.
func groupsOf(uid uint32) ([]string, error) {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return nil, err
	}
	ids, err := u.GroupIds()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, id := range ids {
		// A group without a name can't be one that Access names.
		if g, err := user.LookupGroupId(id); err == nil {
			names = append(names, g.Name)
		}
	}
	return names, nil
}
