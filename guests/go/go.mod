// Added to Go operators by `wasm-operator build-go`. The name cannot be fetched by accident (RFC 2606).
module wasm-operator.invalid/support

// Old, so that the program's own language version need not be raised for it.
go 1.16
