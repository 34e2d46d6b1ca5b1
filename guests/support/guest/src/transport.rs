//! HTTP over the parent: a request is an operation, its answer a series of events.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use wasm_operator_abi::{self as abi, Verb, event};

/// A request or its answer failed below HTTP. Callers may try again.
#[derive(Clone, Debug)]
pub struct Error(String);

impl Error {
    /// An error with that message.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// What has arrived of an answer and was not taken yet.
#[derive(Default)]
struct Inbox {
    head: Option<(StatusCode, HeaderMap)>,
    chunks: VecDeque<Bytes>,
    end: Option<Result<(), Error>>,
    waker: Option<Waker>,
}

type SharedInbox = Arc<Mutex<Inbox>>;
type Arrived = (u64, u32, Box<[u8]>);

/// The open operations.
static OPERATIONS: Mutex<Option<HashMap<u64, SharedInbox>>> = Mutex::new(None);
/// Events that wait for the step: operation, kind and payload.
static EVENTS: Mutex<VecDeque<Arrived>> = Mutex::new(VecDeque::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes an event for the step that follows.
pub(crate) fn deliver(operation: u64, kind: u32, payload: Box<[u8]>) {
    lock(&EVENTS).push_back((operation, kind, payload));
}

/// Hands events to their operations and wakes who waits for them.
pub(crate) fn dispatch() {
    while let Some((operation, kind, payload)) = { lock(&EVENTS).pop_front() } {
        let Some(inbox) = lock(&OPERATIONS)
            .as_ref()
            .and_then(|o| o.get(&operation).cloned())
        else {
            continue; // dropped meanwhile
        };
        let mut inbox = lock(&inbox);
        match kind {
            event::HEAD => inbox.head = Some(parse_head(&payload)),
            event::DATA => inbox.chunks.push_back(payload.into()),
            event::END => inbox.end = Some(Ok(())),
            event::ERROR => inbox.end = Some(Err(parse_error(&payload))),
            _ => {}
        }
        let waker = inbox.waker.take();
        drop(inbox);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

fn parse_head(head: &[u8]) -> (StatusCode, HeaderMap) {
    let mut lines = head.split(|b| *b == b'\n');
    let status = lines.next().and_then(|s| StatusCode::from_bytes(s).ok());
    let mut headers = HeaderMap::new();
    for line in lines {
        let Some(colon) = line.windows(2).position(|w| w == b": ") else {
            continue;
        };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(&line[colon + 2..]);
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    (status.unwrap_or(StatusCode::BAD_GATEWAY), headers)
}

/// From the form of a Kubernetes `Status`.
fn parse_error(status: &[u8]) -> Error {
    let status: serde_json::Value = serde_json::from_slice(status).unwrap_or_default();
    let text = |field: &str| status[field].as_str().unwrap_or("unknown").to_owned();
    Error(format!("{}: {}", text("reason"), text("message")))
}

/// An open operation; dropping it cancels it.
struct Operation {
    number: u64,
    inbox: SharedInbox,
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let Some(operations) = lock(&OPERATIONS).as_mut() {
            operations.remove(&self.number);
        }
        if lock(&self.inbox).end.is_none() {
            abi::cancel(self.number);
        }
    }
}

impl std::fmt::Debug for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Operation({})", self.number)
    }
}

/// Sends a request.
///
/// # Errors
/// When the host refuses it.
pub fn send(request: &http::request::Parts, body: &[u8]) -> Result<ResponseFuture, Error> {
    let mut text = format!("{} {}\n", request.method, request.uri).into_bytes();
    for (name, value) in &request.headers {
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.push(b'\n');
    }
    text.push(b'\n');
    text.extend_from_slice(body);
    let number = abi::start(Verb::Request, &text).map_err(|e| Error(e.to_string()))?;
    let inbox = SharedInbox::default();
    lock(&OPERATIONS)
        .get_or_insert_default()
        .insert(number, inbox.clone());
    Ok(ResponseFuture(Some(Operation { number, inbox })))
}

/// Resolves to the head of the answer.
#[derive(Debug)]
pub struct ResponseFuture(Option<Operation>);

impl Future for ResponseFuture {
    type Output = Result<Response<Body>, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let operation = self.0.take().expect("polled after it was ready");
        let mut inbox = lock(&operation.inbox);
        if let Some((status, headers)) = inbox.head.take() {
            drop(inbox);
            let mut response = Response::new(Body(operation));
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            return Poll::Ready(Ok(response));
        }
        match &inbox.end {
            Some(Err(error)) => Poll::Ready(Err(error.clone())),
            Some(Ok(())) => Poll::Ready(Err(Error::new("an answer without a head"))),
            None => {
                inbox.waker = Some(context.waker().clone());
                drop(inbox);
                self.0 = Some(operation);
                Poll::Pending
            }
        }
    }
}

/// The body of an answer, as it arrives.
#[derive(Debug)]
pub struct Body(Operation);

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Error>>> {
        let mut inbox = lock(&self.0.inbox);
        if let Some(chunk) = inbox.chunks.pop_front() {
            return Poll::Ready(Some(Ok(http_body::Frame::data(chunk))));
        }
        match &inbox.end {
            Some(Ok(())) => Poll::Ready(None),
            Some(Err(error)) => Poll::Ready(Some(Err(error.clone()))),
            None => {
                inbox.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}
