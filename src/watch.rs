//! The typed `watch`: one list and watch that never ends.
//!
//! The steps are those of kube-rs's watcher, which follow client-go's reflector: list in pages,
//! watch from the list's resourceVersion with bookmarks, resume where a connection was cut, list
//! again after 410 Gone, and wait between attempts. Objects pass through as they came: only
//! `metadata.resourceVersion` is read.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use http::StatusCode;
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;

use crate::abi::{Event, EventKind};
use crate::api::{AnswerError, Api, ApiRequest, read_to_end, retry_after};
use crate::backoff::Backoff;
use crate::calls::TypedCall;
use crate::lines::LineBuffer;
use crate::mailbox::Closed;
use crate::session::Session;
use crate::transport::{Lane, TransportError};

/// Page size of the listing unless the guest asks for another; kube-rs's and client-go's.
const PAGE_SIZE: u32 = 500;
/// The server ends a watch after that time (kube-rs: 290 s, below the 300 s at which load
/// balancers like to cut).
const WATCH_SECONDS: u64 = 290;
/// A watch without any line for that long is dead: bookmarks come about once a minute.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS + 30);
/// Waits between failed attempts: client-go's reflector (800 ms to 30 s, doubling).
const FIRST_WAIT: Duration = Duration::from_millis(800);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A step that lasted longer was no failure in a row of failures.
const HEALTHY: Duration = Duration::from_secs(10);
/// The largest `Retry-After` that is honoured.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);
/// Above that, a line is large.
const LARGE_BYTES: usize = 64 << 10;
/// A line that does not end is given up.
const MAX_LINE_BYTES: usize = 8 << 20;

/// Where the watch stands. `step` moves it.
#[derive(Debug)]
enum State {
    /// Nothing is known: list. Leads to `Watching`; an error leads back here.
    Listing,
    /// Watch from that version on. Leads to itself with a later version, or to `Listing` when
    /// the version is too old.
    Watching(String),
}

/// What follows a step that went well.
enum Next {
    /// The next step.
    AtOnce,
    /// The next step, after a pause if this one was short: neither a watch that ends at once nor
    /// one that is always too late may become a busy loop.
    Pause,
}

