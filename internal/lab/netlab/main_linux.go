package netlab

// The process before its first host: a user namespace where it isn't root, and a root
// folder of its own.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// userNamespaceEnv tells a process about the user namespace that Main made for
// it: "inside" once it runs there, "force" to make one although it isn't needed.
const userNamespaceEnv = "NETLAB_USERNS"

// newRootEnv tells it where its root folder may be made; see ownRoot.
const newRootEnv = "NETLAB_ROOT"

// A goroutine that stays locked to its thread takes the thread with it when it
// ends, and that is how threads that entered a host are discarded. The first
// thread can't be discarded: it would stay in the host, and keep its namespaces
// alive. So it is kept for the main goroutine.
func init() { runtime.LockOSThread() }

// Main runs a program that uses hosts and returns its exit status. Where
// namespaces need more rights than the process has, the program is started again
// as root of a user namespace of its own. A test package uses it as
//
//	func TestMain(m *testing.M) { os.Exit(netlab.Main(m.Run)) }
func Main(run func() int) int {
	state := os.Getenv(userNamespaceEnv)
	if state != "inside" && (state == "force" || Unavailable() != nil) {
		status, err := runInUserNamespace()
		if err == nil {
			return status
		}
		fmt.Fprintf(os.Stderr, "netlab: no user namespace: %v\n", err)
	}
	if state == "inside" {
		if err := ownRoot(); err != nil {
			fmt.Fprintf(os.Stderr, "netlab: give the user namespace a root folder: %v\n", err)
			return 1
		}
	}
	defer func() {
		if dir, err := buildDir(); err == nil {
			os.RemoveAll(dir)
		}
	}()
	return run()
}

// runInUserNamespace starts this program again, as root of a new user namespace,
// and returns its exit status. Signals are handed on. The calling thread is the
// main one, so the child's parent-death signal means the death of the process.
func runInUserNamespace() (int, error) {
	root, err := os.MkdirTemp("", "netlab-root-*")
	if err != nil {
		return 0, err
	}
	defer os.Remove(root) // it stays empty: what is mounted there isn't seen here
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), userNamespaceEnv+"=inside", newRootEnv+"="+root)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   unix.SIGKILL,
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT)
	if err := cmd.Start(); err != nil {
		signal.Stop(signals)
		return 0, err
	}
	var forward errgroup.Group
	forward.Go(func() error {
		for s := range signals {
			cmd.Process.Signal(s)
		}
		return nil
	})
	err = cmd.Wait()
	signal.Stop(signals)
	close(signals)
	forward.Wait()
	if state := cmd.ProcessState; state != nil && state.ExitCode() >= 0 {
		return state.ExitCode(), nil
	}
	fmt.Fprintf(os.Stderr, "netlab: %v\n", err)
	return 1, nil
}

// Unavailable says why no hosts can be made by this process; nil where they can.
func Unavailable() error {
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open TUN device: %w", err)
	}
	tun.Close()
	var tried errgroup.Group
	tried.Go(func() error {
		runtime.LockOSThread() // never unlocked: the thread goes with the namespace
		return unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS)
	})
	if err := tried.Wait(); errors.Is(err, unix.EPERM) {
		return fmt.Errorf("make network namespace without root or user namespaces: %w", err)
	} else if err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	return nil
}

// ownRoot gives this process, which is root of a user namespace and alone in its mount
// namespace, a root folder that is its own, with all that was in the other one, and a
// folder for temporary files. There the other root's files look like those of a user who
// isn't known, and the program on trial trusts no folder below such a one.
func ownRoot() error {
	work, err := os.Getwd()
	if err != nil {
		return err
	}
	root := os.Getenv(newRootEnv)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("netlab", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount %s: %w", root, err)
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		from, to := "/"+e.Name(), root+"/"+e.Name()
		switch {
		case e.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(from)
			if err == nil {
				err = os.Symlink(target, to)
			}
			if err != nil {
				return err
			}
		case e.IsDir():
			if err := os.Mkdir(to, 0o755); err != nil {
				return err
			}
			// With the mounts below: a user namespace may not show what they cover.
			if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
				return fmt.Errorf("mount %s: %w", from, err)
			}
		}
	}
	const temporary = "/netlab"
	if err := os.Mkdir(root+temporary, 0o755); err != nil {
		return err
	}
	// The root of the namespace itself, for a thread that enters a mount namespace made
	// from this one begins there (setns(2)). The old one is on top, and goes
	// (pivot_root(2), "pivot_root(".", ".")").
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	if err := os.Chdir(work); err != nil {
		return err
	}
	return os.Setenv("TMPDIR", temporary)
}
