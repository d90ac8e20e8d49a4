package api

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// conn is one end of a connection, and records that it was closed.
type conn struct {
	net.Conn
	mu     sync.Mutex
	closed bool
}

func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return nil
}

// crowd opens connections as any user, and keeps them by user.
type crowd struct {
	t *testing.T
	l *limited
	// open holds the accepted connections by user id, closed ones included.
	open map[uint32][]*peerConn
}

// join connects as a user, and reports whether the connection was accepted.
func (c *crowd) join(who Credentials) bool {
	p := c.l.enter(&conn{}, who)
	if p != nil {
		c.open[who.UID] = append(c.open[who.UID], p)
	}
	return p != nil
}

// has returns the number of open connections of a user.
func (c *crowd) has(uid uint32) (n int) {
	for _, p := range c.open[uid] {
		if !p.Conn.(*conn).closed {
			n++
		}
	}
	return n
}

func newCrowd(t *testing.T, s slots) *crowd {
	access := Access{Operator: 501, Groups: func(uid uint32) ([]string, error) {
		switch {
		case 600 <= uid && uid < 700:
			return []string{"admin"}, nil
		case uid == 4000:
			return nil, errors.New("no such user")
		}
		return []string{"staff"}, nil
	}, AdminGroups: []string{"admin"}}
	l := newLimited(nil, access, s)
	l.admins = []uint32{80}
	return &crowd{t, l, map[uint32][]*peerConn{}}
}

const adminGroup = 80

// TestSlots has strangers open all connections that they can: readers, operators and root keep
// their slots, a new stranger is still accepted, as it replaces another one, and closed
// connections free their slots.
func TestSlots(t *testing.T) {
	c := newCrowd(t, usualSlots)
	for uid := uint32(1000); uid < 3000; uid++ {
		for range 10 {
			if !c.join(Credentials{UID: uid}) {
				t.Fatalf("a new connection of stranger %d is refused", uid)
			}
			if n := c.has(uid); n > usualSlots.perUser[stranger] {
				t.Fatalf("stranger %d has %d connections", uid, n)
			}
			if conns := c.open[uid]; conns[len(conns)-1].Conn.(*conn).closed {
				t.Fatalf("a new connection of stranger %d is closed", uid)
			}
		}
	}
	for uid := uint32(3000 - usualSlots.all[stranger]/usualSlots.perUser[stranger]); uid < 3000; uid++ {
		if n := c.has(uid); n != usualSlots.perUser[stranger] {
			t.Errorf("stranger %d of the newest ones has %d connections", uid, n)
		}
	}
	all := 0
	for uid := range c.open {
		all += c.has(uid)
	}
	if all != usualSlots.all[stranger] || len(c.l.strangers) != all || c.l.used[stranger] != all {
		t.Errorf("strangers have %d connections (%d, %d), want %d", all, len(c.l.strangers), c.l.used[stranger], usualSlots.all[stranger])
	}
	for uid := uint32(600); uid < 604; uid++ {
		// Odd users have the group as a supplementary one, even users as their own.
		who := Credentials{UID: uid, Groups: []uint32{20, adminGroup}}
		if uid%2 == 0 {
			who = Credentials{UID: uid, GID: adminGroup}
		}
		for i := range usualSlots.perUser[reader] {
			if !c.join(who) {
				t.Fatalf("reader %d is refused connection %d", uid, i)
			}
		}
		if c.join(who) {
			t.Errorf("reader %d has more than %d connections", uid, usualSlots.perUser[reader])
		}
	}
	if c.join(Credentials{UID: 604, GID: adminGroup}) {
		t.Errorf("readers have more than %d connections", usualSlots.all[reader])
	}
	for _, uid := range []uint32{0, 501} {
		for i := range usualSlots.perUser[changer] {
			if !c.join(Credentials{UID: uid}) {
				t.Fatalf("user %d is refused connection %d", uid, i)
			}
		}
		if c.join(Credentials{UID: uid}) {
			t.Errorf("user %d has more than %d connections", uid, usualSlots.perUser[changer])
		}
	}
	for _, conns := range c.open {
		for _, p := range conns {
			p.Close()
			p.Close()
		}
	}
	if c.l.used != [classes]int{} || len(c.l.byUser) != 0 || len(c.l.strangers) != 0 {
		t.Errorf("after all connections were closed: %v slots in use, by user %v, %d of strangers", c.l.used, c.l.byUser, len(c.l.strangers))
	}
}

