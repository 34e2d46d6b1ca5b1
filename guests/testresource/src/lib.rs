//! The custom resource `testresources.amurant.io`, and what the sample operators have in common.

use kube::api::{ObjectMeta, PostParams};
use kube::{Api, CustomResource, ResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A number that travels, and when it last moved.
#[derive(Clone, CustomResource, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[kube(group = "amurant.io", version = "v1", kind = "TestResource", namespaced)]
pub struct TestResourceSpec {
    /// Only ever grows.
    pub nonce: i64,
    /// When it was written, as text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub updated_at: String,
}

/// What [`copy`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// The target was not there.
    Created,
    /// The target had this smaller nonce.
    Raised(i64),
    /// The target has the nonce already, or a greater one.
    Nothing,
}

/// Brings the nonce of `from` to the object of the same name in `to`, if it is greater there.
///
/// # Errors
/// What the API server says; a conflict among it, after which the caller tries again.
pub async fn copy(from: &TestResource, to: &Api<TestResource>) -> kube::Result<Copied> {
    let name = from.name_any();
    let Some(mut target) = to.get_opt(&name).await? else {
        let metadata = ObjectMeta { name: Some(name), ..ObjectMeta::default() };
        let created = TestResource { metadata, spec: stamped(from.spec.nonce) };
        to.create(&PostParams::default(), &created).await?;
        return Ok(Copied::Created);
    };
    let before = target.spec.nonce;
    if before >= from.spec.nonce {
        return Ok(Copied::Nothing);
    }
    target.spec = stamped(from.spec.nonce);
    to.replace(&name, &PostParams::default(), &target).await?;
    Ok(Copied::Raised(before))
}

/// A spec with that nonce and the present time.
pub fn stamped(nonce: i64) -> TestResourceSpec {
    let now = k8s_openapi::jiff::Timestamp::now();
    TestResourceSpec { nonce, updated_at: now.to_string() }
}

/// Allocates `HEAP_MEM_SIZE` bytes, filled so that no two pages are alike to the memory manager's
/// eye: ballast for measurements of memory. Keep what is returned.
pub fn ballast() -> Vec<u8> {
    let bytes = std::env::var("HEAP_MEM_SIZE").ok().and_then(|v| v.parse().ok()).unwrap_or(0);
    #[expect(clippy::cast_possible_truncation, reason = "the pattern is the low byte")]
    (0..bytes).map(|i: usize| (i + 9) as u8).collect()
}

/// An environment variable, or its default.
pub fn variable(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}
