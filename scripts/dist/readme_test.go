package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestArchiveReadme(t *testing.T) {
	const b, e = sourceBegin, sourceEnd
	for text, want := range map[string]string{
		"a\n":                                  "a\n",
		"a\n" + b + "make\n" + e + "c\n":       "a\nc\n",
		b + e + b + "make\n" + e:               "",
		"sudo bin/meshhelper run\n":            "sudo ./meshhelper run\n",
		"a\n" + b + "make\n" + e + b + "x" + e: "a\n",
	} {
		if got, err := archiveReadme([]byte(text)); err != nil || string(got) != want {
			t.Errorf("%q became %q, %v, want %q", text, got, err, want)
		}
	}
	for _, text := range []string{b + "a", e, "a" + e + b + e, b + e + e} {
		if got, err := archiveReadme([]byte(text)); err == nil {
			t.Errorf("%q became %q", text, got)
		}
	}
}

// TestArchivePages checks README as archives have it: it says nothing of what only a
// clone has, and what it links to is in the archive.
func TestArchivePages(t *testing.T) {
	t.Chdir("../..")
	files, err := pages()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(files, func(f file) bool { return f.name == "README.md" })
	readme := string(files[i].data)
	for line := range strings.Lines(readme) {
		if strings.HasPrefix(line, "    make ") || strings.Contains(line, "`make ") || strings.Contains(line, "bin/meshhelper") && !strings.Contains(line, "/bin/meshhelper") || strings.Contains(line, "<!--") {
			t.Errorf("an archive can't do %q", line)
		}
	}
	if !strings.Contains(readme, "    sudo ./meshhelper install") {
		t.Error("README says nothing of how to install")
	}
	links := regexp.MustCompile(`\]\(([^):#]+)\)`).FindAllStringSubmatch(readme, -1)
	for _, l := range links {
		if !slices.ContainsFunc(files, func(f file) bool { return f.name == l[1] }) {
			t.Errorf("README links to %s, which no archive has", l[1])
		}
	}
	if len(links) == 0 {
		t.Error("README links to nothing")
	}
}
