package linux

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// splitSysctl splits the name of a sysctl of one interface (or "all" or "default"), such
// as ipv6/conf/eth0/accept_ra. ok reports whether it is one that this package changes.
func splitSysctl(name string) (iface, key string, ok bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 || parts[1] != "conf" || parts[2] == "" || parts[2] == "." || parts[2] == ".." {
		return "", "", false
	}
	switch parts[0] + " " + parts[3] {
	case "ipv4 forwarding", "ipv6 forwarding", "ipv6 accept_ra":
		return parts[2], parts[3], true
	}
	return "", "", false
}

// conf returns the name of a sysctl of an interface.
func conf(family, iface, key string) string { return path.Join(family, "conf", iface, key) }

// sysctls reads and writes the files below a directory: sysctlRoot, except in tests.
// Names are paths such as ipv4/conf/eth0/forwarding: an interface's name may contain the
// dots of sysctl(8).
type sysctls struct{ root string }

// read returns a sysctl's value without surrounding white space.
func (s sysctls) read(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(s.root, name))
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// write sets a sysctl.
func (s sysctls) write(name, value string) error {
	// Without O_CREATE, so that a removed interface is an error.
	f, err := os.OpenFile(filepath.Join(s.root, name), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("write sysctl: %w", err)
	}
	_, err = f.WriteString(value)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write sysctl: %w", err)
	}
	return nil
}

// interfaces lists the interfaces that have sysctls of a family, including "all" and
// "default".
func (s sysctls) interfaces(family string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.root, family, "conf"))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list sysctls: %w", err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, nil
}
