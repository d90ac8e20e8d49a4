package install

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestListByAnotherParser reads the property list that install writes with a parser
// written for this test from the format's DTD: a test that writes and reads with one
// library can't find that library's mistakes.
func TestListByAnotherParser(t *testing.T) {
	g := newRig(t)
	g.o.Arguments = []string{"--endpoint", `<a&b> "c" 'd'`}
	g.must(g.install())
	data, err := os.ReadFile(filepath.Join(g.root, g.o.List()))
	g.must(err)
	// launchd's parser requires the XML and DOCTYPE declarations first.
	if !strings.HasPrefix(string(data), "<?xml ") || !strings.Contains(string(data), `<!DOCTYPE plist PUBLIC "-//Apple`) {
		t.Errorf("it begins with %.80q", data)
	}
	got, err := parsePlist(string(data))
	g.must(err)
	want := map[string]any{
		"Label":             "org.meshhelper",
		"ProgramArguments":  []any{"/Library/PrivilegedHelperTools/org.meshhelper", "run", "--endpoint", `<a&b> "c" 'd'`},
		"RunAtLoad":         true,
		"KeepAlive":         true,
		"ExitTimeOut":       int64(20),
		"ProcessType":       "Interactive",
		"Umask":             int64(0o077), // decimal in the file
		"StandardErrorPath": "/var/log/meshhelper/stderr.log",
	}
	if diff := cmp.Diff(any(want), got); diff != "" {
		t.Errorf("read (-want +got):\n%s", diff)
	}
}

// TestAnotherParserRefuses checks that the test's parser refuses malformed property
// lists.
func TestAnotherParserRefuses(t *testing.T) {
	for _, in := range []string{
		"", "<plist>", "<dict></dict>", "<plist><dict><string>a</string></dict></plist>", "<plist><dict><key>a</key></dict></plist>",
		"<plist><integer>x</integer></plist>", "<plist><date>x</date></plist>", "<plist><true/></plist>x",
		"<plist><dict><key>a</key><true/><key>a</key><true/></dict></plist>",
	} {
		if v, err := parsePlist(in); err == nil {
			t.Errorf("%q was parsed as %v", in, v)
		}
	}
}

// parsePlist parses an XML property list of dictionaries, arrays, strings, integers and
// booleans.
func parsePlist(text string) (any, error) {
	p := plistParser{xml.NewDecoder(strings.NewReader(text))}
	start, err := p.element()
	if err != nil || start != "plist" {
		return nil, fmt.Errorf("not a property list: %q, %w", start, err)
	}
	name, err := p.element()
	if err != nil {
		return nil, err
	}
	v, err := p.value(name)
	if err != nil {
		return nil, err
	}
	if end, err := p.element(); end != "" || err != nil {
		return nil, fmt.Errorf("%q after the value, %v", end, err)
	}
	if end, err := p.element(); err != io.EOF {
		return nil, fmt.Errorf("%q after the property list, %v", end, err)
	}
	return v, nil
}

type plistParser struct{ *xml.Decoder }

// element returns the name of the next start tag, or "" at the end of the enclosing
// element.
func (p plistParser) element() (string, error) {
	for {
		token, err := p.Token()
		if err != nil {
			return "", err
		}
		switch token := token.(type) {
		case xml.StartElement:
			return token.Name.Local, nil
		case xml.EndElement:
			return "", nil
		case xml.CharData:
			if strings.TrimSpace(string(token)) != "" {
				return "", fmt.Errorf("text %q between elements", token)
			}
		}
	}
}

// value parses the rest of an element.
func (p plistParser) value(name string) (any, error) {
	switch name {
	case "dict":
		return p.dict()
	case "array":
		return p.array()
	case "true", "false":
		text, err := p.text()
		if err == nil && text != "" {
			err = fmt.Errorf("a boolean with text %q", text)
		}
		return name == "true", err
	case "string":
		return p.text()
	case "integer":
		text, err := p.text()
		if err != nil {
			return nil, err
		}
		return strconv.ParseInt(text, 10, 64)
	}
	return nil, fmt.Errorf("unexpected <%s>", name)
}

func (p plistParser) text() (string, error) {
	var b strings.Builder
	for {
		token, err := p.Token()
		if err != nil {
			return "", err
		}
		switch token := token.(type) {
		case xml.CharData:
			b.Write(token)
		case xml.EndElement:
			return b.String(), nil
		default:
			return "", fmt.Errorf("unexpected %T in text", token)
		}
	}
}

func (p plistParser) array() (any, error) {
	list := []any{}
	for {
		name, err := p.element()
		if err != nil || name == "" {
			return list, err
		}
		v, err := p.value(name)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
}

func (p plistParser) dict() (any, error) {
	d := map[string]any{}
	for {
		name, err := p.element()
		if err != nil || name == "" {
			return d, err
		}
		key, err := p.text()
		if err != nil || name != "key" {
			return nil, errors.Join(fmt.Errorf("<%s> %q where a key belongs", name, key), err)
		}
		if _, twice := d[key]; twice {
			return nil, fmt.Errorf("key %q occurs twice", key)
		}
		if name, err = p.element(); err != nil {
			return nil, err
		}
		if d[key], err = p.value(name); err != nil {
			return nil, err
		}
	}
}
