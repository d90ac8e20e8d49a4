package macos

import (
	"log/slog"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
)

// Options say how a backend works.
type Options struct {
	// StateDir is the directory of the journal; it exists and only root writes
	// there.
	StateDir string // required
	// Label is the service's, and the last part of the anchor's path.
	Label string // optional; DefaultLabel
	// Runner runs pfctl, sysctl and ifconfig.
	Runner darwin.Runner // required
	// Kernel has the interfaces and the routing table.
	Kernel darwin.Kernel // required
	// CreateTUN makes a utun interface: "utun" for any free number.
	CreateTUN func(name string, mtu int) (tun.Device, error) // optional; wireguard-go's
	// Now is the time of day.
	Now func() time.Time // optional; time.Now
	// Log gets what the backend does; nil discards it.
	Log *slog.Logger // optional
	// Step is called before and after each enforcing step, with one of [Steps], and
	// after each command and routing message of it, so that tests can end the process
	// there.
	Step func(name string) // optional
}

// The enforcing steps, in the order in which Open and Enforce take them; Close
// goes back. A step that has nothing to change isn't taken.
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
	// What is only looked at, and so isn't among Steps.
	StepPorts  = "choose ports for peers' packets"
	StepStates = "look at the packet filter's states"

	StepCut = "cut flows"

	StepRestore         = "restore forwarding"
	StepRemoveInterface = "remove the mesh interface"
	StepFlush           = "flush the anchor"
	StepRelease         = "release the packet filter"
)

// Steps lists the enforcing steps from start to stop.
var Steps = []string{
	StepRepair, StepInterface, StepAddresses, StepRoutes, StepJournal, StepAnchor, StepTables, StepEnable, StepForwarding,
	StepCut, StepRestore, StepRemoveInterface, StepFlush, StepRelease,
}
