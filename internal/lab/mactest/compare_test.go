package mactest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// recorded returns an output of a real Mac, without the first line, which names its source.
func recorded(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "..", "pfconf", "testdata", "mac", name+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "\n")
	if !ok {
		t.Fatalf("%s has no line of its source", name)
	}
	return text
}

func TestNormaliseRecorded(t *testing.T) {
	for _, c := range []struct {
		name string
		form Form
		want []string
	}{
		{"pfctl-sa-main-rules-sharing", FilterAll, []string{
			"No ALTQ support in kernel", "ALTQ related functions disabled",
			`TRANSLATION RULES: nat-anchor "com.apple/*" all`,
			`TRANSLATION RULES: nat-anchor "com.apple.internet-sharing" all`,
			`TRANSLATION RULES: rdr-anchor "com.apple/*" all`,
			`TRANSLATION RULES: rdr-anchor "com.apple.internet-sharing" all`,
			`FILTER RULES: scrub-anchor "com.apple/*" all fragment reassemble`,
			`FILTER RULES: scrub-anchor "com.apple.internet-sharing" all fragment reassemble`,
			`FILTER RULES: anchor "com.apple/*" all`,
			`FILTER RULES: anchor "com.apple.internet-sharing" all`,
			`DUMMYNET RULES: dummynet-anchor "com.apple/*" all`,
		}},
		{"pfctl-references-pfd-26", References, []string{
			"TOKENS:", "PID      Process Name                 TOKEN                    TIMESTAMP", "pfd 11605101605051758694"}},
		{"pfctl-references-alf-10", References, []string{
			"TOKENS:", "PID      Process Name                 TOKEN                    TIMESTAMP", "socketfilterfw 9813589183660731843"}},
		{"pfctl-references-none-26", References, []string{"No pf starter references held"}},
		{"netstat-rn-26", Routes, []string{
			"default 192.168.178.1 UGScg en0",
			"default link#23 UCSIg bridge100",
			"127 127.0.0.1 UCS lo0",
			"127.0.0.1 127.0.0.1 UH lo0",
			"192.168.178.1/32 link#14 UCS en0",
			"224.0.0/4 link#14 UmCS en0",
			"255.255.255.255/32 link#14 UCS en0",
		}},
		{"netstat-rn-inet6", Routes, []string{
			"default fe80::%utun0 UGcIg utun0",
			"default fe80::%utun1 UGcIg utun1",
			"default fe80::%utun2 UGcIg utun2",
			"default fe80::%utun3 UGcIg utun3",
			"fd6f:74a0:9a49::/64 fe80::1%utun5 Uc utun5",
			"fd6f:74a0:9a49::1 link#30 UHL lo0",
		}},
		{"sysctl-forwarding", Sysctls, []string{
			"net.inet6.ip6.forwarding: 1", "net.inet6.ip6.accept_rtadv: 1", "net.inet.ip.forwarding: 1 -> 1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, Normalise(c.form, recorded(t, c.name))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestNormaliseLeavesOutWhatMoves normalises formats that the recorded outputs lack:
// columns of older releases, neighbours, states and counters.
func TestNormaliseLeavesOutWhatMoves(t *testing.T) {
	all := "FILTER RULES:\n" + `anchor "com.apple/*" all` + "\n\nSTATES:\n" + recorded(t, "pfctl-s-states") +
		"\nINFO:\n" + recorded(t, "pfctl-s-info-8days") +
		"\nLABEL COUNTERS:\nx 1 2 3\n\nTIMEOUTS:\ntcp.first                   120s\n\nLIMITS:\nstates        hard limit    10000\n"
	want := []string{`FILTER RULES: anchor "com.apple/*" all`, "INFO: Status: Enabled", "TIMEOUTS: tcp.first 120s", "LIMITS: states hard limit 10000"}
	if diff := cmp.Diff(want, Normalise(FilterAll, all)); diff != "" {
		t.Error(diff)
	}
	if got := Normalise(FilterAll, "INFO:\nStatus: Disabled                              Debug: Urgent\n"); !slices.Equal(got, []string{"INFO: Status: Disabled"}) {
		t.Errorf("disabled: %q", got)
	}
	routes := `Internet:
Destination        Gateway            Flags        Refs      Use   Netif Expire
default            192.168.1.1        UGSc           70       12     en0
192.168.1.7        0:11:22:33:44:55   UHLWIi          1       40     en0   1181
10.9.0.1           10.9.0.1           UH              0        0   utun3
fe80::%lo0/64                         fe80::1%lo0   UcI  lo0
`
	if diff := cmp.Diff([]string{"default 192.168.1.1 UGSc en0", "10.9.0.1 10.9.0.1 UH utun3"}, Normalise(Routes, routes)); diff != "" {
		t.Error(diff)
	}
	ifconfig := "en0: flags=8863<UP,BROADCAST> mtu 1500\n\tether 00:11:22:33:44:55\n\tinet6 fe80::1%en0 prefixlen 64 secured scopeid 0xb\n\tinet 192.168.1.2 netmask 0xffffff00 broadcast 192.168.1.255\n"
	if diff := cmp.Diff([]string{
		"en0: flags=8863<UP,BROADCAST> mtu 1500", "en0: ether 00:11:22:33:44:55",
		"en0: inet 192.168.1.2 netmask 0xffffff00 broadcast 192.168.1.255",
	}, Normalise(Interfaces, ifconfig)); diff != "" {
		t.Error(diff)
	}
	if got := Normalise(Numbered, "ALF: total number of apps = 1\n\n1 :  /usr/libexec/x\n"); !slices.Contains(got, "/usr/libexec/x") {
		t.Errorf("numbered: %q", got)
	}
}

// output returns an Output for a snapshot.
func output(name string, form Form, text string) Output {
	return Output{Command: Command{Name: name, Form: form, Path: "/bin/x"}, Stdout: []byte(text)}
}

// TestDiff makes one change at a time and checks how it is reported.
func TestDiff(t *testing.T) {
	const rules = "pass on en1 all flags S/SA keep state\nblock drop on en2 all\n"
	routes := recorded(t, "netstat-rn-26")
	before := func(o Output) Snapshot { return Snapshot{o} }
	for _, c := range []struct {
		name           string
		was, is        Output
		changed, moved []string
	}{
		{"same", output("r", Routes, routes), output("r", Routes, routes), nil, nil},
		{"expiry", output("r", Routes, routes), output("r", Routes, strings.ReplaceAll(routes, " !", "1180")), nil, nil},
		{"route", output("r", Routes, routes), output("r", Routes, routes+"10.1/16 10.0.0.1 UGSc en0\n"), []string{"r: + 10.1/16 10.0.0.1 UGSc en0"}, nil},
		{"system-route", output("r", Routes, routes), output("r", Routes, routes+"10.1/16 link#30 UCS bridge101\n"), nil, []string{"r: + 10.1/16 link#30 UCS bridge101"}},
		{"own-route", output("r", Routes, routes), output("r", Routes, routes+"100.64.0.7 link#30 UHS utun7\n"), []string{"r: + 100.64.0.7 link#30 UHS utun7"}, nil},
		{"forwarding", output("s", Sysctls, "net.inet.ip.forwarding: 0\n"), output("s", Sysctls, "net.inet.ip.forwarding: 1\n"),
			[]string{"s: - net.inet.ip.forwarding: 0", "s: + net.inet.ip.forwarding: 1"}, nil},
		{"counter", output("s", Sysctls, "net.inet.tcp.pcbcount: 4\nnet.inet.ip.fragpackets: 0\n"), output("s", Sysctls, "net.inet.tcp.pcbcount: 5\nnet.inet.ip.fragpackets: 1\n"), nil,
			[]string{"s: - net.inet.tcp.pcbcount: 4", "s: - net.inet.ip.fragpackets: 0", "s: + net.inet.tcp.pcbcount: 5", "s: + net.inet.ip.fragpackets: 1"}},
		{"rule-gone", output("a", Ruleset, rules), output("a", Ruleset, "block drop on en2 all\n"), []string{"a: - pass on en1 all flags S/SA keep state"}, nil},
		{"rules-turned", output("a", Ruleset, rules), output("a", Ruleset, "block drop on en2 all\npass on en1 all flags S/SA keep state\n"),
			[]string{"a: + the same lines in another order"}, nil},
		{"filter-on", output("p", FilterAll, "INFO:\nStatus: Disabled     Debug: Urgent\n"), output("p", FilterAll, "INFO:\n"+recorded(t, "pfctl-s-info-8days")),
			[]string{"p: - INFO: Status: Disabled", "p: + INFO: Status: Enabled"}, nil},
		{"token", output("t", References, recorded(t, "pfctl-references-none-26")), output("t", References, "TOKENS:\nPID Process Name TOKEN TIMESTAMP\n4063     pfctl     15053025338191571182     0 days 00:00:00\n"),
			[]string{"t: + pfctl 15053025338191571182"}, []string{"t: - No pf starter references held", "t: + TOKENS:", "t: + PID Process Name TOKEN TIMESTAMP"}},
		{"anothers-token", output("t", References, recorded(t, "pfctl-references-pfd-26")), output("t", References, "TOKENS:\nPID      Process Name                 TOKEN                    TIMESTAMP\n"),
			nil, []string{"t: - pfd 11605101605051758694"}},
		{"aged-token", output("t", References, recorded(t, "pfctl-references-pfd-26")), output("t", References, strings.ReplaceAll(recorded(t, "pfctl-references-pfd-26"), "56 days", "57 days")), nil, nil},
		{"temporary", output("i", Interfaces, "en0: flags=1<UP>\n\tinet6 2001:db8::1 prefixlen 64 autoconf temporary\n"), output("i", Interfaces, "en0: flags=1<UP>\n"),
			nil, []string{"i: - en0: inet6 2001:db8::1 prefixlen 64 autoconf temporary"}},
		{"address", output("i", Interfaces, "en0: flags=1<UP>\n\tinet 192.0.2.1 netmask 0xffffff00\n"), output("i", Interfaces, "en0: flags=1<UP>\n"),
			[]string{"i: - en0: inet 192.0.2.1 netmask 0xffffff00"}, nil},
		{"file-of-another", output("l", Lines, "a.plist\n"), output("l", Lines, "a.plist\nb.plist\n"), nil, []string{"l: + b.plist"}},
		{"file-of-ours", output("l", Lines, "a.plist\n"), output("l", Lines, "a.plist\norg.meshhelper.mactest.plist\n"), []string{"l: + org.meshhelper.mactest.plist"}, nil},
		{"command-gone", output("l", Lines, "a"), Output{Command: Command{Name: "l"}, Err: exec.ErrNotFound}, nil,
			[]string{"l: - a", "l: + not run: " + exec.ErrNotFound.Error()}},
		{"service", Output{Command: Command{Name: "p", Form: ExitStatus}, Status: 113}, Output{Command: Command{Name: "p", Form: ExitStatus}},
			[]string{"p: - exit status 113", "p: + exit status 0"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := &Comparison{Own: []string{"org.meshhelper.mactest", "utun7"}, Volatile: map[string]bool{"net.inet.ip.fragpackets": true}}
			got := k.Diff(before(c.was), before(c.is))
			if diff := cmp.Diff(Differences{c.changed, c.moved}, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestVolatile(t *testing.T) {
	a := Snapshot{output("s", Sysctls, "net.a: 1\nnet.b: 1\n")}
	b := Snapshot{output("s", Sysctls, "net.a: 2\nnet.b: 1\n")}
	if diff := cmp.Diff(map[string]bool{"net.a": true}, Volatile(a, b)); diff != "" {
		t.Error(diff)
	}
}

// fakeRunner answers some commands as a Mac would.
type fakeRunner map[string]string

func (f fakeRunner) Run(_ context.Context, _ []byte, path string, args ...string) ([]byte, []byte, int, error) {
	out, ok := f[strings.Join(append([]string{filepath.Base(path)}, args...), " ")]
	if !ok {
		return nil, []byte("what?\n"), 1, nil
	}
	return []byte(out), nil, 0, nil
}

// TestTakeAndSave takes a snapshot with nested anchors and reads the saved files.
func TestTakeAndSave(t *testing.T) {
	r := fakeRunner{
		"sw_vers":                           "ProductName:\tmacOS\nProductVersion:\t26.5\n",
		"netstat -rn":                       recorded(t, "netstat-rn-26"),
		"pfctl -s Anchors":                  "  com.apple\n",
		"pfctl -a com.apple -s Anchors":     "  com.apple/200.AirDrop\n",
		"pfctl -a com.apple -s rules":       `anchor "200.AirDrop/*" all` + "\n",
		"pfctl -a com.apple/200.AirDrop -s": "",
	}
	s := Take(t.Context(), r, Outputs("org.meshhelper.mactest"))
	dir := filepath.Join(t.TempDir(), "before")
	if err := s.Save(dir); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"netstat-rn.txt":                       "# source: /usr/sbin/netstat -rn, exit status 0 on ProductName: macOS ProductVersion: 26.5\n" + recorded(t, "netstat-rn-26"),
		"anchor-com.apple-rules.txt":           "# source: /sbin/pfctl -a com.apple -s rules, exit status 0 on ProductName: macOS ProductVersion: 26.5\n" + `anchor "200.AirDrop/*" all` + "\n",
		"anchor-com.apple+200.AirDrop-nat.txt": "# source: /sbin/pfctl -a com.apple/200.AirDrop -s nat, exit status 1 on ProductName: macOS ProductVersion: 26.5\n",
		"ifconfig.stderr.txt":                  "# source: /sbin/ifconfig -a, exit status 1 on ProductName: macOS ProductVersion: 26.5\nwhat?\n",
	} {
		got, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Error(err)
		} else if string(got) != want {
			t.Errorf("%s: %s", file, cmp.Diff(want, string(got)))
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "netstat-rn.stderr.txt")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an empty stderr was kept: %v", err)
	}
}

func FuzzNormalise(f *testing.F) {
	for _, name := range []string{"netstat-rn-26", "netstat-rn-inet6", "ifconfig-v6-addresses-26", "sysctl-forwarding",
		"pfctl-sa-main-rules-sharing", "pfctl-references-pfd-26", "pfctl-s-info-8days"} {
		for form := Lines; form <= Ignored; form++ {
			f.Add(int(form), recorded(f, name))
		}
	}
	f.Fuzz(func(t *testing.T, form int, text string) {
		for _, line := range Normalise(Form(form), text) {
			if strings.Contains(line, "\n") || strings.TrimSpace(line) == "" {
				t.Errorf("line %q", line)
			}
		}
	})
}

func FuzzDescribe(f *testing.F) {
	f.Add([]byte{0x45, 19: 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if from, _, ok := describe(b); ok && !from.IsValid() {
			t.Errorf("%x has no source", b)
		}
		parseDatagram(b)
	})
}
