package api

import (
	"net"
	"os/user"
	"slices"
	"strconv"
	"sync"
)

// class is which share of the connections a user has a part in.
type class int

const (
	stranger class = iota // may neither read nor change, as far as is known
	reader                // may read
	changer               // may change, too
	classes
)

// slots are the bounds on connections at a time, by class.
type slots struct {
	// perUser is how many one user may have.
	perUser [classes]int
	// all is how many all users of the class may have; 0: no bound but theirs.
	all [classes]int
}

// usualSlots are what a helper with enough open files has. There are at most two
// users that may change, root and the operator.
var usualSlots = slots{
	perUser: [classes]int{stranger: 4, reader: 32, changer: 256},
	all:     [classes]int{stranger: 64, reader: 128},
}

// ownFiles is how many open files are kept for the helper itself: tunnel, netlink,
// WireGuard's sockets, what it saves, and the pipes of commands that it runs.
const ownFiles = 96

// slotsFor returns the bounds for a process that may have so many open files: where
// they are few, every class has its part of those that are left, so that strangers
// never keep root from connecting or the helper from saving.
func slotsFor(files uint64) slots {
	out := usualSlots
	all := uint64(out.all[stranger] + out.all[reader] + 2*out.perUser[changer])
	if files >= ownFiles+all {
		return out
	}
	left := files / 2
	if files > 2*ownFiles {
		left = files - ownFiles
	}
	part := func(n int) int { return max(int(uint64(n)*left/all), 1) }
	for c := range out.all {
		if out.all[c] > 0 {
			out.all[c] = part(out.all[c])
		}
	}
	out.perUser[changer] = part(out.perUser[changer])
	for c := stranger; c <= reader; c++ {
		out.perUser[c] = min(out.perUser[c], out.all[c])
	}
	return out
}

// share is whose slots are counted together.
type share struct {
	class class
	uid   uint32
}

// limited is a listener that knows the user who connects, and bounds how many
// connections each user and each class of users has. Those who may change or read are
// refused a connection too many, by closing it. A stranger's takes the place of the
// oldest of that user's or of all strangers': a new one is always answered, since a
// stranger's request takes no time.
type limited struct {
	*net.UnixListener
	access Access
	slots  slots

	mu     sync.Mutex
	admins []uint32 // the ids of the administrators' groups
	byUser map[share]int
	used   [classes]int
	// strangers are in the order in which they came.
	strangers []*peerConn
}

func newLimited(l *net.UnixListener, a Access, s slots) *limited {
	return &limited{UnixListener: l, access: a, slots: s, byUser: map[share]int{}}
}

// learn looks up the groups of administrators. It may take as long as the host's
// user database does.
func (l *limited) learn() {
	var ids []uint32
	for _, name := range l.access.AdminGroups {
		g, err := user.LookupGroup(name)
		if err != nil {
			continue // a group that doesn't exist has no members
		}
		if id, err := strconv.ParseUint(g.Gid, 10, 32); err == nil {
			ids = append(ids, uint32(id))
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.admins = ids
}

// Accept returns the next connection that is within bounds, as a *peerConn.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		// The groups that the process has are known at once, while the user database
		// may take its time. They decide which slot is taken, and no more.
		who, err := connCredentials(c)
		if err != nil {
			c.Close()
			continue
		}
		if p := l.enter(c, who); p != nil {
			return p, nil
		}
		c.Close()
	}
}

func connCredentials(c *net.UnixConn) (who Credentials, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Credentials{}, err
	}
	if cerr := raw.Control(func(fd uintptr) { who, err = credentialsOf(int(fd)) }); cerr != nil {
		return Credentials{}, cerr
	}
	return who, err
}

// classOf is called with l.mu held.
func (l *limited) classOf(who Credentials) class {
	inAdmins := func(id uint32) bool { return slices.Contains(l.admins, id) }
	switch {
	case l.access.MayChange(who):
		return changer
	case inAdmins(who.GID), slices.ContainsFunc(who.Groups, inAdmins):
		return reader
	}
	return stranger
}

// enter takes a slot for a connection, or returns nil if it is one too many.
func (l *limited) enter(c net.Conn, who Credentials) *peerConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &peerConn{Conn: c, who: who, class: l.classOf(who)}
	p.leave = sync.OnceFunc(func() { l.leave(p) })
	p.mayRead = sync.OnceValue(func() bool { return l.mayRead(p) })
	if p.class == stranger {
		l.makeRoom(p.share())
	} else if !l.fits(p) {
		return nil
	}
	l.take(p)
	return p
}

func (l *limited) take(p *peerConn) {
	p.released = false
	l.byUser[p.share()]++
	l.used[p.class]++
	if p.class == stranger {
		l.strangers = append(l.strangers, p)
	}
}

// fits reports whether p's class has room for it.
func (l *limited) fits(p *peerConn) bool {
	all := l.slots.all[p.class]
	return l.byUser[p.share()] < l.slots.perUser[p.class] && (all == 0 || l.used[p.class] < all)
}

// makeRoom closes the oldest connection of a stranger that has its share, or else of
// all strangers if they have theirs.
func (l *limited) makeRoom(s share) {
	i := -1
	switch {
	case l.byUser[s] >= l.slots.perUser[stranger]:
		i = slices.IndexFunc(l.strangers, func(p *peerConn) bool { return p.who.UID == s.uid })
	case l.used[stranger] >= l.slots.all[stranger]:
		i = 0
	}
	if i < 0 {
		return
	}
	oldest := l.strangers[i]
	l.release(oldest)
	_ = oldest.Conn.Close() // its end of the connection has nothing to say of it
}

// release gives p's slot free. It is called with l.mu held, once or twice.
func (l *limited) release(p *peerConn) {
	if p.released {
		return
	}
	p.released = true
	l.used[p.class]--
	if l.byUser[p.share()]--; l.byUser[p.share()] == 0 {
		delete(l.byUser, p.share())
	}
	if p.class == stranger {
		l.strangers = slices.DeleteFunc(l.strangers, func(other *peerConn) bool { return other == p })
	}
}

func (l *limited) leave(p *peerConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.release(p)
}

// mayRead asks the user database, and has a reader that counts as a stranger take a
// reader's slot if there is one: a user that was made an administrator after logging
// in, or is in more groups than the kernel tells of.
func (l *limited) mayRead(p *peerConn) bool {
	if !l.access.MayRead(p.who) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.class == stranger && !p.released {
		l.release(p)
		if p.class = reader; !l.fits(p) {
			p.class = stranger
		}
		l.take(p)
	}
	return true
}

// peerConn is a connection whose other end is known.
type peerConn struct {
	net.Conn
	who Credentials
	// mayRead asks the user database once per connection.
	mayRead func() bool
	leave   func()

	// Under the listener's lock:
	class    class
	released bool // its slot is free
}

func (c *peerConn) share() share { return share{c.class, c.who.UID} }

// Close closes the connection and gives its slot free.
func (c *peerConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
