package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/macho"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"
)

// tiny returns a Mach-O that is signed as Go's linker does, with code bytes of
// code. Nothing runs it; its load commands and signature are whole.
func tiny(t testing.TB, cpu macho.Cpu, code int) []byte {
	t.Helper()
	const header, command, page = 32, 16, 1 << 12
	limit := header + command + code
	pages := (limit + page - 1) / page
	name := "tiny\x00"
	d := directory{
		Magic: magicDirectory, Version: 0x20400, Flags: flagAdHoc | 0x20000,
		IdentOffset: 88, HashOffset: uint32(88 + len(name)), CodeSlots: uint32(pages), CodeLimit: uint32(limit),
		HashSize: sha256.Size, HashType: hashSHA256, PageX: 12,
	}
	d.Length = d.HashOffset + uint32(pages)*sha256.Size

	var b bytes.Buffer
	put := func(order binary.ByteOrder, v any) {
		if err := binary.Write(&b, order, v); err != nil {
			t.Fatal(err)
		}
	}
	size := 20 + d.Length
	put(binary.LittleEndian, macho.FileHeader{Magic: macho.Magic64, Cpu: cpu, Type: macho.TypeExec, Ncmd: 1, Cmdsz: command})
	put(binary.LittleEndian, []uint32{0, loadCodeSignature, command, uint32(limit), size})
	for i := range code {
		b.WriteByte(byte(i * i >> 4))
	}
	signed := slices.Clone(b.Bytes())
	put(binary.BigEndian, []uint32{magicSuperBlob, size, 1, slotDirectory, 20})
	put(binary.BigEndian, d)
	b.Write(make([]byte, 88-binary.Size(d)))
	b.WriteString(name)
	for p := range slices.Chunk(signed, page) {
		sum := sha256.Sum256(p)
		b.Write(sum[:])
	}
	return b.Bytes()
}

const tinyCode = 10_000

