package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// fakeService records the calls of its methods and answers with one peer.
type fakeService struct {
	mu     sync.Mutex
	asked  []string
	events []events.Event
	newer  chan struct{}
	fail   error
	added  NewPeer
	change PeerChange
}

func newFakeService() *fakeService { return &fakeService{newer: make(chan struct{})} }

func (f *fakeService) note(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, fmt.Sprintf(format, args...))
	return f.fail
}

func (f *fakeService) calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

var phone = Peer{Name: "phone", Kind: mesh.External, Addresses: []netip.Addr{netip.MustParseAddr("100.64.0.9")}}

func (f *fakeService) Status() Status {
	f.note("status")
	return Status{State: Enforcing, Peers: []Peer{phone}, Problems: []Problem{}}
}
func (f *fakeService) Peer(ref string) (Peer, error) { return phone, f.note("peer %s", ref) }
func (f *fakeService) Config(ref string) (Config, error) {
	return Config{Text: "x"}, f.note("config %s", ref)
}
func (f *fakeService) Explain(_ context.Context, q Question) (Explanation, error) {
	return Explanation{Peer: q.Peer}, f.note("explain %v", q)
}
func (f *fakeService) Rules(_ context.Context, language string) (Rules, error) {
	return Rules{Platform: "nft"}, f.note("rules %s", language)
}
func (f *fakeService) Doctor(context.Context) ([]Check, error) { return []Check{}, f.note("doctor") }
func (f *fakeService) Settings() Settings {
	return Settings{Settings: []Setting{{Key: "endpoint", Value: "home.example"}}}
}
func (f *fakeService) ChangeSettings(_ context.Context, changes map[string]*string) (Settings, error) {
	return Settings{Already: changes["endpoint"] == nil}, f.note("settings %d", len(changes))
}
func (f *fakeService) AddPeer(_ context.Context, p NewPeer) (Changed, error) {
	f.added = p
	return Changed{Peer: phone}, f.note("add %s", p.Name)
}
func (f *fakeService) ChangePeer(_ context.Context, ref string, c PeerChange) (Changed, error) {
	f.change = c
	return Changed{Peer: phone, Already: true}, f.note("change %s", ref)
}
func (f *fakeService) RemovePeer(_ context.Context, ref string) (Changed, error) {
	return Changed{Peer: phone}, f.note("remove %s", ref)
}
func (f *fakeService) Record(e events.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e.Seq = uint64(len(f.events) + 1)
	f.events = append(f.events, e)
	close(f.newer)
	f.newer = make(chan struct{})
}
func (f *fakeService) Since(seq uint64) ([]events.Event, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.events[min(int(seq), len(f.events)):], f.newer
}

