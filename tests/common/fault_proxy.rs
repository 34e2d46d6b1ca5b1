//! A proxy between the parent and the API server that breaks what networks and servers break.
//!
//! Towards the parent it is an HTTP/1.1 server without TLS on loopback; towards the API server it
//! is a client with the cluster's credentials. Every request has connections of its own. Faults
//! are switched on with [`FaultProxy::inject`], for chosen requests and a number of times, and
//! count how often they struck.

use std::fmt::Write as _;
use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::cluster::{Cluster, Endpoint};
use super::http::Head;
use super::operator::kubeconfig;
use super::{PATIENCE, wait_for};

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The answer's body comes in pieces of 1 to 7 bytes. Goes together with other faults.
    Split,
    /// The connection breaks in the middle of a line of the answer, after that many whole lines.
    Cut {
        /// Lines that pass.
        after: usize,
    },
    /// The answer is HTTP 410.
    Gone,
    /// The answer is a watch whose one event says 410.
    GoneEvent,
    /// The answer is HTTP 429 with `Retry-After: 1`.
    TooManyRequests,
    /// There is no answer until the fault is switched off.
    Stall,
    /// This is the answer, with status 200 and as JSON; the API server is not asked.
    Canned(Arc<Vec<u8>>),
}

/// A request, as far as faults look at it.
#[derive(Clone, Debug)]
pub struct Request {
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// When it came.
    pub at: Instant,
}

impl Request {
    /// Whether it asks for a watch.
    pub fn is_watch(&self) -> bool {
        self.path.contains("watch=true") || self.path.contains("watch=1")
    }
}

type Which = Box<dyn Fn(&Request) -> bool + Send + Sync>;

/// A fault that was switched on.
pub struct Injected {
    fault: Fault,
    which: Which,
    hits: AtomicUsize,
    limit: AtomicUsize,
    changed: (Mutex<()>, Condvar),
}

