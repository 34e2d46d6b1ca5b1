//! `comb`: many `ring` controllers in one module.
//!
//! Controller i of `NR_OPERATORS` copies from namespace `PREFIX{i}` to `PREFIX{i + 1}`. The last one
//! closes the ring, to `PREFIX0`: the prototype's wrote into a namespace that did not exist, once a
//! second, for ever. Where a namespace is missing, or an object is on its way out, the pause between
//! attempts doubles up to five minutes.
//!
//! Environment: `NR_OPERATORS` (1), `NAMESPACE_PREFIX` (`native-rust-comb`, the prototype's),
//! `HEAP_MEM_SIZE` (bytes of ballast).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use testresource::{Copied, TestResource, ballast, copy, variable};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

struct Context {
    target: Api<TestResource>,
    target_namespace: String,
    /// The last pause of each object that failed.
    pauses: Mutex<HashMap<String, Duration>>,
}

impl Context {
    fn pauses(&self) -> std::sync::MutexGuard<'_, HashMap<String, Duration>> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn reconcile(object: Arc<TestResource>, context: Arc<Context>) -> Result<Action, kube::Error> {
    let outcome = copy(&object, &context.target).await?;
    context.pauses().remove(&object.name_any());
    if outcome != Copied::Nothing {
        let from = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
        println!("{from}: nonce {} to {} ({outcome:?})", object.spec.nonce, context.target_namespace);
    }
    Ok(Action::await_change())
}

fn error_policy(object: Arc<TestResource>, error: &kube::Error, context: Arc<Context>) -> Action {
    let name = object.name_any();
    let mut pauses = context.pauses();
    let pause = pauses.get(&name).map_or(FIRST_PAUSE, |last| (*last * 2).min(LONGEST_PAUSE));
    pauses.insert(name.clone(), pause);
    println!("{name} to {}: {error}; trying again in {pause:?}", context.target_namespace);
    Action::requeue(pause)
}

#[tokio::main]
async fn main() -> Result<(), kube::Error> {
    let _ballast = ballast();
    let client = Client::try_default().await?;
    let prefix = variable("NAMESPACE_PREFIX", "native-rust-comb");
    let count: usize = variable("NR_OPERATORS", "1").parse().unwrap_or(1);
    let controllers: FuturesUnordered<_> = (0..count)
        .map(|i| {
            let source = Api::<TestResource>::namespaced(client.clone(), &format!("{prefix}{i}"));
            let target_namespace = format!("{prefix}{}", (i + 1) % count);
            let context = Context {
                target: Api::namespaced(client.clone(), &target_namespace),
                target_namespace,
                pauses: Mutex::default(),
            };
            Controller::new(source, watcher::Config::default())
                .shutdown_on_signal()
                .run(reconcile, error_policy, Arc::new(context))
                .for_each(|_| async {})
        })
        .collect();
    controllers.collect::<()>().await;
    Ok(())
}
