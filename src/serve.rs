//! A small HTTP server for what this process itself has to tell: metrics, predictions.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_lock::Semaphore;
use async_std::future::timeout;
use async_std::net::TcpListener;
use bytes::Bytes;
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
/// After a failure to accept (no descriptors left, say).
const PAUSE: Duration = Duration::from_millis(200);

/// Answers requests until the future is dropped.
pub async fn serve<H, F>(listener: TcpListener, handler: H)
where
    H: Fn(Request<Bytes>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Bytes>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = places.acquire_arc().await;
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                log::warn!("accepting a connection: {error}");
                async_std::task::sleep(PAUSE).await;
                continue;
            }
        };
        let handler = handler.clone();
        async_std::task::spawn(async move {
            let _place = place;
            let service = service_fn(move |request| {
                let handler = handler.clone();
                async move { Ok::<_, Infallible>(answer(request, handler).await.map(Full::new)) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(Clock)
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(Io::new(Socket::Plain(socket)), service);
            if let Err(error) = connection.await {
                log::debug!("a connection to this process's own server: {error}");
            }
        });
    }
}

async fn answer<H, F>(request: Request<Incoming>, handler: H) -> Response<Bytes>
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
    use async_std::net::TcpStream;
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
}
