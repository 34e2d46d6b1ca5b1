//! Holds a Lease and renews it.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, Patch, PatchParams};
use kube::{Api, Client};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::interval;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt::init();
    // As a program does in which two crypto providers are compiled in.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("there is a crypto provider already"))?;
    let namespace = std::env::var("NAMESPACE").context("NAMESPACE")?;
    let leases: Api<Lease> = Api::namespaced(Client::try_default().await?, &namespace);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut ticks = interval(Duration::from_secs(1));
    let mut beats = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = terminate.recv() => break,
        }
        beats += 1;
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some("heartbeat".into()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some("heartbeat".into()),
                lease_duration_seconds: Some(5),
                lease_transitions: Some(beats),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..LeaseSpec::default()
            }),
        };
        let parameters = PatchParams::apply("heartbeat").force();
        leases
            .patch("heartbeat", &parameters, &Patch::Apply(&lease))
            .await?;
        tracing::debug!("beat {beats}");
    }
    tracing::info!("stopped after {beats} beats");
    Ok(())
}
