//! What a guest asks for: descriptors and raw requests, read and checked.
//!
//! Bytes in, values out: nothing here knows of wasmer or of connections, so all of it is tested
//! without a guest. What passes can be sent as it is, and cannot leave its place in a URL.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::abi::CallError;

/// Longest head of a raw request, in bytes: far below what servers end a shared connection for.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Most headers of a raw request.
const MAX_HEADERS: usize = 128;
/// Longest request target, in bytes.
const MAX_TARGET_BYTES: usize = 16 << 10;
/// Longest name or selector in a descriptor, in bytes.
const MAX_FIELD_BYTES: usize = 8 << 10;

/// The typed verbs of `kube_v1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Reads an object.
    Get,
    /// Reads a page of a collection.
    List,
    /// Lists and watches for ever.
    Watch,
    /// Creates an object.
    Create,
    /// Replaces an object.
    Replace,
    /// Changes an object.
    Patch,
    /// Deletes an object.
    Delete,
}

impl Verb {
    /// All of them, with their import names.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::Get, "get"),
        (Self::List, "list"),
        (Self::Watch, "watch"),
        (Self::Create, "create"),
        (Self::Replace, "replace"),
        (Self::Patch, "patch"),
        (Self::Delete, "delete"),
    ];

    fn is_one_of(self, verbs: &[Self]) -> bool {
        verbs.contains(&self)
    }
}

/// How a patch is meant; see the [API concepts] page.
///
/// [API concepts]: https://kubernetes.io/docs/reference/using-api/api-concepts/#patch-and-apply
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum PatchType {
    /// Server-side apply.
    Apply,
    /// JSON merge patch, RFC 7386.
    Merge,
    /// Strategic merge patch.
    Strategic,
    /// JSON patch, RFC 6902.
    Json,
}

impl PatchType {
    fn content_type(self) -> &'static str {
        match self {
            Self::Apply => "application/apply-patch+yaml",
            Self::Merge => "application/merge-patch+json",
            Self::Strategic => "application/strategic-merge-patch+json",
            Self::Json => "application/json-patch+json",
        }
    }
}

/// The descriptor of a typed verb, as the guest wrote it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Descriptor<'a> {
    #[serde(default)]
    group: String,
    version: String,
    plural: String,
    namespace: Option<String>,
    name: Option<String>,
    subresource: Option<String>,
    label_selector: Option<String>,
    field_selector: Option<String>,
    limit: Option<u32>,
    #[serde(rename = "continue")]
    continue_token: Option<String>,
    resource_version: Option<String>,
    patch_type: Option<PatchType>,
    field_manager: Option<String>,
    #[serde(default)]
    force: bool,
    #[serde(default)]
    dry_run: bool,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// A checked typed call: everything needed to send it, and nothing that could leave its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedCall {
    /// What is asked for.
    pub verb: Verb,
    /// HTTP method.
    pub method: Method,
    /// URL path of the object or collection.
    pub path: String,
    /// URL query, without `?`, percent-encoded.
    pub query: String,
    /// Page size, for `list` and `watch`.
    pub limit: Option<u32>,
    /// `Content-Type` of the body.
    pub content_type: &'static str,
    /// The body, empty for none.
    pub body: Bytes,
}

fn invalid(message: impl Into<String>) -> CallError {
    CallError::Invalid(message.into())
}

/// Checks one path segment by the rule of `path.IsValidPathSegmentName` in apimachinery, and more
/// strictly: no control characters and nothing that ends a path.
fn segment<'a>(field: &str, value: &'a str) -> Result<&'a str, CallError> {
    let bad = |c: char| matches!(c, '/' | '%' | '?' | '#' | '\\' | ' ') || c.is_control();
    if value.is_empty()
        || value == "."
        || value == ".."
        || value.len() > MAX_FIELD_BYTES
        || value.contains(bad)
        || !value.is_ascii()
    {
        return Err(invalid(format!(
            "`{field}` is not a name: {:?}",
            shortened(value)
        )));
    }
    Ok(value)
}

/// The first characters of a text that a guest supplied, for messages.
fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

