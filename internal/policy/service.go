package policy

import "github.com/meshhelper/meshhelper/internal/mesh"

// Service is something that the helper itself serves on the host's mesh addresses. A peer
// with incoming reaches it like everything else of the host; what sets a service apart is
// that other permissions reach it, too, and nothing else of the host.
type Service struct {
	// Set holds the service and no other.
	Set Services
	// Name is what the rules of the packet filters call it: at most 8 letters.
	Name string
	// What names it to people, as in "peers that may reach …".
	What string
	// Needs are the permissions that reach it without incoming; none: every peer does.
	Needs mesh.Permissions
	// Protos are the protocols that it is served by, ProtoTCP and ProtoUDP.
	Protos []uint8
	// Port is its port, the same for all protocols.
	Port uint16
	// Rule is the line of the policy that lets a packet to it pass.
	Rule Rule
}

// Services is a set of services.
type Services uint8

// The services, each as the set that holds it alone, in the order of [AllServices].
const (
	// DNS is the mesh's name service (RFC 1035 4.2).
	DNS Services = 1 << iota
)

// AllServices is the table of services. The policy and the packet filters take theirs from
// here; none is open before [Mesh].Serves has it.
var AllServices = [...]Service{
	{Set: DNS, Name: "dns", What: "this host's DNS", Needs: mesh.Routing, Protos: []uint8{ProtoTCP, ProtoUDP}, Port: 53, Rule: RuleDNS},
}

// EveryService is the set of all services.
const EveryService = Services(1<<len(AllServices) - 1)

// Has reports whether all of q is in the set.
func (s Services) Has(q Services) bool { return s&q == q }

// List returns the services in the set, in the order of [AllServices].
func (s Services) List() []Service {
	var out []Service
	for _, one := range AllServices {
		if s.Has(one.Set) {
			out = append(out, one)
		}
	}
	return out
}

// ServiceBy returns the service that a line of the policy lets packets pass to.
func ServiceBy(rule Rule) (Service, bool) {
	for _, s := range AllServices {
		if s.Rule == rule {
			return s, true
		}
	}
	return Service{}, false
}

// takes reports whether a packet to the host's mesh address is for the service.
func (s *Service) takes(p *Packet) bool {
	if p.DstPort != s.Port {
		return false
	}
	for _, proto := range s.Protos {
		if p.Proto == proto {
			return true
		}
	}
	return false
}
