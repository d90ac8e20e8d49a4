package mesh

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// TestTable checks what other code relies on in the table of permissions: each entry is one
// permission, entries are in the order of their bits, and each has a name and texts for users.
func TestTable(t *testing.T) {
	names := map[string]bool{}
	for i, p := range AllPermissions {
		switch {
		case p.Set != 1<<i:
			t.Errorf("entry %d is the set %b, want the bit %d alone", i, p.Set, i)
		case p.Name == "" || names[p.Name] || strings.Trim(p.Name, "abcdefghijklmnopqrstuvwxyz") != "":
			t.Errorf("entry %d has the name %q", i, p.Name)
		case p.Verb == "" || p.Opens == "":
			t.Errorf("%s lacks a text for users", p.Name)
		case p.Needs >= p.Set:
			t.Errorf("%s needs %v, which isn't before it in the table", p.Name, p.Needs)
		}
		names[p.Name] = true
		if got, err := ParsePermission(p.Name); err != nil || got.Set != p.Set {
			t.Errorf("%s is parsed as %v, %v", p.Name, got, err)
		}
		if got := new(Grants).Of(p.Set); got == nil {
			t.Errorf("%s has no grant", p.Name)
		}
	}
	if All != 1<<len(AllPermissions)-1 || All.String() != strings.Join(PermissionNames(), ", ") {
		t.Errorf("all permissions are %v", All)
	}
}

// TestEffective checks the effective permissions of all sets.
func TestEffective(t *testing.T) {
	for set := range All + 1 {
		want := set
		if !set.Has(Routing) {
			want &^= LAN
		}
		if got := set.Effective(); got != want {
			t.Errorf("%v has the effective permissions %v, want %v", set, got, want)
		}
		if got := Granted(set); got.Allowed() != set || got.At(time.Now()) != set {
			t.Errorf("granted %v gives %v", set, got)
		}
	}
}

func TestDefaultPermissions(t *testing.T) {
	if own, external := DefaultPermissions(Own), DefaultPermissions(External); own != Incoming || external != 0 {
		t.Errorf("own peers may %v, external ones %v", own, external)
	}
}

// TestGrantAnd checks that the combination of two grants allows at a time exactly if both do.
func TestGrantAnd(t *testing.T) {
	start := time.Unix(1000, 0)
	grants := []Grant{{}, {Allowed: true}, {Allowed: true, Until: start.Add(time.Hour)}, {Allowed: true, Until: start.Add(2 * time.Hour)}, {Until: start}}
	for _, g := range grants {
		for _, h := range grants {
			for _, at := range []time.Duration{0, time.Hour, 2 * time.Hour, 3 * time.Hour} {
				now := start.Add(at)
				if got, want := g.And(h).In(now), g.In(now) && h.In(now); got != want {
					t.Errorf("%+v and %+v at %v: %v, want %v", g, h, at, got, want)
				}
			}
		}
	}
}

// TestGrantsJSON encodes and decodes grants in the form of the document.
func TestGrantsJSON(t *testing.T) {
	g := Granted(Incoming)
	*g.Of(LAN) = Grant{Allowed: true, Until: time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)}
	const want = `{"incoming":{"allowed":true},"routing":{"allowed":false},"lan":{"allowed":true,"until":"2026-01-02T15:04:05Z"}}`
	text, err := json.Marshal(g)
	if err != nil || string(text) != want {
		t.Fatalf("got %s, %v, want %s", text, err, want)
	}
	got := Granted(All) // grants that the text lacks must not stay
	if err := json.Unmarshal([]byte(`{"lan":{"allowed":true,"until":"2026-01-02T15:04:05Z"},"incoming":{"allowed":true},"fly":{"allowed":true}}`), &got); err != nil || got != g {
		t.Errorf("read %+v, %v, want %+v", got, err, g)
	}
	for _, bad := range []string{`[]`, `{"lan":7}`, `{"lan":{"allowed":"yes"}}`, `7`} {
		if err := json.Unmarshal([]byte(bad), &got); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}

func FuzzGrantsJSON(f *testing.F) {
	f.Add([]byte(`{"incoming":{"allowed":true},"routing":{"allowed":true,"until":"2026-01-02T15:04:05Z"}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var g, again Grants
		if json.Unmarshal(text, &g) != nil {
			return
		}
		out, err := json.Marshal(g)
		if err != nil {
			return // a year that RFC 3339 can't represent
		}
		if err := json.Unmarshal(out, &again); err != nil || again != g && !sameGrants(again, g) {
			t.Fatalf("%s became %s: %v", text, out, err)
		}
	})
}

func sameGrants(a, b Grants) bool {
	for i := range a {
		if a[i].Allowed != b[i].Allowed || !a[i].Until.Equal(b[i].Until) {
			return false
		}
	}
	return true
}
