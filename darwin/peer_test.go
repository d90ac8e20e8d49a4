package darwin

import (
	"errors"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"testing"
)

func TestIsMember(t *testing.T) {
	groups := func(uid string) ([]string, error) {
		switch uid {
		case "501":
			return []string{"20", "80"}, nil
		case "502":
			return []string{"20", "8", "800"}, nil
		case "503":
			return nil, user.UnknownUserIdError(503)
		}
		return nil, errors.New("no directory")
	}
	for uid, want := range map[uint32]bool{501: true, 502: false, 503: false} {
		if got, err := isMember(uid, AdminGID, groups); err != nil || got != want {
			t.Errorf("user %d is an admin: %v, %v", uid, got, err)
		}
	}
	if got, err := isMember(504, AdminGID, groups); err == nil || got {
		t.Errorf("without a directory: %v, %v", got, err)
	}
}

func TestIsMemberOfThisUser(t *testing.T) {
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("user %s, group %s", u.Uid, u.Gid)
	if ok, err := IsMember(uint32(os.Getuid()), uint32(os.Getgid())); err != nil || !ok {
		t.Errorf("this user in its own group: %v, %v", ok, err)
	}
	if ok, err := IsMember(uint32(os.Getuid()), 4000000000); err != nil || ok {
		t.Errorf("this user in a group without members: %v, %v", ok, err)
	}
}

func TestPeerOf(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p, err := PeerOf(s.(*net.UnixConn))
	if runtime.GOOS != "darwin" {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("got %+v, %v where there is no LOCAL_PEERCRED", p, err)
		}
		return
	}
	if err != nil || p.UID != uint32(os.Getuid()) || p.GID != uint32(os.Getgid()) {
		t.Errorf("peer %+v, %v", p, err)
	}
}
