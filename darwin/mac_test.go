package darwin_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// TestCapturedByMacs reads captured output of Macs as the product does. It is in
// pfconf/testdata/mac; the first line of each file names its source.
func TestCapturedByMacs(t *testing.T) {
	ctx := t.Context()
	for name, want := range map[string]darwin.Token{"pfctl-enable-stderr-26.txt": 11012949885072952621, "pfctl-enable-stderr-again-26.txt": 15447822800193098702} {
		if got, err := darwin.NewPF(answers{stderr: captured(t, name)}).Enable(ctx); err != nil || got != want {
			t.Errorf("%s: token %d, %v", name, got, err)
		}
	}
	releases := strings.Split(strings.TrimSpace(captured(t, "pfctl-release-stderr-26.txt")), "\n")
	for i, want := range []error{darwin.ErrNotEnabled, darwin.ErrTokenInvalid, nil, nil} {
		a := answers{stderr: releases[i] + "\n"}
		if want != nil {
			a.status = 1
		}
		if err := darwin.NewPF(a).Release(ctx, 1); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", releases[i], err, want)
		}
	}
	for name, want := range map[string]struct {
		process string
		token   uint64
		age     time.Duration
	}{
		"pfctl-references-none-26.txt": {},
		"pfctl-references-pfd-26.txt":  {"pfd", 11605101605051758694, 56*24*time.Hour + 8*time.Hour + 17*time.Minute + 11*time.Second},
		"pfctl-references-alf-10.txt":  {"socketfilterfw", 9813589183660731843, 3*time.Minute + 31*time.Second},
	} {
		refs, err := darwin.NewPF(answers{stdout: captured(t, name)}).References(ctx)
		switch {
		case err != nil || len(refs) > 1:
			t.Errorf("%s: %+v, %v", name, refs, err)
		case len(refs) == 0 && want.token != 0:
			t.Errorf("%s: none", name)
		case len(refs) == 1 && (refs[0].Process != want.process || refs[0].Token != want.token || refs[0].Age != want.age):
			t.Errorf("%s: %+v", name, refs)
		}
	}
	if got, err := darwin.NewPF(splitNoise(captured(t, "pfctl-interfaces-lo0-skip.txt"))).Skipped(ctx); err != nil || !slices.Equal(got, []string{"lo0"}) {
		t.Errorf("skipped %q, %v", got, err)
	}
	for name, want := range map[string]struct {
		since                  time.Duration
		match, searches, count uint64
	}{
		"pfctl-info-enabled-26.txt": {},
		"pfctl-s-info-8days.txt":    {8*24*time.Hour + 3*time.Hour + 22*time.Minute + 4*time.Second, 988220, 21967266, 40},
	} {
		i, err := darwin.NewPF(answers{stdout: captured(t, name)}).Info(ctx)
		if err != nil || !i.Enabled || i.For != want.since || i.States != want.count ||
			i.Counters["Counters"]["match"] != want.match || i.Counters["State Table"]["searches"] != want.searches {
			t.Errorf("%s: %+v, %v", name, i, err)
		}
	}
	if err := darwin.NewPF(answers{stderr: captured(t, "pfctl-flush-all-stderr-26.txt")}).Flush(ctx, "com.apple/x"); err != nil {
		t.Errorf("flush: %v", err)
	}
	missing := answers{stdout: "anchor \"*\" all {\n}\n", stderr: "pfctl: DIOCGETRULES: Invalid argument\n"}
	if missing.stdout[:17]+missing.stderr+"}\n" != captured(t, "pfctl-missing-wildcard.txt") {
		t.Errorf("the captured answer for a missing anchor differs: %q", captured(t, "pfctl-missing-wildcard.txt"))
	}
	if rules, err := darwin.NewPF(missing).Rules(ctx, "com.apple/x"); err != nil || rules != "" {
		t.Errorf("a missing anchor: %q, %v", rules, err)
	}
	want := []string{"com.apple", "com.apple/200.AirDrop", "com.apple/200.AirDrop/Bonjour", "com.apple/250.ApplicationFirewall"}
	if names, err := darwin.NewPF(answers{stdout: captured(t, "pfctl-v-s-anchors-10.txt")}).AllAnchors(ctx); err != nil || !slices.Equal(names, want) {
		t.Errorf("all anchors %q, %v", names, err)
	}
	if names, err := darwin.NewPF(answers{stdout: captured(t, "pfctl-v-s-anchors-10.txt")}).Anchors(ctx, "com.apple"); err != nil || !slices.Equal(names, want) {
		t.Errorf("anchors %q, %v", names, err)
	}
}

// splitNoise moves pfctl's noise to stderr, where pfctl prints it.
func splitNoise(text string) (a answers) {
	for line := range strings.Lines(text) {
		if darwin.IsNoise(strings.TrimSpace(line)) {
			a.stderr += line
		} else {
			a.stdout += line
		}
	}
	return a
}

// An idleEngine is a pf engine without rules.
type idleEngine struct{ darwintest.Engine }

func (idleEngine) SetEnabled(bool)             {}
func (idleEngine) Flush(string) bool           { return true }
func (idleEngine) States() []pfsim.State       { return nil }
func (idleEngine) Checksum() string            { return strings.Repeat("0", 32) }
func (idleEngine) Counters() map[string]uint64 { return nil }

// TestFakesPrintLikeMacs compares the fakes' output with the captures.
func TestFakesPrintLikeMacs(t *testing.T) {
	k := darwintest.NewKernel()
	k.SetVariable(xnu.IPv4Forwarding, "1")
	stdout, _, _, err := k.Run(t.Context(), nil, "/usr/sbin/sysctl", "-w", xnu.IPv4Forwarding+"=1")
	if err != nil || !strings.HasSuffix(captured(t, "sysctl-forwarding.txt"), string(stdout)) {
		t.Errorf("sysctl prints %q, %v", stdout, err)
	}
	f := &darwintest.PF{Engine: idleEngine{}, NextToken: func() darwin.Token { return 11012949885072952621 }}
	run := func(args ...string) (string, string) {
		stdout, stderr, status, err := f.Run(t.Context(), nil, "/sbin/pfctl", args...)
		if err != nil || status != 0 {
			t.Fatalf("%q: status %d, %v", args, status, err)
		}
		_, stderrWithoutNoise, _ := strings.Cut(string(stderr), "ALTQ related functions disabled\n")
		return string(stdout), stderrWithoutNoise
	}
	if got, _ := run("-s", "References"); got != captured(t, "pfctl-references-none-26.txt") {
		t.Errorf("no references: %q", got)
	}
	if _, got := run("-E"); got != captured(t, "pfctl-enable-stderr-26.txt") {
		t.Errorf("-E: %q", got)
	}
	if got, _ := run("-s", "info"); got != captured(t, "pfctl-info-enabled-26.txt") {
		t.Errorf("info:\n%s", got)
	}
	_, got := run("-F", "all")
	if want := strings.Replace(captured(t, "pfctl-flush-all-stderr-26.txt"), "42 states", "0 states", 1); got != want {
		t.Errorf("-F all: %q, want %q", got, want)
	}
}
