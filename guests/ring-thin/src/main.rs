//! `ring` without kube-rs: the same work on the guest ABI alone (docs/abi.md).
//!
//! The parent lists and watches; this guest is told of each object, reads its counterpart and
//! writes it when the nonce is smaller there. What is under way is one small entry per operation.
//!
//! Environment: `IN_NAMESPACE` and `OUT_NAMESPACE` (both `default`).

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::json;
use wasm_operator_abi::{self as abi, Verb, event};

/// Pause after a failure, as in `ring`.
const RETRY_NANOSECONDS: u64 = 1_000_000_000;

/// What an open operation is for: which object, which nonce to bring there.
enum Pending {
    Watch,
    Get { name: String, nonce: i64 },
    Write { name: String, nonce: i64 },
}

#[derive(Default)]
struct Guest {
    source: String,
    target: String,
    pending: BTreeMap<u64, Pending>,
    /// Failed, to be tried again at the deadline.
    failed: Vec<(String, i64)>,
}

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::default();
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    #[serde(default, rename = "resourceVersion")]
    resource_version: String,
}

#[derive(Deserialize)]
struct Spec {
    nonce: i64,
}

#[derive(Deserialize)]
struct TestResource {
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
struct Item {
    object: Option<TestResource>,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Status {
    code: u16,
    #[serde(default)]
    message: String,
}

impl Guest {
    fn start(&mut self) {
        let variable = |name| std::env::var(name).unwrap_or_else(|_| "default".to_owned());
        self.source = variable("IN_NAMESPACE");
        self.target = variable("OUT_NAMESPACE");
        self.open(Verb::Watch, &self.descriptor(&self.source), Pending::Watch);
    }

    fn descriptor(&self, namespace: &str) -> serde_json::Value {
        json!({"group": "amurant.io", "version": "v1", "plural": "testresources", "namespace": namespace})
    }

    fn open(&mut self, verb: Verb, descriptor: &serde_json::Value, pending: Pending) {
        match abi::start(verb, descriptor.to_string().as_bytes()) {
            Ok(operation) => {
                self.pending.insert(operation, pending);
            }
            Err(refused) => {
                abi::log(2, &format!("{refused}"));
                self.again(pending);
            }
        }
    }

    fn again(&mut self, pending: Pending) {
        if let Pending::Get { name, nonce } | Pending::Write { name, nonce } = pending {
            self.failed.retain(|(other, _)| *other != name);
            self.failed.push((name, nonce));
        }
    }

    fn get(&mut self, name: String, nonce: i64) {
        let mut descriptor = self.descriptor(&self.target);
        descriptor["name"] = name.as_str().into();
        self.open(Verb::Get, &descriptor, Pending::Get { name, nonce });
    }

    /// Creates the counterpart, or replaces the version of it that was seen.
    fn write(&mut self, name: String, nonce: i64, seen: Option<&str>) {
        let mut descriptor = self.descriptor(&self.target);
        let mut metadata = json!({"name": name});
        if let Some(version) = seen {
            metadata["resourceVersion"] = version.into();
            descriptor["name"] = name.as_str().into();
        }
        descriptor["body"] = json!({
            "apiVersion": "amurant.io/v1", "kind": "TestResource", "metadata": metadata,
            "spec": {"nonce": nonce},
        });
        let verb = if seen.is_some() { Verb::Replace } else { Verb::Create };
        self.open(verb, &descriptor, Pending::Write { name, nonce });
    }

    fn item(&mut self, payload: &[u8]) {
        let Ok(Item { object: Some(object), kind }) = serde_json::from_slice(payload) else { return };
        if kind != "Delete" {
            self.get(object.metadata.name, object.spec.nonce);
        }
    }

    fn result(&mut self, operation: u64, payload: &[u8]) {
        match self.pending.remove(&operation) {
            Some(Pending::Get { name, nonce }) => {
                let Ok(target) = serde_json::from_slice::<TestResource>(payload) else { return };
                if target.spec.nonce < nonce {
                    self.write(name, nonce, Some(&target.metadata.resource_version));
                }
            }
            Some(Pending::Write { name, nonce }) => {
                abi::log(3, &format!("{}/{name}: nonce {nonce} to {}", self.source, self.target));
            }
            Some(Pending::Watch) | None => {}
        }
    }

    fn error(&mut self, operation: u64, payload: &[u8]) {
        let Some(pending) = self.pending.remove(&operation) else { return };
        let status = serde_json::from_slice(payload)
            .unwrap_or(Status { code: 0, message: "no status".to_owned() });
        match pending {
            Pending::Get { name, nonce } if status.code == 404 => self.write(name, nonce, None),
            Pending::Watch => abi::log(1, &status.message),
            pending => {
                abi::log(2, &format!("{}; trying again in 1 s", status.message));
                self.again(pending);
            }
        }
    }

    fn on_event(&mut self, operation: u64, kind: u32, payload: &[u8]) {
        match kind {
            event::START => self.start(),
            event::TIMER => {
                for (name, nonce) in std::mem::take(&mut self.failed) {
                    self.get(name, nonce);
                }
            }
            event::ITEM => self.item(payload),
            event::RESULT => self.result(operation, payload),
            event::ERROR => self.error(operation, payload),
            _ => {}
        }
        if !self.failed.is_empty() {
            abi::timer(RETRY_NANOSECONDS);
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn alloc(length: u32) -> *mut u8 {
    abi::allocate(length)
}

#[unsafe(no_mangle)]
extern "C" fn on_event(operation: u64, kind: u32, pointer: *mut u8, length: u32) {
    // SAFETY: the host passes what `alloc` returned, once (docs/abi.md).
    let payload = unsafe { abi::payload(pointer, length) };
    GUEST.with_borrow_mut(|guest| guest.on_event(operation, kind, &payload));
}

/// `_start` sets up the standard library and returns; the work begins with the `start` event.
fn main() {}
