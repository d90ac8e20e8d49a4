package netlab

// What the process does before its first host: it enters a user namespace if it isn't
// root, and a root folder of its own.

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

// userNamespaceEnv is the environment variable about the user namespace that Main
// creates: "inside" in the process that runs there, "force" to create one as root too.
const userNamespaceEnv = "NETLAB_USERNS"

// newRootEnv tells it where its root folder may be made; see ownRoot.
const newRootEnv = "NETLAB_ROOT"

// When a goroutine ends while locked to its thread, the thread ends too (see
// runtime.LockOSThread); so threads that entered a host are discarded. The main thread
// can't end: it would stay in the host and keep its namespaces. So it is reserved for the
// main goroutine.
func init() { runtime.LockOSThread() }

// Main runs a program that uses hosts and returns its exit status. If the process isn't
// permitted to create namespaces, it starts the program again as root of a new user
// namespace. A test package calls it as
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
// and returns its exit status. It forwards signals. The calling thread is the main one,
// so the child's parent-death signal is sent when the process ends, not a thread.
func runInUserNamespace() (int, error) {
	root, err := os.MkdirTemp("", "netlab-root-*")
	if err != nil {
		return 0, err
	}
	defer os.Remove(root) // empty, as the child's mounts aren't visible here
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

// Unavailable returns why this process can't create hosts; nil if it can.
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
// namespace, a root folder that it owns, with everything from the former one, and a
// folder for temporary files. In the user namespace the files of the machine's root
// belong to an unknown user (nobody), and the program under test trusts no folder below
// one of those.
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
			// MS_REC, because a user namespace mustn't uncover what is below a mount.
			if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
				return fmt.Errorf("mount %s: %w", from, err)
			}
		}
	}
	const temporary = "/netlab"
	if err := os.Mkdir(root+temporary, 0o755); err != nil {
		return err
	}
	// It must be the root of the mount namespace, not only of the process: a thread that
	// enters a mount namespace copied from this one starts there (setns(2)). The old root
	// is then mounted on top, and is unmounted (pivot_root(2), "pivot_root(".", ".")").
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
