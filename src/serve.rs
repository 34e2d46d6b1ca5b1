//! A small HTTP server for what this process itself has to tell: metrics, predictions.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::time::Duration;

use async_std::future::timeout;
use async_std::net::{TcpListener, TcpStream};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::{Either, select};
use futures::stream::FuturesUnordered;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};

use crate::hyper_io::{Clock, Io, Socket};

/// Connections at a time; others wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
const MAX_BODY_BYTES: usize = 1 << 20;
/// A request's head has to be there by then, and the connection is closed when none comes.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Of a request's head, and of answers that wait to be sent.
const BUFFER_BYTES: usize = 64 << 10;
/// No connection lives longer, whatever it does: who does not read its answers holds a place.
const LIFE: Duration = Duration::from_secs(600);
/// After a failure to accept (no descriptors left, say).
const PAUSE: Duration = Duration::from_millis(200);

/// Answers requests until the future is dropped, which closes all connections.
pub async fn serve<H, F>(listener: TcpListener, handler: H)
where
    H: Fn(Request<Bytes>) -> F + Clone,
    F: Future<Output = Response<Bytes>>,
{
    let mut connections = FuturesUnordered::new();
    let mut has_failed = false;
    loop {
        let may_accept = connections.len() < MAX_CONNECTIONS;
        let accept = async {
            if !may_accept {
                return std::future::pending().await;
            }
            let accepted = listener.accept().await;
            if accepted.is_err() {
                async_std::task::sleep(PAUSE).await;
            }
            accepted
        };
        let end = async {
            if connections.next().await.is_none() {
                std::future::pending::<()>().await;
            }
        };
        match select(pin!(accept), pin!(end)).await {
            Either::Left((Ok((socket, _)), _)) => {
                has_failed = false;
                connections.push(connection(socket, handler.clone()));
            }
            Either::Left((Err(error), _)) => {
                if !std::mem::replace(&mut has_failed, true) {
                    log::warn!("accepting a connection: {error}");
                }
            }
            Either::Right(_) => {}
        }
    }
}

/// One connection, to its end.
async fn connection<H, F>(socket: TcpStream, handler: H)
where
    H: Fn(Request<Bytes>) -> F,
    F: Future<Output = Response<Bytes>>,
{
    let service = service_fn(|request| {
        let answer = answer(request, &handler);
        async move { Ok::<_, Infallible>(answer.await.map(Full::new)) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(Clock)
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(Io::new(Socket::Plain(socket)), service);
    match timeout(LIFE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("a connection to this process's own server: {error}"),
        Err(_) => log::debug!("a connection to this process's own server: too old"),
    }
}

async fn answer<H, F>(request: Request<Incoming>, handler: &H) -> Response<Bytes>
where
    H: Fn(Request<Bytes>) -> F,
    F: Future<Output = Response<Bytes>>,
{
    let (head, body) = request.into_parts();
    if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
        return text(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large\n");
    }
    let body = Limited::new(body, MAX_BODY_BYTES).collect();
    match timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => handler(Request::from_parts(head, body.to_bytes())).await,
        Ok(Err(_)) => text(
            StatusCode::PAYLOAD_TOO_LARGE,
            "the body is broken or too large\n",
        ),
        Err(_) => text(
            StatusCode::REQUEST_TIMEOUT,
            "the body did not come in time\n",
        ),
    }
}

/// A plain text answer.
pub fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    response
}

/// Listens there.
///
/// # Errors
/// What the system says, with the address.
pub async fn listen(address: std::net::SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|e| io::Error::new(e.kind(), format!("{address}: {e}")))
}

/// Serves `/metrics` (and `/healthz`, which only says that the process answers).
pub async fn metrics(request: Request<Bytes>) -> Response<Bytes> {
    match request.uri().path() {
        "/metrics" => {
            let mut response = text(StatusCode::OK, crate::metrics::render());
            response.headers_mut().insert(
                http::header::CONTENT_TYPE,
                http::HeaderValue::from_static("text/plain; version=0.0.4"),
            );
            response
        }
        "/healthz" => text(StatusCode::OK, "ok\n"),
        _ => text(StatusCode::NOT_FOUND, "there are /metrics and /healthz\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_std::io::{ReadExt, WriteExt};
    use async_std::task::{block_on, spawn};

    async fn ask(address: std::net::SocketAddr, request: String) -> String {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[test]
    fn requests_are_answered_and_large_ones_refused() {
        block_on(async {
            let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
            let address = listener.local_addr().unwrap();
            spawn(serve(listener, metrics));
            let head = "HTTP/1.1\r\nhost: a\r\nconnection: close\r\n";
            let answer = ask(address, format!("GET /metrics {head}\r\n")).await;
            assert!(answer.contains("wasm_operator_wakes_total"), "{answer}");
            let answer = ask(address, format!("GET /x {head}\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
            let large = format!("POST /metrics {head}content-length: 9999999\r\n\r\n");
            let answer = ask(address, large).await;
            assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        });
    }

    #[test]
    fn places_are_limited_and_given_back_and_all_end_with_the_server() {
        block_on(async {
            let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = spawn(serve(listener, metrics));
            let mut idle = Vec::new();
            for _ in 0..MAX_CONNECTIONS {
                idle.push(TcpStream::connect(address).await.unwrap());
            }
            let request = "GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
            let mut waiting = Box::pin(ask(address, request.into()));
            let soon = Duration::from_millis(200);
            assert!(timeout(soon, &mut waiting).await.is_err(), "one too many");
            idle.pop();
            assert!(waiting.await.starts_with("HTTP/1.1 200"));
            server.cancel().await;
            for mut socket in idle {
                let read = timeout(Duration::from_secs(5), socket.read(&mut [0])).await;
                assert_eq!(read.unwrap().unwrap_or(0), 0);
            }
        });
    }
}
