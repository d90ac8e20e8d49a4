# Everything here needs only Go and make.

GO ?= go

.PHONY: build test vet

build:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/meshhelper ./cmd/meshhelper

test:
	$(GO) test ./...

vet:
	$(GO) vet ./...
	GOOS=darwin GOARCH=arm64 $(GO) vet ./...
	GOOS=darwin GOARCH=amd64 $(GO) vet ./...
	GOOS=windows GOARCH=amd64 $(GO) vet ./...
