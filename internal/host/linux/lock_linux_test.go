package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// TestLockBySquatter has an unprivileged user try everything against the lock while the
// helper starts: the abstract socket of its name, the same file, a table.
func TestLockBySquatter(t *testing.T) {
	g := newRig(t)
	g.do(func() error {
		for _, name := range []string{"@meshhelper-lock", "@" + lockTable} {
			l, err := net.Listen("unix", name)
			if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
				return err
			}
			if err == nil {
				t.Cleanup(func() { l.Close() })
			}
		}
		return nil
	})
	// Another user's process can't take the lock: the kernel requires the capability.
	var tried error
	g.do(func() error {
		tried = withoutRights(func() error {
			c, err := lock()
			if err == nil {
				c.Close()
			}
			return err
		})
		return nil
	})
	if !errors.Is(tried, unix.EPERM) {
		t.Errorf("a user without rights got %v from the lock", tried)
	}
	g.open()
	g.close()
}

// withoutRights runs f on a thread without capabilities.
func withoutRights(f func() error) error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have, none [2]unix.CapUserData
	if err := unix.Capget(&head, &have[0]); err != nil {
		return err
	}
	none = have
	none[0].Effective, none[1].Effective = 0, 0
	if err := unix.Capset(&head, &none[0]); err != nil {
		return err
	}
	err := f()
	return errors.Join(err, unix.Capset(&head, &have[0]))
}

// TestLockSurvivesOthers has other programs of root do to the lock what they do to
// rulesets.
func TestLockSurvivesOthers(t *testing.T) {
	g := newRig(t)
	before := g.snapshot()
	g.do(func() error {
		first, err := lock()
		if err != nil {
			return err
		}
		defer first.Close()
		c, err := nftables.New()
		if err != nil {
			return err
		}
		c.FlushRuleset()
		if err := c.Flush(); err != nil {
			return fmt.Errorf("flush ruleset: %w", err)
		}
		c.DelTable(&nftables.Table{Name: lockTable, Family: nftables.TableFamilyINet})
		if err := c.Flush(); !errors.Is(err, unix.EPERM) {
			t.Errorf("another process deletes the table: %v", err)
		}
		_, err = lock()
		if want := fmt.Sprintf("process %d", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a second lock: %v, want an error with %q", err, want)
		}
		return nil
	})
	if diff := before.Diff(g.snapshot()); len(diff) > 0 {
		t.Errorf("the lock left %v", diff)
	}
}

// TestTableWithoutOwnerIsNoLock loads a table with the lock's name from a saved ruleset.
func TestTableWithoutOwnerIsNoLock(t *testing.T) {
	g := newRig(t)
	g.do(func() error {
		c, err := nlconn.Dial(unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := transact(c, newLockTable(0, "1")); err != nil {
			return err
		}
		l, err := lock()
		if err != nil {
			return err
		}
		if _, err := lock(); err == nil {
			t.Error("the lock is taken twice")
		}
		return l.Close()
	})
}

// TestLockEndsWithTheProcess kills a process that holds the lock.
func TestLockEndsWithTheProcess(t *testing.T) {
	g := newRig(t)
	for range 3 {
		g.do(func() error {
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestHoldLock$")
			cmd.Env = append(os.Environ(), holdLock+"=1")
			out, err := cmd.StdoutPipe()
			if err != nil {
				return err
			}
			if err := cmd.Start(); err != nil {
				return err
			}
			_, err = out.Read(make([]byte, 1))
			_, held := lock()
			if want := fmt.Sprintf("process %d", cmd.Process.Pid); err != nil || held == nil || !strings.Contains(held.Error(), want) {
				t.Errorf("while another process has the lock: %v, want an error with %q (%v)", held, want, err)
			}
			if err := InUse(); !errors.Is(err, errLocked) {
				t.Errorf("InUse while another process has the lock: %v", err)
			}
			killed := cmd.Process.Kill()
			_ = cmd.Wait()
			if err := InUse(); err != nil {
				t.Errorf("InUse after the holder was killed: %v", err)
			}
			l, err := lock()
			if err != nil {
				return fmt.Errorf("after the holder was killed: %w", err)
			}
			return errors.Join(killed, l.Close())
		})
	}
}

// holdLock is the environment variable that makes TestHoldLock take the lock.
const holdLock = "MESHHELPER_TEST_HOLD_LOCK"

// TestHoldLock is the other process of TestLockEndsWithTheProcess.
func TestHoldLock(t *testing.T) {
	if os.Getenv(holdLock) == "" {
		t.Skip("it is run by TestLockEndsWithTheProcess")
	}
	if _, err := lock(); err != nil {
		t.Fatal(err)
	}
	fmt.Println("locked")
	select {}
}

// TestFileLock tests the lock for old kernels.
func TestFileLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "meshhelper")
	const ns = "/proc/self/ns/net"
	first, err := lockByFile(dir, ns)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockByFile(dir, ns); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("a second lock: %v", err)
	}
	other, err := lockByFile(dir, "/proc/self/ns/uts")
	if err != nil {
		t.Errorf("the lock of another namespace: %v", err)
	} else if err := other.Close(); err != nil {
		t.Error(err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the lock's folder is left: %v", err)
	}
	for _, tt := range []struct {
		name string
		make func() error
	}{
		{"others can open the folder", func() error { return errors.Join(os.Mkdir(dir, 0o755), os.Chmod(dir, 0o755)) }},
		{"a link", func() error { return os.Symlink(t.TempDir(), dir) }},
		{"another user's", func() error { return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 65534, 65534)) }},
		{"others can write beside it", func() error { return os.Chmod(filepath.Dir(dir), 0o777) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.make(); errors.Is(err, fs.ErrPermission) {
				t.Skip("not as root:", err)
			} else if err != nil {
				t.Fatal(err)
			}
			if l, err := lockByFile(dir, ns); err == nil {
				l.Close()
				t.Error("it is used")
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestCommentOf parses user data as any program may write it, up to the size that the
// kernel accepts (NFT_USERDATA_MAXLEN, 256 bytes, in linux/netfilter/nf_tables.h).
func TestCommentOf(t *testing.T) {
	entry := func(kind byte, size int, data string) []byte { return append([]byte{kind, byte(size)}, data...) }
	long := strings.Repeat("x", 254)
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"none":                {nil, ""},
		"a comment":           {entry(0, 4, "abc\x00"), "abc"},
		"behind another":      {append(entry(7, 2, "yz"), entry(0, 3, "abc")...), "abc"},
		"as long as can be":   {entry(0, 254, long), long},
		"another, as long":    {entry(7, 254, long), ""},
		"longer than is":      {entry(0, 50, "abc"), ""},
		"a type without size": {[]byte{0}, ""},
	} {
		if got := commentOf(c.data); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func FuzzParseLockTable(f *testing.F) {
	f.Add(newLockTable(tableFlagOwner, "123").Data)
	f.Add([]byte{})
	f.Add([]byte("0000\x1a\x00\x06\x00\x00000000000000000000000")) // user data with a wrong size
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, process, err := parseLockTable(b); err == nil && len(process) > 10 {
			t.Errorf("process %q", process)
		}
	})
}