// TestReaderFoundLater has a user whose right to read is known from the user database only:
// from its first request on, its connection counts as a reader's, not as a stranger's.
func TestReaderFoundLater(t *testing.T) {
	c := newCrowd(t, usualSlots)
	who := Credentials{UID: 610}
	if !c.join(who) {
		t.Fatal("the connection is refused")
	}
	if p := c.open[610][0]; p.class != stranger || !p.mayRead() || p.class != reader {
		t.Errorf("class %v, may read %v", p.class, p.mayRead())
	}
	for uid := uint32(1000); uid < 1200; uid++ {
		c.join(Credentials{UID: uid})
	}
	if c.has(610) != 1 {
		t.Error("strangers replaced the reader's connection")
	}
	if c.join(Credentials{UID: 4000}); c.open[4000][0].mayRead() || c.open[4000][0].class != stranger {
		t.Error("a user that the database doesn't know may read")
	}
}

// TestReaderAmongStrangers has a reader found by the database while the readers' slots are
// full, which stays in a stranger's slot, and one whose connection is closed during the
// lookup, which gets no slot.
func TestReaderAmongStrangers(t *testing.T) {
	c := newCrowd(t, usualSlots)
	for uid := uint32(600); uid < 600+uint32(usualSlots.all[reader]/usualSlots.perUser[reader]); uid++ {
		for range usualSlots.perUser[reader] {
			c.join(Credentials{UID: uid, GID: adminGroup})
		}
	}
	late := Credentials{UID: 610}
	if !c.join(late) {
		t.Fatal("the connection is refused")
	}
	if p := c.open[610][0]; !p.mayRead() || p.class != stranger || c.l.used[reader] > usualSlots.all[reader] {
		t.Errorf("class %v, may read %t, %d readers of %d", p.class, p.mayRead(), c.l.used[reader], usualSlots.all[reader])
	}
	if !c.join(late) {
		t.Fatal("the connection is refused")
	}
	for _, p := range c.open[600] {
		p.Close()
	}
	gone := c.open[610][1]
	gone.Close()
	used := c.l.used
	if gone.mayRead() || c.l.used != used {
		t.Errorf("a closed connection may read or takes a slot: %v in use, before %v", c.l.used, used)
	}
}

// TestLookupsHang has a user database that doesn't answer. All connections of one user wait
// for one lookup, replaced connections stop waiting, and many users start at most maxLookups
// lookups. Once the database answers, a reader may read again.
func TestLookupsHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, usualSlots)
		answer, usual := make(chan struct{}), c.l.access.Groups
		var asked atomic.Int32
		c.l.access.Groups = func(uid uint32) ([]string, error) {
			asked.Add(1)
			<-answer
			return usual(uid)
		}
		var waiting atomic.Int32
		request := func(uid uint32) {
			c.join(Credentials{UID: uid})
			p := c.open[uid][len(c.open[uid])-1]
			waiting.Add(1)
			go func() {
				defer waiting.Add(-1)
				p.mayRead()
			}()
			synctest.Wait()
		}
		for range 100 {
			request(1000)
		}
		if asked.Load() != 1 || waiting.Load() != int32(usualSlots.perUser[stranger]) {
			t.Errorf("for 100 connections of one user: %d lookups, %d connections wait, want 1 and %d", asked.Load(), waiting.Load(), usualSlots.perUser[stranger])
		}
		for uid := uint32(2000); uid < 3000; uid++ {
			request(uid)
		}
		if asked.Load() != maxLookups || waiting.Load() > int32(usualSlots.all[stranger]) {
			t.Errorf("for 1000 users: %d lookups, %d connections wait, want %d, and at most %d", asked.Load(), waiting.Load(), maxLookups, usualSlots.all[stranger])
		}
		close(answer)
		synctest.Wait()
		if c.join(Credentials{UID: 610}); !c.open[610][0].mayRead() || len(c.l.lookups) != 0 {
			t.Errorf("once the database answers, a reader may not read, or %d lookups are left", len(c.l.lookups))
		}
	})
}

// TestSlotsForFewFiles checks that any limit of open files leaves some for the helper itself,
// and slots for each class.
func TestSlotsForFewFiles(t *testing.T) {
	if slotsFor(1024) != usualSlots || slotsFor(1<<40) != usualSlots {
		t.Errorf("with 1024 files: %+v, want %+v", slotsFor(1024), usualSlots)
	}
	for _, files := range []uint64{32, 64, 128, 256, 512, 800} {
		t.Run(fmt.Sprint(files), func(t *testing.T) {
			s := slotsFor(files)
			all := uint64(s.all[stranger] + s.all[reader] + 2*s.perUser[changer])
			if all > files-min(files/2, ownFiles) {
				t.Errorf("%d connections leave the helper %d files", all, int(files)-int(all))
			}
			for c := stranger; c < classes; c++ {
				if s.perUser[c] < 1 || c != changer && s.all[c] < s.perUser[c] {
					t.Errorf("class %d: %+v", c, s)
				}
			}
		})
	}
}
