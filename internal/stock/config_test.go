package stock

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/mesh/meshtest"
)

// phoneConfig returns the configuration of a phone with a full tunnel.
func phoneConfig(t testing.TB) Config {
	key, host := meshtest.Key(t, 50), meshtest.Key(t, 51)
	a, err := mesh.DefaultPrefixes().Derive(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	dns := []netip.Addr{netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("149.112.112.112")}
	return ForPeer(key, a, host.Public(), mesh.Endpoint{Host: "198.51.100.3", Port: 51820}, Everything(), dns)
}

// TestConfigText compares the complete text of a configuration, as apps and scripts read it.
func TestConfigText(t *testing.T) {
	c := phoneConfig(t)
	want := `[Interface]
PrivateKey = ` + c.PrivateKey.Reveal() + `
Address = ` + c.Addresses[0].String() + `, ` + c.Addresses[1].String() + `
DNS = 9.9.9.9, 149.112.112.112
MTU = 1280

[Peer]
PublicKey = ` + c.PublicKey.String() + `
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = 198.51.100.3:51820
PersistentKeepalive = 25
`
	if diff := cmp.Diff(want, c.Text()); diff != "" {
		t.Error(diff)
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	bare := Config{PublicKey: c.PublicKey, Addresses: c.Addresses[:1], AllowedIPs: c.AllowedIPs[1:]}
	want = "[Interface]\nPrivateKey = " + KeyPlaceholder + "\nAddress = " + c.Addresses[0].String() +
		"\n\n[Peer]\nPublicKey = " + c.PublicKey.String() + "\nAllowedIPs = ::/0\n"
	if diff := cmp.Diff(want, bare.Text()); diff != "" {
		t.Error(diff)
	}
}

// TestParseConfigAsWritten parses the text of configurations and writes them again: the text
// stays the same.
func TestParseConfigAsWritten(t *testing.T) {
	placeholder := phoneConfig(t)
	placeholder.PrivateKey = mesh.PrivateKey{}
	named := phoneConfig(t)
	named.Endpoint = mesh.Endpoint{Host: "Home.example.net", Port: 1}
	v6 := phoneConfig(t)
	v6.Endpoint, v6.DNS, v6.MTU, v6.Keepalive = mesh.Endpoint{Host: "2001:db8::1", Port: 65535}, nil, 0, 0
	for _, want := range []Config{phoneConfig(t), placeholder, named, v6} {
		got, err := ParseConfig(want.Text())
		if err != nil {
			t.Fatal(err)
		}
		if got.Text() != want.Text() {
			t.Errorf("the text becomes\n%s\nwant\n%s", got.Text(), want.Text())
		}
	}
}

// TestParseConfigAsEdited parses a configuration in another order, case and spacing, with
// comments and CRLF, as users and other programs write them.
func TestParseConfigAsEdited(t *testing.T) {
	c := phoneConfig(t)
	text := "# my phone\r\n[interface]\r\n\tprivatekey=" + c.PrivateKey.Reveal() + " # secret\r\naddress = 100.70.8.9\naddress=fd6d:6573:6800::9/128\n" +
		"[ PEER ]\nPersistentKeepalive = off\nALLOWEDIPS = 0.0.0.0/0,::/0\npublickey = " + c.PublicKey.String()
	got, err := ParseConfig(text)
	if err != nil {
		t.Fatal(err)
	}
	if !got.PrivateKey.Equal(c.PrivateKey) || len(got.Addresses) != 2 || got.Addresses[0].Bits() != 32 || len(got.AllowedIPs) != 2 || got.Keepalive != 0 {
		t.Errorf("got %+v", got)
	}
}

// TestParseConfigRefuses parses texts with one fault each: the error is ErrBadConfig, and
// doesn't quote the private key.
func TestParseConfigRefuses(t *testing.T) {
	good := phoneConfig(t).Text()
	replace := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	for name, text := range map[string]string{
		"empty":            "",
		"binary":           "\x00\xff",
		"huge":             strings.Repeat("\n", configLimit+1),
		"no section":       "MTU = 1280\n" + good,
		"odd section":      replace("[Peer]", "[Server]"),
		"open section":     replace("[Peer]", "[Peer"),
		"two peers":        good + good[strings.Index(good, "[Peer]"):],
		"two keys":         replace("MTU = 1280", "PrivateKey = "+KeyPlaceholder),
		"a command":        replace("MTU = 1280", "PostUp = rm -rf /"),
		"peer key outside": replace("MTU = 1280", "Endpoint = 1.2.3.4:5"),
		"no private key":   replace("PrivateKey", "#"),
		"bad private key":  replace("PrivateKey = ", "PrivateKey = x"),
		"no public key":    replace("PublicKey", "#"),
		"no address":       replace("Address", "#"),
		"no allowed IPs":   replace("AllowedIPs", "#"),
		"bad prefix":       replace("::/0", "::/129"),
		"empty in a list":  replace("0.0.0.0/0, ", "0.0.0.0/0,, "),
		"DNS name":         replace("9.9.9.9", "dns.example"),
		"small MTU":        replace("1280", "575"),
		"negative MTU":     replace("1280", "-1280"),
		"port 0":           replace(":51820", ":0"),
		"no port":          replace(":51820", ""),
		"large port":       replace(":51820", ":65536"),
		"odd host":         replace("198.51.100.3", "a b"),
		"long keepalive":   replace("= 25", "= 65536"),
		"neither":          replace("MTU = 1280", "MTU"),
	} {
		got, err := ParseConfig(text)
		if !errors.Is(err, ErrBadConfig) {
			t.Errorf("%s: %v, %+v", name, err, got)
			continue
		}
		if key := phoneConfig(t).PrivateKey.Reveal(); strings.Contains(err.Error(), key[:10]) {
			t.Errorf("%s: the error quotes the private key: %v", name, err)
		}
	}
}

func TestParseEndpoint(t *testing.T) {
	for in, want := range map[string]string{
		"198.51.100.3:51820": "198.51.100.3:51820",
		"[2001:db8::1]:7":    "[2001:db8::1]:7",
		"home.example.net:1": "home.example.net:1",
		"home.example.net.":  "home.example.net.:99",
		"198.51.100.3":       "198.51.100.3:99",
		"2001:db8::1":        "[2001:db8::1]:99",
		"[2001:db8::1]":      "[2001:db8::1]:99",
	} {
		if got, err := mesh.ParseEndpoint(in, 99); err != nil || got.String() != want {
			t.Errorf("ParseEndpoint(%q) = %v, %v, want %s", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", ":", ":1", "a:", "a:b", "a:0", "a:65536", "a:-1", "a:1:2", "-a:1", "a..b:1", "a\nb:1", "a#:1", "ü..example:1",
		"0.0.0.0:1", "[::]:1", "224.0.0.1:1", "[fe80::1%en0]:1", strings.Repeat("a", 64) + ":1", strings.Repeat("a.", 130) + "a:1",
	} {
		if got, err := mesh.ParseEndpoint(in, 99); err == nil {
			t.Errorf("ParseEndpoint(%q) = %v", in, got)
		}
	}
	if got, err := mesh.ParseEndpoint("home.example.net", 0); err == nil {
		t.Errorf("without a fallback port: %v", got)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add(phoneConfig(f).Text())
	f.Add("[Interface]\nPrivateKey=" + KeyPlaceholder + "\nAddress=10.0.0.1\n[Peer]\nPublicKey=hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\nAllowedIPs=::/0\nEndpoint=[::1]:1")
	f.Add("[[]]=\n#=\n=\r")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseConfig(text)
		if err != nil {
			return
		}
		again, err := ParseConfig(c.Text())
		if err != nil {
			t.Fatalf("%q is accepted, but the text written from it isn't: %v\n%s", text, err, c.Text())
		}
		if again.Text() != c.Text() {
			t.Errorf("%q\nbecomes\n%q", c.Text(), again.Text())
		}
	})
}

func FuzzParseEndpoint(f *testing.F) {
	for _, s := range []string{"198.51.100.3:51820", "[2001:db8::1]:7", "a.b:1", "[a]", "[::1", "a_b.:2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := mesh.ParseEndpoint(s, 7)
		if err != nil {
			return
		}
		if again, err := mesh.ParseEndpoint(e.String(), 0); err != nil || again != e {
			t.Errorf("%q is parsed as %+v, whose text is parsed as %+v, %v", s, e, again, err)
		}
		if strings.ContainsAny(e.String(), "\r\n#=, ") {
			t.Errorf("%q is parsed as %q, which would break a configuration", s, e)
		}
	})
}

// TestEndpointName parses names with letters outside ASCII: the endpoint has the ASCII form
// (RFC 5891), which apps look up in the DNS.
func TestEndpointName(t *testing.T) {
	for text, want := range map[string]string{
		"müller.example:51820":  "xn--mller-kva.example:51820",
		"MÜLLER.example:1":      "xn--mller-kva.example:1",
		"straße.example":        "xn--strae-oqa.example:51820",
		"例え.テスト:2":              "xn--r8jz45g.xn--zckzah:2",
		"Home.example:51820":    "Home.example:51820",
		"my_host.example:51820": "my_host.example:51820",
		"１９２.0.2.1:51820":       "192.0.2.1:51820",
		"a\u200bb.example:1":    "ab.example:1", // a zero-width space, which the mapping removes
		"ü..example:1":          "",
		"\xff.example:1":        "",
		"-ü.example:1":          "",
	} {
		e, err := mesh.ParseEndpoint(text, 51820)
		if err != nil {
			e = mesh.Endpoint{}
		}
		if got := e.String(); got != want && (want != "" || err == nil) {
			t.Errorf("%q is %q, %v, want %q", text, got, err, want)
		}
	}
}

// TestConfigCompact checks that the compact text for a QR code has the same meaning as the
// full text, and needs a smaller code.
func TestConfigCompact(t *testing.T) {
	c := phoneConfig(t)
	got, err := ParseConfig(c.Compact())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(c.Text(), got.Text()); diff != "" {
		t.Error(diff)
	}
	long, err := EncodeQR(c.Text())
	if err != nil {
		t.Fatal(err)
	}
	short, err := EncodeQR(c.Compact())
	if err != nil {
		t.Fatal(err)
	}
	if short.Size() >= long.Size() || short.Size() > 69 {
		t.Errorf("%d columns, and %d with the full text", short.Size(), long.Size())
	}
}

// TestConfigNeverPrintsItsKey formats a configuration with the verbs of logs and errors: none
// prints the private key, which only Text does.
func TestConfigNeverPrintsItsKey(t *testing.T) {
	key := meshtest.Key(t, 3)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%b"} {
		out := fmt.Sprintf(verb, Config{PrivateKey: key})
		for _, form := range []string{key.Reveal()[:12], fmt.Sprintf("%X", key[:6]), fmt.Sprintf("%x", key[:6]), fmt.Sprint(key[:])[1:20]} {
			if strings.Contains(out, form) {
				t.Errorf("%s prints the key as %q", verb, form)
			}
		}
	}
}
