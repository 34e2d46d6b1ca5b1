module wasm-operator.invalid/go-thin

go 1.24
