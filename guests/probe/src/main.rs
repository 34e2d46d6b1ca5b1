//! `probe`: a kube-rs program that the parent's tests look through. `PROBE` says what it does, in
//! the namespace `NAMESPACE` (`default`). All objects are ConfigMaps.
//!
//! | `PROBE` | |
//! |---|---|
//! | `requeue` | for each one labelled `probe=requeue`: adds the time in ms to `data.times` (comma-separated) of `NAME-out`, and again every 2 s |
//! | `apply` | for each labelled `probe=apply`: server-side apply of `data.key=probe` as field manager `probe`, without force; upon a conflict writes it to `data.message` of `NAME-conflict`, then applies with force |
//! | `list` | lists all in pages of 500, then again by a reflector, and writes the counts to `list-out` (`data.pages`, `data.listed`, `data.watched`) |
//! | `owns` | for each labelled `probe=owns`: keeps a `NAME-owned` that it owns, so that this one comes back when it is deleted |
//! | `finalizer` | for each labelled `probe=finalizer`: holds a finalizer; writes `NAME-applied`, and upon deletion `NAME-cleaned` |
//! | `events` | for each labelled `probe=events`: publishes an Event about it with reason `Probed` |
//! | `panic`, `spin`, `exit` | does so (an endless loop; code 3) when one of that name appears; at its start increases `data.starts` of `started` |
//! | `stop` | a Controller that is shut down by the request to stop; then writes `stopped` and ends with code 0; at its start writes `started` as above |

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::finalizer::{self, finalizer};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::{Value, json};

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Kube(#[from] kube::Error),
    #[error(transparent)]
    Finalizer(#[from] Box<finalizer::Error<kube::Error>>),
}

type Maps = Api<ConfigMap>;

struct Context {
    maps: Maps,
    recorder: Recorder,
}

fn now_ms() -> u128 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis())
}

/// Writes a ConfigMap, whoever owns its fields.
async fn put(maps: &Maps, name: &str, data: Value) -> kube::Result<()> {
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data,
    });
    maps.patch(
        name,
        &PatchParams::apply("probe-out").force(),
        &Patch::Apply(map),
    )
    .await?;
    Ok(())
}

/// An entry of a ConfigMap's data, if there is one.
async fn entry(maps: &Maps, name: &str, key: &str) -> kube::Result<Option<String>> {
    Ok(maps
        .get_opt(name)
        .await?
        .and_then(|map| map.data?.remove(key)))
}

fn controller(maps: &Maps, probe: &str) -> Controller<ConfigMap> {
    let labelled = watcher::Config::default().labels(&format!("probe={probe}"));
    Controller::new(maps.clone(), labelled)
}

fn error_policy(map: Arc<ConfigMap>, error: &Error, _: Arc<Context>) -> Action {
    eprintln!("{}: {error}", map.name_any());
    Action::requeue(Duration::from_millis(200))
}

async fn requeue(map: Arc<ConfigMap>, context: Arc<Context>) -> Result<Action, Error> {
    let name = format!("{}-out", map.name_any());
    let now = now_ms();
    let times = match entry(&context.maps, &name, "times").await? {
        Some(before) => format!("{before},{now}"),
        None => now.to_string(),
    };
    put(&context.maps, &name, json!({"times": times})).await?;
    Ok(Action::requeue(Duration::from_secs(2)))
}

async fn apply(map: Arc<ConfigMap>, context: Arc<Context>) -> Result<Action, Error> {
    let (name, maps) = (map.name_any(), &context.maps);
    let wanted = Patch::Apply(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name},
        "data": {"key": "probe"},
    }));
    let manager = PatchParams::apply("probe");
    match maps.patch(&name, &manager, &wanted).await {
        Err(kube::Error::Api(status)) if status.code == 409 => {
            put(
                maps,
                &format!("{name}-conflict"),
                json!({"message": status.message}),
            )
            .await?;
            maps.patch(&name, &manager.force(), &wanted).await?;
        }
        outcome => drop(outcome?),
    }
    Ok(Action::await_change())
}

async fn list(maps: &Maps) -> kube::Result<()> {
    let mut params = ListParams::default().limit(500);
    let (mut pages, mut listed) = (0, 0);
    loop {
        let page = maps.list(&params).await?;
        pages += 1;
        listed += page.items.len();
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => break,
        }
    }
    let (store, writer) = reflector::store();
    let mut changes = watcher(maps.clone(), watcher::Config::default())
        .default_backoff()
        .reflect(writer)
        .applied_objects()
        .boxed();
    tokio::select! {
        _ = async { while changes.next().await.is_some() {} } => {}
        _ = store.wait_until_ready() => {}
    }
    let data = json!({
        "pages": pages.to_string(),
        "listed": listed.to_string(),
        "watched": store.len().to_string(),
    });
    put(maps, "list-out", data).await?;
    std::future::pending().await
}