impl TypedCall {
    /// Reads and checks a descriptor.
    ///
    /// # Errors
    /// [`CallError::Invalid`], naming the field.
    pub fn parse(verb: Verb, json: &[u8]) -> Result<Self, CallError> {
        let d: Descriptor =
            serde_json::from_slice(json).map_err(|e| invalid(format!("descriptor: {e}")))?;
        d.check(verb)?;
        let mut query = form_urlencoded::Serializer::new(String::new());
        for (key, value) in [
            ("labelSelector", &d.label_selector),
            ("fieldSelector", &d.field_selector),
            ("continue", &d.continue_token),
            ("resourceVersion", &d.resource_version),
            ("fieldManager", &d.field_manager),
        ] {
            if let Some(value) = value {
                query.append_pair(key, value);
            }
        }
        if d.force {
            query.append_pair("force", "true");
        }
        if d.dry_run {
            query.append_pair("dryRun", "All");
        }
        if let (Verb::List, Some(limit)) = (verb, d.limit) {
            query.append_pair("limit", &limit.to_string());
        }
        Ok(Self {
            verb,
            method: match verb {
                Verb::Get | Verb::List | Verb::Watch => Method::GET,
                Verb::Create => Method::POST,
                Verb::Replace => Method::PUT,
                Verb::Patch => Method::PATCH,
                Verb::Delete => Method::DELETE,
            },
            path: d.path(verb)?,
            query: query.finish(),
            limit: d.limit,
            content_type: d
                .patch_type
                .map_or("application/json", PatchType::content_type),
            body: d.body.map_or_else(Bytes::new, |body| {
                Bytes::copy_from_slice(body.get().as_bytes())
            }),
        })
    }

    /// Path and query, as they stand in the request line.
    pub fn path_and_query(&self) -> String {
        if self.query.is_empty() {
            self.path.clone()
        } else {
            format!("{}?{}", self.path, self.query)
        }
    }
}

impl Descriptor<'_> {
    /// Which fields go with which verb.
    fn check(&self, verb: Verb) -> Result<(), CallError> {
        use Verb::{Create, Delete, Get, List, Patch, Replace, Watch};
        let allowed: [(&str, bool, &[Verb]); 11] = [
            (
                "name",
                self.name.is_some(),
                &[Get, Create, Replace, Patch, Delete],
            ),
            (
                "subresource",
                self.subresource.is_some(),
                &[Get, Create, Replace, Patch],
            ),
            (
                "labelSelector",
                self.label_selector.is_some(),
                &[List, Watch],
            ),
            (
                "fieldSelector",
                self.field_selector.is_some(),
                &[List, Watch],
            ),
            ("limit", self.limit.is_some(), &[List, Watch]),
            ("continue", self.continue_token.is_some(), &[List]),
            (
                "resourceVersion",
                self.resource_version.is_some(),
                &[Get, List],
            ),
            ("patchType", self.patch_type.is_some(), &[Patch]),
            (
                "fieldManager",
                self.field_manager.is_some(),
                &[Create, Replace, Patch],
            ),
            ("dryRun", self.dry_run, &[Create, Replace, Patch, Delete]),
            (
                "body",
                self.body.is_some(),
                &[Create, Replace, Patch, Delete],
            ),
        ];
        for (field, present, verbs) in allowed {
            if present && !verb.is_one_of(verbs) {
                return Err(invalid(format!("`{field}` does not go with this verb")));
            }
        }
        if verb.is_one_of(&[Get, Replace, Patch, Delete]) && self.name.is_none() {
            return Err(invalid("`name` is missing"));
        }
        if verb == Create && self.name.is_some() != self.subresource.is_some() {
            return Err(invalid(
                "`create` takes `name` and `subresource` together or not at all",
            ));
        }
        if verb.is_one_of(&[Create, Replace, Patch]) && self.body.is_none() {
            return Err(invalid("`body` is missing"));
        }
        if verb == Patch && self.patch_type.is_none() {
            return Err(invalid("`patchType` is missing"));
        }
        if self.force && self.patch_type != Some(PatchType::Apply) {
            return Err(invalid("`force` goes with patchType \"apply\" only"));
        }
        if self.patch_type == Some(PatchType::Apply) && self.field_manager.is_none() {
            return Err(invalid("`fieldManager` is missing"));
        }
        if self.limit == Some(0) {
            return Err(invalid("`limit` must be above 0"));
        }
        for (field, value) in [
            ("labelSelector", &self.label_selector),
            ("fieldSelector", &self.field_selector),
            ("continue", &self.continue_token),
            ("resourceVersion", &self.resource_version),
            ("fieldManager", &self.field_manager),
        ] {
            if value.as_ref().is_some_and(|v| v.len() > MAX_FIELD_BYTES) {
                return Err(invalid(format!(
                    "`{field}` is longer than {MAX_FIELD_BYTES} bytes"
                )));
            }
        }
        Ok(())
    }

    fn path(&self, verb: Verb) -> Result<String, CallError> {
        let version = segment("version", &self.version)?;
        let mut path = if self.group.is_empty() {
            format!("/api/{version}")
        } else {
            format!("/apis/{}/{version}", segment("group", &self.group)?)
        };
        if let Some(namespace) = self.namespace.as_deref().filter(|n| !n.is_empty()) {
            path.push_str("/namespaces/");
            path.push_str(segment("namespace", namespace)?);
        }
        path.push('/');
        path.push_str(segment("plural", &self.plural)?);
        if let Some(name) = self
            .name
            .as_deref()
            .filter(|_| verb != Verb::List && verb != Verb::Watch)
        {
            path.push('/');
            path.push_str(segment("name", name)?);
        }
        if let Some(subresource) = self.subresource.as_deref() {
            path.push('/');
            path.push_str(segment("subresource", subresource)?);
        }
        Ok(path)
    }
}

