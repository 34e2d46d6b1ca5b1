//! Measures how long a ring operator takes to carry a nonce from one namespace to the next.
//!
//! `ring-latency N NAME=FROM:TO...`: for each operator that copies from namespace FROM to TO, in
//! turn and N times: raises the nonce in FROM and waits until a watch shows it in TO. What is
//! measured is the same for all: two writes, two watch events and the operator between them.
//! Prints p50, p99 and, against the first operator, the ratio of the medians.

use std::time::{Duration, Instant};

use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, Client};
use serde_json::json;
use testresource::{TestResource, TestResourceSpec};

type Failure = Box<dyn std::error::Error>;

const OBJECT: &str = "latency";
const WARM_UP: i64 = 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct Operator {
    name: String,
    from: Api<TestResource>,
    to: Api<TestResource>,
    /// What happens in TO; open all the time, for opening a watch takes longer than a reconcile.
    events: BoxStream<'static, kube::Result<WatchEvent<TestResource>>>,
    micros: Vec<u128>,
}

impl Operator {
    fn parse(client: &Client, text: &str) -> Result<Self, Failure> {
        let (name, namespaces) = text.split_once('=').ok_or("NAME=FROM:TO")?;
        let (from, to) = namespaces.split_once(':').ok_or("NAME=FROM:TO")?;
        Ok(Self {
            name: name.to_owned(),
            from: Api::namespaced(client.clone(), from),
            to: Api::namespaced(client.clone(), to),
            events: futures::stream::empty().boxed(),
            micros: Vec::new(),
        })
    }

    /// Makes the object, and waits until the operator has copied it: it is up then.
    async fn prepare(&mut self) -> Result<(), Failure> {
        let metadata = ObjectMeta {
            name: Some(OBJECT.into()),
            ..ObjectMeta::default()
        };
        let object = TestResource {
            metadata,
            spec: TestResourceSpec::now(0),
        };
        self.from.create(&PostParams::default(), &object).await?;
        let copied = async {
            while self.to.get_opt(OBJECT).await?.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok::<_, kube::Error>(())
        };
        tokio::time::timeout(PATIENCE, copied).await??;
        self.watch().await
    }

    async fn watch(&mut self) -> Result<(), Failure> {
        let version = self
            .to
            .get(OBJECT)
            .await?
            .metadata
            .resource_version
            .unwrap_or_default();
        let config = WatchParams::default()
            .fields(&format!("metadata.name={OBJECT}"))
            .timeout(290);
        self.events = self.to.watch(&config, &version).await?.boxed();
        Ok(())
    }

    async fn measure(&mut self, nonce: i64) -> Result<(), Failure> {
        let patch = Patch::Merge(json!({"spec": {"nonce": nonce}}));
        let started = Instant::now();
        self.from
            .patch(OBJECT, &PatchParams::default(), &patch)
            .await?;
        loop {
            match tokio::time::timeout(PATIENCE, self.events.try_next()).await?? {
                Some(WatchEvent::Modified(object)) if object.spec.nonce >= nonce => {
                    self.micros.push(started.elapsed().as_micros());
                    return Ok(());
                }
                Some(_) => {}
                None => return Err(format!("{}: the watch ended", self.name).into()),
            }
        }
    }

    /// The value below which that many hundredths of the measurements are, in milliseconds.
    fn percentile(&self, hundredths: usize) -> f64 {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        let index = (sorted.len() * hundredths / 100).min(sorted.len().saturating_sub(1));
        sorted
            .get(index)
            .map_or(f64::NAN, |micros| *micros as f64 / 1000.0)
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let count: i64 = arguments
        .next()
        .ok_or("ring-latency N NAME=FROM:TO...")?
        .parse()?;
    let client = Client::try_default().await?;
    let mut operators = arguments
        .map(|text| Operator::parse(&client, &text))
        .collect::<Result<Vec<_>, _>>()?;
    for operator in &mut operators {
        operator.prepare().await?;
    }
    for nonce in 1..=WARM_UP + count {
        for operator in &mut operators {
            operator.measure(nonce).await?;
            if nonce <= WARM_UP {
                operator.micros.clear();
            }
        }
    }
    let base = operators
        .first()
        .map_or(f64::NAN, |first| first.percentile(50));
    println!("| operator | N | p50 ms | p99 ms | p50 against the first |");
    println!("|---|---|---|---|---|");
    for operator in &operators {
        let (p50, p99) = (operator.percentile(50), operator.percentile(99));
        println!(
            "| {} | {count} | {p50:.2} | {p99:.2} | {:.2} |",
            operator.name,
            p50 / base
        );
    }
    Ok(())
}
