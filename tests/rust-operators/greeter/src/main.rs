//! Two controllers in one program. The first keeps a ConfigMap for each Greeting, with a word that
//! comes from a ConfigMap `words`; it cleans up when a Greeting goes, and says so by Events. The
//! second counts the Greetings of the namespace.

use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use futures::StreamExt;
use greeter::{Greeting, GreetingStatus};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::finalizer::{self, Event as Finalizer, finalizer};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{WatchStreamExt, predicates, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;
use thiserror::Error;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// The namespace to work in
    #[arg(long, env = "NAMESPACE", default_value = "default")]
    namespace: String,
    /// What to say when nothing else is configured
    #[arg(long, default_value = "hello")]
    word: String,
}

#[derive(Debug, Error)]
enum Error {
    #[error("Kubernetes: {0}")]
    Kube(#[from] kube::Error),
    #[error("finalizer: {0}")]
    Finalizer(#[source] Box<finalizer::Error<Error>>),
    #[error("a greeting without a namespace")]
    NoNamespace,
}

struct Context {
    client: Client,
    recorder: Recorder,
    words: Store<ConfigMap>,
    word: String,
}

async fn reconcile(greeting: Arc<Greeting>, context: Arc<Context>) -> Result<Action, Error> {
    let namespace = greeting.namespace().ok_or(Error::NoNamespace)?;
    let greetings: Api<Greeting> = Api::namespaced(context.client.clone(), &namespace);
    finalizer(&greetings, "example.com/greeter", greeting, |event| async {
        match event {
            Finalizer::Apply(greeting) => apply(&greetings, &greeting, &context).await,
            Finalizer::Cleanup(greeting) => cleanup(&greeting, &context).await,
        }
    })
    .await
    .map_err(|e| Error::Finalizer(Box::new(e)))
}

async fn apply(
    greetings: &Api<Greeting>,
    greeting: &Greeting,
    context: &Context,
) -> Result<Action, Error> {
    let namespace = greeting.namespace().ok_or(Error::NoNamespace)?;
    let words = ObjectRef::new("words").within(&namespace);
    let word = context
        .words
        .get(&words)
        .and_then(|map| map.data.as_ref()?.get("word").cloned())
        .unwrap_or_else(|| context.word.clone());
    let text = format!("{word}, {}", greeting.spec.name);
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(greeting.name_any()),
            owner_references: greeting.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        data: Some([("text".to_owned(), text.clone())].into()),
        ..ConfigMap::default()
    };
    let maps: Api<ConfigMap> = Api::namespaced(context.client.clone(), &namespace);
    let parameters = PatchParams::apply("greeter").force();
    maps.patch(&greeting.name_any(), &parameters, &Patch::Apply(&map))
        .await?;
    if greeting.status.as_ref().and_then(|s| s.greeted.as_ref()) != Some(&text) {
        let status = json!({ "status": GreetingStatus { greeted: Some(text.clone()) } });
        greetings
            .patch_status(
                &greeting.name_any(),
                &PatchParams::default(),
                &Patch::Merge(&status),
            )
            .await?;
        publish(greeting, context, "Greeted", text).await?;
    }
    Ok(Action::requeue(Duration::from_secs(300)))
}

async fn cleanup(greeting: &Greeting, context: &Context) -> Result<Action, Error> {
    publish(
        greeting,
        context,
        "Parted",
        format!("good-bye, {}", greeting.spec.name),
    )
    .await?;
    Ok(Action::await_change())
}

async fn publish(
    greeting: &Greeting,
    context: &Context,
    reason: &str,
    note: String,
) -> Result<(), Error> {
    let event = Event {
        type_: EventType::Normal,
        reason: reason.into(),
        note: Some(note),
        action: "Greet".into(),
        secondary: None,
    };
    context
        .recorder
        .publish(&event, &greeting.object_ref(&()))
        .await?;
    Ok(())
}

fn on_error(greeting: Arc<Greeting>, error: &Error, _: Arc<Context>) -> Action {
    warn!("{}: {error}", greeting.name_any());
    Action::requeue(Duration::from_secs(1))
}

async fn count(
    map: Arc<ConfigMap>,
    context: Arc<(Client, Store<Greeting>)>,
) -> Result<Action, kube::Error> {
    let (client, greetings) = &*context;
    let maps: Api<ConfigMap> =
        Api::namespaced(client.clone(), &map.namespace().unwrap_or_default());
    let data = json!({ "data": { "greetings": greetings.state().len().to_string() } });
    maps.patch(
        &map.name_any(),
        &PatchParams::default(),
        &Patch::Merge(&data),
    )
    .await?;
    Ok(Action::requeue(Duration::from_secs(1)))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .init();
    let arguments = Arguments::parse();
    let client = Client::try_default().await?;
    let namespace = arguments.namespace.as_str();
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let greetings: Api<Greeting> = Api::namespaced(client.clone(), namespace);
    info!("working in {namespace}");

    let (words, writer) = reflector::store();
    let only_words = watcher::Config::default().fields("metadata.name=words");
    let words_stream = watcher(maps.clone(), only_words.clone())
        .default_backoff()
        .reflect(writer)
        .applied_objects()
        .predicate_filter(predicates::resource_version, Default::default())
        .for_each(|_| std::future::ready(()));

    let controller = Controller::new(greetings, watcher::Config::default());
    let all = controller.store();
    let context = Arc::new(Context {
        recorder: Recorder::new(client.clone(), Reporter::from("greeter")),
        client: client.clone(),
        words: words.clone(),
        word: arguments.word,
    });
    let store = all.clone();
    let greet = controller
        .owns(maps.clone(), watcher::Config::default())
        .watches(maps.clone(), only_words, move |_| {
            let all = store.state();
            all.into_iter()
                .map(|greeting| ObjectRef::from_obj(&*greeting))
        })
        .shutdown_on_signal()
        .run(reconcile, on_error, context)
        .for_each(|result| async move {
            match result {
                Ok((object, _)) => info!("greeted {}", object.name),
                Err(error) => error!("{error}"),
            }
        });

    let counter = Controller::new(maps, watcher::Config::default().labels("count=greetings"))
        .shutdown_on_signal()
        .run(
            count,
            |_, _, _| Action::requeue(Duration::from_secs(1)),
            Arc::new((client, all)),
        )
        .for_each(|_| std::future::ready(()));

    tokio::select! {
        _ = async { tokio::join!(greet, counter) } => info!("good-bye"),
        _ = words_stream => error!("the stream of words ended"),
    }
    Ok(())
}
