package linux

// Names of the enforcing steps, as status and errors show them, in the order in which
// Open and Enforce take them. Close takes its own in reverse order of what they undo. A
// step that has nothing to change isn't taken.
const (
	StepLock       = "lock the host"
	StepRepair     = "repair what a killed helper left"
	StepClosed     = "load the closed table"
	StepInterface  = "make the mesh interface"
	StepAddresses  = "set the mesh addresses"
	StepAddRoutes  = "add the peers' routes"
	StepTable      = "load the table"
	StepDelRoutes  = "delete the routes of peers that are gone"
	StepJournal    = "write the journal"
	StepAcceptRA   = "keep the advertised default route"
	StepForwarding = "open forwarding"

	StepRestore         = "restore forwarding"
	StepRemoveInterface = "remove the mesh interface"
	StepRemoveTable     = "delete the table"

	StepCut = "cut flows"
)

// Steps lists all enforcing steps, from start to stop.
var Steps = []string{
	StepLock, StepRepair, StepClosed, StepInterface, StepAddresses, StepAddRoutes, StepTable,
	StepDelRoutes, StepJournal, StepAcceptRA, StepForwarding, StepCut,
	StepRestore, StepRemoveInterface, StepRemoveTable,
}
