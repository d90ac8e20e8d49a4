# Everything here needs only Go and make.

GO ?= go

.PHONY: build test soak fuzz demo vet

build:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/meshhelper ./cmd/meshhelper

test:
	$(GO) test ./...
	@$(GO) test -count=1 -v -run '^TestVectors$$' ./pfconf/pfsim | grep '^pf vectors:'

# The long proofs: 200 kills, 30 s of toggles, a million packets of a hostile peer, and
# 10,000 meshes read back.
soak:
	$(GO) test ./internal/lab/trial -count=1 -v -timeout 120m -soak
	$(GO) test ./internal/host/macos -count=1 -v -run TestWhatIsHeldIsWhatWasWritten -timeout 60m -worlds 10000

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
	$(GO) test ./internal/host/macos -v -run TestDifferential -timeout 60m -packets 10000000

# The story with real packets, on hosts made of network namespaces: as root, or
# without root where user namespaces are allowed.
demo: build
	$(GO) run ./internal/lab/demo

# What runs on a Mac only is looked at and linked here, too.
vet:
	$(GO) vet ./...
	GOOS=darwin GOARCH=arm64 $(GO) vet -tags mactest ./...
	GOOS=darwin GOARCH=amd64 $(GO) vet -tags mactest ./...
	GOOS=darwin GOARCH=arm64 $(GO) test -tags mactest -c -o /dev/null $(MACTEST)
	GOOS=windows GOARCH=amd64 $(GO) vet ./...

# The archives of a release, for macOS and Linux, in dist/. VERSION names it.
VERSION ?=
.PHONY: dist
dist:
	$(GO) run ./scripts/dist -version "$(VERSION)"

# On a Mac, as root: what is assumed of macOS, tried, and the helper from install to
# uninstall. No helper may be installed. One package at a time, for they share the
# Mac. What the Mac printed is kept in MESHHELPER_ARTIFACTS, else in a new folder
# that is named.
MACTEST = ./darwin ./launchd ./internal/host/macos ./internal/lab/simmac ./internal/lab/mactest
.PHONY: test-mac
test-mac:
	$(GO) test -count=1 -v -p 1 -timeout 30m -tags mactest $(MACTEST)
