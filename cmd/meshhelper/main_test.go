//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/hostfake"
)

// TestMain lets the scripts run the real main, with a host that enforces
// nothing as one more platform.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"meshhelper": func() { os.Exit(newApp(withFake(hosts())).main(os.Args[1:])) },
		"netns":      inNamespace,
	})
}

func withFake(p map[string]newHost) map[string]newHost {
	out := map[string]newHost{"fake": newFake}
	for name, make := range p {
		out[name] = make
	}
	return out
}

// newFake returns a host that fails a step while the file FAULTS/step is there,
// with the text of the file.
func newFake(hostOptions) (host.Host, error) {
	h := hostfake.New()
	dir := os.Getenv("FAULTS")
	h.SetFault(func(step string) error {
		text, err := os.ReadFile(filepath.Join(dir, step))
		if err != nil {
			return nil
		}
		return &host.StepError{Step: step, Err: errors.New(string(bytes.TrimSpace(text))), Hint: "take the fault away"}
	})
	return h.Host(), nil
}

func TestScripts(t *testing.T) { testscript.Run(t, scripts("testdata/script")) }

// scripts returns how the scripts of a folder are run.
func scripts(dir string) testscript.Params {
	return testscript.Params{
		Dir: dir,
		Setup: func(env *testscript.Env) error {
			env.Setenv("MESHHELPER_SOCKET", filepath.Join(env.WorkDir, "s"))
			env.Setenv("FAULTS", filepath.Join(env.WorkDir, "faults"))
			// Other users must get to the socket, and not be able to replace it.
			return openTo(env.WorkDir, os.TempDir())
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits,
			"as":    runAs,
			"get":   get,
			"ready": ready,
			"until": until,
		},
	}
}

// openTo makes dir and the folders above it, up to top, accessible to all.
func openTo(dir, top string) error {
	for ; len(dir) > len(top); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// exits runs a command that must end with a status: exits STATUS COMMAND...
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS COMMAND...")
	}
	got := 0
	var failed *exec.ExitError
	err := ts.Exec(args[1], args[2:]...)
	if errors.As(err, &failed) {
		got = failed.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v: %v", args[1:], err)
	}
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("%v ended with status %d, want %s", args[1:], got, args[0])
	}
}

// runAs runs a command as another user, who is in no group of administrators,
// and wants a status: as UID STATUS COMMAND...
func runAs(ts *testscript.TestScript, neg bool, args []string) {
	uid, err := strconv.ParseUint(args[0], 10, 32)
	ts.Check(err)
	path := args[2]
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if _, err := os.Stat(filepath.Join(dir, path)); err == nil {
			path = filepath.Join(dir, path)
			ts.Check(openTo(dir, os.TempDir()))
			break
		}
	}
	cmd := exec.Command(path, args[3:]...)
	cmd.Env = []string{"MESHHELPER_SOCKET=" + ts.Getenv("MESHHELPER_SOCKET")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	err = cmd.Run()
	if cmd.ProcessState == nil {
		ts.Fatalf("%v", err)
	}
	if got := strconv.Itoa(cmd.ProcessState.ExitCode()); got != args[1] {
		ts.Fatalf("%v as user %d ended with status %s, want %s", args[2:], uid, got, args[1])
	}
}

// ready waits until the helper is past starting.
func ready(ts *testscript.TestScript, _ bool, _ []string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := api.NewClient(ts.Getenv("MESHHELPER_SOCKET")).WaitReady(ctx)
	ts.Check(err)
}

// get prints the answer of the socket to a GET: get PATH
func get(ts *testscript.TestScript, _ bool, args []string) {
	c := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", ts.Getenv("MESHHELPER_SOCKET"))
		},
	}}
	answer, err := c.Get("http://helper" + args[0])
	ts.Check(err)
	defer answer.Body.Close()
	_, err = io.Copy(ts.Stdout(), answer.Body)
	ts.Check(err)
}

// until waits until a file has a text: until FILE TEXT
func until(ts *testscript.TestScript, _ bool, args []string) {
	limit := time.Now().Add(time.Minute)
	for {
		text, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && bytes.Contains(text, []byte(args[1])) {
			return
		}
		if time.Now().After(limit) {
			ts.Fatalf("%s has no %q: %q, %v", args[0], args[1], text, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
