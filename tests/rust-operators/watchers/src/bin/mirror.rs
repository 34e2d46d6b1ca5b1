//! A watcher alone, and a reflector with its store: copies each Secret's name into a ConfigMap
//! `mirror`, with the number of ConfigMaps there are.

use std::pin::pin;

use futures::{StreamExt, TryStreamExt, future};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt::init();
    let client = Client::try_default().await?;
    let namespace = std::env::var("NAMESPACE").unwrap_or_else(|_| "default".into());
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &namespace);
    let maps: Api<ConfigMap> = Api::namespaced(client, &namespace);

    let (store, writer) = reflector::store::<ConfigMap>();
    let reflecting = watcher(maps.clone(), watcher::Config::default())
        .default_backoff()
        .reflect(writer)
        .for_each(|_| future::ready(()));
    tokio::spawn(reflecting);
    store.wait_until_ready().await?;

    let mut events = pin!(watcher(secrets, watcher::Config::default()).default_backoff());
    while let Some(event) = events.try_next().await? {
        let (name, state) = match &event {
            watcher::Event::Apply(secret) | watcher::Event::InitApply(secret) => {
                (secret.name_any(), "there")
            }
            watcher::Event::Delete(secret) => (secret.name_any(), "gone"),
            watcher::Event::Init | watcher::Event::InitDone => continue,
        };
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": "mirror" },
            "data": { name: state, "maps": store.state().len().to_string() },
        });
        let merged = match maps.get_opt("mirror").await? {
            Some(_) => Patch::Merge(map),
            None => Patch::Apply(map),
        };
        maps.patch("mirror", &PatchParams::apply("mirror"), &merged)
            .await?;
    }
    Ok(())
}
