//! `simple`: every change of a TestResource but `cluster` increases the nonce of `cluster` by one.
//!
//! Every change counts once, whatever happens. The prototype that this follows counted every event
//! it saw, so a restart, a resync or a second reconcile counted again. Here the nonce of `cluster`
//! and a record of what it contains are one object, written in one request: the annotation
//! `simple.amurant.io/counted` says of each object, by its UID, up to which generation it was
//! counted. (The API server increases an object's generation with every change of its spec, starting
//! from 1.) So a reconcile adds the generations that are new, even those that went by while
//! this program was not running, and adds nothing when it comes again. The write is based on the
//! `cluster` that was read: if another has written meanwhile, it is refused as a conflict, and the
//! reconcile starts over. What was deleted leaves the record and keeps its part in the nonce.
//!
//! | environment | |
//! |---|---|
//! | `IN_NAMESPACE` | the namespace (`default`) |
//! | `HEAP_MEM_SIZE` | bytes of ballast, for benchmarks (0) |

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::reflector::Store;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use testresource::{TestResource, TestResourceSpec, ballast, variable};

const CLUSTER: &str = "cluster";
const COUNTED: &str = "simple.amurant.io/counted";

struct Context {
    api: Api<TestResource>,
    /// What exists, to know which entries of the record are needed no more.
    objects: Store<TestResource>,
}

/// Up to which generation each object was counted, by UID.
type Counted = BTreeMap<String, i64>;

/// Counts the generations of an object that were not counted yet; says how many.
fn count(counted: &mut Counted, object: &TestResource) -> i64 {
    let generation = object.metadata.generation.unwrap_or(0);
    let before = counted
        .insert(object.uid().unwrap_or_default(), generation)
        .unwrap_or(0);
    generation - before
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("the annotation {COUNTED} of {CLUSTER} cannot be read")]
    Record(#[from] serde_json::Error),
}

async fn reconcile(object: Arc<TestResource>, context: Arc<Context>) -> Result<Action, Failure> {
    if object.name_any() == CLUSTER {
        return Ok(Action::await_change());
    }
    let found = context.api.get_opt(CLUSTER).await?;
    let exists = found.is_some();
    let mut cluster = found.unwrap_or_else(|| TestResource {
        metadata: ObjectMeta {
            name: Some(CLUSTER.to_owned()),
            ..ObjectMeta::default()
        },
        spec: TestResourceSpec {
            nonce: 0,
            updated_at: None,
        },
    });

    let record = cluster.annotations().get(COUNTED);
    let mut counted: Counted = record.map_or(Ok(Counted::new()), |r| serde_json::from_str(r))?;
    let new = count(&mut counted, &object);
    if new <= 0 {
        return Ok(Action::await_change());
    }
    let objects = context.objects.state();
    counted.retain(|uid, _| objects.iter().any(|o| o.metadata.uid.as_ref() == Some(uid)));
    cluster
        .annotations_mut()
        .insert(COUNTED.to_owned(), serde_json::to_string(&counted)?);
    cluster.spec = TestResourceSpec::now(cluster.spec.nonce + new);

    let params = PostParams::default();
    if exists {
        context.api.replace(CLUSTER, &params, &cluster).await?;
    } else {
        context.api.create(&params, &cluster).await?;
    }
    println!(
        "{}: {new} more, cluster has nonce {}",
        object.name_any(),
        cluster.spec.nonce
    );
    Ok(Action::await_change())
}

fn error_policy(object: Arc<TestResource>, error: &Failure, _: Arc<Context>) -> Action {
    eprintln!("{}: {error}; trying again in 1 s", object.name_any());
    Action::requeue(Duration::from_secs(1))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let _ballast = ballast();
    let client = Client::try_default().await?;
    let api = Api::<TestResource>::namespaced(client, &variable("IN_NAMESPACE", "default")?);
    // One at a time: they all write `cluster`.
    let controller = Controller::new(api.clone(), watcher::Config::default())
        .with_config(controller::Config::default().concurrency(1))
        .shutdown_on_signal();
    let objects = controller.store();
    controller
        .run(reconcile, error_policy, Arc::new(Context { api, objects }))
        .for_each(|outcome| async {
            // What a reconcile failed with is in `error_policy`'s hands.
            if let Err(controller::Error::QueueError(error)) = outcome {
                eprintln!("watch: {error}");
            }
        })
        .await;
    Ok(())
}
