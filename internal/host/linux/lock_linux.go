package linux

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// lockTable is the name of the empty table of nftables that is the lock. Tables
// belong to the network namespace, as everything does that two helpers would
// fight over, so that mount and process namespaces make no difference. Only a
// process with CAP_NET_ADMIN can make one. It has the owner flag: no other
// process can change, flush or delete it, and the kernel deletes it when the
// socket that made it is closed, which it does for a killed process
// (nft_table_lookup and nft_rcv_nl_event of net/netfilter/nf_tables_api.c, since
// Linux 5.12).
const lockTable = "meshhelper-lock"

// Flags and attributes of tables that the constants of golang.org/x/sys lack
// (linux/netfilter/nf_tables.h).
const (
	tableFlagOwner    = 2 // NFT_TABLE_F_OWNER
	tableAttrUserdata = 6 // NFTA_TABLE_USERDATA
)

// lockFolder is where the lock is on kernels that know no owner of a table.
const lockFolder = "/run/meshhelper"

// lockLimit bounds how long the kernel may take to answer for the lock.
const lockLimit = 10 * time.Second

// lock makes this process the only helper of the calling thread's network
// namespace until what it returns is closed, or the process has ended.
func lock() (io.Closer, error) {
	c, err := lockByTable()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return lockByFile(lockFolder, "/proc/thread-self/ns/net")
	}
	return c, err
}

func anotherHelper(process string) error {
	if process == "" {
		return errors.New("another helper runs on this host")
	}
	return fmt.Errorf("another helper runs on this host (process %s)", process)
}

// lockByTable makes the table of the lock.
func lockByTable() (_ io.Closer, err error) {
	c, err := nlconn.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("make table %s: %w", lockTable, err)
	}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	if err := c.SetDeadline(time.Now().Add(lockLimit)); err != nil {
		return nil, fmt.Errorf("make table %s: %w", lockTable, err)
	}
	made := transact(c, newLockTable(tableFlagOwner, strconv.Itoa(os.Getpid())))
	if made == nil {
		return c, c.SetDeadline(time.Time{})
	}
	// A table that another process owns is refused with EPERM, as is all that a
	// process without the capability asks for.
	held, holder, err := lockHolder(c)
	switch {
	case err != nil || !held && !errors.Is(made, unix.EEXIST):
		return nil, fmt.Errorf("make table %s: %w", lockTable, made)
	case held:
		return nil, anotherHelper(holder)
	}
	// A table without an owner is no lock: a saved ruleset was loaded, say. Of two
	// processes that replace it, the second is refused.
	if err := transact(c, delLockTable(), newLockTable(tableFlagOwner, strconv.Itoa(os.Getpid()))); err != nil {
		return nil, fmt.Errorf("replace table %s, which no process owns: %w", lockTable, err)
	}
	return c, c.SetDeadline(time.Time{})
}

// newLockTable is the message that makes the table, and fails where it exists. The
// process is named in its comment: the owner that the kernel tells is a socket.
func newLockTable(flags uint32, process string) netlink.Message {
	return tableMessage(unix.NFT_MSG_NEWTABLE, netlink.Create|netlink.Excl|netlink.Acknowledge,
		netlink.Attribute{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, flags)},
		netlink.Attribute{Type: tableAttrUserdata, Data: userdata.AppendString(nil, userdata.TypeComment, lockComment+process)})
}

// lockComment precedes the number of the process in the table's comment.
const lockComment = "held by process "

func delLockTable() netlink.Message { return tableMessage(unix.NFT_MSG_DELTABLE, 0) }

func tableMessage(kind int, flags netlink.HeaderFlags, attrs ...netlink.Attribute) netlink.Message {
	attrs = append([]netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(lockTable), 0)}}, attrs...)
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		panic(err) // attributes of constant size are never too long
	}
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: netlink.Request | flags},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, b...),
	}
}

// transact sends messages, the last of which asks to be acknowledged, as one
// transaction of nftables.
func transact(c *nlconn.Conn, ms ...netlink.Message) error {
	edge := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: kind, Flags: netlink.Request},
			Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	batch := append([]netlink.Message{edge(unix.NFNL_MSG_BATCH_BEGIN)}, ms...)
	if _, err := c.SendMessages(append(batch, edge(unix.NFNL_MSG_BATCH_END))); err != nil {
		return err
	}
	_, err := c.Receive()
	return err
}

