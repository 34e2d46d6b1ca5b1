//go:build wasip1

// Command go-thin does the work of go-ring on the host functions alone (docs/abi.md): no goroutines,
// no net/http, no client-go. The parent lists, watches, reads and writes for it.
//
//	GOOS=wasip1 GOARCH=wasm go build -buildmode=c-shared
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"time"
	"unsafe"
)

// Kinds of events.
const (
	start  = 1
	stop   = 2
	timer  = 3
	result = 4
	item   = 5
	failed = 9
)

const pause = time.Second

//go:wasmimport kube_v1 watch
func kubeWatch(descriptor unsafe.Pointer, length uint32) int64

//go:wasmimport kube_v1 get
func kubeGet(descriptor unsafe.Pointer, length uint32) int64

//go:wasmimport kube_v1 create
func kubeCreate(descriptor unsafe.Pointer, length uint32) int64

//go:wasmimport kube_v1 replace
func kubeReplace(descriptor unsafe.Pointer, length uint32) int64

//go:wasmimport host_v1 timer
func hostTimer(nanoseconds uint64) int32

// descriptor names a collection or an object, and what to do with it.
type descriptor struct {
	Group     string  `json:"group"`
	Version   string  `json:"version"`
	Plural    string  `json:"plural"`
	Namespace string  `json:"namespace"`
	Name      string  `json:"name,omitempty"`
	Body      *object `json:"body,omitempty"`
}

// object is a TestResource.
type object struct {
	APIVersion string         `json:"apiVersion"`
	Kind       string         `json:"kind"`
	Metadata   map[string]any `json:"metadata"`
	Spec       spec           `json:"spec"`
}

type spec struct {
	Nonce     int64  `json:"nonce"`
	UpdatedAt string `json:"updated_at,omitempty"`
}

func (o *object) name() string {
	name, _ := o.Metadata["name"].(string)
	return name
}

type status struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

var (
	source = variable("IN_NAMESPACE")
	target = variable("OUT_NAMESPACE")
	// waiting has what goes on when an operation is answered.
	waiting = map[int64]func(kind uint32, payload []byte){}
	// wanted is the nonce of each object that is to be copied; busy are those being copied now.
	wanted, busy = map[string]int64{}, map[string]bool{}
	// later are objects whose copy has failed.
	later   = map[string]bool{}
	buffers = map[uintptr][]byte{}
)

func variable(name string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return "default"
}

// call starts an operation; next gets its answers.
func call(function func(unsafe.Pointer, uint32) int64, d descriptor, next func(kind uint32, payload []byte)) {
	d.Group, d.Version, d.Plural = "amurant.io", "v1", "testresources"
	text, err := json.Marshal(d)
	if err != nil {
		panic(err)
	}
	number := function(unsafe.Pointer(unsafe.SliceData(text)), uint32(len(text)))
	if number < 1 {
		// Too many operations, say. Whoever asked deals with it as with any failure.
		next(failed, fmt.Appendf(nil, `{"message":"the parent refuses it: %d"}`, number))
		return
	}
	waiting[number] = next
}

func watch() {
	call(kubeWatch, descriptor{Namespace: source}, func(kind uint32, payload []byte) {
		if kind != item {
			panic(fmt.Sprintf("the watch has ended: %s", payload))
		}
		var step struct {
			Type   string  `json:"type"`
			Object *object `json:"object"`
		}
		if err := json.Unmarshal(payload, &step); err != nil {
			fmt.Fprintln(os.Stderr, "watch:", err)
			return
		}
		switch step.Type {
		case "InitApply", "Apply":
			wanted[step.Object.name()] = step.Object.Spec.Nonce
			copyNonce(step.Object.name())
		case "Delete":
			delete(wanted, step.Object.name())
		}
	})
}

// copyNonce brings an object's nonce to the target, one copy of each name at a time.
func copyNonce(name string) {
	nonce, ok := wanted[name]
	if !ok || busy[name] {
		return
	}
	busy[name] = true
	call(kubeGet, descriptor{Namespace: target, Name: name}, func(kind uint32, payload []byte) {
		var found object
		switch {
		case kind == failed && code(payload) == 404:
			fresh := &object{APIVersion: "amurant.io/v1", Kind: "TestResource", Metadata: map[string]any{"name": name}, Spec: now(nonce)}
			call(kubeCreate, descriptor{Namespace: target, Body: fresh}, written(name, nonce))
		case kind == failed:
			again(name, payload)
		case json.Unmarshal(payload, &found) != nil:
			again(name, payload)
		case found.Spec.Nonce >= nonce:
			finish(name, nonce)
		default:
			found.Spec = now(nonce)
			call(kubeReplace, descriptor{Namespace: target, Name: name, Body: &found}, written(name, nonce))
		}
	})
}

func now(nonce int64) spec {
	return spec{nonce, time.Now().UTC().Format(time.RFC3339Nano)}
}

func written(name string, nonce int64) func(uint32, []byte) {
	return func(kind uint32, payload []byte) {
		if kind == failed {
			again(name, payload)
			return
		}
		fmt.Printf("%s/%s: nonce %d -> %s\n", source, name, nonce, target)
		finish(name, nonce)
	}
}

// finish ends a copy, and begins another if the source has changed meanwhile.
func finish(name string, nonce int64) {
	delete(busy, name)
	if wanted[name] != nonce {
		copyNonce(name)
	}
}

func again(name string, payload []byte) {
	var answer status
	_ = json.Unmarshal(payload, &answer)
	fmt.Fprintf(os.Stderr, "%s -> %s: %s; trying again in %v\n", name, target, answer.Message, pause)
	delete(busy, name)
	later[name] = true
}

func code(payload []byte) int {
	var answer status
	_ = json.Unmarshal(payload, &answer)
	return answer.Code
}

//go:wasmexport alloc
func alloc(length uint32) unsafe.Pointer {
	buffer := make([]byte, length)
	pointer := unsafe.Pointer(unsafe.SliceData(buffer))
	buffers[uintptr(pointer)] = buffer
	return pointer
}

//go:wasmexport on_event
func onEvent(operation int64, kind, pointer, length uint32) {
	payload := buffers[uintptr(pointer)]
	delete(buffers, uintptr(pointer))
	switch kind {
	case start:
		watch()
	case stop:
		os.Exit(0)
	case timer:
		names := later
		later = map[string]bool{}
		for name := range names {
			copyNonce(name)
		}
	default:
		next := waiting[operation]
		if kind != item {
			delete(waiting, operation)
		}
		if next != nil {
			next(kind, payload)
		}
	}
	// Every event drops the deadline.
	if len(later) > 0 {
		hostTimer(uint64(pause))
	}
}

func main() {}
