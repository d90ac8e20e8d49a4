//go:build unix

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestAddedPermission adds a permission as a programmer would, an entry of the table and a
// line of the policy, the service that it opens, which the helper is made to serve. It builds
// the program with both, and finds the permission wherever permissions are: this test runs
// again in that build, with the scripts of testdata/added. So do the tests of the hosts that
// send packets to each service: the packet filters open what the policy says.
func TestAddedPermission(t *testing.T) {
	if _, err := mesh.ParsePermission("send"); err == nil {
		testscript.Run(t, scripts("testdata/added"))
		return
	}
	replaced := map[string]string{}
	for _, c := range []struct{ file, after, added string }{
		{"../../internal/mesh/permission.go", "\t// without Routing.\n\tLAN\n", "\tSend\n"},
		{"../../internal/mesh/permission.go", "Opens: \"reach this host's other networks\", Needs: Routing,\n\t},\n", `	{
		Set: Send, Name: "send", Verb: "send files here",
		Opens: "send files to this host", Default: []Kind{Own},
	},
`},
		{"../../internal/policy/service.go", "\tDNS Services = 1 << iota\n", "\tFiles\n"},
		{
			"../../internal/policy/service.go", "Port: 53, Rule: RuleDNS},\n",
			"\t{Set: Files, Name: \"files\", What: \"this host's files\", Needs: mesh.Send, Protos: []uint8{ProtoTCP}, Port: 51823, Rule: RuleFiles},\n",
		},
		{"../../internal/policy/verdict.go", "\tRuleDNS\n", "\tRuleFiles\n"},
		{"../../internal/policy/verdict.go", "may ask the host's DNS\",\n", "\tRuleFiles: \"a peer with send may send files to this host\",\n"},
		{"../../internal/reconcile/round.go", "\t\tListenPort: listenPort,\n", "\t\tServes:     policy.Files,\n"},
	} {
		path, err := filepath.Abs(c.file)
		if err != nil {
			t.Fatal(err)
		}
		from := path
		if replaced[path] != "" {
			from = replaced[path]
		}
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		before, rest, ok := strings.Cut(string(text), c.after)
		if !ok {
			t.Fatalf("%s has no place for an entry more", c.file)
		}
		copied := filepath.Join(t.TempDir(), filepath.Base(path))
		if err := os.WriteFile(copied, []byte(before+c.after+c.added+rest), 0o600); err != nil {
			t.Fatal(err)
		}
		replaced[path] = copied
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replaced})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "overlay.json")
	if err := os.WriteFile(file, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	again := func(folder, test, passes string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "-overlay", file, "-run", "^"+test+"$", folder)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: "+test+"/"+passes) {
			t.Errorf("with one permission more, %s: %v\n%s", folder, err, out)
		}
	}
	again(".", "TestAddedPermission", "everywhere")
	again("../../internal/policy", "TestServices", "files")
	again("../../internal/host/macos", "TestServices", "files/tcp")
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		t.Logf("not tried on Linux with real packets: it takes root there")
		return
	}
	again("../../internal/host/linux", "TestServices", "files")
}

// TestPermissionsInDocs holds the table of permissions in docs/cli.md against the one in
// the program.
func TestPermissionsInDocs(t *testing.T) {
	text, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	want.WriteString("| permission | lets a peer | needs | from the start |\n|---|---|---|---|\n")
	for _, p := range mesh.AllPermissions {
		needs, kinds := "", "no peer"
		if p.Needs != 0 {
			needs = "`" + strings.ReplaceAll(p.Needs.String(), ", ", "`, `") + "`"
		}
		if len(p.Default) > 0 {
			var names []string
			for _, k := range p.Default {
				names = append(names, string(k))
			}
			kinds = strings.Join(names, ", ") + " peers"
		}
		want.WriteString("| `" + p.Name + "` | " + p.Opens + " | " + needs + " | " + kinds + " |\n")
	}
	if !strings.Contains(string(text), want.String()) {
		t.Errorf("docs/cli.md hasn't this table:\n%s", want.String())
	}
}
