package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshhelper/meshhelper/internal/events"
)

// Reader answers questions about the mesh and the host. A ref is a peer's name, mesh address
// or public key. Errors for a client are *Error; any other counts as internal.
type Reader interface {
	Status() Status
	Peer(ref string) (Peer, error)
	// Config returns a peer's configuration for a stock WireGuard app.
	Config(ref string) (Config, error)
	// Explain says what happens to a packet, and why.
	Explain(ctx context.Context, q Question) (Explanation, error)
	// Rules returns the rules as loaded, or as they would be in another language.
	Rules(ctx context.Context, language string) (Rules, error)
	// Doctor checks the host.
	Doctor(ctx context.Context) ([]Check, error)
	Settings() Settings
}

// Changer changes the wanted state. Each method returns when the change is in
// force, or with an error that says what isn't (CodeNotInForce).
type Changer interface {
	AddPeer(ctx context.Context, p NewPeer) (Changed, error)
	ChangePeer(ctx context.Context, ref string, c PeerChange) (Changed, error)
	RemovePeer(ctx context.Context, ref string) (Changed, error)
	// ChangeSettings sets keys; a nil value unsets one. It returns when the settings are
	// saved. The answer lists the keys that need a restart.
	ChangeSettings(ctx context.Context, changes map[string]*string) (Settings, error)
}

// Journal has the latest events.
type Journal interface {
	// Record adds an event. The journal sets its Seq and Time.
	Record(e events.Event)
	// Since returns the events with a greater Seq that the journal still has, and a channel
	// that is closed when there are newer ones.
	Since(seq uint64) ([]events.Event, <-chan struct{})
}

// Service is all that a Server needs.
type Service interface {
	Reader
	Changer
	Journal
}

// ServerOptions configures NewServer.
type ServerOptions struct {
	Listener *net.UnixListener // required: see Listen
	Service  Service           // required
	Access   Access            // required
	Logger   *slog.Logger      // required
}

// Server answers on the socket.
type Server struct {
	opts    ServerOptions
	handler http.Handler
	denials *denials
}

// NewServer returns a server. Run serves its listener.
func NewServer(o ServerOptions) *Server {
	s := &Server{opts: o, denials: newDenials()}
	s.handler = s.routes()
	return s
}

// Limits of one connection. No request comes near them; they keep a client from holding
// memory, or a slot of its user, by a request that it never finishes.
const (
	maxBody       = 1 << 20          // of a request, in bytes
	maxHeader     = 16 << 10         // of a request, in bytes
	headerTimeout = 5 * time.Second  // for reading the header
	bodyTimeout   = 10 * time.Second // for reading the whole request
	idleTimeout   = 30 * time.Second // between requests
	// writeTimeout limits a whole answer, including the wait for enforcement.
	writeTimeout = time.Minute
	// eventTimeout limits the writing of one batch of events, as a stream has no end.
	eventTimeout = 10 * time.Second
	// shutdownTimeout is how long running requests may continue after Run's ctx ended.
	shutdownTimeout = 2 * time.Second
)

// connKey is the context key of a request's connection, a *peerConn.
type connKey struct{}

