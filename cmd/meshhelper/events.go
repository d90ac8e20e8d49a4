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
		Long: `Show what happened, the last thousand events, also those of before the helper's last
start. With --follow go on with what happens; a helper that starts again is waited for.`,
		RunE: func(c *cobra.Command, _ []string) error { return showEvents(c.Context(), a, follow) },
	}
	c.Flags().BoolVar(&follow, "follow", false, "go on with what happens")
	return c
}

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
	return a.outlast(ctx, func(answered func()) error {
		// Each helper has recorded something by the time it answers.
		return a.client().Events(ctx, last, true, func(e events.Event) error {
			answered()
			return each(e)
		})
	})
}

// reachPause is how long a command waits between attempts to reach a helper that went
// away.
const reachPause = 500 * time.Millisecond

// outlast calls ask again where it failed because the helper went away, once it has
// answered, and says so once for each time that it goes. ask calls answered when the
// helper does.
func (a *app) outlast(ctx context.Context, ask func(answered func()) error) error {
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

// eventWriter writes events, with the names of the users that asked for them.
type eventWriter struct {
	app   *app
	users map[uint32]string
}

// userEvent is an event with its user's name, as this command knows it: the helper
// looks up none, for a user database may not answer.
type userEvent struct {
	events.Event
	User string `json:"user,omitempty"`
}

func (w *eventWriter) write(e events.Event) error {
	who := userEvent{Event: e}
	if e.UID != nil {
		who.User = w.name(*e.UID)
	}
	return w.app.print(who, func() {
		text := e.Message
		if who.User != "" {
			text += ", by " + who.User
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

// name returns a user's name, or "user 1000" for one that has none here.
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