func TestCheckSignature(t *testing.T) {
	good := tiny(t, macho.CpuArm64, tinyCode)
	if err := checkSignature(good); err != nil {
		t.Fatal(err)
	}
	const limit = 48 + tinyCode
	put := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint32(b[at:], v); return b }
	}
	for name, tt := range map[string]struct {
		spoil func(b []byte) []byte
		want  string
	}{
		"first page":        {func(b []byte) []byte { b[60]++; return b }, "page 0 "},
		"last byte of code": {func(b []byte) []byte { b[limit-1]++; return b }, "page 2 "},
		"a hash":            {func(b []byte) []byte { b[len(b)-1]++; return b }, "page 2 "},
		"a byte more":       {func(b []byte) []byte { return append(b, 0) }, "ends at"},
		"a byte less":       {func(b []byte) []byte { return b[:len(b)-1] }, "ends at"},
		"no load command":   {func(b []byte) []byte { b[32] = 0x1e; return b }, "0 load commands"},
		"no superblob":      {put(limit, 0), "magic"},
		"superblob's end":   {put(limit+4, 1<<31), "length"},
		"many slots":        {put(limit+8, maxSlots+1), "slots"},
		"no directory":      {put(limit+12, 7), "no code directory"},
		"directory outside": {put(limit+16, 1<<31), "no code directory"},
		"directory's magic": {put(limit+20, 0), "code directory with magic"},
		"directory's end":   {put(limit+24, 1<<31), "code directory with magic"},
		"not ad hoc":        {put(limit+32, 0), "not signed ad hoc"},
		"hashes outside":    {put(limit+36, 1<<31), "hashes up to"},
		"fewer pages":       {put(limit+48, 2), "pages are signed"},
		"a lower limit":     {put(limit+52, 4096), "are signed"},
		"SHA-1":             {func(b []byte) []byte { b[limit+57] = 1; return b }, "SHA-256"},
		"large pages":       {func(b []byte) []byte { b[limit+59] = 63; return b }, "pages of 2^63"},
		"not a Mach-O":      {func(b []byte) []byte { return []byte("#!/bin/sh\nexit 0\n") }, "magic"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := checkSignature(tt.spoil(slices.Clone(good))); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func FuzzCheckSignature(f *testing.F) {
	f.Add(tiny(f, macho.CpuArm64, 100))
	f.Add(tiny(f, macho.CpuArm64, 5000))
	f.Fuzz(func(t *testing.T, b []byte) {
		if checkSignature(b) != nil {
			return
		}
		// What is accepted is signed: no byte of its first page can change.
		if _, start, err := signature(b); err != nil {
			t.Error(err)
		} else if start > 0 {
			b[min(int(start), 1<<12)-1]++
			if checkSignature(b) == nil {
				t.Error("changed code is accepted")
			}
		}
	})
}

func TestJoin(t *testing.T) {
	amd, arm := tiny(t, macho.CpuAmd64, 3), tiny(t, macho.CpuArm64, 5000)
	checkFat(t, amd, arm)
	for name, s := range map[string][][]byte{
		"twice":        {arm, arm},
		"another cpu":  {amd, tiny(t, macho.CpuPpc, 3)},
		"not a Mach-O": {amd, []byte("x")},
	} {
		if _, err := join(s); err == nil {
			t.Errorf("%s: joined", name)
		}
	}
}

// checkFat joins two executables and reads the result as macOS does.
func checkFat(t *testing.T, amd, arm []byte) {
	t.Helper()
	data, err := join([][]byte{amd, arm})
	if err != nil {
		t.Fatal(err)
	}
	f, err := macho.NewFatFile(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Arches) != 2 {
		t.Fatalf("%d slices", len(f.Arches))
	}
	for i, want := range []struct {
		cpu   macho.Cpu
		align uint32
		thin  []byte
	}{{macho.CpuAmd64, 12, amd}, {macho.CpuArm64, 14, arm}} {
		a := f.Arches[i]
		if a.Cpu != want.cpu || a.Align != want.align || a.Offset%(1<<want.align) != 0 || a.SubCpu != a.File.SubCpu {
			t.Errorf("slice %d: %+v", i, a.FatArchHeader)
		}
		if !bytes.Equal(data[a.Offset:a.Offset+a.Size], want.thin) {
			t.Errorf("slice %d isn't the executable that was joined", i)
		}
	}
}

// TestRelease builds what Macs run and reads what the linker wrote.
func TestRelease(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the command for two processors: not with -short")
	}
	b := &builder{version: "v0.0.0-test"}
	amd, err := b.slice(t.Context(), platform{"darwin", "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	arm, err := b.slice(t.Context(), platform{"darwin", "arm64"}) // checks the signature
	if err != nil {
		t.Fatal(err)
	}
	checkLoads(t, arm)
	checkLoads(t, amd)
	checkFat(t, amd, arm)
	if !bytes.Contains(arm, []byte(b.version)) {
		t.Error("the version isn't in it")
	}
	_, start, err := signature(arm)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []uint32{0x1000, start / 2, start - 1} {
		arm[at]++
		if err := checkSignature(arm); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("page %d ", at>>12)) {
			t.Errorf("byte %d changed: %v", at, err)
		}
		arm[at]--
	}
	t.Logf("%d pages of the arm64 executable verified", (start+4095)/4096)
}

// checkLoads looks at what a Mac needs besides: libraries that every release
// has, an id, and the oldest release that it runs on.
func checkLoads(t *testing.T, program []byte) {
	t.Helper()
	f, err := macho.NewFile(bytes.NewReader(program))
	if err != nil {
		t.Fatal(err)
	}
	libraries, err := f.ImportedLibraries()
	if err != nil || !slices.Contains(libraries, "/usr/lib/libSystem.B.dylib") {
		t.Errorf("%v: libraries %q, %v", f.Cpu, libraries, err)
	}
	for _, l := range libraries {
		if !strings.HasPrefix(l, "/usr/lib/") && !strings.HasPrefix(l, "/System/Library/Frameworks/") {
			t.Errorf("%v: needs %s, which no Mac comes with", f.Cpu, l)
		}
	}
	const uuid, buildVersion = 0x1b, 0x32 // LC_UUID, LC_BUILD_VERSION
	found := map[uint32]int{}
	for _, l := range f.Loads {
		raw := l.Raw()
		command := f.ByteOrder.Uint32(raw)
		found[command]++
		if command == buildVersion && (f.ByteOrder.Uint32(raw[8:]) != 1 || f.ByteOrder.Uint32(raw[12:])>>16 > 12) {
			t.Errorf("%v: for platform %d from release %#x", f.Cpu, f.ByteOrder.Uint32(raw[8:]), f.ByteOrder.Uint32(raw[12:]))
		}
	}
	if found[uuid] != 1 || found[buildVersion] != 1 {
		t.Errorf("%v: %d LC_UUID and %d LC_BUILD_VERSION", f.Cpu, found[uuid], found[buildVersion])
	}
}

func TestPack(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	in := []file{{"meshhelper", 0o755, []byte("program")}, {"LICENSE", 0o644, []byte("free")}}
	data, err := pack("x-1", in, at)
	if err != nil {
		t.Fatal(err)
	}
	other, err := pack("x-1", []file{in[1], in[0]}, at.Local())
	if err != nil || !bytes.Equal(data, other) {
		t.Errorf("the same files in another order and zone give another archive, %v", err)
	}
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil || !h.ModTime.Equal(at) || h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%+v, %v", h, err)
		}
		got = append(got, fmt.Sprintf("%o %s %s", h.Mode, h.Name, body))
	}
	sums := fmt.Sprintf("%x  LICENSE\n%x  meshhelper\n", sha256.Sum256([]byte("free")), sha256.Sum256([]byte("program")))
	want := []string{"644 x-1/LICENSE free", "755 x-1/meshhelper program", "644 x-1/SHA256SUMS " + sums}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestReleaseTime(t *testing.T) {
	for _, tt := range []struct{ epoch, commit, want string }{
		{"", "", "1970-01-01T00:00:00Z"},
		{"", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"},
		{"86400", "2026-01-02T03:04:05Z", "1970-01-02T00:00:00Z"},
		{"-1", "", ""}, {"x", "", ""}, {"", "yesterday", ""},
	} {
		got, err := releaseTime(tt.epoch, tt.commit)
		if (err == nil) != (tt.want != "") || err == nil && got.Format(time.RFC3339) != tt.want {
			t.Errorf("%q, %q: %v, %v", tt.epoch, tt.commit, got, err)
		}
	}
}

func TestCheckVersion(t *testing.T) {
	for v, ok := range map[string]bool{"v1.2.3": true, "devel-0123456789ab": true, "": false, "../x": false, ".x": false, "a b": false} {
		if err := checkVersion(v); (err == nil) != ok {
			t.Errorf("%q: %v", v, err)
		}
	}
}
