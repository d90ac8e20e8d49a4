package darwin_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
)

// patient runs programs with a timeout that no slow machine reaches.
var patient = darwin.Exec{Timeout: time.Minute}

// shell runs a script with this system's shell.
func shell(t *testing.T, e darwin.Exec, ctx context.Context, stdin, script string) (string, string, int, error) {
	t.Helper()
	out, errOut, status, err := e.Run(ctx, []byte(stdin), "/bin/sh", "-c", script)
	return string(out), string(errOut), status, err
}

// TestExec checks the input, environment and result of a program, and its failures.
func TestExec(t *testing.T) {
	t.Setenv("MESH_SECRET", "x")
	out, errOut, status, err := shell(t, patient, t.Context(), "in", `cat; echo "$LC_ALL $MESH_SECRET $PWD"; echo talk >&2; exit 3`)
	if err != nil || status != 3 || out != "inC  /\n" || errOut != "talk\n" {
		t.Errorf("stdout %q, stderr %q, status %d, %v", out, errOut, status, err)
	}
	if _, _, _, err := patient.Run(t.Context(), nil, "sh"); err == nil {
		t.Error("ran a program by a relative path")
	}
	if _, _, _, err := patient.Run(t.Context(), nil, "/nowhere/pfctl"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("ran a missing program: %v", err)
	}
	if _, _, _, err := shell(t, patient, t.Context(), "", "kill -9 $$"); err == nil {
		t.Error("no error for a program that was killed")
	}
}

// TestExecDrainsBothPipes has a program fill stdout and stderr alternately, which would
// deadlock if one weren't drained.
func TestExecDrainsBothPipes(t *testing.T) {
	out, errOut, status, err := shell(t, patient, t.Context(), "",
		`i=0; while [ $i -lt 3000 ]; do echo "................................................"; echo "++++++++++++++++++++++++++++++++++++++++++++++++" >&2; i=$((i+1)); done`)
	if err != nil || status != 0 || len(out) != 3000*49 || len(errOut) != 3000*49 {
		t.Errorf("%d and %d bytes, status %d, %v", len(out), len(errOut), status, err)
	}
}

// TestExecTimesOut has a program exceed its timeout, with a child that keeps the pipes
// open.
func TestExecTimesOut(t *testing.T) {
	begin := time.Now()
	// The shell's child keeps the pipes open.
	_, _, _, err := shell(t, darwin.Exec{Timeout: 50 * time.Millisecond}, t.Context(), "", "sleep 60 & sleep 60")
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a program beyond its timeout: %v", err)
	}
	if d := time.Since(begin); d > 30*time.Second {
		t.Errorf("the timeout took %v", d)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("the helper stops"))
	if _, _, _, err := shell(t, patient, ctx, "", "true"); err == nil || !strings.Contains(err.Error(), "the helper stops") {
		t.Errorf("with a canceled context: %v", err)
	}
}

func TestExecBoundsOutput(t *testing.T) {
	_, _, _, err := shell(t, patient, t.Context(), "", "head -c 40000000 /dev/zero")
	if err == nil || !strings.Contains(err.Error(), "bytes of output") {
		t.Errorf("a program with too much output: %v", err)
	}
}
