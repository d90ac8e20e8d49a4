//go:build unix

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// otherUser is the user that is called nobody.
const otherUser = 65534

// link makes a link to this program that is called meshhelper, in a new folder.
func link(t *testing.T) (program string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "run") // short, for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A program is what its name says, to testscript.Main.
	program = filepath.Join(dir, "meshhelper")
	if err := os.Symlink(self, program); err != nil {
		t.Fatal(err)
	}
	return program
}

// TestRootAsksNoOtherUsersHelper has another user run a helper of its own, with the
// endpoint of its choice, where root's commands may be led to: they ask it nothing.
func TestRootAsksNoOtherUsersHelper(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can run a helper as another user")
	}
	program := link(t)
	dir := filepath.Join(filepath.Dir(program), "home")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, otherUser, otherUser), openTo(filepath.Dir(program), os.TempDir()), openTo(filepath.Dir(self), os.TempDir())); err != nil {
		t.Fatal(err)
	}
	var out said
	helper := exec.Command(program, "run", "--platform", "fake", "--listen-port", "0", "--endpoint", "evil.example:51820")
	// Its own socket is where it looks by itself.
	helper.Env = []string{"XDG_STATE_HOME=" + dir, "HOME=" + dir, "TMPDIR=" + os.TempDir()}
	helper.Args = append(helper.Args, "--state-dir", filepath.Join(dir, "state"))
	helper.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: otherUser, Gid: otherUser}}
	helper.Stdout, helper.Stderr = &out, &out
	if err := helper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { helper.Process.Kill(); helper.Wait() }()
	socket := filepath.Join(dir, "meshhelper", "meshhelper.sock")
	for until := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Lstat(socket); err == nil {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("it made no socket where its user alone can write\n%s", out.String())
		}
	}
	if info, err := os.Stat(filepath.Dir(socket)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the socket's folder: %v, %v", info.Mode(), err)
	}
	ask := func(uid uint32, env []string, args ...string) (status int, stdout, stderr string) {
		var out, talk bytes.Buffer
		cmd := exec.Command(program, args...)
		cmd.Env, cmd.Stdout, cmd.Stderr = env, &out, &talk
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		cmd.Run()
		if cmd.ProcessState == nil {
			t.Fatal("the command doesn't start")
		}
		return cmd.ProcessState.ExitCode(), out.String(), talk.String()
	}
	// Its own user is served.
	if status, stdout, stderr := ask(otherUser, helper.Env, "peer", "add", "phone"); systemSocketMissing(t) &&
		(status != 0 || !strings.Contains(stdout, "Endpoint = evil.example:51820")) {
		t.Fatalf("its own user: status %d, %s; nothing is proved", status, stderr)
	}
	for name, c := range map[string]struct {
		env    []string
		args   []string
		status int
		says   string
	}{
		"by --socket":          {nil, []string{"--socket", socket}, exitFailed, "nothing was asked: the socket can't be trusted"},
		"by MESHHELPER_SOCKET": {[]string{"MESHHELPER_SOCKET=" + socket}, nil, exitFailed, "belongs to user 65534, not to root"},
		// As sudo -E leaves it.
		"by XDG_STATE_HOME":  {[]string{"XDG_STATE_HOME=" + dir}, nil, exitUnreachable, systemSocket()},
		"by XDG_RUNTIME_DIR": {[]string{"XDG_RUNTIME_DIR=" + filepath.Dir(socket)}, nil, exitUnreachable, systemSocket()},
		"by TMPDIR":          {[]string{"TMPDIR=" + filepath.Dir(socket)}, nil, exitUnreachable, systemSocket()},
	} {
		if c.status == exitUnreachable && !systemSocketMissing(t) {
			continue
		}
		status, stdout, stderr := ask(0, c.env, append([]string{"peer", "add", "phone"}, c.args...)...)
		if status != c.status || stdout != "" || !strings.Contains(stderr, c.says) {
			t.Errorf("%s: status %d, %q, %q; want %d and %q", name, status, stdout, stderr, c.status, c.says)
		}
	}
}

// systemSocketMissing reports whether no helper runs on this machine.
func systemSocketMissing(t *testing.T) bool {
	_, err := os.Lstat(systemSocket())
	if err == nil {
		t.Logf("a helper runs here (%s): what a command does without one isn't tried", systemSocket())
	}
	return err != nil
}

// TestDefaultSocket never names a folder for temporary files.
func TestDefaultSocket(t *testing.T) {
	for _, c := range []struct {
		env  map[string]string
		want string
	}{
		{map[string]string{"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/meshhelper.sock"},
		{map[string]string{"XDG_STATE_HOME": "/s", "HOME": "/h"}, "/s/meshhelper/meshhelper.sock"},
		{map[string]string{"HOME": "/h", "TMPDIR": "/t"}, "/h/.local/state/meshhelper/meshhelper.sock"},
		{map[string]string{"XDG_RUNTIME_DIR": "run"}, ""},
		{map[string]string{"TMPDIR": "/t"}, ""},
	} {
		a := &app{getenv: func(name string) string { return c.env[name] }}
		if got := a.userSocket(); got != c.want {
			t.Errorf("%v: %q, want %q", c.env, got, c.want)
		}
	}
}
