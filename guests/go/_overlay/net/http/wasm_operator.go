package http

// wasmOperatorRoundTrip answers what the parent operator serves; false leaves a request to the
// transport. The support package sets it.
var wasmOperatorRoundTrip func(*Request) (*Response, bool, error)
