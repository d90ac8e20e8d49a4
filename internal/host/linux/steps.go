package linux

// Names of the enforcing steps, as status and errors show them, in the order in which
// Open and Enforce take them. A step that has nothing to change isn't taken.
const (
	// Open: there is one helper per network namespace.
	StepLock = "lock the host"
	// Restores the forwarding in the journal. A killed helper's table stays for now.
	StepRepair = "repair what a killed helper left"
	// From here on nothing to the mesh prefixes leaves the host.
	StepClosed = "load the closed table"
	// The interface is up only after the closed table holds for its name.
	StepInterface = "make the mesh interface"

	// Enforce.
	StepAddresses = "set the mesh addresses"
	// Routes come before the table and go after it: without its route a peer's address
	// would be reached by the uplink, and only the table would keep the packet in.
	StepAddRoutes = "add the peers' routes"
	StepTable     = "load the table"
	StepDelRoutes = "delete the routes of peers that are gone"
	// The journal is on disk before the first sysctl changes.
	StepJournal = "write the journal"
	// accept_ra comes before forwarding, with which the kernel would drop the route.
	StepAcceptRA = "keep the advertised default route"
	// Forwarding comes last, when filter and NAT hold.
	StepForwarding = "open forwarding"

	// Close: in reverse, with the table last.
	StepRestore         = "restore forwarding"
	StepRemoveInterface = "remove the mesh interface"
	StepRemoveTable     = "delete the table"

	// Cut, which changes conntrack and elements of the cut sets.
	StepCut = "cut flows"
)
