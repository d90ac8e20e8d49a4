package main

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
)

// newEventsCommand returns `events`.
func newEventsCommand(a *app) *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use: "events", Short: "Show what happened",
		Long: `Show the last thousand events, including those from before the helper's last start.
With --follow, go on with events as they happen; if the helper goes away, the command
waits until it answers again.`,
		RunE: func(c *cobra.Command, _ []string) error { return showEvents(c.Context(), a, follow) },
	}
	c.Flags().BoolVar(&follow, "follow", false, "go on with events as they happen")
	return c
}

// showEvents prints the journal, and with follow each new event until ctx ends.
func showEvents(ctx context.Context, a *app, follow bool) error {
	var last uint64
	out := eventWriter{app: a, users: map[uint32]string{}}
	each := func(e events.Event) error {
		last = e.Seq
		return out.write(e)
	}
	if !follow {
		return a.client().Events(ctx, 0, false, each)
	}
	return a.retryUnreachable(ctx, func(answered func()) error {
		// last keeps an event from being printed again after the connection was lost.
		// Every helper has recorded an event by the time it answers, so that the first one
		// here shows that it is reachable.
		return a.client().Events(ctx, last, true, func(e events.Event) error {
			answered()
			return each(e)
		})
	})
}

// reachPause is the time between two attempts to reach a helper that went away. A restart
// takes a second or two, and an attempt costs one connect(2) on a Unix socket.
const reachPause = 500 * time.Millisecond

// retryUnreachable calls ask, and again every reachPause while the helper is unreachable.
// A helper that never answered is an error; only one that was reached before, and may be
// restarting, is waited for. ask calls answered when the helper answers. Each loss and each
// return of the helper is reported once on stderr. The end of ctx is no error.
func (a *app) retryUnreachable(ctx context.Context, ask func(answered func()) error) error {
	reached, away := false, false
	answered := func() {
		if away {
			a.talk("meshhelper: the helper answers again")
		}
		reached, away = true, false
	}
	for {
		err := ask(answered)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil, !reached, !errors.Is(err, api.ErrUnreachable):
			return err
		}
		if !away {
			a.talk("meshhelper: the helper went away; waiting until it answers again (Ctrl-C ends)")
		}
		away = true
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(reachPause):
		}
	}
}

// eventWriter writes events, with the names of the users that caused them.
type eventWriter struct {
	app   *app
	users map[uint32]string // names by user ID, each looked up once
}

// userEvent is an event with its user's name. The command looks the name up, because the
// helper must not wait for a user database (LDAP, for example) that may not answer.
type userEvent struct {
	events.Event
	User string `json:"user,omitempty"`
}

// write prints one event: on a line of its own, and on a terminal narrower than 80 columns
// with a shorter time, so that the message has room.
func (w *eventWriter) write(e events.Event) error {
	named := userEvent{Event: e}
	if e.UID != nil {
		named.User = w.name(*e.UID)
	}
	return w.app.print(named, func() {
		text := e.Message
		if named.User != "" {
			text += ", by " + named.User
		}
		at := e.Time.Local().Format("2006-01-02 15:04:05")
		if w.app.columns > 0 && w.app.columns < 80 {
			w.app.sayWrapped(e.Time.Local().Format("01-02 15:04 ")+string(e.Kind)+": ", "    ", text)
			return
		}
		head := fmt.Sprintf("%s  %-9s  ", at, e.Kind)
		w.app.sayWrapped(head, strings.Repeat(" ", len(head)), text)
	})
}

// name returns a user's name, or "user 1000" if the user database has no entry.
func (w *eventWriter) name(uid uint32) string {
	name, known := w.users[uid]
	if known {
		return name
	}
	name = "user " + strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
		name = u.Username
	}
	w.users[uid] = name
	return name
}
