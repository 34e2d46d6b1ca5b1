//! The JSON of the ABI, as far as this guest needs it.

use serde::{Deserialize, Serialize};

/// A step of the watch.
#[derive(Deserialize)]
pub struct Item {
    #[serde(rename = "type")]
    pub kind: String,
    pub object: Option<Object>,
}

/// A TestResource that was read.
#[derive(Deserialize)]
pub struct Object {
    pub metadata: Metadata,
    pub spec: Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    pub name: String,
    pub resource_version: String,
}

#[derive(Deserialize)]
pub struct Spec {
    pub nonce: i64,
}

/// Why an operation failed.
#[derive(Deserialize)]
pub struct Status {
    pub code: u16,
    pub message: String,
}

impl Item {
    pub fn parse(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }
}

impl Object {
    pub fn parse(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }
}

impl Status {
    pub fn parse(json: &[u8]) -> Self {
        serde_json::from_slice(json).unwrap_or_else(|_| Self {
            code: 0,
            message: "unknown".to_owned(),
        })
    }
}

/// What an operation is to do.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor<'a> {
    group: &'static str,
    version: &'static str,
    plural: &'static str,
    namespace: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<Body<'a>>,
}

impl<'a> Descriptor<'a> {
    /// The TestResources of a namespace.
    pub fn new(namespace: &'a str) -> Self {
        Self {
            group: "amurant.io",
            version: "v1",
            plural: "testresources",
            namespace,
            name: None,
            patch_type: None,
            body: None,
        }
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// A TestResource to write: all of it for `create`, what changes for `patch`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Body<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: BodyMetadata<'a>,
    spec: BodySpec<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BodyMetadata<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_version: Option<&'a str>,
}

#[derive(Serialize)]
struct BodySpec<'a> {
    nonce: i64,
    updated_at: &'a str,
}

impl<'a> Body<'a> {
    /// With the object that was read, the API server refuses a write to any later version of it.
    pub fn new(name: &'a str, nonce: i64, updated_at: &'a str, read: Option<&'a Object>) -> Self {
        let resource_version = read.map(|object| &*object.metadata.resource_version);
        Self {
            api_version: "amurant.io/v1",
            kind: "TestResource",
            metadata: BodyMetadata {
                name,
                resource_version,
            },
            spec: BodySpec { nonce, updated_at },
        }
    }
}
