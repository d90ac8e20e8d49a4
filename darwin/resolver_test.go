package darwin_test

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
)

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func TestResolversCaptured(t *testing.T) {
	text := captured(t, "scutil-dns.txt")
	got, err := darwin.ParseResolvers(text)
	want := []darwin.Resolver{
		{Servers: addrs("75.75.75.75", "75.75.76.76"), Interface: "en0"},
		{Servers: addrs("10.0.2.1"), Interface: "en0", Scoped: true},
	}
	if diff := cmp.Diff(want, got, compareNetip); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	all, err := darwin.Resolvers(t.Context(), answers{stdout: text})
	if err != nil || !slices.Equal(all, addrs("10.0.2.1", "75.75.75.75", "75.75.76.76")) {
		t.Errorf("%v, %v", all, err)
	}
	got, err = darwin.ParseResolvers(captured(t, "scutil-dns-tailscale.txt"))
	if err != nil || len(got) != 2 || got[1].Domain != "tail3b1a8.ts.net" || got[1].Servers[0] != netip.MustParseAddr("100.100.100.100") {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestResolversOddAnswers(t *testing.T) {
	if got, err := darwin.ParseResolvers("No DNS configuration available\n"); err != nil || len(got) != 0 {
		t.Errorf("none: %+v, %v", got, err)
	}
	for name, a := range map[string]answers{
		"nothing":       {},
		"another word":  {stdout: "resolver #1\n  nameserver[0] : 10.0.0.1\n"},
		"no address":    {stdout: "DNS configuration\n\nresolver #1\n  nameserver[0] : dns.example\n"},
		"a strange one": {stdout: "DNS configuration\n\nresolver #1\n  port     : 70000\n"},
		"a failure":     {stdout: "DNS configuration\n", status: 1},
	} {
		if got, err := darwin.Resolvers(t.Context(), a); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestFakeResolvers checks that the fake's output parses to the same resolvers.
func TestFakeResolvers(t *testing.T) {
	k := darwintest.NewKernel()
	list := []darwin.Resolver{
		{Servers: addrs("192.168.1.1", "fe80::1%en0"), Interface: "en0"},
		{Servers: addrs("100.100.100.100"), Domain: "ts.net"},
		{Servers: addrs("127.0.0.1"), Port: 5353, Domain: "test"},
		{Servers: addrs("10.0.0.1"), Interface: "utun4", Scoped: true},
	}
	for _, want := range [][]darwin.Resolver{nil, list, list[3:]} {
		k.SetResolvers(want)
		stdout, _, _, err := k.Run(t.Context(), nil, "/usr/sbin/scutil", "--dns")
		if err != nil {
			t.Fatal(err)
		}
		got, err := darwin.ParseResolvers(string(stdout))
		if diff := cmp.Diff(want, got, compareNetip); err != nil || diff != "" {
			t.Errorf("%v (-want +got):\n%s", err, diff)
		}
	}
	if all, err := darwin.Resolvers(t.Context(), k); err != nil || !slices.Equal(all, addrs("10.0.0.1")) {
		t.Errorf("%v, %v", all, err)
	}
}

func FuzzParseResolvers(f *testing.F) {
	f.Add(captured(f, "scutil-dns.txt"))
	f.Add(captured(f, "scutil-dns-tailscale.txt"))
	f.Fuzz(func(t *testing.T, text string) {
		list, err := darwin.ParseResolvers(text)
		for _, r := range list {
			if err != nil || len(r.Servers) == 0 {
				t.Errorf("%+v, %v", r, err)
			}
		}
	})
}
