package mactest

// The script on Linux: the same checks, with the helper on a host of netlab.

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

func TestMain(m *testing.M) { os.Exit(netlab.Main(m.Run)) }

// newPicture returns a network with a helper on host B.
func newPicture(t *testing.T) *netlab.Picture {
	t.Helper()
	if err := netlab.Unavailable(); err != nil {
		t.Skip("no hosts to try the script on:", err)
	}
	lab, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error("close lab:", err)
		}
	})
	p, err := netlab.NewPicture(lab)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// serveInternet has host I answer HTTP, with a page and an endless file, and DNS.
func serveInternet(t *testing.T, i *netlab.Host) {
	t.Helper()
	at := netlab.Addresses().I.V4
	var web net.Listener
	var dns *net.UDPConn
	err := i.Do(func() (err error) {
		if web, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(at, 80))); err != nil {
			return err
		}
		dns, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 53)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "a page") })
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		for block := make([]byte, 16<<10); r.Context().Err() == nil; {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	server := &http.Server{Handler: mux}
	done := make(chan struct{}, 2)
	go func() {
		server.Serve(web)
		done <- struct{}{}
	}()
	go func() {
		answerDNS(dns)
		done <- struct{}{}
	}()
	t.Cleanup(func() {
		server.Close()
		dns.Close()
		<-done
		<-done
	})
}

// answerDNS answers every query with an empty response.
func answerDNS(c *net.UDPConn) {
	buf := make([]byte, 2048)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		var question dnsmessage.Message
		if err != nil || question.Unpack(buf[:n]) != nil {
			continue
		}
		question.Header.Response = true
		if b, err := question.Pack(); err == nil {
			c.WriteToUDPAddrPort(b, from)
		}
	}
}

// TestScript runs the script of `make test-mac` on a Linux host, so that a failure on a Mac
// alone has its cause there.
func TestScript(t *testing.T) {
	p := newPicture(t)
	serveInternet(t, p.I)
	binary, err := netlab.Build("github.com/meshhelper/meshhelper/cmd/meshhelper")
	if err != nil {
		t.Fatal(err)
	}
	before, err := p.B.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	// As on a Mac, the peer is on the host itself.
	helper, err := p.B.Start(nil, binary, "run", "--state-dir", filepath.Join(p.Lab.Dir(), "state"), "--endpoint", "127.0.0.1:51820")
	if err != nil {
		t.Fatal(err)
	}
	s := &script{world: world{
		do: p.B.Do,
		command: func(ctx context.Context, args ...string) (string, string, int, error) {
			return p.B.Run(ctx, "", binary, args...)
		},
		page:      &url.URL{Scheme: "http", Host: netlab.Addresses().I.V4.String(), Path: "/"},
		resolver:  netip.AddrPortFrom(netlab.Addresses().I.V4, 53),
		download:  &url.URL{Scheme: "http", Host: netlab.Addresses().I.V4.String(), Path: "/file"},
		neighbour: netlab.Addresses().L.V4,
		keep:      func(string, string) {},
	}}
	for end := time.Now().Add(generous); ; time.Sleep(50 * time.Millisecond) {
		stdout, _, code, err := s.command(t.Context(), "status", "--json")
		if err == nil && code == 0 && !strings.Contains(stdout, `"starting"`) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the helper isn't ready:\n%s", helper.Output())
		}
	}
	t.Run("script", s.run)
	if t.Failed() {
		t.Logf("the helper printed:\n%s", helper.Output())
	}
	if err := helper.Stop(); err != nil {
		t.Error(err)
	}
	after, err := p.B.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if diff := before.Diff(after); len(diff) > 0 {
		t.Errorf("the host isn't as it was found:\n%s", strings.Join(diff, "\n"))
	}
}