// server returns the HTTP server of the socket.
func (s *Server) server(ctx context.Context) *http.Server {
	return &http.Server{
		Handler:           s.handler,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       bodyTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		// The general handler would answer `OPTIONS *` without a check of the user's rights.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(s.opts.Logger.Handler(), slog.LevelDebug),
		BaseContext:                  func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
}

// Run serves until ctx ends, and then waits up to shutdownTimeout for running requests. It
// closes the listener.
func (s *Server) Run(ctx context.Context) error {
	server := s.server(ctx)
	g, gctx := errgroup.WithContext(ctx)
	limited := newLimited(s.opts.Listener, s.opts.Access, slotsFor(openFiles()))
	// Not in g, as a user database that hangs must not keep the helper from stopping.
	go limited.lookUpAdmins()
	g.Go(func() error { return s.denials.run(gctx, s.opts.Service.Record) })
	g.Go(func() error {
		err := server.Serve(limited)
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return fmt.Errorf("serve socket: %w", err)
	})
	g.Go(func() error {
		<-gctx.Done()
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if server.Shutdown(limit) != nil {
			return server.Close()
		}
		return nil
	})
	return g.Wait()
}

// right is the right that a request needs.
type right bool

const (
	toRead   right = false
	toChange right = true
)

// endpoint answers one method on one path. It returns the value to encode as JSON, or nil if
// it wrote the response itself.
type endpoint func(w http.ResponseWriter, r *http.Request) (any, error)

// routes returns the handler of all requests.
func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, route := range []struct {
		method, path string
		needs        right
		answer       endpoint
	}{
		{"GET", "/v1/status", toRead, s.status},
		{"GET", "/v1/peers", toRead, s.peers},
		{"POST", "/v1/peers", toChange, s.addPeer},
		{"GET", "/v1/peers/{name}", toRead, s.peer},
		{"PATCH", "/v1/peers/{name}", toChange, s.changePeer},
		{"DELETE", "/v1/peers/{name}", toChange, s.removePeer},
		{"GET", "/v1/peers/{name}/config", toRead, s.config},
		{"GET", "/v1/settings", toRead, s.settings},
		{"PATCH", "/v1/settings", toChange, s.changeSettings},
		{"GET", "/v1/explain", toRead, s.explain},
		{"GET", "/v1/rules", toRead, s.rules},
		{"GET", "/v1/doctor", toRead, s.doctor},
		{"GET", "/v1/events", toRead, s.events},
		{"GET", "/v1/metrics", toRead, s.metrics},
	} {
		mux.HandleFunc(route.method+" "+route.path, s.guarded(route.needs, route.answer))
		methods[route.path] = append(methods[route.path], route.method)
	}
	for path, allowed := range methods {
		sort.Strings(allowed)
		mux.HandleFunc(path, s.guarded(toRead, badMethod(strings.Join(allowed, ", "))))
	}
	mux.HandleFunc("/", s.guarded(toRead, func(_ http.ResponseWriter, r *http.Request) (any, error) {
		return nil, Errorf(CodeNotFound, "path %q is unknown", r.URL.Path).WithHint("the requests start with /v1/status")
	}))
	// The mux answers an unclean path with a redirect of its own, so the user's rights are
	// checked before the mux sees the request.
	return s.guarded(toRead, func(w http.ResponseWriter, r *http.Request) (any, error) {
		mux.ServeHTTP(w, r)
		return nil, nil
	})
}

// badMethod answers a request whose method the path doesn't take.
func badMethod(allowed string) endpoint {
	return func(w http.ResponseWriter, r *http.Request) (any, error) {
		w.Header().Set("Allow", allowed)
		return nil, Errorf(CodeBadMethod, "%s is not for %q", r.Method, r.URL.Path).WithHint("it takes %s", allowed)
	}
}

// guarded wraps an endpoint: it checks the user's right before the request is parsed, limits
// the body, and encodes the answer or the error.
func (s *Server) guarded(needs right, answer endpoint) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if err := s.admit(r, needs); err != nil {
			// net/http would read the rest of the body to reuse the connection.
			w.Header().Set("Connection", "close")
			writeError(w, err)
			return
		}
		body, err := answer(w, r)
		switch {
		case err != nil:
			writeError(w, err)
		case body != nil:
			writeJSON(w, http.StatusOK, body)
		}
	}
}

// Caller returns the uid of the client whose request ctx belongs to. ok is false for any
// other ctx.
func Caller(ctx context.Context) (uid uint32, ok bool) {
	c, ok := ctx.Value(connKey{}).(*peerConn)
	if !ok {
		return 0, false
	}
	return c.who.UID, true
}

// admit refuses a request whose user lacks the right, and records the refusal within the
// rate that denials allows.
func (s *Server) admit(r *http.Request, needs right) error {
	c, ok := r.Context().Value(connKey{}).(*peerConn)
	if !ok {
		return Errorf(CodeForbidden, "the other end of the connection is unknown")
	}
	if s.opts.Access.MayChange(c.who) || needs == toRead && c.mayRead() {
		return nil
	}
	verb := "read"
	if needs == toChange || r.Method != http.MethodGet && r.Method != http.MethodHead {
		needs, verb = toChange, "change"
	}
	if s.denials.shouldRecord(denial{c.who.UID, needs}, time.Now()) {
		s.opts.Service.Record(events.Event{Kind: events.Denied, Message: fmt.Sprintf(
			"user %d may not %s: %.20s %.100q", c.who.UID, verb, r.Method, r.URL.Path)})
	}
	return Errorf(CodeForbidden, "user %d may not %s the mesh", c.who.UID, verb).
		WithHint("root and the operator may change it, and members of %s read it; try sudo",
			strings.Join(s.opts.Access.AdminGroups, " or "))
}