// serve runs a server on a new socket until the test ends, and returns the socket's path.
func serve(t *testing.T, s Service) string {
	t.Helper()
	path := filepath.Join(shortDir(t), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	server := NewServer(ServerOptions{
		Listener: l, Service: s, Logger: slog.New(slog.DiscardHandler),
		Access: Access{Operator: uint32(os.Getuid())},
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return path
}

// shortDir returns a temporary folder with a short path, as the path of a Unix socket is
// limited to about 100 bytes.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestClientAndServer calls each method of the client: the service gets one call with the same
// arguments. References that would change the URL's path are unknown peers.
func TestClientAndServer(t *testing.T) {
	f := newFakeService()
	c := NewClient(serve(t, f))
	ctx := t.Context()
	// A key may contain characters with a meaning in a URL path.
	const key = "AAAA/+BBB//C="
	for want, do := range map[string]func() error{
		"status":        func() error { _, err := c.Status(ctx); return err },
		"peer " + key:   func() error { _, err := c.Peer(ctx, key); return err },
		"peer fd00::1":  func() error { _, err := c.Peer(ctx, "fd00::1"); return err },
		"config a b":    func() error { _, err := c.Config(ctx, "a b"); return err },
		"rules pf":      func() error { _, err := c.Rules(ctx, "pf"); return err },
		"doctor":        func() error { _, err := c.Doctor(ctx); return err },
		"add new":       func() error { _, err := c.AddPeer(ctx, NewPeer{Name: "new"}); return err },
		"change phone":  func() error { _, err := c.ChangePeer(ctx, "phone", PeerChange{}); return err },
		"remove " + key: func() error { _, err := c.RemovePeer(ctx, key); return err },
		"explain {phone 192.0.2.1 443 tcp invalid IP}": func() error {
			_, err := c.Explain(ctx, Question{Peer: "phone", To: netip.MustParseAddr("192.0.2.1"), Port: 443, Proto: "tcp"})
			return err
		},
	} {
		before := len(f.calls())
		if err := do(); err != nil {
			t.Errorf("%s: %v", want, err)
			continue
		}
		if got := f.calls()[before:]; len(got) != 1 || got[0] != want {
			t.Errorf("the service got the calls %q, want %q", got, want)
		}
	}
	for _, ref := range []string{"", ".", ".."} {
		_, err := c.Peer(ctx, ref)
		var e *Error
		if !errors.As(err, &e) || e.Code != CodeUnknownPeer {
			t.Errorf("peer %q: %v", ref, err)
		}
	}
	if changed, err := c.ChangePeer(ctx, "phone", PeerChange{}); err != nil || !changed.Already || changed.Peer.Name != "phone" {
		t.Errorf("change: %+v, %v", changed, err)
	}
}

// TestErrorsTravel checks that the client returns the error that the service returned.
func TestErrorsTravel(t *testing.T) {
	f := newFakeService()
	c := NewClient(serve(t, f))
	for _, want := range []*Error{
		{CodeUnknownPeer, `peer "fone" is unknown`, `did you mean "phone"?`},
		{CodeNotInForce, "saved, not in force", ""},
	} {
		f.fail = want
		_, err := c.Peer(t.Context(), "fone")
		var got *Error
		if !errors.As(err, &got) || *got != *want {
			t.Errorf("got %#v, want %#v", err, want)
		}
	}
	f.fail = errors.New("something broke")
	_, err := c.Peer(t.Context(), "phone")
	var got *Error
	if !errors.As(err, &got) || got.Code != CodeInternal || got.Message != "something broke" {
		t.Errorf("got %#v", err)
	}
}

// TestBadRequests sends requests with one fault each: the status, the code and the text of the
// error fit the fault, and the service gets no call.
func TestBadRequests(t *testing.T) {
	f := newFakeService()
	path := serve(t, f)
	client := httpClient(path)
	huge := `{"name":"` + strings.Repeat("x", maxBody) + `"}`
	for _, c := range []struct {
		method, path, body string
		status             int
		code, says         string
	}{
		{"POST", "/v1/peers", `{"name":"a","extra":1}`, 400, CodeBadRequest, "extra"},
		{"POST", "/v1/peers", `{"name":1}`, 400, CodeBadRequest, `"name" is a number`},
		{"POST", "/v1/peers", `{"permissions":{"routing":{"allowed":"yes"}}}`, 400, CodeBadRequest, "is a string, want bool"},
		{"POST", "/v1/peers", `{"permissions":{"routing":{"allowed":true,"until":"soon"}}}`, 400, CodeBadRequest, "soon"},
		{"POST", "/v1/peers", `{"name":"a"} {}`, 400, CodeBadRequest, "follows"},
		{"POST", "/v1/peers", `{"name"`, 400, CodeBadRequest, "ends before"},
		{"POST", "/v1/peers", ``, 400, CodeBadRequest, "ends before"},
		{"POST", "/v1/peers", `[]`, 400, CodeBadRequest, "array"},
		{"POST", "/v1/peers", huge, 413, CodeTooLarge, "1048576"},
		{"PATCH", "/v1/peers/phone", huge, 413, CodeTooLarge, "1048576"},
		{"PUT", "/v1/status", "", 405, CodeBadMethod, "it takes GET"},
		{"DELETE", "/v1/peers", "", 405, CodeBadMethod, "it takes GET, POST"},
		{"GET", "/v2/status", "", 404, CodeNotFound, "/v2/status"},
		{"GET", "/", "", 404, CodeNotFound, "/v1/status"},
		{"GET", "/v1/explain?peer=a&to=x", "", 400, CodeBadRequest, `"x"`},
		{"GET", "/v1/explain?peer=a&peer=b", "", 400, CodeBadRequest, "2 times"},
		{"GET", "/v1/explain?port=70000", "", 400, CodeBadRequest, "70000"},
		{"GET", "/v1/explain?verbose=1", "", 400, CodeBadRequest, "verbose"},
	} {
		request, err := http.NewRequest(c.method, "http://x"+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.path, err)
			continue
		}
		var body struct{ Error Error }
		err = json.NewDecoder(response.Body).Decode(&body)
		response.Body.Close()
		if err != nil || response.StatusCode != c.status || body.Error.Code != c.code || !strings.Contains(body.Error.Error(), c.says) {
			t.Errorf("%s %s %.40s: status %d, %+v (%v), want %d, %s and %q", c.method, c.path, c.body, response.StatusCode, body.Error, err, c.status, c.code, c.says)
		}
	}
	if got := f.calls(); len(got) != 0 {
		t.Errorf("the service got the calls %q, want none", got)
	}
}

func httpClient(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
}

// TestRights sends every request as every kind of user, and checks which are allowed and that
// each refusal is recorded once per user and right.
func TestRights(t *testing.T) {
	const operator, admin, stranger = 501, 502, 503
	f := newFakeService()
	access := Access{Operator: operator, AdminGroups: []string{"admin"}, Groups: func(uid uint32) ([]string, error) {
		switch uid {
		case admin:
			return []string{"staff", "admin"}, nil
		case stranger:
			return []string{"staff"}, nil
		}
		return nil, errors.New("unknown user")
	}}
	s := NewServer(ServerOptions{Service: f, Access: access, Logger: slog.New(slog.DiscardHandler)})
	for _, user := range []struct {
		uid          uint32
		read, change bool
	}{
		{0, true, true}, {operator, true, true}, {admin, true, false}, {stranger, false, false}, {999, false, false}, {NoOperator, false, false},
	} {
		for _, r := range []struct {
			method, path string
			change       bool
		}{
			{"GET", "/v1/status", false}, {"GET", "/v1/peers", false}, {"GET", "/v1/peers/phone", false}, {"GET", "/v1/peers/phone/config", false},
			{"GET", "/v1/explain?peer=a&to=192.0.2.1", false}, {"GET", "/v1/rules", false}, {"GET", "/v1/doctor", false},
			{"GET", "/v1/events?follow=false", false}, {"GET", "/v1/metrics", false}, {"GET", "/v1/nothing", false},
			{"POST", "/v1/peers", true}, {"PATCH", "/v1/peers/phone", true}, {"DELETE", "/v1/peers/phone", true},
		} {
			who := Credentials{UID: user.uid}
			conn := &peerConn{who: who, mayRead: func() bool { return access.MayRead(who) }}
			request := httptest.NewRequest(r.method, r.path, strings.NewReader("{}"))
			request = request.WithContext(context.WithValue(request.Context(), connKey{}, conn))
			w := &deadlineRecorder{httptest.NewRecorder()}
			s.handler.ServeHTTP(w, request)
			want := user.read
			if r.change {
				want = user.change
			}
			if got := w.Code != http.StatusForbidden; got != want {
				t.Errorf("user %d, %s %s: status %d, want allowed %v", user.uid, r.method, r.path, w.Code, want)
			}
		}
	}
	denied := map[string]int{}
	for _, e := range f.events {
		if e.Kind == events.Denied {
			who, _, _ := strings.Cut(e.Message, ":")
			denied[who]++
		}
	}
	want := map[string]int{ // one per user and right, whatever the number of requests
		"user 502 may not change": 1,
		"user 503 may not read":   1, "user 503 may not change": 1,
		"user 999 may not read": 1, "user 999 may not change": 1,
		"user 4294967295 may not read": 1, "user 4294967295 may not change": 1,
	}
	if diff := cmp.Diff(want, denied); diff != "" {
		t.Errorf("events of denials (-want +got):\n%s", diff)
	}
}

// TestNoCredentials checks that a request without credentials of the client is refused.
func TestNoCredentials(t *testing.T) {
	s := NewServer(ServerOptions{Service: newFakeService(), Logger: slog.New(slog.DiscardHandler)})
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, httptest.NewRequest("GET", "/v1/status", nil))
	if w.Code != http.StatusForbidden {
		t.Errorf("status %d, want %d", w.Code, http.StatusForbidden)
	}
}

// deadlineRecorder is a ResponseRecorder that accepts deadlines, which handlers set.
type deadlineRecorder struct{ *httptest.ResponseRecorder }

func (deadlineRecorder) SetReadDeadline(time.Time) error  { return nil }
func (deadlineRecorder) SetWriteDeadline(time.Time) error { return nil }

// TestEvents reads the recorded events, and with follow also one that is recorded later.
func TestEvents(t *testing.T) {
	f := newFakeService()
	c := NewClient(serve(t, f))
	f.Record(events.Event{Kind: events.State, Message: "one"})
	f.Record(events.Event{Kind: events.State, Message: "two"})
	collect := func(ctx context.Context, follow bool, stop int) (got []string, err error) {
		err = c.Events(ctx, 0, follow, func(e events.Event) error {
			if got = append(got, e.Message); len(got) == stop {
				return io.EOF
			}
			return nil
		})
		return got, err
	}
	if got, err := collect(t.Context(), false, 0); err != nil || !cmp.Equal(got, []string{"one", "two"}) {
		t.Errorf("without follow: %q, %v", got, err)
	}
	done := make(chan []string)
	go func() {
		got, _ := collect(t.Context(), true, 3)
		done <- got
	}()
	f.Record(events.Event{Kind: events.State, Message: "three"})
	if got := <-done; !cmp.Equal(got, []string{"one", "two", "three"}) {
		t.Errorf("with follow: %q", got)
	}
}

// TestCrowd checks that the server answers while many other connections send nothing, a part
// of a request, or a request with a body that is too large.
func TestCrowd(t *testing.T) {
	path := serve(t, newFakeService())
	for i := range usualSlots.perUser[changer] / 2 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		switch i % 3 {
		case 1:
			fmt.Fprint(c, "GET /v1/sta")
		case 2:
			fmt.Fprint(c, "POST /v1/peers HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n{")
		}
	}
	c := NewClient(path)
	start := time.Now()
	if _, err := c.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("answered in %v with %d other connections open", time.Since(start), usualSlots.perUser[changer]/2)
}

