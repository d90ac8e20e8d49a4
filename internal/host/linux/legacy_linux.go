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

	"github.com/meshhelper/meshhelper/internal/host"
)

// legacyKind is one of the two kinds of tables that iptables-legacy loads into the kernel
// (x_tables). nftables doesn't show them.
type legacyKind struct {
	program string
	names   string // file in /proc/net that lists the tables in use
	domain  int
	level   int
	target  int // offset of target_offset in struct ipt_entry or ip6t_entry
}

// From include/uapi/linux/netfilter_ipv4/ip_tables.h and netfilter_ipv6/ip6_tables.h.
var legacyKinds = []legacyKind{
	{"iptables-legacy", "ip_tables_names", unix.AF_INET, unix.SOL_IP, 88},
	{"ip6tables-legacy", "ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6, 140},
}

// Constants of linux/netfilter/x_tables.h and of the two headers above; sizes in bytes.
const (
	legacyGetInfo    = 64      // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	legacyGetEntries = 65      // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	legacyNameSize   = 32      // XT_TABLE_MAXNAMELEN
	legacyInfoSize   = 84      // struct ipt_getinfo
	legacyHooks      = 5       // NF_INET_NUMHOOKS
	legacyMostBytes  = 1 << 16 // entries larger than this count as rules without being read
	verdictDrop      = -1      // how XT_STANDARD_TARGET holds NF_DROP
)

// legacyTable is what is read of a table.
type legacyTable struct {
	name  string
	rules int  // entries other than the policies of built-in chains
	drops bool // a built-in chain has the policy DROP
}

// legacyProblems names the tables of iptables-legacy that have rules. These aren't
// evaluated: they may let everything pass, or nothing.
func legacyProblems() ([]host.Problem, error) {
	var out []host.Problem
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

// problem reports the tables that may drop packets, if any.
func (k legacyKind) problem(tables []legacyTable) (host.Problem, bool) {
	var used []string
	for _, t := range tables {
		if t.rules > 0 || t.drops {
			used = append(used, t.name)
		}
	}
	if len(used) == 0 {
		return host.Problem{}, false
	}
	noun := "table "
	if len(used) > 1 {
		noun = "tables "
	}
	return host.Problem{
		Step:    stepOthers,
		Kind:    host.KindOtherFilters,
		Message: fmt.Sprintf("rules of %s in %s%s may drop peers' packets: they aren't evaluated", k.program, noun, strings.Join(used, ", ")),
		Hint:    fmt.Sprintf("see the output of %s-save, or switch the software that they belong to to iptables-nft, whose rules are evaluated", k.program),
	}, true
}

// tables reads the tables in use. The file lists only those that some program has used;
// asking the kernel for another one would create it.
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
		t, err := k.table(name, func(option int, value []byte) error { return getsockopt(fd, k.level, option, value) })
		if err != nil {
			return out, fmt.Errorf("read table %s of %s: %w", name, k.program, err)
		}
		out = append(out, t)
	}
	return out, nil
}

// maxTableReads is how often a table is read that changes in the meantime (EAGAIN).
const maxTableReads = 10

// table reads a table. ask is getsockopt(2) with an option and its value.
func (k legacyKind) table(name string, ask func(option int, value []byte) error) (t legacyTable, err error) {
	if len(name) >= legacyNameSize {
		return legacyTable{}, errors.New("the name is too long")
	}
	for range maxTableReads {
		if t, err = k.read(name, ask); !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	return t, err
}

// read asks for a table's counts, and for its entries only if they are just the policies
// of built-in chains: there may be a hundred thousand others, which aren't evaluated.
func (k legacyKind) read(name string, ask func(option int, value []byte) error) (legacyTable, error) {
	info := make([]byte, legacyInfoSize)
	copy(info, name)
	if err := ask(legacyGetInfo, info); err != nil {
		return legacyTable{}, err
	}
	size := binary.NativeEndian.Uint32(info[legacyInfoSize-4:])
	if n := rulesIn(info); n > 0 || size > legacyMostBytes {
		return legacyTable{name: name, rules: max(n, 1)}, nil
	}
	// The entries in struct ipt_get_entries are aligned for a u64, which on i386 is
	// offset 36.
	for _, head := range []int{40, 36} {
		all := make([]byte, head+int(size))
		copy(all, name)
		binary.NativeEndian.PutUint32(all[legacyNameSize:], size)
		err := ask(legacyGetEntries, all)
		if err == nil {
			return k.parse(name, info, all[head:])
		}
		if !errors.Is(err, unix.EINVAL) {
			return legacyTable{}, err
		}
	}
	return legacyTable{}, unix.EINVAL
}

// legacyWord returns a 32-bit number of struct ipt_getinfo after the name: valid_hooks,
// hook_entry[5], underflow[5], num_entries, size.
func legacyWord(info []byte, i int) uint32 {
	return binary.NativeEndian.Uint32(info[legacyNameSize+4*i:])
}

// rulesIn returns the number of entries that aren't policies of built-in chains nor the
// last entry, which ends the table (XT_ERROR_TARGET).
func rulesIn(info []byte) int {
	return int(legacyWord(info, 1+2*legacyHooks)) - mathbits.OnesCount32(legacyWord(info, 0)) - 1
}

// parse takes the counts from struct ipt_getinfo, and the policies from the entries that
// end the built-in chains (underflow).
func (k legacyKind) parse(name string, info, entries []byte) (legacyTable, error) {
	if len(info) < legacyInfoSize {
		return legacyTable{}, errors.New("an answer is too short")
	}
	hooks := legacyWord(info, 0)
	t := legacyTable{name: name, rules: rulesIn(info)}
	for hook := range legacyHooks {
		if hooks&(1<<hook) == 0 {
			continue
		}
		end := uint64(legacyWord(info, 1+legacyHooks+hook))
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

// getsockopt passes the value's bytes to the kernel and stores the answer in them.
func getsockopt(fd, level, option int, value []byte) error {
	size := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
