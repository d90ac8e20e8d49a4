package daemon

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// outside returns the addresses by which others know the host, as they are in force.
func (r *rig) outside() string {
	c, _ := r.d.condition()
	return strings.Trim(fmt.Sprint(c.host.Outside), "[]")
}

func (r *rig) wantOutside(about, want string) {
	r.t.Helper()
	if got := r.outside(); got != want {
		r.t.Errorf("%s: known by %s, want %s", about, got, want)
	}
}

// TestOutsideOutlastsSilence has the resolver be silent, and answer in turn: an address
// by which the host's own name was known stays one, over a restart, too, and for a day.
func TestOutsideOutlastsSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		named := map[string]string{SettingEndpoint: "home.example"}
		begin := func() {
			o := r.options()
			o.Endpoint.Host = "home.example"
			o.Settings = StartSettings{Given: named}
			r.startWith(o)
		}
		begin()
		r.after(time.Second)
		r.wantOutside("before the first answer", "")
		if by, _ := r.doctor(); !strings.Contains(by["endpoint"].Message, "as long as its address isn't known") {
			t.Errorf("doctor says %+v", by["endpoint"])
		}
		r.resolveTo("203.0.113.9")
		r.after(10 * resolveInterval)
		r.wantOutside("found", "203.0.113.9")
		r.resolveTo("")
		r.end()
		begin()
		r.wantOutside("after a restart without DNS", "203.0.113.9")
		r.after(48 * time.Hour)
		r.wantOutside("as long as none is found", "203.0.113.9")
		r.resolveTo("203.0.113.10")
		r.after(10 * resolveInterval)
		r.wantOutside("another, long after", "203.0.113.10")
		r.resolveTo("203.0.113.11")
		r.after(10 * resolveInterval)
		r.wantOutside("another, soon after", "203.0.113.10 203.0.113.11")
		r.after(outsideFor)
		r.wantOutside("a day later", "203.0.113.11")

		// More than count: those that do already stay.
		all := []string{"203.0.113.11"}
		for i := range maxOutside + 4 {
			all = append(all, fmt.Sprintf("1.0.0.%d", i))
		}
		r.resolveTo(strings.Join(all, ","))
		r.after(10 * resolveInterval)
		if got := r.outside(); len(strings.Fields(got)) != maxOutside || !strings.Contains(got, "203.0.113.11") {
			t.Errorf("of many: %s", got)
		}
		if by, _ := r.doctor(); by["endpoint"].OK || !strings.Contains(by["endpoint"].Message, "5 don't") {
			t.Errorf("doctor says %+v", by["endpoint"])
		}
		r.end()
		// Another name's addresses don't count.
		named[SettingEndpoint] = "other.example"
		r.resolveTo("")
		o := r.options()
		o.Endpoint.Host = "other.example"
		o.Settings = StartSettings{Given: named}
		r.startWith(o)
		r.wantOutside("another name", "")
		r.end()
	})
}
