//! `comb`: many `ring` controllers in one module.
//!
//! Controller i copies from namespace `PREFIX{i}` to `PREFIX{i + 1}`, and the last one closes the
//! ring by copying to `PREFIX0`. (The last one of the prototype that this follows wrote into a
//! namespace that did not exist, every second, for ever.) Should a namespace be missing nevertheless,
//! the parent's log says so, and the next attempt is 30 s later.
//!
//! | environment | |
//! |---|---|
//! | `NR_OPERATORS` | how many controllers (1) |
//! | `NAMESPACE_PREFIX` | what their namespaces are called (`native-rust-comb`, as in the prototype) |
//! | `HEAP_MEM_SIZE` | bytes of ballast, for benchmarks (0) |

use std::error::Error;
use std::sync::Arc;

use futures::StreamExt;
use futures::future::join_all;
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

async fn run(client: Client, from: String, to: String) {
    let target = Api::namespaced(client.clone(), &to);
    Controller::new(
        Api::<TestResource>::namespaced(client, &from),
        watcher::Config::default(),
    )
    .shutdown_on_signal()
    .run(
        reconcile,
        error_policy,
        Arc::new(Context {
            target,
            target_namespace: to,
        }),
    )
    .for_each(|outcome| async {
        // What a reconcile failed with is in `error_policy`'s hands.
        if let Err(controller::Error::QueueError(error)) = outcome {
            eprintln!("watch: {error}");
        }
    })
    .await;
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let _ballast = ballast();
    let client = Client::try_default().await?;
    let prefix = variable("NAMESPACE_PREFIX", "native-rust-comb")?;
    let count: usize = variable("NR_OPERATORS", "1")?.parse()?;
    let namespace = |i| format!("{prefix}{}", i % count);
    join_all((0..count).map(|i| run(client.clone(), namespace(i), namespace(i + 1)))).await;
    Ok(())
}
