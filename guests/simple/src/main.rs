//! `simple`: every TestResource but `cluster` increases the nonce of `cluster` by one.
//!
//! Once per object, whatever happens: the prototype this follows counted every reconcile, so a
//! restart or a resync counted again. Here the count and the list of what was counted change in one
//! write: `cluster` carries the annotation `simple.amurant.io/counted` with the UIDs, and a write
//! that is based on an older `cluster` fails with a conflict and is tried again. An object that is
//! deleted leaves the list; one that is made again under its name has a new UID and counts again.
//!
//! Environment: `IN_NAMESPACE` (`default`), `HEAP_MEM_SIZE` (bytes of ballast).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::Store;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use testresource::{TestResource, ballast, stamped, variable};

const CLUSTER: &str = "cluster";
const COUNTED: &str = "simple.amurant.io/counted";

struct Context {
    api: Api<TestResource>,
    /// All objects of the namespace, to know which of the counted still exist.
    objects: Store<TestResource>,
}

async fn reconcile(object: Arc<TestResource>, context: Arc<Context>) -> Result<Action, kube::Error> {
    let (Some(uid), false) = (object.uid(), object.name_any() == CLUSTER) else {
        return Ok(Action::await_change());
    };
    let api = &context.api;
    let Some(mut cluster) = api.get_opt(CLUSTER).await? else {
        let metadata = ObjectMeta {
            name: Some(CLUSTER.into()),
            annotations: Some([(COUNTED.to_owned(), uid)].into()),
            ..ObjectMeta::default()
        };
        api.create(&PostParams::default(), &TestResource { metadata, spec: stamped(1) }).await?;
        println!("{}: cluster created with nonce 1", object.name_any());
        return Ok(Action::await_change());
    };
    let annotation = cluster.annotations().get(COUNTED).cloned().unwrap_or_default();
    let mut counted: BTreeSet<&str> = annotation.split(',').filter(|uid| !uid.is_empty()).collect();
    if counted.contains(uid.as_str()) {
        return Ok(Action::await_change());
    }
    let existing: BTreeSet<String> = context.objects.state().iter().filter_map(|o| o.uid()).collect();
    counted.retain(|uid| existing.contains(*uid));
    counted.insert(&uid);
    let counted = counted.into_iter().collect::<Vec<_>>().join(",");
    cluster.annotations_mut().insert(COUNTED.into(), counted);
    cluster.spec = stamped(cluster.spec.nonce + 1);
    api.replace(CLUSTER, &PostParams::default(), &cluster).await?;
    println!("{}: cluster raised to nonce {}", object.name_any(), cluster.spec.nonce);
    Ok(Action::await_change())
}

fn error_policy(object: Arc<TestResource>, error: &kube::Error, _: Arc<Context>) -> Action {
    println!("{}: {error}; trying again in 1 s", object.name_any());
    Action::requeue(Duration::from_secs(1))
}

#[tokio::main]
async fn main() -> Result<(), kube::Error> {
    let _ballast = ballast();
    let client = Client::try_default().await?;
    let api = Api::<TestResource>::namespaced(client, &variable("IN_NAMESPACE", "default"));
    let controller = Controller::new(api.clone(), watcher::Config::default()).shutdown_on_signal();
    let objects = controller.store();
    controller
        .run(reconcile, error_policy, Arc::new(Context { api, objects }))
        .for_each(|_| async {})
        .await;
    Ok(())
}
