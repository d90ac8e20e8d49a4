package darwin

// Unexported identifiers for the tests in package darwin_test. Those tests can't be in
// package darwin, because the fakes that they use import it.
var (
	AppendRoute    = appendRoute
	CheckInterface = checkInterface
	KindOf         = kind
	IsNoise        = isNoise
	LeadsOut       = leadsOut
	Matters        = matters
	NewRoute       = newRoute
	Ours           = ours
	ParseRoute     = parseRoute
	ParseSockets   = parseSockets
)