/// A checked raw request.
#[derive(Clone, Debug)]
pub struct RawCall {
    /// HTTP method.
    pub method: Method,
    /// Path and query.
    pub path_and_query: String,
    /// The headers that may pass.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The body, empty for none.
    pub body: Bytes,
    /// Whether the query asks for a watch.
    pub is_watch: bool,
}

/// Headers that never pass from a guest: credentials and identity (the parent authenticates), and
/// those that belong to the connection, which is the parent's.
fn is_filtered(name: &HeaderName) -> bool {
    let name = name.as_str();
    matches!(
        name,
        "authorization"
            | "cookie"
            | "host"
            | "connection"
            | "upgrade"
            | "te"
            | "trailer"
            | "keep-alive"
            | "content-length"
            | "transfer-encoding"
            | "accept-encoding"
            | "expect"
    ) || [
        "impersonate-",
        "x-remote-",
        "x-forwarded-",
        "proxy-",
        "sec-websocket-",
    ]
    .iter()
    .any(|prefix| name.starts_with(prefix))
}

impl RawCall {
    /// Reads and checks a raw request.
    ///
    /// # Errors
    /// [`CallError::Invalid`] when it is malformed, [`CallError::Refused`] when it asks for an upgrade.
    pub fn parse(request: &Bytes) -> Result<Self, CallError> {
        let end = request
            .windows(2)
            .position(|w| w == b"\n\n")
            .ok_or_else(|| invalid("request: no empty line after the headers"))?;
        if end > MAX_HEAD_BYTES {
            return Err(invalid(format!(
                "request: the head is above {MAX_HEAD_BYTES} bytes"
            )));
        }
        let head = std::str::from_utf8(&request[..end])
            .map_err(|_| invalid("request: the head is not UTF-8"))?;
        let mut lines = head.split('\n');
        let first = lines.next().unwrap_or_default();
        let (method, target) = first
            .split_once(' ')
            .ok_or_else(|| invalid("request: the first line is not `METHOD PATH`"))?;
        let method: Method = method
            .parse()
            .map_err(|_| invalid(format!("request: not a method: {:?}", shortened(method))))?;
        if method == Method::CONNECT {
            return Err(CallError::Refused("CONNECT".into()));
        }
        let path_and_query = origin_form(target)?;
        let mut headers = Vec::new();
        for line in lines {
            let (name, value) = line
                .split_once(':')
                .ok_or_else(|| invalid(format!("request: not a header: {:?}", shortened(line))))?;
            let name: HeaderName = name.parse().map_err(|_| {
                invalid(format!("request: not a header name: {:?}", shortened(name)))
            })?;
            let value: HeaderValue = value
                .trim()
                .parse()
                .map_err(|_| invalid(format!("request: bad value of header {name}")))?;
            if name == http::header::UPGRADE {
                return Err(CallError::Refused(
                    "upgraded connections (exec, attach, port-forward) are not available".into(),
                ));
            }
            if !is_filtered(&name) {
                headers.push((name, value));
            }
            if headers.len() > MAX_HEADERS {
                return Err(invalid(format!("request: more than {MAX_HEADERS} headers")));
            }
        }
        Ok(Self {
            method,
            is_watch: asks_for_watch(&path_and_query),
            path_and_query,
            headers,
            body: request.slice(end + 2..),
        })
    }
}

