//! `NAME`: says what this operator does.
//!
//! As it stands, it greets: every ConfigMap with the label `greet=true` in `NAMESPACE` gets
//! `data.greeting`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};

async fn reconcile(object: Arc<ConfigMap>, api: Arc<Api<ConfigMap>>) -> kube::Result<Action> {
    let name = object.name_any();
    let greeting = ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(
            "greeting".to_owned(),
            format!("hello, {name}"),
        )])),
        ..ConfigMap::default()
    };
    // Server-side apply: says what we want and leaves all else alone, however often it is done.
    let params = PatchParams::apply("NAME").force();
    api.patch(&name, &params, &Patch::Apply(&greeting)).await?;
    println!("greeted {name}");
    Ok(Action::requeue(Duration::from_secs(300)))
}

fn error_policy(object: Arc<ConfigMap>, error: &kube::Error, _: Arc<Api<ConfigMap>>) -> Action {
    eprintln!("{}: {error}; trying again in 5 s", object.name_any());
    Action::requeue(Duration::from_secs(5))
}

#[tokio::main]
async fn main() -> kube::Result<()> {
    let client = Client::try_default().await?;
    let namespace = std::env::var("NAMESPACE").unwrap_or_else(|_| "default".to_owned());
    let api = Api::<ConfigMap>::namespaced(client, &namespace);
    Controller::new(api.clone(), watcher::Config::default().labels("greet=true"))
        .shutdown_on_signal()
        .run(reconcile, error_policy, Arc::new(api))
        .for_each(|_| async {})
        .await;
    Ok(())
}
