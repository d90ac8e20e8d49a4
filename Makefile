# Everything here needs only Go and make.

GO ?= go

.PHONY: build test soak fuzz demo vet

build:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/meshhelper ./cmd/meshhelper

test:
	$(GO) test ./...
	@$(GO) test -count=1 -v -run '^TestVectors$$' ./pfconf | grep '^pf vectors:'

# The long proofs: 200 kills, 30 s of toggles, a million packets of a hostile peer,
# and a simulated Mac that is killed after each command.
soak:
	$(GO) test ./internal/netlab/trial -count=1 -v -timeout 120m -soak
	$(GO) test ./internal/macos -count=1 -v -run Kill -timeout 60m -everykill

# Every fuzz target for FUZZTIME, and ten million packets through pf as a Mac has
# it, and the policy.
FUZZTIME ?= 30s
fuzz:
	set -e; for dir in $$($(GO) list -f '{{.Dir}}' ./...); do \
		for target in $$(grep -hos '^func Fuzz[A-Za-z0-9]*' $$dir/*_test.go | cut -c6-); do \
			echo "$$dir $$target"; \
			$(GO) test $$dir -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME); \
		done; \
	done
	$(GO) test ./internal/macos -v -run TestDifferential -timeout 60m -packets 10000000

# The story with real packets, on hosts made of network namespaces: as root, or
# without root where user namespaces are allowed.
demo: build
	$(GO) run ./internal/netlab/demo

vet:
	$(GO) vet ./...
	GOOS=darwin GOARCH=arm64 $(GO) vet ./...
	GOOS=darwin GOARCH=amd64 $(GO) vet ./...
	GOOS=windows GOARCH=amd64 $(GO) vet ./...

# The archives of a release, for macOS and Linux, in dist/. VERSION names it.
VERSION ?=
.PHONY: dist
dist:
	$(GO) run ./scripts/dist -version "$(VERSION)"

# On a Mac, as root: what is assumed of macOS, tried. The helper must not run.
.PHONY: test-mac
test-mac:
	$(GO) test -count=1 -v -tags mactest ./darwin ./launchd ./internal/netlab/simmac
