package trial

// Clients that keep the helper's socket busy.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
)

// socketPath is the socket of the helper on B.
const socketPath = "/run/meshhelper.sock"

// dial opens a connection to the helper on B.
func (m *Mesh) dial() (conn net.Conn, err error) {
	err = m.B.Do(func() (err error) {
		conn, err = net.Dial("unix", socketPath)
		return err
	})
	return conn, err
}

// client returns an operator's client that keeps connections open.
func (m *Mesh) client(t testing.TB) *http.Client {
	transport := &http.Transport{
		DialContext:         func(context.Context, string, string) (net.Conn, error) { return m.dial() },
		MaxIdleConnsPerHost: 16,
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// ask sends a request and decodes the answer. A refusal is also an error.
func ask(c *http.Client, method, path string, body, into any) error {
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(text)
	}
	request, err := http.NewRequest(method, "http://meshhelper"+path, content)
	if err != nil {
		return err
	}
	answer, err := c.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %s: %w", method, path, answer.Status, text, err)
	}
	return json.Unmarshal(text, into)
}

// toggle returns the request body that sets one permission.
func toggle(permission string, allowed bool) any {
	return map[string]any{"permissions": map[string]any{permission: map[string]bool{"allowed": allowed}}}
}