/// The path and query of a request target, with scheme and authority dropped.
fn origin_form(target: &str) -> Result<String, CallError> {
    if target.len() > MAX_TARGET_BYTES {
        return Err(invalid(format!(
            "request: the URL is above {MAX_TARGET_BYTES} bytes"
        )));
    }
    let uri: http::Uri = target
        .parse()
        .map_err(|_| invalid(format!("request: not a URL: {:?}", shortened(target))))?;
    let path_and_query = uri.path_and_query().map_or("/", |p| p.as_str());
    let path = path_and_query.split('?').next().unwrap_or_default();
    if !path.starts_with('/')
        || path
            .to_ascii_lowercase()
            .replace("%2e", ".")
            .split('/')
            .any(|s| s == "..")
    {
        return Err(invalid(format!(
            "request: not an absolute path: {:?}",
            shortened(target)
        )));
    }
    Ok(path_and_query.to_owned())
}

fn asks_for_watch(path_and_query: &str) -> bool {
    let query = path_and_query.split_once('?').map_or("", |(_, q)| q);
    form_urlencoded::parse(query.as_bytes()).any(|(k, v)| k == "watch" && (v == "true" || v == "1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(verb: Verb, json: &str) -> Result<TypedCall, CallError> {
        TypedCall::parse(verb, json.as_bytes())
    }

    #[test]
    fn a_get_of_a_namespaced_custom_resource_has_its_url() {
        let call = typed(Verb::Get, r#"{"group":"amurant.io","version":"v1","plural":"testresources","namespace":"a","name":"b"}"#).unwrap();
        assert_eq!(
            call.path_and_query(),
            "/apis/amurant.io/v1/namespaces/a/testresources/b"
        );
        assert_eq!(call.method, Method::GET);
    }

    #[test]
    fn a_list_of_the_core_group_encodes_its_selectors() {
        let call = typed(Verb::List, r#"{"version":"v1","plural":"configmaps","labelSelector":"a=b,c in (d)","limit":7,"continue":"x&y"}"#).unwrap();
        assert_eq!(
            call.path_and_query(),
            "/api/v1/configmaps?labelSelector=a%3Db%2Cc+in+%28d%29&continue=x%26y&limit=7"
        );
    }

    #[test]
    fn an_apply_carries_manager_force_and_content_type() {
        let call = typed(
            Verb::Patch,
            r#"{"version":"v1","plural":"configmaps","namespace":"n","name":"c","subresource":"status","patchType":"apply","fieldManager":"m","force":true,"body":{"a": 1}}"#,
        )
        .unwrap();
        assert_eq!(
            call.path_and_query(),
            "/api/v1/namespaces/n/configmaps/c/status?fieldManager=m&force=true"
        );
        assert_eq!(call.content_type, "application/apply-patch+yaml");
        assert_eq!(&call.body[..], b"{\"a\": 1}");
    }

    #[test]
    fn names_cannot_leave_their_place_in_the_url() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a?b",
            "a#b",
            "%2e%2e",
            "a b",
            "a\\u0000b",
            "ä",
        ] {
            let json = format!(
                r#"{{"version":"v1","plural":"configmaps","namespace":"n","name":"{name}"}}"#
            );
            let error = typed(Verb::Get, &json).unwrap_err();
            assert!(
                matches!(&error, CallError::Invalid(m) if m.contains("`name`")),
                "{name}: {error:?}"
            );
        }
    }

    #[test]
    fn fields_that_do_not_belong_are_refused_by_name() {
        for (verb, extra, field) in [
            (Verb::Get, r#""name":"a","body":{}"#, "body"),
            (Verb::List, r#""name":"a""#, "name"),
            (Verb::Patch, r#""name":"a","body":{}"#, "patchType"),
            (
                Verb::Patch,
                r#""name":"a","body":{},"patchType":"merge","force":true"#,
                "force",
            ),
            (
                Verb::Patch,
                r#""name":"a","body":{},"patchType":"apply""#,
                "fieldManager",
            ),
            (Verb::Create, r#""name":"a","body":{}"#, "subresource"),
            (Verb::List, r#""limit":0"#, "limit"),
            (Verb::Get, r#""name":"a","nmae":"b""#, "nmae"),
            (Verb::Delete, "\"limit\":1", "limit"),
        ] {
            let error = typed(
                verb,
                &format!(r#"{{"version":"v1","plural":"pods",{extra}}}"#),
            )
            .unwrap_err();
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn a_raw_request_loses_credentials_and_keeps_the_rest() {
        let request = Bytes::from_static(
            b"PATCH http://kubernetes.default/api/v1/x?watch=0 HTTP\nAuthorization: Bearer t\nImpersonate-User: admin\ncontent-type: a/b\nX-Remote-Group: g\naccept: c\n\nbody",
        );
        assert!(
            RawCall::parse(&request).is_err(),
            "a version in the request line is not part of the ABI"
        );
        let request = Bytes::from_static(
            b"PATCH http://kubernetes.default/api/v1/x?a=1\nAuthorization: Bearer t\nImpersonate-User: admin\ncontent-type: a/b\nX-Remote-Group: g\naccept: c\n\nbody\n\nmore",
        );
        let call = RawCall::parse(&request).unwrap();
        assert_eq!(call.path_and_query, "/api/v1/x?a=1");
        let names: Vec<_> = call.headers.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["content-type", "accept"]);
        assert_eq!(&call.body[..], b"body\n\nmore");
        assert!(!call.is_watch);
    }

    #[test]
    fn a_watch_is_recognised_by_its_query() {
        for (query, expected) in [
            ("watch=true", true),
            ("a=b&watch=1", true),
            ("watch=false", false),
            ("watchx=true", false),
        ] {
            let request = Bytes::from(format!("GET /api/v1/pods?{query}\n\n"));
            assert_eq!(
                RawCall::parse(&request).unwrap().is_watch,
                expected,
                "{query}"
            );
        }
    }

    #[test]
    fn malformed_raw_requests_are_told_apart() {
        for (request, part) in [
            ("GET /", "empty line"),
            ("GET\n\n", "METHOD PATH"),
            ("GET /a/../b\n\n", "absolute path"),
            ("GET /\nno header\n\n", "not a header"),
            ("GET /\nx: a\u{1}b\n\n", "bad value"),
            ("GET /\nupgrade: spdy\n\n", "upgraded"),
            ("CONNECT /\n\n", "CONNECT"),
            ("GET /a/%2E./b\n\n", "absolute path"),
            (
                &format!("GET /\n{}\n", "a:\n".repeat(200)),
                "more than 128 headers",
            ),
            (
                &format!("GET /\na: {}\n\n", "x".repeat(70_000)),
                "above 65536",
            ),
            (&format!("GET /{}\n\n", "x".repeat(20_000)), "above 16384"),
        ] {
            let error = RawCall::parse(&Bytes::from(request.to_owned()))
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{request:?}: {error}");
        }
    }
}
