# Everything here needs only Go and make.

GO ?= go

.PHONY: build test fuzz demo vet

build:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/meshhelper ./cmd/meshhelper

test:
	$(GO) test ./...
	@$(GO) test -count=1 -v -run '^TestVectors$$' ./pfconf | grep '^pf vectors:'

# Ten million packets through pf as a Mac has it, and the policy.
fuzz:
	$(GO) test ./internal/macos -v -run TestDifferential -timeout 60m -packets 10000000 | grep -v '^ *=== '

# The story with real packets, on hosts made of network namespaces: as root, or
# without root where user namespaces are allowed.
demo: build
	$(GO) run ./internal/netlab/demo

vet:
	$(GO) vet ./...
	GOOS=darwin GOARCH=arm64 $(GO) vet ./...
	GOOS=darwin GOARCH=amd64 $(GO) vet ./...
	GOOS=windows GOARCH=amd64 $(GO) vet ./...

# On a Mac, as root: what is assumed of macOS, tried. The helper must not run.
.PHONY: test-mac
test-mac:
	$(GO) test -count=1 -v -tags mactest ./darwin ./launchd ./internal/netlab/simmac