// TestOneTooMany checks that the server closes a connection beyond the limit of a user, and
// accepts new ones once others are closed.
func TestOneTooMany(t *testing.T) {
	path := serve(t, newFakeService())
	var conns []net.Conn
	for range usualSlots.perUser[changer] {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	extra, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	extra.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := extra.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("one connection too many: %v, want it closed", err)
	}
	for _, c := range conns {
		c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for c := NewClient(path); ; {
		if _, err := c.Status(ctx); err == nil {
			return
		} else if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// TestCredentials compares the credentials that the kernel reports with those of this process.
func TestCredentials(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	limited := newLimited(l, Access{Operator: uint32(os.Getuid())}, usualSlots)
	dialled, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	c, err := limited.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := Credentials{UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: int32(os.Getpid())}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	got := c.(*peerConn).who
	for _, g := range groups {
		if !slices.Contains(got.Groups, uint32(g)) {
			t.Errorf("group %d is missing in %v", g, got.Groups)
		}
	}
	if got.UID != want.UID || got.GID != want.GID || got.PID != want.PID && got.PID != 0 {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestListen checks that every user may connect to the socket, that a second helper can't
// listen on it, that a socket without a listener is replaced, and that Close removes it.
func TestListen(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := Listen(path); !errors.Is(err, ErrHeld) {
		t.Errorf("a second helper: %v, want ErrHeld", err)
	}
	// A killed process leaves the file behind, and no process listens on it.
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal(err)
	}
	l, err = Listen(path)
	if err != nil {
		t.Fatalf("Listen doesn't replace a dead socket: %v", err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket still exists after Close: %v", err)
	}
}

// TestListenRefuses calls Listen with paths that it must refuse: it returns an error that says
// why, and doesn't change an existing file.
func TestListenRefuses(t *testing.T) {
	dir := shortDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := errors.Join(os.Mkdir(open, 0o777), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{
		"":                                      "empty",
		"/" + strings.Repeat("x", 103):          "104 bytes",
		file:                                    "not a socket",
		link:                                    "not a socket",
		filepath.Join(open, "s"):                "others could make or replace",
		filepath.Join(dir, "missing", "folder"): "no such file",
	} {
		l, err := Listen(path)
		if err == nil {
			l.Close()
		}
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("Listen(%q): %v, want %q", path, err, says)
		}
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "mine" {
		t.Errorf("the file was changed: %q, %v", text, err)
	}
}

// TestUnreachable connects where there is no socket, or one without a listener: the error is
// ErrUnreachable and names the path.
func TestUnreachable(t *testing.T) {
	dir := shortDir(t)
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, path := range []string{filepath.Join(dir, "none"), dead} {
		if _, err := NewClient(path).Status(t.Context()); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestNotAHelper connects to a server that isn't a helper: the error says so.
func TestNotAHelper(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprint(w, "hello")
	})}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	defer func() { server.Close(); <-done }()
	if _, err := NewClient(path).Status(t.Context()); err == nil || !strings.Contains(err.Error(), "isn't a helper's") {
		t.Errorf("got %v", err)
	}
}

func TestMetrics(t *testing.T) {
	at := time.Unix(1700000000, 0)
	var b bytes.Buffer
	err := WriteMetrics(&b, Status{
		Version: `1"2\3`, Platform: "linux", State: Enforcing, Generation: 4, Enforced: 3, Repairs: 2, Problems: []Problem{{}},
		Peers: []Peer{{
			Name: "phone", RxBytes: 10, TxBytes: 20, LastHandshake: &at,
			Permissions: Permissions{1: Permission{Allowed: true}}, Routing: Routing{Now: true, RxBytes: 5}, Refused: Refused{Mesh: 7},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/metrics.txt")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// TestStatusJSON compares a complete status with the JSON that the API promises.
func TestStatusJSON(t *testing.T) {
	at := time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)
	p := phone
	p.LastHandshake, p.Endpoint = &at, "198.51.100.3:51820"
	p.Permissions = Permissions{0: Permission{Allowed: true, Until: at}, 2: Permission{Allowed: true, Effective: new(bool)}}
	got, err := json.MarshalIndent(Status{State: Starting, Problems: []Problem{{"a", "b", "c"}}, Peers: []Peer{p}}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/status.json")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.TrimSpace(string(want)), string(got)); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
}

func FuzzRequests(f *testing.F) {
	for _, s := range []string{
		`{"name":"phone","publicKey":"x","kind":"own","addresses":["100.64.0.1"],"permissions":{"routing":{"allowed":true,"for":"2h"}}}`,
		`{"permissions":{"lan":{"allowed":true,"until":"2026-01-02T15:04:05Z"}},"endpoint":null}`,
		`{}`, `null`, `{"a":`, `{"name":"a"}{}`, "\xff", strings.Repeat("[", 100),
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, into := range []any{new(NewPeer), new(PeerChange)} {
			err := decodeJSON(bytes.NewReader(body), into)
			var e *Error
			if err != nil && (!errors.As(err, &e) || e.HTTPStatus() != http.StatusBadRequest) {
				t.Errorf("%q: %v, want status 400", body, err)
			}
			if err == nil && !json.Valid(body) {
				t.Errorf("%q, which isn't JSON, is accepted", body)
			}
		}
	})
}
