//! What a child asked for, carried out: each operation is a task that talks to the API server and
//! posts its answers to the child's mailbox.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use http_body::Frame;
use http_body_util::BodyExt;

use crate::abi::{CallError, Event, EventKind, MAX_DATA_BYTES, encode_failure, encode_head};
use crate::api::{Answer, AnswerError, Api, ApiRequest};
use crate::calls::{RawCall, TypedCall, Verb};
use crate::frames::Frames;
use crate::mailbox::Closed;
use crate::session::Session;
use crate::transport::{Lane, TransportError};
use crate::watch::Watch;

/// How often a call is sent again that the API server put off with 429 and `Retry-After`. It was
/// not processed then, whatever its verb (API priority and fairness).
const MAX_RETRIES: usize = 5;
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Starts a typed call.
///
/// # Errors
/// [`CallError`] when it is malformed or one too many.
pub fn start_typed(
    session: &Arc<Session>,
    api: &Api,
    verb: Verb,
    descriptor: &[u8],
) -> Result<u64, CallError> {
    let call = TypedCall::parse(verb, descriptor)?;
    let (owner, api) = (session.clone(), api.clone());
    let bytes = descriptor.len();
    if verb != Verb::Watch {
        return session.open(false, bytes, move |operation| async move {
            // Held until the mailbox has taken the answer.
            let _receiving = owner.receive().await;
            let event = typed(&owner, &api, operation, &call).await;
            // A closed mailbox has nobody left to tell.
            let _ = owner.mailbox.send(event).await;
        });
    }
    session.open(true, bytes, move |operation| async move {
        let watch = Watch {
            api: &api,
            session: &owner,
            call: &call,
            operation,
        };
        let Some(payload) = watch.run().await else {
            return;
        };
        let event = Event {
            operation,
            kind: EventKind::Error,
            payload,
        };
        let _ = owner.mailbox.send(event).await;
    })
}

/// Starts a raw request.
///
/// # Errors
/// [`CallError`] when it is malformed or one too many.
pub fn start_raw(session: &Arc<Session>, api: &Api, request: &Bytes) -> Result<u64, CallError> {
    let call = RawCall::parse(request)?;
    let (owner, api) = (session.clone(), api.clone());
    session.open(call.is_watch, request.len(), move |operation| async move {
        let raw = Raw {
            session: &owner,
            operation,
        };
        let last = match raw.run(&api, call).await {
            Ok(()) => raw.event(EventKind::End, Bytes::new()),
            Err(RawError::Failed { reason, message }) => {
                log::debug!(target: &owner.child.name, "operation {operation}: {message}");
                raw.event(EventKind::Error, encode_failure(reason, &message))
            }
            Err(RawError::Closed(Closed)) => return,
        };
        let _ = owner.mailbox.send(last).await;
    })
}

async fn typed(session: &Session, api: &Api, operation: u64, call: &TypedCall) -> Event {
    let (kind, payload) = match answer(session, api, call).await {
        Ok(answer) if answer.status.is_success() => (EventKind::Result, answer.body),
        Ok(answer) => (EventKind::Error, status_payload(&answer)),
        Err(error) => {
            log::debug!(target: &session.child.name, "operation {operation}: {error}");
            let reason = match &error {
                AnswerError::TooLarge => "TooLarge",
                AnswerError::Transport(TransportError::TimedOut(_)) => "TimedOut",
                _ => "ConnectionFailed",
            };
            (EventKind::Error, encode_failure(reason, &error.to_string()))
        }
    };
    Event {
        operation,
        kind,
        payload,
    }
}

/// Sends a typed call, again when the server asks to come back later.
async fn answer(session: &Session, api: &Api, call: &TypedCall) -> Result<Answer, AnswerError> {
    let mut request = ApiRequest::get(call.path_and_query());
    request.method = call.method.clone();
    request.body = call.body.clone();
    if !call.body.is_empty() {
        let content_type = HeaderValue::from_static(call.content_type);
        request.headers.push((header::CONTENT_TYPE, content_type));
    }
    let mut retries = 0;
    loop {
        let answer = api.call(&session.child.identity, request.clone()).await?;
        match answer.retry_after {
            Some(pause)
                if answer.status == StatusCode::TOO_MANY_REQUESTS && retries < MAX_RETRIES =>
            {
                retries += 1;
                async_std::task::sleep(pause.min(LONGEST_RETRY_AFTER)).await;
            }
            _ => return Ok(answer),
        }
    }
}

