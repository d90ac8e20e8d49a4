//go:build !unix

package wanted

import "errors"

func lockDir(string) (func() error, error) {
	return nil, errors.New("locking a state directory is not supported on this system")
}
