//! The custom resource `testresources.amurant.io`, and what the sample operators have in common.

use std::env::{self, VarError};
use std::hint::black_box;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, CustomResource, ResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A number that travels.
#[derive(Clone, CustomResource, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[kube(
    group = "amurant.io",
    version = "v1",
    kind = "TestResource",
    namespaced
)]
pub struct TestResourceSpec {
    /// The number. The sample operators only ever raise it.
    pub nonce: i64,
    /// When one of them last wrote it (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<String>,
}

impl TestResourceSpec {
    /// That nonce, written now.
    pub fn now(nonce: i64) -> Self {
        Self {
            nonce,
            updated_at: Some(Timestamp::now().to_string()),
        }
    }
}

/// Brings the nonce of `from` to the object of the same name in `to`, unless it has as much already.
/// Says whether anything was written.
///
/// # Errors
/// What the API server says. A conflict is among it: another has written since `to` was read.
pub async fn copy(from: &TestResource, to: &Api<TestResource>) -> kube::Result<bool> {
    let name = from.name_any();
    let nonce = from.spec.nonce;
    match to.get_opt(&name).await? {
        Some(target) if target.spec.nonce >= nonce => return Ok(false),
        Some(mut target) => {
            target.spec = TestResourceSpec::now(nonce);
            to.replace(&name, &PostParams::default(), &target).await?;
        }
        None => {
            let metadata = ObjectMeta {
                name: Some(name),
                ..ObjectMeta::default()
            };
            let target = TestResource {
                metadata,
                spec: TestResourceSpec::now(nonce),
            };
            to.create(&PostParams::default(), &target).await?;
        }
    }
    Ok(true)
}

/// How long to wait after a failure: 1 s, or 30 s when the namespace to write into does not exist,
/// which somebody must do something about.
pub fn pause(error: &kube::Error) -> Duration {
    let missing_namespace = match error {
        kube::Error::Api(status) if status.code == 404 => status
            .details
            .as_ref()
            .is_some_and(|details| details.kind == "namespaces"),
        _ => false,
    };
    Duration::from_secs(if missing_namespace { 30 } else { 1 })
}

/// An environment variable, or its default.
///
/// # Errors
/// When it is not text.
pub fn variable(name: &str, default: &str) -> Result<String, VarError> {
    match env::var(name) {
        Err(VarError::NotPresent) => Ok(default.to_owned()),
        other => other,
    }
}

/// What benchmarks ask for: `HEAP_MEM_SIZE` bytes of heap, to be kept until the end, and a program
/// that is unlike all others when `COMPILE_NONCE` was set at compile time.
///
/// # Panics
/// When `HEAP_MEM_SIZE` is not a number.
pub fn ballast() -> Vec<u8> {
    black_box(option_env!("COMPILE_NONCE"));
    let size: usize = env::var("HEAP_MEM_SIZE").map_or(0, |size| {
        size.parse().expect("HEAP_MEM_SIZE is a number of bytes")
    });
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low byte is what is wanted"
    )]
    black_box((0..size).map(|i| (i + 9) as u8).collect())
}
