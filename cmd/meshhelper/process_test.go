//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
)

// limit bounds what must happen; it says nothing of how fast.
const limit = time.Minute

// A process is the real program as a process of its own, on a host that enforces
// nothing.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	socket string
	client *api.Client
	done   chan struct{}
}

// startProcess starts `meshhelper run` by a shell, after the shell's commands in
// before, and waits until it is ready. out gets what it prints.
func startProcess(t *testing.T, before string, out io.Writer) *process {
	t.Helper()
	name := link(t)
	dir := filepath.Dir(name)
	p := &process{t: t, socket: filepath.Join(dir, "s"), done: make(chan struct{})}
	p.cmd = exec.Command("/bin/sh", "-c", before+` exec "$@"`, "sh", name, "run", "--platform", "fake",
		"--state-dir", filepath.Join(dir, "state"), "--listen-port", "0", "--socket", p.socket)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() { p.cmd.Process.Kill(); <-p.done })
	p.client = api.NewClient(p.socket)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if _, err := p.client.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// mustEnd wants the process to have left in good order: by itself, and without its
// socket.
func (p *process) mustEnd() {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(limit):
		p.t.Fatal("it still runs")
	}
	if status := p.cmd.ProcessState; !status.Success() {
		p.t.Errorf("it ended with %v", status)
	}
	if _, err := os.Lstat(p.socket); !errors.Is(err, os.ErrNotExist) {
		p.t.Errorf("its socket is still there: %v", err)
	}
}

// toggle changes a peer's permission n times.
func (p *process) toggle(n int) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), limit)
	defer cancel()
	_, err := p.client.AddPeer(ctx, api.NewPeer{Name: "phone", PublicKey: "4+kGYe2dVTRjEBG9/eVGCXT1Y2OY5tjp2j3GIYuBrkg="})
	if err != nil {
		p.t.Fatal(err)
	}
	for i := range n {
		_, err := p.client.ChangePeer(ctx, "phone", api.PeerChange{
			Permissions: map[string]api.PermissionChange{"routing": {Allowed: i%2 == 0}},
		})
		if err != nil {
			p.t.Fatalf("change %d: %v", i, err)
		}
	}
}

// TestSignalsEndInOrder sends each signal by which people and systems end a
// program, twice.
func TestSignalsEndInOrder(t *testing.T) {
	// What this process ignores, as under nohup, the helper would, too.
	heeded := make(chan os.Signal, 1)
	signal.Notify(heeded, syscall.SIGHUP, syscall.SIGINT)
	defer signal.Stop(heeded)
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT} {
		t.Run(s.String(), func(t *testing.T) {
			p := startProcess(t, "", nil)
			p.signal(s)
			_ = p.cmd.Process.Signal(s) // it may have ended
			p.mustEnd()
		})
	}
}

// TestNohup has the caller ignore SIGHUP and SIGINT: they don't end the helper.
func TestNohup(t *testing.T) {
	p := startProcess(t, `trap "" HUP INT;`, nil)
	p.signal(syscall.SIGHUP)
	p.signal(syscall.SIGINT)
	p.toggle(2) // the signals were delivered before any of its answers
	p.signal(syscall.SIGTERM)
	p.mustEnd()
}

// TestStderrIsClosed takes the reader of the helper's stderr away, as a closed
// terminal and a pager that ends do.
func TestStderrIsClosed(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, "", w)
	w.Close()
	r.Close()
	p.toggle(20)
	p.signal(syscall.SIGTERM)
	p.mustEnd()
}

// TestStderrIsStuck has a reader of the helper's stderr that reads nothing, or was
// stopped: the helper goes on, and ends when it is told to.
func TestStderrIsStuck(t *testing.T) {
	for name, reader := range map[string]func(t *testing.T, r *os.File){
		"not read": func(*testing.T, *os.File) {},
		"stopped": func(t *testing.T, r *os.File) {
			cat := exec.Command("cat")
			cat.Stdin = r
			if err := cat.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { cat.Process.Kill(); cat.Wait() })
			if err := cat.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			reader(t, r)
			fill(t, w)
			p := startProcess(t, "", w)
			w.Close()
			p.toggle(300)
			p.signal(syscall.SIGTERM)
			p.mustEnd()
		})
	}
}

// fill writes to a pipe until it takes no more.
func fill(t *testing.T, w *os.File) {
	t.Helper()
	chunk := bytes.Repeat([]byte("x"), 1<<10)
	for range 1 << 14 {
		if err := w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err := w.Write(chunk)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("the pipe takes everything")
}

// TestErrorIsPrinted wants the reason why a helper doesn't start on stderr, though
// that goes by a queue.
func TestErrorIsPrinted(t *testing.T) {
	var out bytes.Buffer
	p := startProcess(t, "", nil)
	second := exec.Command(p.cmd.Args[4], append(p.cmd.Args[5:], "--state-dir", t.TempDir())...)
	second.Stderr = &out
	if err := second.Run(); err == nil || !strings.Contains(out.String(), "another helper answers there") {
		t.Errorf("%v, %q", err, out.String())
	}
}

// waitingReader is standard input of which nothing comes.
type waitingReader struct {
	once    sync.Once
	reading chan struct{} // closed when it is read from
}

func (r *waitingReader) Read([]byte) (int, error) {
	r.once.Do(func() { close(r.reading) })
	select {}
}

// TestSignalsEndReading has commands wait for a host's facts that never come, from
// standard input and from a named pipe: each signal ends them, as it does all others.
func TestSignalsEndReading(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"rules --platform pf", "explain phone 9.9.9.9"} {
		for _, from := range []string{"-", pipe} {
			for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM} {
				t.Run(command+" from "+from+" "+s.String(), func(t *testing.T) {
					if signal.Ignored(s) {
						t.Skip("the test was started with the signal ignored, which commands leave so")
					}
					var said bytes.Buffer
					stdin := &waitingReader{reading: make(chan struct{})}
					a := newApp(nil)
					a.stdin, a.stdout, a.stderr = stdin, io.Discard, &said
					status := make(chan int, 1)
					go func() { status <- a.main(append(strings.Fields(command), "--host", from)) }()
					late := time.After(limit)
					for waits := false; !waits; {
						select {
						case got := <-status:
							t.Fatalf("it ended with %d and said %q", got, said.String())
						case <-late:
							t.Fatal("it doesn't read")
						case <-stdin.reading:
							waits = true
						case <-time.After(time.Millisecond):
							// A pipe that is opened to be read from can be written to.
							if fd, err := syscall.Open(pipe, syscall.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
								defer syscall.Close(fd)
								waits = true
							}
						}
					}
					// Its handler is set, so that the test goes on.
					if err := syscall.Kill(os.Getpid(), s); err != nil {
						t.Fatal(err)
					}
					select {
					case got := <-status:
						if got != exitFailed || !strings.Contains(said.String(), "read host facts from ") {
							t.Errorf("it ended with %d and said %q", got, said.String())
						}
					case <-late:
						t.Error("it still waits")
					}
				})
			}
		}
	}
}