// lockHolder says whether a process owns the lock's table, and which.
func lockHolder(c *nlconn.Conn) (held bool, process string, err error) {
	ms, err := c.Execute(tableMessage(unix.NFT_MSG_GETTABLE, 0))
	if err != nil {
		return false, "", err
	}
	for _, m := range ms {
		if held, process, err = parseLockTable(m.Data); err != nil {
			return false, "", err
		}
	}
	return held, process, nil
}

// parseLockTable reads an answer to NFT_MSG_GETTABLE.
func parseLockTable(b []byte) (held bool, process string, err error) {
	if len(b) < nfgenmsg {
		return false, "", errShort
	}
	ad, err := netlink.NewAttributeDecoder(b[nfgenmsg:])
	if err != nil {
		return false, "", err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch {
		case ad.Type() == unix.NFTA_TABLE_FLAGS && len(ad.Bytes()) == 4:
			held = ad.Uint32()&tableFlagOwner != 0
		case ad.Type() == tableAttrUserdata:
			process = processNumber(strings.TrimPrefix(commentOf(ad.Bytes()), lockComment))
		}
	}
	return held, process, ad.Err()
}

// commentOf returns the comment in a table's user data, which are entries of a type, a
// size and so many bytes (udata.h of libnftnl), or "" where there is none. The kernel keeps
// them as any program gave them, and userdata.Get of google/nftables panics where a size is
// wrong.
func commentOf(b []byte) string {
	for len(b) >= 2 {
		end := 2 + int(b[1])
		if len(b) < end {
			break
		}
		if b[0] == byte(userdata.TypeComment) {
			return string(bytes.TrimSuffix(b[2:end], []byte{0}))
		}
		b = b[end:]
	}
	return ""
}

// processNumber returns what begins with a process's number without what follows,
// and "" where there is no number.
func processNumber(s string) string {
	n, err := strconv.ParseUint(strings.TrimRight(s, "\x00\n"), 10, 32)
	if err != nil {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

// fileLock is the lock as a locked file.
type fileLock struct {
	dir, path string
	f         *os.File
}

// Close removes the file, and the folder when it is empty, and lets the lock go.
func (l fileLock) Close() error {
	err := os.Remove(l.path)
	_ = os.Remove(l.dir) // another network namespace's lock may be there
	return errors.Join(err, l.f.Close())
}

// lockTries bounds how often a lock is tried that others remove meanwhile.
const maxLockTries = 100

// lockByFile locks a file in a folder that only this user can open, named by the
// network namespace. Helpers in two mount namespaces that share their network
// namespace but not the folder don't see each other.
func lockByFile(dir, netns string) (io.Closer, error) {
	var ns unix.Stat_t
	if err := unix.Stat(netns, &ns); err != nil {
		return nil, fmt.Errorf("find the network namespace %s: %w", netns, err)
	}
	if err := checkParent(filepath.Dir(dir)); err != nil {
		return nil, err
	}
	l := fileLock{dir: dir, path: filepath.Join(dir, fmt.Sprintf("netns-%d.lock", ns.Ino))}
	for range maxLockTries {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("make the lock's folder: %w", err)
		}
		if err := checkFolder(dir); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the holder removed the folder
		}
		if err != nil {
			return nil, fmt.Errorf("open the lock: %w", err)
		}
		l.f = f
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			defer f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				b := make([]byte, 16)
				n, _ := f.ReadAt(b, 0)
				return nil, anotherHelper(processNumber(string(b[:n])))
			}
			return nil, fmt.Errorf("lock %s: %w", l.path, err)
		}
		if isFileAt(f, l.path) {
			if err := errors.Join(f.Truncate(0), writeAt(f, strconv.Itoa(os.Getpid()))); err != nil {
				return nil, errors.Join(fmt.Errorf("write %s: %w", l.path, err), l.Close())
			}
			return l, nil
		}
		f.Close() // another process removed it before it was locked
	}
	return nil, fmt.Errorf("lock %s: other processes keep removing it", l.path)
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// isAt reports whether an open file is the one that has this path.
func isFileAt(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// closedParent refuses a folder in which other users could make the lock's folder.
func checkParent(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("find the lock's folder: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("the lock's folder would be in %s, where other users may write", dir)
	}
	return nil
}

// ownFolder refuses a folder that another user could have made or can open.
func checkFolder(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("find the lock's folder: %w", err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s isn't a folder that only this user can open", dir)
	}
	return nil
}
