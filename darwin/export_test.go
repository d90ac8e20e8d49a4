package darwin

// What tests outside the package try by itself: they can't be inside it, as the
// fakes import it.
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
