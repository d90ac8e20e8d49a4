package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	mathbits "math/bits"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/platform"
)

// legacyKind is one of the two kinds of tables that iptables-legacy loads into the
// kernel (x_tables), which nftables doesn't show.
type legacyKind struct {
	program string
	names   string // the file that lists the tables in use
	domain  int
	level   int
	target  int // where an entry says where its target begins: ipt_entry, ip6t_entry
}

// From include/uapi/linux/netfilter_ipv4/ip_tables.h and netfilter_ipv6/ip6_tables.h.
var legacyKinds = []legacyKind{
	{"iptables-legacy", "ip_tables_names", unix.AF_INET, unix.SOL_IP, 88},
	{"ip6tables-legacy", "ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6, 140},
}

const (
	legacyGetInfo    = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	legacyGetEntries = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	legacyNameSize   = 32 // XT_TABLE_MAXNAMELEN
	legacyInfoSize   = 84 // struct ipt_getinfo
	legacyHooks      = 5  // NF_INET_NUMHOOKS
	legacyMostBytes  = 64 << 20
	verdictDrop      = -1 // how XT_STANDARD_TARGET holds NF_DROP
)

// legacyTable is what is looked at of a table.
type legacyTable struct {
	name  string
	rules int  // entries that aren't the ends of built-in chains
	drops bool // the policy of a built-in chain
}

// legacyProblems names the tables of iptables-legacy that hold rules. These aren't judged:
// they may let everything pass, or nothing.
func legacyProblems() ([]platform.Problem, error) {
	var out []platform.Problem
	var errs []error
	for _, k := range legacyKinds {
		tables, err := k.tables()
		errs = append(errs, err)
		if p, ok := k.problem(tables); ok {
			out = append(out, p)
		}
	}
	return out, errors.Join(errs...)
}

func (k legacyKind) problem(tables []legacyTable) (platform.Problem, bool) {
	var used []string
	for _, t := range tables {
		if t.rules > 0 || t.drops {
			used = append(used, t.name)
		}
	}
	if len(used) == 0 {
		return platform.Problem{}, false
	}
	noun := "table "
	if len(used) > 1 {
		noun = "tables "
	}
	return platform.Problem{
		Step:    lookAround,
		Message: fmt.Sprintf("rules of %s in %s%s may drop peers' packets: what they do isn't evaluated", k.program, noun, strings.Join(used, ", ")),
		Hint:    fmt.Sprintf("look at %s-save, or have the software that they belong to use iptables-nft, which is evaluated", k.program),
	}, true
}

// tables looks at the tables in use. The file lists them only where something has used
// them; asking the kernel for one that isn't listed would create it.
func (k legacyKind) tables() ([]legacyTable, error) {
	b, err := os.ReadFile("/proc/thread-self/net/" + k.names)
	names := strings.Fields(string(b))
	if errors.Is(err, os.ErrNotExist) || err == nil && len(names) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list tables of %s: %w", k.program, err)
	}
	slices.Sort(names)
	fd, err := unix.Socket(k.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", k.program, err)
	}
	defer unix.Close(fd)
	var out []legacyTable
	for _, name := range names {
		t, err := k.table(fd, name)
		if err != nil {
			return out, fmt.Errorf("read table %s of %s: %w", name, k.program, err)
		}
		out = append(out, t)
	}
	return out, nil
}

func (k legacyKind) table(fd int, name string) (legacyTable, error) {
	if len(name) >= legacyNameSize {
		return legacyTable{}, errors.New("its name is too long")
	}
	info := make([]byte, legacyInfoSize)
	copy(info, name)
	if err := getsockopt(fd, k.level, legacyGetInfo, info); err != nil {
		return legacyTable{}, err
	}
	size := binary.NativeEndian.Uint32(info[legacyInfoSize-4:])
	if size > legacyMostBytes {
		return legacyTable{name: name, rules: 1}, nil // more than what has no rules
	}
	// struct ipt_get_entries, whose entries begin where a u64 may: that is at 36 on i386.
	for _, head := range []int{40, 36} {
		all := make([]byte, head+int(size))
		copy(all, name)
		binary.NativeEndian.PutUint32(all[legacyNameSize:], size)
		err := getsockopt(fd, k.level, legacyGetEntries, all)
		if err == nil {
			return k.parse(name, info, all[head:])
		}
		if !errors.Is(err, unix.EINVAL) {
			return legacyTable{}, err
		}
	}
	return legacyTable{}, unix.EINVAL
}

// parse takes a table's numbers from struct ipt_getinfo, and the policies from the
// entries that the built-in chains end with.
func (k legacyKind) parse(name string, info, entries []byte) (legacyTable, error) {
	if len(info) < legacyInfoSize {
		return legacyTable{}, errors.New("an answer is too short")
	}
	word := func(i int) uint32 { return binary.NativeEndian.Uint32(info[legacyNameSize+4*i:]) }
	hooks, number := word(0), word(1+2*legacyHooks)
	// The last entry ends the table (XT_ERROR_TARGET).
	t := legacyTable{name: name, rules: int(number) - mathbits.OnesCount32(hooks) - 1}
	for hook := range legacyHooks {
		if hooks&(1<<hook) == 0 {
			continue
		}
		end := uint64(word(1 + legacyHooks + hook))
		if end+uint64(k.target)+2 > uint64(len(entries)) {
			return legacyTable{}, errors.New("an answer is too short")
		}
		// struct xt_standard_target: a header of 32 bytes, and the verdict.
		at := end + uint64(binary.NativeEndian.Uint16(entries[end+uint64(k.target):])) + 32
		if at+4 > uint64(len(entries)) {
			return legacyTable{}, errors.New("an answer is too short")
		}
		t.drops = t.drops || int32(binary.NativeEndian.Uint32(entries[at:])) == verdictDrop
	}
	return t, nil
}

// getsockopt asks with the value's bytes and puts the answer there.
func getsockopt(fd, level, option int, value []byte) error {
	size := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
