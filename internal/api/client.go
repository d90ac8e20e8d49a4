package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
)

// ErrUnreachable is in the chain of a Client's error when no helper answers on
// the socket.
var ErrUnreachable = errors.New("the helper isn't reachable")

// ErrNotPermitted is in the chain of a Client's error when the file system doesn't let this
// user connect to the socket.
var ErrNotPermitted = errors.New("the socket may not be opened")

// maxAnswer limits the size of an answer in bytes; the status of 10,000 peers has 8 MB.
const maxAnswer = 64 << 20

// Client sends requests to the helper on a socket. Its methods return an *Error if the
// helper refuses, and an error with ErrUnreachable, ErrNotPermitted or ErrUntrusted in its
// chain if the request wasn't answered. It is safe for concurrent use.
type Client struct {
	http *http.Client
	path string
}

// NewClient returns a client for the socket at path. It doesn't connect yet. The client
// only talks to a process of root or of this user; with any other its methods return
// ErrUntrusted.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return dialTrusted(ctx, path) }
	return &Client{path: path, http: &http.Client{
		Transport: &http.Transport{DialContext: dial, ResponseHeaderTimeout: writeTimeout},
		// A helper never redirects. Following would send a body elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Status returns the status with all peers.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	_, err = c.do(ctx, "GET", "/v1/status", nil, &s)
	return s, err
}

// Peer returns one peer. In all methods ref is a name, a mesh address or a public key.
func (c *Client) Peer(ctx context.Context, ref string) (p Peer, err error) {
	_, err = c.do(ctx, "GET", peerPath(ref), nil, &p)
	return p, err
}

// Config returns a peer's configuration for a stock WireGuard app.
func (c *Client) Config(ctx context.Context, ref string) (cfg Config, err error) {
	_, err = c.do(ctx, "GET", peerPath(ref)+"/config", nil, &cfg)
	return cfg, err
}

// Rules returns the rules as loaded, or, if language isn't "", as they would be in another
// language, such as "nft".
func (c *Client) Rules(ctx context.Context, language string) (r Rules, err error) {
	path := "/v1/rules"
	if language != "" {
		path += "?platform=" + url.QueryEscape(language)
	}
	_, err = c.do(ctx, "GET", path, nil, &r)
	return r, err
}

// Doctor returns the result of every check of the host.
func (c *Client) Doctor(ctx context.Context) (checks []Check, err error) {
	_, err = c.do(ctx, "GET", "/v1/doctor", nil, &checks)
	return checks, err
}

// Explain returns what happens to a packet, and why.
func (c *Client) Explain(ctx context.Context, q Question) (e Explanation, err error) {
	v := url.Values{"peer": {q.Peer}, "to": {q.To.String()}, "proto": {q.Proto}}
	if q.Port != 0 {
		v.Set("port", strconv.Itoa(int(q.Port)))
	}
	if q.From.IsValid() {
		v.Set("from", q.From.String())
	}
	_, err = c.do(ctx, "GET", "/v1/explain?"+v.Encode(), nil, &e)
	return e, err
}

// Settings returns the settings.
func (c *Client) Settings(ctx context.Context) (s Settings, err error) {
	_, err = c.do(ctx, "GET", "/v1/settings", nil, &s)
	return s, err
}

// ChangeSettings sets keys; a nil value unsets one.
func (c *Client) ChangeSettings(ctx context.Context, changes map[string]*string) (s Settings, err error) {
	header, err := c.do(ctx, "PATCH", "/v1/settings", changes, &s)
	s.Already = header.Get(alreadyHeader) == "true"
	return s, err
}

// AddPeer adds a peer. Like the other changes it returns when the change is in force.
func (c *Client) AddPeer(ctx context.Context, p NewPeer) (Changed, error) {
	return c.change(ctx, "POST", "/v1/peers", p)
}

// ChangePeer changes the fields of a peer that are set in change.
func (c *Client) ChangePeer(ctx context.Context, ref string, change PeerChange) (Changed, error) {
	return c.change(ctx, "PATCH", peerPath(ref), change)
}

// RemovePeer removes a peer.
func (c *Client) RemovePeer(ctx context.Context, ref string) (Changed, error) {
	return c.change(ctx, "DELETE", peerPath(ref), nil)
}

// Events calls each with every event in the journal whose Seq is greater than since. With
// follow it goes on with new events, until each returns an error, which Events returns, or
// ctx ends (nil) or the helper stops (ErrUnreachable).
func (c *Client) Events(ctx context.Context, since uint64, follow bool, each func(events.Event) error) error {
	response, err := c.send(ctx, "GET", fmt.Sprintf("/v1/events?since=%d&follow=%t", since, follow), nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	for dec := json.NewDecoder(response.Body); ; {
		var e events.Event
		err := dec.Decode(&e)
		switch {
		case err == io.EOF && !follow, ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("read events: %w: %w", ErrUnreachable, err)
		}
		if err := each(e); err != nil {
			return err
		}
	}
}

// peerPath returns the path of a peer.
func peerPath(ref string) string { return "/v1/peers/" + url.PathEscape(ref) }

// checkRef refuses a ref that would make another path when it is cleaned. No peer can have
// such a name.
func checkRef(path string) error {
	switch ref := strings.TrimSuffix(strings.TrimPrefix(path, "/v1/peers/"), "/config"); ref {
	case "", ".", "..":
		return Errorf(CodeUnknownPeer, "peer %q is unknown", ref).WithHint("see `meshhelper peer list`")
	}
	return nil
}

// change sends a request that changes a peer.
func (c *Client) change(ctx context.Context, method, path string, body any) (out Changed, err error) {
	header, err := c.do(ctx, method, path, body, &out.Peer)
	out.Already = header.Get(alreadyHeader) == "true"
	return out, err
}

// do sends a request and decodes the answer into into.
func (c *Client) do(ctx context.Context, method, path string, body, into any) (http.Header, error) {
	response, err := c.send(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if err := json.NewDecoder(io.LimitReader(response.Body, maxAnswer)).Decode(into); err != nil {
		return nil, fmt.Errorf("read the helper's answer to %s %s: %w", method, path, err)
	}
	return response.Header, nil
}

// send sends a request and returns the response, whose body the caller closes. A status of
// 300 or more becomes an error.
func (c *Client) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	if err := checkRef(path); err != nil {
		return nil, err
	}
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		content = bytes.NewReader(text)
	}
	// The host's name is never resolved, as the transport dials the socket.
	request, err := http.NewRequestWithContext(ctx, method, "http://meshhelper"+path, content)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, c.reachError(err)
	}
	if response.StatusCode >= 300 {
		defer response.Body.Close()
		return nil, readError(response)
	}
	return response, nil
}

