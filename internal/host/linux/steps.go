package linux

// The enforcing steps, in the order in which Open and Enforce take them; Close
// goes back. A step that has nothing to change isn't taken.
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

// Steps lists the enforcing steps from start to stop.
var Steps = []string{
	StepLock, StepRepair, StepClosed, StepInterface, StepAddresses, StepAddRoutes, StepTable,
	StepDelRoutes, StepJournal, StepAcceptRA, StepForwarding, StepCut,
	StepRestore, StepRemoveInterface, StepRemoveTable,
}