func (s *Server) status(http.ResponseWriter, *http.Request) (any, error) {
	return s.opts.Service.Status(), nil
}

func (s *Server) peers(http.ResponseWriter, *http.Request) (any, error) {
	return s.opts.Service.Status().Peers, nil
}

func (s *Server) peer(_ http.ResponseWriter, r *http.Request) (any, error) {
	return orError(s.opts.Service.Peer(r.PathValue("name")))
}

func (s *Server) config(_ http.ResponseWriter, r *http.Request) (any, error) {
	return orError(s.opts.Service.Config(r.PathValue("name")))
}

func (s *Server) rules(_ http.ResponseWriter, r *http.Request) (any, error) {
	return orError(s.opts.Service.Rules(r.Context(), r.URL.Query().Get("platform")))
}

func (s *Server) doctor(_ http.ResponseWriter, r *http.Request) (any, error) {
	return orError(s.opts.Service.Doctor(r.Context()))
}

// orError converts a typed result to that of an endpoint, which is nil with an error.
func orError[T any](answer T, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return answer, nil
}

func (s *Server) addPeer(w http.ResponseWriter, r *http.Request) (any, error) {
	var p NewPeer
	if err := readJSON(w, r, &p); err != nil {
		return nil, err
	}
	changed, err := s.opts.Service.AddPeer(r.Context(), p)
	return answerChange(w, changed, err)
}

func (s *Server) changePeer(w http.ResponseWriter, r *http.Request) (any, error) {
	var c PeerChange
	if err := readJSON(w, r, &c); err != nil {
		return nil, err
	}
	changed, err := s.opts.Service.ChangePeer(r.Context(), r.PathValue("name"), c)
	return answerChange(w, changed, err)
}

func (s *Server) removePeer(w http.ResponseWriter, r *http.Request) (any, error) {
	changed, err := s.opts.Service.RemovePeer(r.Context(), r.PathValue("name"))
	return answerChange(w, changed, err)
}

func (s *Server) settings(http.ResponseWriter, *http.Request) (any, error) {
	return s.opts.Service.Settings(), nil
}

func (s *Server) changeSettings(w http.ResponseWriter, r *http.Request) (any, error) {
	var changes map[string]*string
	if err := readJSON(w, r, &changes); err != nil {
		return nil, err
	}
	changed, err := s.opts.Service.ChangeSettings(r.Context(), changes)
	if err != nil {
		return nil, err
	}
	w.Header().Set(alreadyHeader, strconv.FormatBool(changed.Already))
	return changed, nil
}

// alreadyHeader is "true" if a request changed nothing, else "false".
const alreadyHeader = "Meshhelper-Already"

// answerChange returns the changed peer, and sets the header.
func answerChange(w http.ResponseWriter, c Changed, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	w.Header().Set(alreadyHeader, strconv.FormatBool(c.Already))
	return c.Peer, nil
}

func (s *Server) explain(_ http.ResponseWriter, r *http.Request) (any, error) {
	q, err := parseQuestion(r.URL.Query())
	if err != nil {
		return nil, err
	}
	return orError(s.opts.Service.Explain(r.Context(), q))
}

