//! `ring`: copies the nonce of every TestResource from one namespace to the next.
//!
//! Several of them, each from namespace i to i + 1 and the last one back to the first, make a ring
//! round which a nonce travels once: a copy only ever raises it.
//!
//! | environment | |
//! |---|---|
//! | `IN_NAMESPACE` | where from (`default`) |
//! | `OUT_NAMESPACE` | where to (`default`) |
//! | `HEAP_MEM_SIZE` | bytes of ballast, for benchmarks (0) |
//!
//! This is an ordinary kube-rs program.

use std::error::Error;
use std::sync::Arc;

use futures::StreamExt;
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use testresource::{TestResource, ballast, copy, pause, variable};

struct Context {
    target: Api<TestResource>,
    target_namespace: String,
}

async fn reconcile(
    object: Arc<TestResource>,
    context: Arc<Context>,
) -> Result<Action, kube::Error> {
    if copy(&object, &context.target).await? {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        println!(
            "{namespace}/{name}: nonce {} -> {}",
            object.spec.nonce, context.target_namespace
        );
    }
    Ok(Action::await_change())
}

fn error_policy(object: Arc<TestResource>, error: &kube::Error, context: Arc<Context>) -> Action {
    let pause = pause(error);
    let (name, target) = (object.name_any(), &context.target_namespace);
    eprintln!("{name} -> {target}: {error}; trying again in {pause:?}");
    Action::requeue(pause)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let _ballast = ballast();
    let client = Client::try_default().await?;
    let source =
        Api::<TestResource>::namespaced(client.clone(), &variable("IN_NAMESPACE", "default")?);
    let target_namespace = variable("OUT_NAMESPACE", "default")?;
    let target = Api::namespaced(client, &target_namespace);
    Controller::new(source, watcher::Config::default())
        .shutdown_on_signal()
        .run(
            reconcile,
            error_policy,
            Arc::new(Context {
                target,
                target_namespace,
            }),
        )
        .for_each(|outcome| async {
            // What a reconcile failed with is in `error_policy`'s hands.
            if let Err(controller::Error::QueueError(error)) = outcome {
                eprintln!("watch: {error}");
            }
        })
        .await;
    Ok(())
}
