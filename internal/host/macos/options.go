package macos

import (
	"log/slog"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
)

// Options configures a [Backend].
type Options struct {
	// StateDir is the directory of the journal and of the file of cuts. It exists, and
	// only root can write to it.
	StateDir string // required
	// Label is the service's, and the last component of the anchor's path.
	Label string // optional; DefaultLabel
	// Runner runs pfctl, sysctl and ifconfig.
	Runner darwin.Runner // required
	// Kernel reads interfaces, routes, sockets and sysctls, and opens routing sockets.
	Kernel darwin.Kernel // required
	// CreateTUN makes a utun interface: "utun" for any free number.
	CreateTUN func(name string, mtu int) (tun.Device, error) // optional; wireguard-go's
	// Now returns the current time.
	Now func() time.Time // optional; time.Now
	// Log receives warnings; nil discards them.
	Log *slog.Logger // optional
	// Step is called with one of [Steps] before and after each enforcing step, so that
	// tests can kill the process there.
	Step func(name string) // optional
}

// The enforcing steps, in the order in which Open and Enforce run them; Close undoes
// them in reverse. A step that has nothing to change doesn't run. Users see the names
// in errors and problems.
const (
	StepRepair     = "repair what a killed helper left"
	StepInterface  = "make the mesh interface"
	StepAddresses  = "set the mesh addresses"
	StepRoutes     = "set the peers' routes"
	StepJournal    = "write the journal"
	StepAnchor     = "load the anchor"
	StepTables     = "change the anchor's tables"
	StepEnable     = "enable the packet filter"
	StepForwarding = "open forwarding"
	// These two only read, so they aren't among Steps; problems refer to them.
	StepPorts  = "choose ports for peers' packets"
	StepStates = "look at the packet filter's states"

	StepCut = "cut flows"

	StepRestore         = "restore forwarding"
	StepRemoveInterface = "remove the mesh interface"
	StepFlush           = "flush the anchor"
	StepRelease         = "release the packet filter"
)

// Steps lists the enforcing steps, from start to stop.
var Steps = []string{
	StepRepair, StepInterface, StepAddresses, StepRoutes, StepJournal, StepAnchor, StepTables, StepEnable, StepForwarding,
	StepCut, StepRestore, StepRemoveInterface, StepFlush, StepRelease,
}