// parseQuestion parses the parameters of explain. It refuses unknown and repeated ones.
func parseQuestion(values map[string][]string) (Question, error) {
	q := Question{Proto: "icmp"}
	for name, v := range values {
		if len(v) != 1 {
			return Question{}, Errorf(CodeBadRequest, "parameter %q occurs %d times", name, len(v))
		}
		var err error
		switch name {
		case "peer":
			q.Peer = v[0]
		case "to":
			q.To, err = netip.ParseAddr(v[0])
		case "from":
			q.From, err = netip.ParseAddr(v[0])
		case "proto":
			q.Proto = v[0]
		case "port":
			var port uint64
			port, err = strconv.ParseUint(v[0], 10, 16)
			q.Port = uint16(port)
		default:
			return Question{}, Errorf(CodeBadRequest, "parameter %q is unknown", name).WithHint("there are peer, to, port, proto and from")
		}
		if err != nil {
			return Question{}, Errorf(CodeBadRequest, "parameter %s: %q is not valid", name, v[0])
		}
	}
	if text := values["port"]; text != nil && q.Port == 0 && q.Proto != "icmp" {
		return Question{}, Errorf(CodeBadRequest, "parameter port: %q is not valid", text[0]).
			WithHint("it is a number from 1 to 65535; leave it out to ask without a port")
	}
	return q, nil
}

// events streams the events of the journal and new ones, as JSON lines, until the client
// disconnects. With follow=false it ends after those of the journal; with since it begins
// after that Seq.
func (s *Server) events(w http.ResponseWriter, r *http.Request) (any, error) {
	var seq uint64
	if text := r.URL.Query().Get("since"); text != "" {
		var err error
		if seq, err = strconv.ParseUint(text, 10, 64); err != nil {
			return nil, Errorf(CodeBadRequest, "parameter since: %q is not valid", text).WithHint("it is an event's seq")
		}
	}
	follow := r.URL.Query().Get("follow") != "false"
	control := http.NewResponseController(w)
	// The server's deadlines are for a whole request; a stream gets one for each batch.
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	w.Header().Set("Content-Type", "application/jsonl")
	encoder := json.NewEncoder(w)
	for {
		batch, newer := s.opts.Service.Since(seq)
		if err := control.SetWriteDeadline(time.Now().Add(eventTimeout)); err != nil {
			return nil, nil
		}
		for _, e := range batch {
			if encoder.Encode(e) != nil {
				return nil, nil
			}
			seq = e.Seq
		}
		if control.Flush() != nil || !follow {
			return nil, nil
		}
		select {
		case <-r.Context().Done():
			return nil, nil
		case <-newer:
		}
	}
}

func (s *Server) metrics(w http.ResponseWriter, _ *http.Request) (any, error) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	// A write only fails if the client disconnected.
	_ = WriteMetrics(w, s.opts.Service.Status())
	return nil, nil
}

// readJSON decodes a body that must be exactly one JSON value without unknown fields.
func readJSON(w http.ResponseWriter, r *http.Request, into any) error {
	if err := decodeJSON(r.Body, into); err != nil {
		return err
	}
	// The body is read. From here on the request may wait for enforcement, longer than
	// bodyTimeout.
	return http.NewResponseController(w).SetReadDeadline(time.Time{})
}

// decodeJSON is readJSON without the deadline.
func decodeJSON(body io.Reader, into any) error {
	dec := json.NewDecoder(body)
	dec.DisallowUnknownFields()
	err := dec.Decode(into)
	if err == nil {
		if _, err = dec.Token(); err == io.EOF {
			return nil
		}
		if err == nil {
			err = errors.New("something follows the JSON value")
		}
	}
	return bodyError(err)
}

// bodyError returns the *Error for a failure to decode a body.
func bodyError(err error) error {
	var tooLarge *http.MaxBytesError
	var wrongType *json.UnmarshalTypeError
	switch {
	case errors.As(err, &tooLarge):
		return Errorf(CodeTooLarge, "the body has more than %d bytes", tooLarge.Limit)
	case errors.As(err, &wrongType):
		return Errorf(CodeBadRequest, "field %q is a %s, want %s", wrongType.Field, wrongType.Value, wrongType.Type)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return Errorf(CodeBadRequest, "the body ends before its JSON value does")
	}
	return Errorf(CodeBadRequest, "read the body: %v", err)
}

// writeError writes err as {"error": {...}} with its status.
func writeError(w http.ResponseWriter, err error) {
	e := asError(err)
	writeJSON(w, e.HTTPStatus(), struct {
		Error *Error `json:"error"`
	}{e})
}

// writeJSON writes a response.
func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	// An error means that the client disconnected.
	_ = encoder.Encode(body)
}
