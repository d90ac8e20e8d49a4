package main

import (
	"bytes"
	"debug/macho"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// A universal executable (mach-o/fat.h) is a header in network byte order, one
// entry for each processor, and the executables at aligned offsets.
const (
	fatHeaderSize = 8
	fatArchSize   = 20
)

// alignments are the page sizes of the processors, as exponents of two: the kernel maps a
// slice in place.
var alignments = map[macho.Cpu]uint32{macho.CpuAmd64: 12, macho.CpuArm64: 14}

// fatArch is struct fat_arch.
type fatArch struct {
	CPU, SubCPU, Offset, Size, Align uint32
}

// join puts executables for different processors into one file. It changes none of their
// bytes, so their signatures stay valid.
func join(slices [][]byte) ([]byte, error) {
	archs, size, err := layOut(slices)
	if err != nil {
		return nil, fmt.Errorf("join executables: %w", err)
	}
	out := make([]byte, size)
	binary.BigEndian.PutUint32(out, macho.MagicFat)
	binary.BigEndian.PutUint32(out[4:], uint32(len(slices)))
	if _, err := binary.Encode(out[fatHeaderSize:], binary.BigEndian, archs); err != nil {
		return nil, fmt.Errorf("join executables: %w", err)
	}
	for i, a := range archs {
		copy(out[a.Offset:], slices[i])
	}
	return out, nil
}

// layOut returns the headers of the slices, with their offsets, and the file's size.
func layOut(slices [][]byte) ([]fatArch, uint64, error) {
	seen := map[macho.Cpu]bool{}
	end := uint64(fatHeaderSize + fatArchSize*len(slices))
	var archs []fatArch
	for _, s := range slices {
		f, err := macho.NewFile(bytes.NewReader(s))
		if err != nil {
			return nil, 0, err
		}
		align, known := alignments[f.Cpu]
		if !known || seen[f.Cpu] || f.Type != macho.TypeExec {
			return nil, 0, fmt.Errorf("a %v for %v: unknown, or listed twice", f.Type, f.Cpu)
		}
		seen[f.Cpu] = true
		start := (end + 1<<align - 1) &^ (1<<align - 1)
		if end = start + uint64(len(s)); end > math.MaxUint32 {
			return nil, 0, errors.New("more than 4 GiB")
		}
		archs = append(archs, fatArch{uint32(f.Cpu), f.SubCpu, uint32(start), uint32(len(s)), align})
	}
	return archs, end, nil
}
