//! `probe`: a kube-rs program that the parent's tests look through.
//!
//! Environment: `NAMESPACE`, and `PROBE`, which says what it does:
//!
//! | `PROBE` | what it does |
//! |---|---|
//! | `requeue` | a Controller on ConfigMaps labelled `probe=requeue` that asks for a requeue after 2 s, and after each reconcile adds the time in ms to `data.times` (comma-separated) of ConfigMap `NAME-out` |
//! | `apply` | for each ConfigMap labelled `probe=apply`: server-side apply of `data.key=probe` without force as field manager `probe`; after a conflict (409) it writes ConfigMap `NAME-conflict`, then applies with force |
//! | `list` | lists all ConfigMaps in pages of 500, lists them again through a reflector, and writes both counts to ConfigMap `list-out` (`data.pages`, `data.listed`, `data.watched`) |
//! | `owns` | for each ConfigMap labelled `probe=owns`, keeps a ConfigMap `NAME-owned` that it owns |
//! | `panic`, `spin`, `exit` | does so when a ConfigMap of that name appears; until then writes ConfigMap `started` with the number of starts it has seen |
//! | `stop` | waits for the request to stop, writes ConfigMap `stopped`, ends with code 0 |

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;
use testresource::variable;

type Maps = Api<ConfigMap>;

fn labelled(probe: &str) -> watcher::Config {
    watcher::Config::default().labels(&format!("probe={probe}"))
}

fn now_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis())
}

/// Writes a ConfigMap, whoever owns its fields.
async fn put(maps: &Maps, name: &str, data: serde_json::Value) -> kube::Result<ConfigMap> {
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data});
    maps.patch(name, &PatchParams::apply("probe-out").force(), &Patch::Apply(object)).await
}

fn retry(_: Arc<ConfigMap>, error: &kube::Error, _: Arc<Maps>) -> Action {
    println!("{error}");
    Action::requeue(Duration::from_millis(200))
}

async fn requeue(object: Arc<ConfigMap>, maps: Arc<Maps>) -> kube::Result<Action> {
    let name = format!("{}-out", object.name_any());
    let before = maps.get_opt(&name).await?.and_then(|m| m.data?.remove("times"));
    let times = before.map_or_else(|| now_ms().to_string(), |b| format!("{b},{}", now_ms()));
    put(&maps, &name, json!({"times": times})).await?;
    Ok(Action::requeue(Duration::from_secs(2)))
}

async fn apply(object: Arc<ConfigMap>, maps: Arc<Maps>) -> kube::Result<Action> {
    let name = object.name_any();
    let wanted = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": "probe"}});
    let params = PatchParams::apply("probe");
    match maps.patch(&name, &params, &Patch::Apply(&wanted)).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {
            put(&maps, &format!("{name}-conflict"), json!({"message": status.message})).await?;
            maps.patch(&name, &params.force(), &Patch::Apply(&wanted)).await?;
        }
        Err(error) => return Err(error),
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
    let watching = watcher(maps.clone(), watcher::Config::default())
        .default_backoff()
        .reflect(writer)
        .applied_objects()
        .try_for_each(|_| async { Ok(()) });
    tokio::select! {
        _ = watching => println!("the watch ended"),
        _ = store.wait_until_ready() => {}
    }
    let counts = json!({"pages": pages.to_string(), "listed": listed.to_string(), "watched": store.len().to_string()});
    put(maps, "list-out", counts).await?;
    std::future::pending().await
}

async fn owns(object: Arc<ConfigMap>, maps: Arc<Maps>) -> kube::Result<Action> {
    let name = format!("{}-owned", object.name_any());
    let owner = object.controller_owner_ref(&());
    let owned = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "ownerReferences": [owner]}});
    maps.patch(&name, &PatchParams::apply("probe").force(), &Patch::Apply(owned)).await?;
    Ok(Action::await_change())
}

/// Waits for a ConfigMap of that name, then fails in that way.
async fn fail(maps: &Maps, how: &str) -> kube::Result<()> {
    let before = maps.get_opt("started").await?.and_then(|m| m.data?.remove("starts"));
    let starts = before.and_then(|b| b.parse::<u32>().ok()).unwrap_or(0) + 1;
    put(maps, "started", json!({"starts": starts.to_string()})).await?;
    let config = watcher::Config::default().fields(&format!("metadata.name={how}"));
    let mut events = Box::pin(watcher(maps.clone(), config).default_backoff().applied_objects());
    while events.next().await.is_none_or(|event| event.is_err()) {}
    match how {
        "panic" => panic!("as was asked for"),
        "exit" => std::process::exit(3),
        _ => loop {
            std::hint::black_box(());
        },
    }
}

#[tokio::main]
async fn main() -> Result<(), kube::Error> {
    let maps: Maps = Api::namespaced(Client::try_default().await?, &variable("NAMESPACE", "default"));
    let shared = Arc::new(maps.clone());
    match variable("PROBE", "").as_str() {
        "requeue" => {
            let controller = Controller::new(maps, labelled("requeue"));
            controller.run(requeue, retry, shared).for_each(|_| async {}).await;
        }
        "apply" => {
            let controller = Controller::new(maps, labelled("apply"));
            controller.run(apply, retry, shared).for_each(|_| async {}).await;
        }
        "owns" => {
            let controller = Controller::new(maps.clone(), labelled("owns"))
                .owns(maps, watcher::Config::default());
            controller.run(owns, retry, shared).for_each(|_| async {}).await;
        }
        "list" => list(&maps).await?,
        how @ ("panic" | "spin" | "exit") => fail(&maps, how).await?,
        "stop" => {
            println!("waiting to be stopped");
            tokio::signal::ctrl_c().await.map_err(|e| kube::Error::Service(Box::new(e)))?;
            put(&maps, "stopped", json!({"at": now_ms().to_string()})).await?;
        }
        other => println!("PROBE={other}: no such probe"),
    }
    Ok(())
}