impl Injected {
    /// How often it struck.
    pub fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }

    /// Waits until it has struck that often.
    pub fn wait_for_hits(&self, count: usize) {
        let what = format!("{:?} to strike {count} times", self.fault);
        wait_for(&what, PATIENCE, || (self.hits() >= count).then_some(()));
    }

    /// Switches it off; who is stalled goes on.
    pub fn off(&self) {
        let _guard = self
            .changed
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.limit.store(0, Ordering::SeqCst);
        self.changed.1.notify_all();
    }

    /// Takes one strike for a request.
    fn strikes(&self, request: &Request) -> bool {
        (self.which)(request)
            && self
                .hits
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |hits| {
                    (hits < self.limit.load(Ordering::SeqCst)).then_some(hits + 1)
                })
                .is_ok()
    }

    fn wait_until_off(&self) {
        let mut guard = self
            .changed
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while self.limit.load(Ordering::SeqCst) > 0 {
            guard = self
                .changed
                .1
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

struct Shared {
    upstream: Option<Endpoint>,
    faults: Mutex<Vec<Arc<Injected>>>,
    requests: Mutex<Vec<Request>>,
    over: AtomicBool,
}

/// See the module's documentation.
pub struct FaultProxy {
    address: std::net::SocketAddr,
    shared: Arc<Shared>,
}

impl FaultProxy {
    /// A proxy to that cluster.
    pub fn to(cluster: &Cluster) -> Self {
        Self::start(Some(cluster.endpoint.clone()))
    }

    /// A proxy to nowhere: what no fault answers is a 404.
    pub fn to_nowhere() -> Self {
        Self::start(None)
    }

    fn start(upstream: Option<Endpoint>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            upstream,
            faults: Mutex::default(),
            requests: Mutex::default(),
            over: AtomicBool::new(false),
        });
        let server = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if server.over.load(Ordering::SeqCst) {
                    break;
                }
                let server = server.clone();
                // A connection that breaks is what this is about.
                std::thread::spawn(move || drop(server.serve(client)));
            }
        });
        Self { address, shared }
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A kubeconfig that leads here.
    pub fn kubeconfig(&self) -> String {
        kubeconfig(&self.url())
    }

    /// Switches a fault on for the next `times` requests that `which` chooses. Of several faults
    /// for one request the oldest strikes.
    pub fn inject(
        &self,
        fault: Fault,
        times: usize,
        which: impl Fn(&Request) -> bool + Send + Sync + 'static,
    ) -> Arc<Injected> {
        let injected = Arc::new(Injected {
            fault,
            which: Box::new(which),
            hits: AtomicUsize::new(0),
            limit: AtomicUsize::new(times),
            changed: (Mutex::new(()), Condvar::new()),
        });
        let mut faults = self.shared.faults.lock().unwrap();
        faults.push(injected.clone());
        injected
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// Waits until that many requests have come that `which` chooses.
    pub fn wait_for_requests(&self, what: &str, count: usize, which: impl Fn(&Request) -> bool) {
        wait_for(what, PATIENCE, || {
            let found = self.requests().iter().filter(|r| which(r)).count();
            (found >= count).then_some(())
        });
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        for fault in self.shared.faults.lock().unwrap().iter() {
            fault.off();
        }
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

/// Where an answer's body goes: chunks, perhaps tiny ones, and perhaps an early end.
struct Answer {
    client: TcpStream,
    split: bool,
    cut_after: Option<usize>,
    lines: usize,
}

impl Answer {
    fn head(&mut self, status_line: &str, headers: &[(String, String)]) -> io::Result<()> {
        let mut head = format!("{status_line}\r\n");
        for (name, value) in headers {
            write!(head, "{name}: {value}\r\n").map_err(io::Error::other)?;
        }
        head.push_str("transfer-encoding: chunked\r\nconnection: close\r\n\r\n");
        self.client.write_all(head.as_bytes())
    }

    /// Whether to go on.
    fn body(&mut self, piece: &[u8]) -> io::Result<bool> {
        let Some(after) = self.cut_after else {
            self.chunks(piece)?;
            return Ok(true);
        };
        for line in piece.split_inclusive(|b| *b == b'\n') {
            if self.lines == after {
                // At least the first byte passes, and never the line's end.
                self.chunks(&line[..line.len().div_ceil(2).min(line.len() - 1).max(1)])?;
                return Ok(false);
            }
            self.chunks(line)?;
            self.lines += usize::from(line.ends_with(b"\n"));
        }
        Ok(true)
    }

    fn chunks(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let mut size = 0;
        while !bytes.is_empty() {
            size = if self.split {
                size % 7 + 1
            } else {
                bytes.len()
            };
            let (chunk, rest) = bytes.split_at(size.min(bytes.len()));
            let mut framed = format!("{:x}\r\n", chunk.len()).into_bytes();
            framed.extend_from_slice(chunk);
            framed.extend_from_slice(b"\r\n");
            self.client.write_all(&framed)?;
            bytes = rest;
        }
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        self.client.write_all(b"0\r\n\r\n")
    }
}

const GONE: &str = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old resource version: 1 (2)","reason":"Expired","code":410}"#;
const TOO_MANY: &str = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too many requests, please try again later","reason":"TooManyRequests","code":429}"#;

impl Shared {
    /// Serves one request.
    fn serve(&self, client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut from_client = BufReader::new(client.try_clone()?);
        let Some(head) = Head::read(&mut from_client)? else {
            return Ok(());
        };
        let body = head.request_body().read_all(&mut from_client)?;
        let mut words = head.first_line.split(' ');
        let request = Request {
            method: words.next().unwrap_or_default().to_owned(),
            path: words.next().unwrap_or_default().to_owned(),
            at: Instant::now(),
        };
        let mut answer = Answer {
            client,
            split: false,
            cut_after: None,
            lines: 0,
        };
        let chosen = self.choose(&request, &mut answer);
        self.requests.lock().unwrap().push(request);
        match chosen.as_deref().map(|f| &f.fault) {
            Some(Fault::Gone) => canned(&mut answer, "410 Gone", &[], GONE.as_bytes()),
            Some(Fault::GoneEvent) => {
                let event = format!("{{\"type\":\"ERROR\",\"object\":{GONE}}}\n");
                canned(&mut answer, "200 OK", &[], event.as_bytes())
            }
            Some(Fault::TooManyRequests) => {
                let retry = [("retry-after".to_owned(), "1".to_owned())];
                canned(
                    &mut answer,
                    "429 Too Many Requests",
                    &retry,
                    TOO_MANY.as_bytes(),
                )
            }
            Some(Fault::Canned(body)) => canned(&mut answer, "200 OK", &[], body),
            _ => {
                if let Some(stalled) = chosen.filter(|f| matches!(f.fault, Fault::Stall)) {
                    stalled.wait_until_off();
                }
                match &self.upstream {
                    Some(upstream) => forward(upstream, &head, &body, &mut answer),
                    None => canned(&mut answer, "404 Not Found", &[], b"{}"),
                }
            }
        }
    }

    /// The fault that strikes this request.
    fn choose(&self, request: &Request, answer: &mut Answer) -> Option<Arc<Injected>> {
        let faults = self.faults.lock().unwrap();
        let is_split = |f: &Injected| matches!(f.fault, Fault::Split);
        answer.split = faults.iter().any(|f| is_split(f) && f.strikes(request));
        let chosen = faults.iter().find(|f| !is_split(f) && f.strikes(request))?;
        if let Fault::Cut { after } = chosen.fault {
            answer.cut_after = Some(after);
        }
        Some(chosen.clone())
    }
}

fn canned(
    answer: &mut Answer,
    status: &str,
    headers: &[(String, String)],
    body: &[u8],
) -> io::Result<()> {
    let mut headers = headers.to_vec();
    headers.push(("content-type".to_owned(), "application/json".to_owned()));
    answer.head(&format!("HTTP/1.1 {status}"), &headers)?;
    if !answer.body(body)? {
        return Ok(());
    }
    answer.end()
}

/// Headers that belong to a connection, and those that the proxy sets itself.
fn is_hop_header(name: &str) -> bool {
    matches!(
        name,
        "connection" | "transfer-encoding" | "content-length" | "host" | "keep-alive"
    )
}

fn forward(upstream: &Endpoint, head: &Head, body: &[u8], answer: &mut Answer) -> io::Result<()> {
    let mut server = upstream.connect()?;
    let mut text = format!("{}\r\n{}", head.first_line, upstream.own_headers());
    for (name, value) in head.headers.iter().filter(|(n, _)| !is_hop_header(n)) {
        write!(text, "{name}: {value}\r\n").map_err(io::Error::other)?;
    }
    write!(text, "content-length: {}\r\n\r\n", body.len()).map_err(io::Error::other)?;
    server.write_all(text.as_bytes())?;
    server.write_all(body)?;
    server.flush()?;
    let mut server = BufReader::new(server);
    copy_answer(&mut server, answer)
}

fn copy_answer(server: &mut impl Read, answer: &mut Answer) -> io::Result<()> {
    let head = Head::read(server)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let headers: Vec<_> = head
        .headers
        .iter()
        .filter(|(n, _)| !is_hop_header(n))
        .cloned()
        .collect();
    answer.head(&head.first_line, &headers)?;
    let mut body = head.body();
    loop {
        let piece = body.next(server)?;
        if piece.is_empty() {
            return answer.end();
        }
        if !answer.body(&piece)? {
            // Closed without the chunk that ends a body.
            return Ok(());
        }
    }
}
