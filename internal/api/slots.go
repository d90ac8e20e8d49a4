package api

import (
	"net"
	"os/user"
	"slices"
	"strconv"
	"sync"
)

// class is a class of users, by their rights. Each has connections of its own.
type class int

const (
	stranger class = iota // may neither read nor change, as far as is known
	reader                // may read
	changer               // may change, too
	classes
)

// slots has the limits on simultaneous connections, by class.
type slots struct {
	// perUser is the limit for one user.
	perUser [classes]int
	// all is the limit for all users of the class together; 0 is none besides perUser.
	all [classes]int
}

// usualSlots are the limits if enough files may be open. Changers need no common limit, as
// there are at most two: root and the operator.
var usualSlots = slots{
	perUser: [classes]int{stranger: 4, reader: 32, changer: 256},
	all:     [classes]int{stranger: 64, reader: 128},
}

// ownFiles is how many file descriptors are reserved for the helper itself: tunnel, netlink,
// WireGuard's sockets, the files it saves, and the pipes of commands that it runs.
const ownFiles = 96

// slotsFor returns the limits for a process that may have a number of open files. If there
// are too few for usualSlots, every class gets its proportion of those besides ownFiles, so
// that strangers can't keep root from connecting or the helper from saving.
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

// share identifies connections that count against one perUser limit.
type share struct {
	class class
	uid   uint32
}

// limited is a listener that knows the user of each connection, and limits the connections
// of each user and of each class. Above the limit, a new connection of a reader or a changer
// is closed. A new connection of a stranger instead replaces the oldest of that user, or of
// all strangers: it is always answered, as refusing a stranger's request takes no time.
type limited struct {
	*net.UnixListener
	access Access
	slots  slots

	mu     sync.Mutex
	admins []uint32 // the gids of Access.AdminGroups
	byUser map[share]int
	used   [classes]int
	// strangers has their connections, the oldest first.
	strangers []*peerConn
	// lookups are the questions to the user database that run, by uid.
	lookups map[uint32]*lookup
}

// maxLookups limits the lookups that run at once. On macOS each holds a thread of the
// process while the user database doesn't answer, and a process that needs more than 10,000
// ends (debug.SetMaxThreads). One user may own many uids: subuid(5).
const maxLookups = 64

// lookup is one question to the user database, which the connections of a user share.
type lookup struct {
	done chan struct{} // closed when may has the answer
	may  bool
}

// newLimited returns a listener that takes its connections from l.
func newLimited(l *net.UnixListener, a Access, s slots) *limited {
	return &limited{UnixListener: l, access: a, slots: s, byUser: map[share]int{}, lookups: map[uint32]*lookup{}}
}

// lookUpAdmins looks up the gids of the administrators' groups. It may block for as long as
// the host's user database does; until it is done, readers count as strangers.
func (l *limited) lookUpAdmins() {
	var ids []uint32
	for _, name := range l.access.AdminGroups {
		g, err := user.LookupGroup(name)
		if err != nil {
			continue // most likely the group doesn't exist here
		}
		if id, err := strconv.ParseUint(g.Gid, 10, 32); err == nil {
			ids = append(ids, uint32(id))
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.admins = ids
}

// Accept returns the next connection that is within the limits, as a *peerConn.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		// The kernel knows the groups of the process at once, while the user database may
		// block. They only decide which slot the connection takes.
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

// connCredentials returns the credentials of the process at the other end of c.
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

// classOf returns a user's class by what is known without blocking. The caller holds l.mu.
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

// enter takes a slot for a connection, or returns nil if there is none.
func (l *limited) enter(c net.Conn, who Credentials) *peerConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &peerConn{Conn: c, who: who, class: l.classOf(who), closed: make(chan struct{})}
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

// take takes a slot for p. The caller holds l.mu.
func (l *limited) take(p *peerConn) {
	p.released = false
	l.byUser[p.share()]++
	l.used[p.class]++
	if p.class == stranger {
		l.strangers = append(l.strangers, p)
	}
}

// fits reports whether p's user and class have a free slot. The caller holds l.mu.
func (l *limited) fits(p *peerConn) bool {
	all := l.slots.all[p.class]
	return l.byUser[p.share()] < l.slots.perUser[p.class] && (all == 0 || l.used[p.class] < all)
}

// makeRoom closes the oldest connection of a stranger that is at its limit, or else of all
// strangers if they are at theirs. The caller holds l.mu.
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
	l.end(oldest)
	_ = oldest.Conn.Close() // closing a unix socket has no failure to act on
}

// end frees the slot of p, which is closed, and ends what waits for p. A second call has no
// effect: makeRoom ends p before its handler closes it. The caller holds l.mu.
func (l *limited) end(p *peerConn) {
	if !p.released {
		l.release(p)
		close(p.closed)
	}
}

// release frees p's slot, which p has. The caller holds l.mu.
func (l *limited) release(p *peerConn) {
	p.released = true
	l.used[p.class]--
	if l.byUser[p.share()]--; l.byUser[p.share()] == 0 {
		delete(l.byUser, p.share())
	}
	if p.class == stranger {
		l.strangers = slices.DeleteFunc(l.strangers, func(other *peerConn) bool { return other == p })
	}
}

// leave frees p's slot when it is closed.
func (l *limited) leave(p *peerConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end(p)
}

// mayRead asks the user database whether p's user may read. If so, and p counts as a
// stranger, p gets a reader's slot if one is free: the user became an administrator after
// logging in, or is in more groups than the kernel reports.
func (l *limited) mayRead(p *peerConn) bool {
	if !l.lookUp(p) {
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

// lookUp reports whether p's user may read by the user database, which may block. It doesn't
// wait for the database longer than p is open, so that connections which replace each other
// leave nothing behind. If maxLookups run, the user may not read, as after a failed lookup.
func (l *limited) lookUp(p *peerConn) bool {
	uid := p.who.UID
	l.mu.Lock()
	q := l.lookups[uid]
	if q == nil {
		if len(l.lookups) >= maxLookups {
			l.mu.Unlock()
			return false
		}
		q = &lookup{done: make(chan struct{})}
		l.lookups[uid] = q
		go func() {
			defer close(q.done)
			q.may = l.access.MayRead(p.who)
			l.mu.Lock()
			defer l.mu.Unlock()
			delete(l.lookups, uid)
		}()
	}
	l.mu.Unlock()
	select {
	case <-q.done:
		return q.may
	case <-p.closed:
		return false
	}
}

// peerConn is a connection with the credentials of the process at its other end.
type peerConn struct {
	net.Conn
	who Credentials
	// mayRead is limited.mayRead, called once per connection.
	mayRead func() bool
	leave   func()        // limited.leave, called once
	closed  chan struct{} // closed with the connection

	// Under the listener's lock:
	class    class
	released bool // the slot was freed
}

// share returns which perUser limit the connection counts against.
func (c *peerConn) share() share { return share{c.class, c.who.UID} }

// Close closes the connection and then frees its slot.
func (c *peerConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
