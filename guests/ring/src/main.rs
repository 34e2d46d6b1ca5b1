//! `ring`: copies the nonce of every TestResource from one namespace to the next.
//!
//! N of them, each from namespace i to i + 1 and the last back to the first, make a ring around
//! which a nonce travels once: a copy only ever raises it.
//!
//! Environment: `IN_NAMESPACE` and `OUT_NAMESPACE` (both `default`), `HEAP_MEM_SIZE` (bytes of
//! ballast). `COMPILE_NONCE`, when it is set at build time, makes the module unlike all others.
//!
//! This is an ordinary kube-rs program; `cargo run` makes a native operator of the same source.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use testresource::{Copied, TestResource, ballast, copy, variable};

struct Context {
    target: Api<TestResource>,
    target_namespace: String,
}

async fn reconcile(object: Arc<TestResource>, context: Arc<Context>) -> Result<Action, kube::Error> {
    let outcome = copy(&object, &context.target).await?;
    if outcome != Copied::Nothing {
        let from = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
        println!("{from}: nonce {} to {} ({outcome:?})", object.spec.nonce, context.target_namespace);
    }
    Ok(Action::await_change())
}

fn error_policy(object: Arc<TestResource>, error: &kube::Error, _: Arc<Context>) -> Action {
    println!("{}: {error}; trying again in 1 s", object.name_any());
    Action::requeue(Duration::from_secs(1))
}

#[tokio::main]
async fn main() -> Result<(), kube::Error> {
    let _ballast = ballast();
    let _unique = option_env!("COMPILE_NONCE").map(std::hint::black_box);
    let client = Client::try_default().await?;
    let source = Api::<TestResource>::namespaced(client.clone(), &variable("IN_NAMESPACE", "default"));
    let target_namespace = variable("OUT_NAMESPACE", "default");
    let target = Api::namespaced(client, &target_namespace);
    Controller::new(source, watcher::Config::default())
        .shutdown_on_signal()
        .run(reconcile, error_policy, Arc::new(Context { target, target_namespace }))
        .for_each(|_| async {})
        .await;
    Ok(())
}
