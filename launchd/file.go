package launchd

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
)

// Chain describes program and each directory above it, for CheckProgram.
func Chain(program string) ([]File, error) {
	if bad := absolute("program", program); bad != "" {
		return nil, fmt.Errorf("look at program: %s", bad)
	}
	var chain []File
	for p := program; ; p = path.Dir(p) {
		f, err := Lstat(p)
		if err != nil {
			return nil, err
		}
		chain = append(chain, f)
		if p == "/" {
			return chain, nil
		}
	}
}

// Write renders the job to file, which must be named after its label, as 0644
// whatever the umask is (an installer's umask of 0 made launchd refuse others'
// files), and as root:wheel when root does it. The file appears whole or not at
// all, and is on disk when Write returns.
func (j *Job) Write(file string) error {
	data, err := j.Render()
	if err != nil {
		return err
	}
	if filepath.Base(file) != j.Label+".plist" {
		return fmt.Errorf("write property list: %q must be named %q after its label", file, j.Label+".plist")
	}
	if err := writeFile(file, data); err != nil {
		return fmt.Errorf("write property list: %w", err)
	}
	return nil
}

// writeFile replaces file by a rename. The temporary name ends differently, so
// that launchd doesn't load it at a boot in between.
func writeFile(file string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), ".new-*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		if err := f.Chown(0, 0); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	return syncDir(filepath.Dir(file))
}

// syncDir makes a rename in dir last through a power failure.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
