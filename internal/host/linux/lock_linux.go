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

// lockTable is the name of an empty nftables table that is the lock. Like everything that
// two helpers would compete for, tables belong to the network namespace, so mount and PID
// namespaces don't matter. Only a process with CAP_NET_ADMIN can create one; an abstract
// Unix socket, which also belongs to the network namespace, could be bound by any local
// user. The table has the owner flag: no other process can change, flush or delete it,
// and the kernel deletes it when the socket that created it is closed, also for a killed
// process (nft_table_lookup and nft_rcv_nl_event in net/netfilter/nf_tables_api.c, since
// Linux 5.12).
const lockTable = "meshhelper-lock"

// Flags and attributes of tables that golang.org/x/sys lacks
// (linux/netfilter/nf_tables.h).
const (
	tableFlagOwner    = 2 // NFT_TABLE_F_OWNER
	tableAttrUserdata = 6 // NFTA_TABLE_USERDATA
)

// lockFolder is the folder of the lock file, which is used on kernels without table
// owners.
const lockFolder = "/run/meshhelper"

// lockLimit bounds how long the kernel may take to answer. It is generous: a busy
// nftables makes transactions wait for each other.
const lockLimit = 10 * time.Second

// lock makes this process the only helper of the calling thread's network namespace,
// until the result is closed or the process ends.
func lock() (io.Closer, error) {
	c, err := lockByTable()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return lockByFile(lockFolder, "/proc/thread-self/ns/net")
	}
	return c, err
}

// errLocked is in the chain of the error for a lock that another process holds.
var errLocked = errors.New("another helper runs on this host")

// anotherHelper returns the error for a lock that is held; process is the holder's number
// or empty.
func anotherHelper(process string) error {
	if process == "" {
		return errLocked
	}
	return fmt.Errorf("%w (process %s)", errLocked, process)
}

// InUse returns an error if a helper runs in this network namespace, whatever its socket and
// its state folder. It takes the lock for a moment, which needs root. That the lock can't be
// asked for, as on a kernel without nftables, is no error: no helper runs there.
func InUse() error {
	held, err := lock()
	switch {
	case errors.Is(err, errLocked):
		return err
	case err != nil:
		return nil
	}
	return held.Close()
}

// lockByTable creates the lock's table.
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
	// The kernel refuses a table that another process owns with EPERM, as it refuses
	// every request without the capability.
	held, holder, err := lockHolder(c)
	switch {
	case err != nil || !held && !errors.Is(made, unix.EEXIST):
		return nil, fmt.Errorf("make table %s: %w", lockTable, made)
	case held:
		return nil, anotherHelper(holder)
	}
	// A table without an owner is no lock: it may come from a saved ruleset. If two
	// processes replace it, the second one is refused.
	if err := transact(c, delLockTable(), newLockTable(tableFlagOwner, strconv.Itoa(os.Getpid()))); err != nil {
		return nil, fmt.Errorf("replace table %s, which no process owns: %w", lockTable, err)
	}
	return c, c.SetDeadline(time.Time{})
}

// newLockTable returns the message that creates the table and fails if it exists. The
// table's comment has the process number, because the owner that the kernel reports is a
// socket's port ID.
func newLockTable(flags uint32, process string) netlink.Message {
	return tableMessage(unix.NFT_MSG_NEWTABLE, netlink.Create|netlink.Excl|netlink.Acknowledge,
		netlink.Attribute{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, flags)},
		netlink.Attribute{Type: tableAttrUserdata, Data: userdata.AppendString(nil, userdata.TypeComment, lockComment+process)})
}

// lockComment precedes the process number in the table's comment.
const lockComment = "held by process "

// delLockTable returns the message that deletes the table.
func delLockTable() netlink.Message { return tableMessage(unix.NFT_MSG_DELTABLE, 0) }

// tableMessage returns a message about the lock's table.
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

// transact sends messages as one transaction of nftables. The last message must ask for
// an acknowledgement.
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

// lockHolder reports whether a process owns the lock's table, and its number.
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

// parseLockTable parses an answer to NFT_MSG_GETTABLE.
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

// commentOf returns the comment in a table's or rule's user data, or "". User data are
// entries of a type byte, a size byte and so many bytes (udata.h of libnftnl). The kernel
// stores them as any program gave them, and userdata.Get of google/nftables panics at a
// wrong size.
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

// processNumber returns s if it is a process number, and otherwise "".
func processNumber(s string) string {
	n, err := strconv.ParseUint(strings.TrimRight(s, "\x00\n"), 10, 32)
	if err != nil {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

// fileLock is a lock file that is locked by flock(2).
type fileLock struct {
	dir, path string
	f         *os.File
}

// Close removes the file, and the folder if it is empty, and releases the lock.
func (l fileLock) Close() error {
	err := os.Remove(l.path)
	_ = os.Remove(l.dir) // may hold the lock of another network namespace
	return errors.Join(err, l.f.Close())
}

// maxLockTries bounds the attempts to lock a file that other processes keep removing.
const maxLockTries = 100

// lockByFile locks a file named after the network namespace, in a folder that only this
// user can open. Helpers in two mount namespaces that share the network namespace but not
// the folder don't see each other's lock.
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

// writeAt replaces the beginning of the file.
func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// isFileAt reports whether path still names the open file.
func isFileAt(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// checkParent refuses a parent in which other users could create the lock's folder.
func checkParent(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("find the lock's folder: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("refuse to lock in %s, where other users may write", dir)
	}
	return nil
}

// checkFolder refuses a folder that another user may have created or can open.
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
