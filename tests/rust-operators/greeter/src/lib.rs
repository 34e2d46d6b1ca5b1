//! The type that greeter works on.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whom to greet.
#[derive(CustomResource, Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[kube(
    group = "example.com",
    version = "v1",
    kind = "Greeting",
    namespaced,
    status = "GreetingStatus",
    shortname = "greet"
)]
pub struct GreetingSpec {
    pub name: String,
}

/// What was done.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, Serialize)]
pub struct GreetingStatus {
    pub greeted: Option<String>,
}