// reachError adds the socket's path and the kind of failure to an error of the transport.
func (c *Client) reachError(err error) error {
	// The made-up URL in a url.Error would only distract from the socket's path.
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	kind := ErrUnreachable
	switch {
	case errors.Is(err, ErrUntrusted):
		return fmt.Errorf("ask the helper at %q: nothing was asked: %w", c.path, err)
	case errors.Is(err, fs.ErrPermission):
		kind = ErrNotPermitted
	}
	return fmt.Errorf("ask the helper at %q: %w: %w", c.path, kind, err)
}

// readError decodes the error in a response. A body in another format isn't from a helper.
func readError(response *http.Response) error {
	var body struct {
		Error *Error `json:"error"`
	}
	err := json.NewDecoder(io.LimitReader(response.Body, maxBody)).Decode(&body)
	if err != nil || body.Error == nil {
		return fmt.Errorf("the answer %q isn't a helper's", response.Status)
	}
	return body.Error
}

// WaitReady polls the status until the helper isn't Starting any more, or ctx ends. It also
// waits for a helper that doesn't listen yet.
func (c *Client) WaitReady(ctx context.Context) (Status, error) {
	for {
		s, err := c.Status(ctx)
		if err == nil && s.State != Starting {
			return s, nil
		}
		if err != nil && !errors.Is(err, ErrUnreachable) {
			return Status{}, err
		}
		select {
		case <-ctx.Done():
			return s, errors.Join(err, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