#[derive(Debug, Error)]
enum StepError {
    #[error("{0}")]
    Transport(#[from] TransportError),
    #[error("{0}")]
    Answer(#[from] AnswerError),
    #[error("the watch broke off: {0}")]
    Broken(String),
    #[error("{status}: {message}")]
    Status {
        status: StatusCode,
        message: String,
        retry_after: Option<Duration>,
        body: Bytes,
    },
    /// Watching from no version would lose deletions without a sign.
    #[error("an answer without a resourceVersion")]
    NoVersion,
    #[error("not a Kubernetes answer: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error(transparent)]
    Closed(#[from] Closed),
}

/// A running typed watch.
pub struct Watch<'a> {
    /// The API server.
    pub api: &'a Api,
    /// Whose watch it is.
    pub session: &'a Session,
    /// What is watched.
    pub call: &'a TypedCall,
    /// Its operation number.
    pub operation: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    #[serde(default)]
    resource_version: String,
    #[serde(default, rename = "continue")]
    continue_token: String,
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: ListMetadata,
    /// `null` for an empty list of some aggregated API servers.
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ObjectMetadata {
    #[serde(default)]
    resource_version: String,
}

#[derive(Deserialize)]
struct Object {
    metadata: ObjectMetadata,
}

/// The fields of a `Status` that are needed here.
#[derive(Deserialize, Default)]
struct Status {
    #[serde(default)]
    code: u16,
    #[serde(default)]
    message: String,
}

impl Watch<'_> {
    /// Target of its log lines.
    fn child(&self) -> &str {
        &self.session.child.name
    }

    /// Runs until the mailbox closes, or until the API server says that it can never work; then
    /// returns the payload of the `error` event.
    pub async fn run(&self) -> Option<Bytes> {
        let mut state = State::Listing;
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        loop {
            let started = Instant::now();
            let result = self.step(&mut state).await;
            if started.elapsed() > HEALTHY {
                backoff.reset();
            }
            match result {
                Ok(Next::AtOnce) => {}
                Ok(Next::Pause) if started.elapsed() > HEALTHY => {}
                Ok(Next::Pause) => async_std::task::sleep(backoff.wait()).await,
                Err(StepError::Closed(_)) => return None,
                Err(StepError::Status {
                    status,
                    body,
                    message,
                    ..
                }) if matches!(status.as_u16(), 400 | 405) => {
                    log::warn!(target: self.child(), "watch of {}: {status}: {message}", self.call.path);
                    return Some(body);
                }
                Err(error) => {
                    let pause = self.report(&error).unwrap_or_default().max(backoff.wait());
                    async_std::task::sleep(pause).await;
                }
            }
        }
    }

    /// Logs a failed step at the level of who has to act; returns the server's own wish for a
    /// pause.
    fn report(&self, error: &StepError) -> Option<Duration> {
        let path = &self.call.path;
        match error {
            StepError::Status {
                status, message, ..
            } if *status == StatusCode::FORBIDDEN => {
                log::warn!(target: self.child(), "watch of {path}: {message} (needs the RBAC verbs list and watch)");
                None
            }
            StepError::Status {
                status, message, ..
            } if *status == StatusCode::NOT_FOUND => {
                log::warn!(target: self.child(), "watch of {path}: {message} (is its CRD installed?)");
                None
            }
            StepError::Status { retry_after, .. } => {
                log::info!(target: self.child(), "watch of {path}: {error}; trying again");
                retry_after.map(|pause| pause.min(LONGEST_RETRY_AFTER))
            }
            _ => {
                log::info!(target: self.child(), "watch of {path}: {error}; trying again");
                None
            }
        }
    }

    async fn step(&self, state: &mut State) -> Result<Next, StepError> {
        match state {
            State::Listing => {
                // In a box that is gone afterwards: watching goes on for long.
                let version = Box::pin(self.list()).await?;
                *state = State::Watching(version);
                Ok(Next::AtOnce)
            }
            State::Watching(version) => match self.watch(version).await {
                Ok(()) => Ok(Next::Pause),
                Err(StepError::Status {
                    status: StatusCode::GONE,
                    message,
                    ..
                }) => {
                    log::debug!(target: self.child(), "watch of {}: {message}; listing again", self.call.path);
                    *state = State::Listing;
                    Ok(Next::Pause)
                }
                Err(error) => {
                    if matches!(
                        error,
                        StepError::NoVersion
                            | StepError::Status {
                                status: StatusCode::BAD_REQUEST,
                                ..
                            }
                    ) {
                        *state = State::Listing;
                    }
                    Err(error)
                }
            },
        }
    }

    fn request(&self, extra: &[(&str, &str)]) -> ApiRequest {
        let mut query = form_urlencoded::Serializer::new(self.call.query.clone());
        query.extend_pairs(extra);
        ApiRequest::get(format!("{}?{}", self.call.path, query.finish()))
    }

    async fn item(&self, kind: &str, object: Option<&RawValue>) -> Result<(), Closed> {
        let payload = match object {
            None => format!(r#"{{"type":"{kind}"}}"#),
            Some(object) => format!(r#"{{"type":"{kind}","object":{}}}"#, object.get()),
        };
        let event = Event {
            operation: self.operation,
            kind: EventKind::Item,
            payload: payload.into(),
        };
        self.session.mailbox.send(event).await
    }

    /// Lists all pages; returns the version to watch from.
    async fn list(&self) -> Result<String, StepError> {
        let limit = self.call.limit.unwrap_or(PAGE_SIZE).to_string();
        let mut token = String::new();
        self.item("Init", None).await?;
        loop {
            let mut extra = vec![("limit", limit.as_str())];
            if !token.is_empty() {
                extra.push(("continue", &token));
            }
            // Held until the mailbox has taken the page.
            let _receiving = self.session.receive().await;
            let answer = self
                .api
                .call(&self.session.child.identity, self.request(&extra))
                .await?;
            if !answer.status.is_success() {
                return Err(status_error(answer.status, answer.retry_after, answer.body));
            }
            let page: Page = serde_json::from_slice(&answer.body)?;
            for object in page.items.into_iter().flatten() {
                self.item("InitApply", Some(object)).await?;
            }
            if page.metadata.continue_token.is_empty() {
                self.item("InitDone", None).await?;
                return versioned(page.metadata.resource_version);
            }
            token = page.metadata.continue_token;
        }
    }

    /// Watches once, from and to `version`. A watch that the server ends in good order is no error.
    async fn watch(&self, version: &mut String) -> Result<(), StepError> {
        let seconds = WATCH_SECONDS.to_string();
        let request = self.request(&[
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", &seconds),
            ("resourceVersion", version),
        ]);
        let response = self
            .api
            .send(&self.session.child.identity, Lane::Watch, request)
            .await?;
        let status = response.status();
        if !status.is_success() {
            let pause = retry_after(response.headers());
            let body = read_to_end(response.into_body()).await?;
            return Err(status_error(status, pause, body));
        }
        let mut body = response.into_body();
        let mut lines = LineBuffer::default();
        let mut place = None;
        loop {
            let frame = async_std::future::timeout(SILENCE, body.frame().map(Ok::<_, ()>)).await;
            let frame = match frame {
                Ok(Ok(Some(frame))) => frame.map_err(|e| StepError::Broken(e.to_string()))?,
                Ok(_) => return Ok(()),
                Err(_) => return Err(StepError::Broken("no sign of life".into())),
            };
            let Ok(chunk) = frame.into_data() else {
                continue;
            };
            let whole = lines.push(&chunk);
            // Large lines count among the answers a child may have received, until they are sent.
            if place.is_none() && lines.pending_bytes() + chunk.len() > LARGE_BYTES {
                place = Some(self.session.receive().await);
            }
            let Some(whole) = whole else {
                if lines.pending_bytes() > MAX_LINE_BYTES {
                    return Err(StepError::Broken(format!(
                        "a line above {MAX_LINE_BYTES} bytes"
                    )));
                }
                continue;
            };
            for line in whole.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
                self.line(line, version).await?;
            }
            if lines.pending_bytes() <= LARGE_BYTES {
                place = None;
            }
        }
    }

    async fn line(&self, line: &[u8], version: &mut String) -> Result<(), StepError> {
        let Line { kind, object } = serde_json::from_slice(line)?;
        let item = match kind {
            "ADDED" | "MODIFIED" => Some("Apply"),
            "DELETED" => Some("Delete"),
            "BOOKMARK" => None,
            "ERROR" => {
                let status: Status = serde_json::from_str(object.get()).unwrap_or_default();
                let code =
                    StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                let body = Bytes::copy_from_slice(object.get().as_bytes());
                return Err(status_error(code, None, body));
            }
            other => {
                log::debug!(target: self.child(), "watch of {}: unknown event {other:?}", self.call.path);
                return Ok(());
            }
        };
        let seen: Object = serde_json::from_str(object.get())?;
        if let Some(item) = item {
            self.item(item, Some(object)).await?;
        }
        *version = versioned(seen.metadata.resource_version)?;
        Ok(())
    }
}

fn versioned(version: String) -> Result<String, StepError> {
    if version.is_empty() {
        Err(StepError::NoVersion)
    } else {
        Ok(version)
    }
}

fn status_error(status: StatusCode, retry_after: Option<Duration>, body: Bytes) -> StepError {
    let parsed: Status = serde_json::from_slice(&body).unwrap_or_default();
    let message = if parsed.message.is_empty() {
        status
            .canonical_reason()
            .unwrap_or("no reason given")
            .to_owned()
    } else {
        parsed.message
    };
    StepError::Status {
        status,
        message,
        retry_after,
        body,
    }
}
