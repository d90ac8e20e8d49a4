package darwin_test

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
)

// answers is a Runner that gives every command the same answer.
type answers struct {
	stdout, stderr string
	status         int
}

func (a answers) Run(context.Context, []byte, string, ...string) ([]byte, []byte, int, error) {
	return []byte(a.stdout), []byte(a.stderr), a.status, nil
}

func TestAddresses6Captured(t *testing.T) {
	en0 := captured(t, "ifconfig-en0-temporary.txt")
	got, err := darwin.NewIfconfig(answers{stdout: en0}).Addresses6(t.Context(), "en0")
	if err != nil {
		t.Fatal(err)
	}
	address := func(s string, flags darwin.AddressFlags, scope int) darwin.Address6 {
		return darwin.Address6{Prefix: netip.MustParsePrefix(s + "/64"), Flags: flags, Scope: scope}
	}
	const old = darwin.AddressDeprecated | darwin.AddressAutoconf | darwin.AddressTemporary
	want := []darwin.Address6{
		address("fe80::400:228:2505:7d7", darwin.AddressSecured, 6),
		address("2001:db8:1:2:8c9:acbf:db68:bfc1", darwin.AddressAutoconf|darwin.AddressSecured, 0),
		address("2001:db8:1:2:1463:8db2:31fb:9cd1", old, 0),
		address("2001:db8:1:2:a5cc:2094:eb19:3936", old, 0),
		address("2001:db8:1:2:d542:cfc0:5d79:9678", old, 0),
		address("2001:db8:1:2:59a8:d229:19d4:bee5", darwin.AddressAutoconf|darwin.AddressTemporary, 0),
	}
	if diff := cmp.Diff(want, got, compareNetip); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for i, a := range got {
		if a.IsSettled() != (i == 1) {
			t.Errorf("%v, %v: settled %v", a.Prefix, a.Flags, a.IsSettled())
		}
	}
	// A list of a Mac's addresses, converted to ifconfig's format.
	var lines string
	for line := range strings.Lines(captured(t, "ifconfig-v6-addresses-26.txt")) {
		_, rest, _ := strings.Cut(line, ": ")
		lines += "\tinet6 " + rest
	}
	all, err := darwin.ParseAddresses6(lines)
	if err != nil || len(all) != 7 || all[5].Prefix != netip.MustParsePrefix("fd7a:115c:a1e0::332:d067/48") {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestParseAddresses6(t *testing.T) {
	for line, want := range map[string]darwin.Address6{
		"inet6 fd00::1 --> fd00::2 prefixlen 128 ":                       {Prefix: netip.MustParsePrefix("fd00::1/128"), Peer: netip.MustParseAddr("fd00::2")},
		"inet6 2001:db8::7 prefixlen 64 tentative optimistic autoconf ":  {Prefix: netip.MustParsePrefix("2001:db8::7/64"), Flags: darwin.AddressTentative | darwin.AddressOptimistic | darwin.AddressAutoconf},
		"inet6 2001:db8::8c1e prefixlen 64 detached duplicated dynamic ": {Prefix: netip.MustParsePrefix("2001:db8::8c1e/64"), Flags: darwin.AddressDetached | darwin.AddressDuplicated | darwin.AddressDynamic},
		"inet6 2001:db8::9 prefixlen 64 clat46 newword pltime 5 ":        {Prefix: netip.MustParsePrefix("2001:db8::9/64"), Flags: darwin.AddressCLAT46},
	} {
		got, err := darwin.ParseAddresses6("utun4: flags=8051<UP> mtu 1420\n\t" + line + "\n\tinet 10.0.0.1 --> 10.0.0.1 netmask 0xffffffff\n")
		if err != nil || len(got) != 1 || got[0] != want {
			t.Errorf("%s: %+v, %v, want %+v", line, got, err, want)
		}
	}
	for _, bad := range []string{"inet6", "inet6 x prefixlen 64", "inet6 10.0.0.1 prefixlen 24", "inet6 ::1 prefixlen 129",
		"inet6 ::1 prefixlen", "inet6 ::1 --> x prefixlen 1", "inet6 fe80::1 prefixlen 64 scopeid none", "inet6 ::1 netmask 3"} {
		if got, err := darwin.ParseAddresses6(bad + "\n"); err == nil {
			t.Errorf("%q was parsed as %+v", bad, got)
		}
	}
	for name, a := range map[string]answers{
		"no such interface": {stderr: "ifconfig: interface en9 does not exist\n", status: 1},
		"a warning":         {stderr: "ifconfig: ioctl(SIOCGIFAFLAG_IN6): Can't assign requested address\n"},
	} {
		if got, err := darwin.NewIfconfig(a).Addresses6(t.Context(), "en9"); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got, err := darwin.NewIfconfig(answers{}).Addresses6(t.Context(), "-a"); err == nil {
		t.Errorf("parsed an option as an interface: %+v", got)
	}
}

func TestKernelKnowsAddressKinds(t *testing.T) {
	k := newLaptop(t)
	c := darwin.NewIfconfig(k)
	list := func() []darwin.Address6 {
		got, err := c.Addresses6(t.Context(), "en0")
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	p := netip.MustParsePrefix("2001:db8:1:0:59a8:d229:19d4:bee5/64")
	if err := k.AddAddress6("en0", p, darwin.AddressAutoconf|darwin.AddressTemporary); err != nil {
		t.Fatal(err)
	}
	if err := k.AddAddress6("en0", netip.MustParsePrefix("fe80::7/64"), darwin.AddressSecured); err != nil {
		t.Fatal(err)
	}
	before := k.Changes()
	if err := k.SetAddressFlags("en0", p.Addr(), darwin.AddressAutoconf|darwin.AddressTemporary|darwin.AddressDeprecated); err != nil {
		t.Fatal(err)
	}
	if k.Changes() != before {
		t.Error("the kernel announces that an address becomes deprecated")
	}
	want := []darwin.Address6{
		{Prefix: netip.MustParsePrefix("2001:db8:1::5/64")},
		{Prefix: p, Flags: darwin.AddressDeprecated | darwin.AddressAutoconf | darwin.AddressTemporary},
		{Prefix: netip.MustParsePrefix("fe80::7/64"), Scope: 2, Flags: darwin.AddressSecured},
	}
	if diff := cmp.Diff(want, list(), compareNetip); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// An address that is removed and added again starts without its former flags.
	if err := k.RemoveAddress("en0", p.Addr()); err != nil {
		t.Fatal(err)
	}
	if err := k.AddAddress("en0", p); err != nil {
		t.Fatal(err)
	}
	if got := list(); got[len(got)-1].Flags != 0 {
		t.Errorf("an address that was added again has the flags %v", got[len(got)-1].Flags)
	}
	if _, err := c.Addresses6(t.Context(), "en9"); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("a missing interface: %v", err)
	}
}

func FuzzParseAddresses6(f *testing.F) {
	f.Add(captured(f, "ifconfig-en0-temporary.txt"))
	f.Add("\tinet6 fd00::1 --> fd00::2 prefixlen 128 \n")
	f.Add("inet6 fe80::1%lo0 prefixlen 64 scopeid 0x1")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := darwin.ParseAddresses6(text)
		for _, a := range list {
			if err != nil || !a.Prefix.IsValid() || !a.Prefix.Addr().Is6() || a.Prefix.Addr().Zone() != "" {
				t.Errorf("%+v, %v", a, err)
			}
		}
	})
}