/// The body of a failed answer when it is a `Status`, as the API server's are; else one made of
/// what there is (a proxy's error page, say).
fn status_payload(answer: &Answer) -> Bytes {
    #[derive(serde::Deserialize)]
    struct Kind<'a> {
        kind: &'a str,
    }
    if serde_json::from_slice::<Kind>(&answer.body).is_ok_and(|k| k.kind == "Status") {
        return answer.body.clone();
    }
    let text: String = String::from_utf8_lossy(&answer.body)
        .chars()
        .take(512)
        .collect();
    serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": answer.status.as_u16(),
        "reason": reason(answer.status),
        "message": text,
    })
    .to_string()
    .into()
}

/// A status as the API server's `StatusReason`s are spelt (`metav1`, types.go).
fn reason(status: StatusCode) -> String {
    match status {
        StatusCode::INTERNAL_SERVER_ERROR => "InternalError".to_owned(),
        status => status
            .canonical_reason()
            .unwrap_or_default()
            .replace(' ', ""),
    }
}

enum RawError {
    Failed {
        reason: &'static str,
        message: String,
    },
    Closed(Closed),
}

impl From<Closed> for RawError {
    fn from(closed: Closed) -> Self {
        Self::Closed(closed)
    }
}

/// A raw request on its way.
struct Raw<'a> {
    session: &'a Session,
    operation: u64,
}

impl Raw<'_> {
    fn event(&self, kind: EventKind, payload: Bytes) -> Event {
        Event {
            operation: self.operation,
            kind,
            payload,
        }
    }

    async fn run(&self, api: &Api, call: RawCall) -> Result<(), RawError> {
        let (method, target) = (call.method.clone(), call.path_and_query.clone());
        let lane = if call.is_watch {
            Lane::Watch
        } else {
            Lane::Call
        };
        let request = ApiRequest {
            method: call.method,
            path_and_query: call.path_and_query,
            headers: call.headers,
            body: call.body,
        };
        let response = api
            .send(&self.session.child.identity, lane, request)
            .await
            .map_err(|error| {
                let timed_out = matches!(error, TransportError::TimedOut(_));
                RawError::Failed {
                    reason: if timed_out {
                        "TimedOut"
                    } else {
                        "ConnectionFailed"
                    },
                    message: error.to_string(),
                }
            })?;
        if response.status() == StatusCode::FORBIDDEN {
            log::warn!(target: &self.session.child.name, "{method} {target} is forbidden to it: grant the RBAC verb, or set serviceAccountName");
        }
        let head = encode_head(response.status(), response.headers());
        self.session
            .mailbox
            .send(self.event(EventKind::Head, head))
            .await?;
        let content_type = response.headers().get(header::CONTENT_TYPE);
        let content_type = content_type.and_then(|v| v.to_str().ok());
        let is_watch = call.is_watch && response.status().is_success();
        let mut frames = is_watch.then(|| Frames::new(content_type.unwrap_or_default()));
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            let chunk = match frame.map(Frame::into_data) {
                Ok(Ok(chunk)) => chunk,
                // Trailers.
                Ok(Err(_)) => continue,
                Err(error) => {
                    self.finish(frames).await?;
                    return Err(RawError::Failed {
                        reason: "ConnectionFailed",
                        message: format!("the answer broke off: {error}"),
                    });
                }
            };
            match &mut frames {
                None => self.send_data(chunk).await?,
                Some(frames) => {
                    for data in frames.push(&chunk) {
                        self.send_data(data).await?;
                    }
                }
            }
        }
        self.finish(frames).await
    }

    /// Sends what a watch has kept back.
    async fn finish(&self, frames: Option<Frames>) -> Result<(), RawError> {
        for data in frames.map_or_else(Vec::new, |mut frames| frames.finish()) {
            self.send_data(data).await?;
        }
        Ok(())
    }

    async fn send_data(&self, mut data: Bytes) -> Result<(), RawError> {
        while !data.is_empty() {
            let part = data.split_to(data.len().min(MAX_DATA_BYTES));
            self.session.flows(self.operation).await;
            self.session
                .mailbox
                .send(self.event(EventKind::Data, part))
                .await?;
        }
        Ok(())
    }
}
