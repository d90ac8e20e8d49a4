package api

import (
	"os/user"
	"slices"
	"strconv"
)

// Credentials are those of the process at the other end of a connection, as the
// kernel recorded them when the connection was made. A process that passes the socket to
// another one passes its rights along.
type Credentials struct {
	UID uint32
	GID uint32
	// PID is 0 if the kernel doesn't report it (macOS).
	PID int32
	// Groups are those that the kernel reports, possibly fewer than the user has.
	Groups []uint32
}

// Access decides which users may read and which may change. Root may do both.
type Access struct {
	// Operator is the uid of the user who may change, too, or NoOperator.
	Operator uint32
	// AdminGroups are the names of the groups whose members may read. One that
	// doesn't exist has no members.
	AdminGroups []string // optional
	// Groups returns the names of a user's groups. It may block.
	Groups func(uid uint32) ([]string, error) // optional: the host's user database
}

// NoOperator is the uid of no user: (uid_t)-1 is reserved, as chown(2) takes it for "no
// change" (POSIX).
const NoOperator = ^uint32(0)

// MayChange reports whether the user may change the wanted state.
func (a Access) MayChange(c Credentials) bool {
	return c.UID == 0 || c.UID == a.Operator && a.Operator != NoOperator
}

// MayRead reports whether the user may see the mesh. A user whose groups can't be looked up
// may not. The lookup may block for as long as the host's user database does.
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

// groupsOf looks up a user's groups in the host's user database.
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
		// AdminGroups has names, so a group without one doesn't matter.
		if g, err := user.LookupGroupId(id); err == nil {
			names = append(names, g.Name)
		}
	}
	return names, nil
}
