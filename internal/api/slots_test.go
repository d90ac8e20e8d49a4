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

// conn is an end of a connection that notes when it is closed.
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

// crowd counts connections by user.
type crowd struct {
	t *testing.T
	l *limited
	// open are the connections that were taken, by user.
	open map[uint32][]*peerConn
}

// join connects as a user, and reports whether that was taken.
func (c *crowd) join(who Credentials) bool {
	p := c.l.enter(&conn{}, who)
	if p != nil {
		c.open[who.UID] = append(c.open[who.UID], p)
	}
	return p != nil
}

// has counts the connections of a user that aren't closed.
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

// TestSlots has strangers take all that they can: it is no reader's, no operator's
// and not root's, a new stranger gets a connection all the same, and what is closed
// is free again.
func TestSlots(t *testing.T) {
	c := newCrowd(t, usualSlots)
	for uid := uint32(1000); uid < 3000; uid++ {
		for range 10 {
			if !c.join(Credentials{UID: uid}) {
				t.Fatalf("a new connection of stranger %d isn't taken", uid)
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
		// One is in the group as the kernel tells it, one has it as its own.
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
			t.Errorf("reader %d has more than %d", uid, usualSlots.perUser[reader])
		}
	}
	if c.join(Credentials{UID: 604, GID: adminGroup}) {
		t.Errorf("readers have more than %d", usualSlots.all[reader])
	}
	for _, uid := range []uint32{0, 501} {
		for i := range usualSlots.perUser[changer] {
			if !c.join(Credentials{UID: uid}) {
				t.Fatalf("user %d is refused connection %d", uid, i)
			}
		}
		if c.join(Credentials{UID: uid}) {
			t.Errorf("user %d has more than %d", uid, usualSlots.perUser[changer])
		}
	}
	for _, conns := range c.open {
		for _, p := range conns {
			p.Close()
			p.Close()
		}
	}
	if c.l.used != [classes]int{} || len(c.l.byUser) != 0 || len(c.l.strangers) != 0 {
		t.Errorf("all are closed, and in use are %v of %v, %d strangers", c.l.used, c.l.byUser, len(c.l.strangers))
	}
}

// TestReaderFoundLater has a user of whom only the database says that it may read:
// from its first request on it isn't among the strangers.
func TestReaderFoundLater(t *testing.T) {
	c := newCrowd(t, usualSlots)
	who := Credentials{UID: 610}
	if !c.join(who) {
		t.Fatal("not taken")
	}
	if p := c.open[610][0]; p.class != stranger || !p.mayRead() || p.class != reader {
		t.Errorf("class %v, may read %v", p.class, p.mayRead())
	}
	for uid := uint32(1000); uid < 1200; uid++ {
		c.join(Credentials{UID: uid})
	}
	if c.has(610) != 1 {
		t.Error("strangers took the reader's place")
	}
	if c.join(Credentials{UID: 4000}); c.open[4000][0].mayRead() || c.open[4000][0].class != stranger {
		t.Error("a user that is unknown to the host may read")
	}
}

// TestReaderAmongStrangers has readers of whom only the database says so, more than
// readers have slots, and one that lost its connection while the database was asked.
func TestReaderAmongStrangers(t *testing.T) {
	c := newCrowd(t, usualSlots)
	for uid := uint32(600); uid < 600+uint32(usualSlots.all[reader]/usualSlots.perUser[reader]); uid++ {
		for range usualSlots.perUser[reader] {
			c.join(Credentials{UID: uid, GID: adminGroup})
		}
	}
	late := Credentials{UID: 610}
	if !c.join(late) {
		t.Fatal("not taken")
	}
	if p := c.open[610][0]; !p.mayRead() || p.class != stranger || c.l.used[reader] > usualSlots.all[reader] {
		t.Errorf("class %v, may read %t, %d readers of %d", p.class, p.mayRead(), c.l.used[reader], usualSlots.all[reader])
	}
	if !c.join(late) {
		t.Fatal("not taken")
	}
	for _, p := range c.open[600] {
		p.Close()
	}
	gone := c.open[610][1]
	gone.Close()
	used := c.l.used
	if gone.mayRead() || c.l.used != used {
		t.Errorf("a closed connection has a slot: %v, before %v", c.l.used, used)
	}
}

// TestLookupsHang has a user database that doesn't answer: connections of one user wait for
// one lookup, those that were replaced don't wait any longer, users with many uids start no
// more lookups than maxLookups, and everything works again once the database answers.
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
			t.Errorf("for 100 connections of one user: %d lookups, and %d wait, want 1 and %d", asked.Load(), waiting.Load(), usualSlots.perUser[stranger])
		}
		for uid := uint32(2000); uid < 3000; uid++ {
			request(uid)
		}
		if asked.Load() != maxLookups || waiting.Load() > int32(usualSlots.all[stranger]) {
			t.Errorf("for 1000 users: %d lookups, and %d wait, want %d, and %d at most", asked.Load(), waiting.Load(), maxLookups, usualSlots.all[stranger])
		}
		close(answer)
		synctest.Wait()
		if c.join(Credentials{UID: 610}); !c.open[610][0].mayRead() || len(c.l.lookups) != 0 {
			t.Errorf("afterwards a reader may not read, or %d lookups are left", len(c.l.lookups))
		}
	})
}

// TestSlotsForFewFiles keeps files for the helper, and some slots for each class,
// whatever the limit is.
func TestSlotsForFewFiles(t *testing.T) {
	if slotsFor(1024) != usualSlots || slotsFor(1<<40) != usualSlots {
		t.Errorf("with 1024 files: %+v", slotsFor(1024))
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
