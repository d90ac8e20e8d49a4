package main

import (
	"bytes"
	"crypto/sha256"
	"debug/macho"
	"encoding/binary"
	"errors"
	"fmt"
)

// From xnu's osfmk/kern/cs_blobs.h and mach-o/loader.h.
const (
	loadCodeSignature = 0x1d       // LC_CODE_SIGNATURE
	magicSuperBlob    = 0xfade0cc0 // CSMAGIC_EMBEDDED_SIGNATURE
	magicDirectory    = 0xfade0c02 // CSMAGIC_CODEDIRECTORY
	slotDirectory     = 0          // CSSLOT_CODEDIRECTORY
	flagAdHoc         = 0x2        // CS_ADHOC
	hashSHA256        = 2          // CS_HASHTYPE_SHA256
	maxSlots          = 16         // of a signature; Go's linker writes one
)

// directory is the part of struct __CodeDirectory that every version has.
type directory struct {
	Magic, Length, Version, Flags       uint32
	HashOffset, IdentOffset             uint32
	SpecialSlots, CodeSlots, CodeLimit  uint32
	HashSize, HashType, Platform, PageX uint8 // PageX: 2^PageX bytes a page
	Spare                               uint32
}

// checkSignature returns an error unless the Mach-O is signed ad hoc and each of
// its pages has the hash that its code directory says, as the kernel will check
// it: otherwise an arm64 Mac kills the program when it touches the page.
func checkSignature(program []byte) error {
	blob, start, err := signature(program)
	if err != nil {
		return err
	}
	data, err := directoryOf(blob)
	if err != nil {
		return err
	}
	var d directory
	if _, err := binary.Decode(data, binary.BigEndian, &d); err != nil {
		return fmt.Errorf("read the code directory: %w", err)
	}
	switch {
	case d.Magic != magicDirectory || uint64(d.Length) > uint64(len(data)):
		return fmt.Errorf("code directory with magic %#x and length %d", d.Magic, d.Length)
	case d.Flags&flagAdHoc == 0:
		return fmt.Errorf("flags %#x: not signed ad hoc", d.Flags)
	case d.HashType != hashSHA256 || d.HashSize != sha256.Size:
		return fmt.Errorf("hash type %d of %d bytes, want SHA-256", d.HashType, d.HashSize)
	case d.CodeLimit != start:
		return fmt.Errorf("%d bytes are signed, the signature begins at %d", d.CodeLimit, start)
	case d.PageX != 12 && d.PageX != 14:
		return fmt.Errorf("pages of 2^%d bytes", d.PageX)
	}
	return checkPages(program[:start], data[:d.Length], d)
}

// signature returns the signature of a Mach-O, which its load command locates at the end of
// the file, and its offset.
func signature(program []byte) ([]byte, uint32, error) {
	f, err := macho.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, 0, err
	}
	var start, size uint32
	found := 0
	for _, l := range f.Loads {
		if raw := l.Raw(); f.ByteOrder.Uint32(raw) == loadCodeSignature && len(raw) == 16 {
			start, size = f.ByteOrder.Uint32(raw[8:]), f.ByteOrder.Uint32(raw[12:])
			found++
		}
	}
	if found != 1 {
		return nil, 0, fmt.Errorf("%d load commands LC_CODE_SIGNATURE, want 1", found)
	}
	if uint64(start)+uint64(size) != uint64(len(program)) {
		return nil, 0, fmt.Errorf("the signature ends at %d, the file at %d", uint64(start)+uint64(size), len(program))
	}
	return program[start:], start, nil
}

// directoryOf returns the code directory of a signature and what follows it.
func directoryOf(blob []byte) ([]byte, error) {
	var head struct{ Magic, Length, Count uint32 }
	n, err := binary.Decode(blob, binary.BigEndian, &head)
	if err != nil {
		return nil, fmt.Errorf("read the signature: %w", err)
	}
	if head.Magic != magicSuperBlob || uint64(head.Length) > uint64(len(blob)) || head.Count > maxSlots {
		return nil, fmt.Errorf("signature with magic %#x, length %d and %d slots", head.Magic, head.Length, head.Count)
	}
	slots := make([]struct{ Type, Offset uint32 }, head.Count)
	if _, err := binary.Decode(blob[n:head.Length], binary.BigEndian, slots); err != nil {
		return nil, fmt.Errorf("read the signature's slots: %w", err)
	}
	for _, s := range slots {
		if s.Type == slotDirectory && s.Offset <= head.Length {
			return blob[s.Offset:head.Length], nil
		}
	}
	return nil, errors.New("the signature has no code directory")
}

// checkPages compares the hash of each page.
func checkPages(code, data []byte, d directory) error {
	page := 1 << d.PageX
	if want := (len(code) + page - 1) / page; int64(d.CodeSlots) != int64(want) {
		return fmt.Errorf("%d pages are signed of %d", d.CodeSlots, want)
	}
	end := uint64(d.HashOffset) + uint64(d.CodeSlots)*sha256.Size
	if end > uint64(len(data)) {
		return fmt.Errorf("hashes up to %d in a code directory of %d bytes", end, len(data))
	}
	hashes := data[d.HashOffset:end]
	for i := range int(d.CodeSlots) {
		got := sha256.Sum256(code[i*page : min((i+1)*page, len(code))])
		if !bytes.Equal(got[:], hashes[i*sha256.Size:(i+1)*sha256.Size]) {
			return fmt.Errorf("page %d doesn't have the hash in its signature", i)
		}
	}
	return nil
}
