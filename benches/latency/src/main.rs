//! Measures how long a ring operator takes to carry a nonce from one namespace to the next.
//!
//! `ring-latency N NAME=FROM:TO...`: for each operator that copies from namespace FROM to TO, in
//! turn and N times: raises the nonce in FROM and waits until a watch shows it in TO. What is
//! measured is the same for all: two writes, two watch events and the operator between them.
//! Prints p50, p99 and, against the first operator, the ratio of the medians.

use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, Client};
use serde_json::json;
use testresource::{TestResource, stamped};

type Failure = Box<dyn std::error::Error>;

const OBJECT: &str = "latency";
const WARM_UP: i64 = 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct Operator {
    name: String,
    from: Api<TestResource>,
    to: Api<TestResource>,
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
            micros: Vec::new(),
        })
    }

    async fn prepare(&self) -> Result<(), Failure> {
        let metadata = ObjectMeta { name: Some(OBJECT.into()), ..ObjectMeta::default() };
        let object = TestResource { metadata, spec: stamped(0) };
        for api in [&self.from, &self.to] {
            if api.get_opt(OBJECT).await?.is_none() {
                api.create(&PostParams::default(), &object).await?;
            }
        }
        Ok(())
    }

    async fn measure(&mut self, nonce: i64) -> Result<(), Failure> {
        let version = self.to.get(OBJECT).await?.metadata.resource_version.unwrap_or_default();
        let config = WatchParams::default().fields(&format!("metadata.name={OBJECT}"));
        let mut events = self.to.watch(&config, &version).await?.boxed();
        let patch = Patch::Merge(json!({"spec": {"nonce": nonce}}));
        let started = Instant::now();
        self.from.patch(OBJECT, &PatchParams::default(), &patch).await?;
        while let Some(event) = tokio::time::timeout(PATIENCE, events.try_next()).await?? {
            if matches!(event, WatchEvent::Modified(object) if object.spec.nonce >= nonce) {
                self.micros.push(started.elapsed().as_micros());
                return Ok(());
            }
        }
        Err(format!("{}: the watch ended", self.name).into())
    }

    /// The value below which that many hundredths of the measurements are, in milliseconds.
    fn percentile(&self, hundredths: usize) -> f64 {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        let index = (sorted.len() * hundredths / 100).min(sorted.len().saturating_sub(1));
        sorted.get(index).map_or(f64::NAN, |micros| *micros as f64 / 1000.0)
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let count: i64 = arguments.next().ok_or("ring-latency N NAME=FROM:TO...")?.parse()?;
    let client = Client::try_default().await?;
    let mut operators =
        arguments.map(|text| Operator::parse(&client, &text)).collect::<Result<Vec<_>, _>>()?;
    for operator in &operators {
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
    let base = operators.first().map_or(f64::NAN, |first| first.percentile(50));
    println!("| operator | N | p50 ms | p99 ms | p50 against the first |");
    println!("|---|---|---|---|---|");
    for operator in &operators {
        let (p50, p99) = (operator.percentile(50), operator.percentile(99));
        println!("| {} | {count} | {p50:.2} | {p99:.2} | {:.2} |", operator.name, p50 / base);
    }
    Ok(())
}
