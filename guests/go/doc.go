// Package support makes an unmodified Go program a child operator of wasm-operator.
//
// `wasm-operator build-go` adds a blank import of it to the program's package main. It
//
//   - runs main.main in a goroutine at the first event, and returns to the parent whenever every
//     goroutine waits (start_wasip1.go),
//   - hands requests of every [net/http.Transport] that go to the API server to the parent, which
//     has the credentials and the connections (transport.go, operation.go),
//   - makes the parent's request to stop a SIGTERM.
//
// The functions between guest and parent are those of docs/abi.md (host_wasip1.go). What stands in
// files without a build tag knows nothing of WebAssembly, so that `go test` runs anywhere.
package support