async fn owns(map: Arc<ConfigMap>, context: Arc<Context>) -> Result<Action, Error> {
    let name = format!("{}-owned", map.name_any());
    let owned = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": name, "ownerReferences": [map.controller_owner_ref(&())]},
    });
    let manager = PatchParams::apply("probe").force();
    context
        .maps
        .patch(&name, &manager, &Patch::Apply(owned))
        .await?;
    Ok(Action::await_change())
}

async fn finalize(map: Arc<ConfigMap>, context: Arc<Context>) -> Result<Action, Error> {
    let outcome = finalizer(&context.maps, "probe.amurant.io/done", map, async |event| {
        let name = match &event {
            finalizer::Event::Apply(map) => format!("{}-applied", map.name_any()),
            finalizer::Event::Cleanup(map) => format!("{}-cleaned", map.name_any()),
        };
        put(&context.maps, &name, json!({})).await?;
        Ok(Action::await_change())
    });
    Ok(outcome.await.map_err(Box::new)?)
}

async fn publish(map: Arc<ConfigMap>, context: Arc<Context>) -> Result<Action, Error> {
    let event = Event {
        type_: EventType::Normal,
        reason: "Probed".to_owned(),
        note: Some("seen by the probe".to_owned()),
        action: "Probe".to_owned(),
        secondary: None,
    };
    context
        .recorder
        .publish(&event, &map.object_ref(&()))
        .await?;
    Ok(Action::await_change())
}

async fn ignore(_: Arc<ConfigMap>, _: Arc<Context>) -> Result<Action, Error> {
    Ok(Action::await_change())
}

/// Counts the starts of this child.
async fn started(maps: &Maps) -> kube::Result<()> {
    let before = entry(maps, "started", "starts")
        .await?
        .and_then(|n| n.parse::<u32>().ok());
    put(
        maps,
        "started",
        json!({"starts": (before.unwrap_or(0) + 1).to_string()}),
    )
    .await
}

/// Waits for a ConfigMap of that name.
async fn appears(maps: &Maps, name: &str) {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut maps = watcher(maps.clone(), config)
        .default_backoff()
        .applied_objects()
        .boxed();
    while !matches!(maps.try_next().await, Ok(Some(_))) {}
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let client = Client::try_default().await?;
    let variable = |name| std::env::var(name).ok();
    let namespace = variable("NAMESPACE").unwrap_or_else(|| "default".to_owned());
    let maps = Maps::namespaced(client.clone(), &namespace);
    let reporter = Reporter {
        controller: "probe".to_owned(),
        instance: None,
    };
    let context = Arc::new(Context {
        maps: maps.clone(),
        recorder: Recorder::new(client, reporter),
    });

    let probe = variable("PROBE").unwrap_or_default();
    let controller = controller(&maps, &probe);
    match &*probe {
        "requeue" => {
            controller
                .run(requeue, error_policy, context)
                .for_each(async |_| ())
                .await
        }
        "apply" => {
            controller
                .run(apply, error_policy, context)
                .for_each(async |_| ())
                .await
        }
        "list" => list(&maps).await?,
        "owns" => {
            let controller = controller.owns(maps, watcher::Config::default());
            controller
                .run(owns, error_policy, context)
                .for_each(async |_| ())
                .await;
        }
        "finalizer" => {
            controller
                .run(finalize, error_policy, context)
                .for_each(async |_| ())
                .await
        }
        "events" => {
            controller
                .run(publish, error_policy, context)
                .for_each(async |_| ())
                .await
        }
        "panic" | "spin" | "exit" => {
            started(&maps).await?;
            appears(&maps, &probe).await;
            match &*probe {
                "panic" => panic!("as asked"),
                "spin" => loop {
                    std::hint::black_box(());
                },
                _ => std::process::exit(3),
            }
        }
        "stop" => {
            started(&maps).await?;
            let controller = controller.shutdown_on_signal();
            controller
                .run(ignore, error_policy, context)
                .for_each(async |_| ())
                .await;
            put(&maps, "stopped", json!({})).await?;
        }
        other => eprintln!("PROBE={other}: no such probe"),
    }
    Ok(())
}
