// Added to Go operators by `wasm-operator build-go`. The name cannot be fetched by accident (RFC 2606).
module wasm-operator.invalid/support

go 1.24
