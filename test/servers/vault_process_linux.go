package servers

import "syscall"

// dieWithParent also moves the child out of this process group, so that ^C at
// a terminal ends it through Stop and not at once.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}
