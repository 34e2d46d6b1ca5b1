//! Every connection this process opens: HTTP/2 by ALPN with HTTP/1.1 as fallback, TLS by rustls,
//! sockets by async-std.
//!
//! One [`Transport`] serves the API server, a second one everything else (through [`surf`]).
//! HTTP/2 servers cap the streams of a connection (kube-apiserver: 100), and a request above the
//! cap waits without an error. So streams are counted, and spread over as many connections as they
//! need; long-lived watches and short calls have connections of their own.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_std::net::TcpStream;
use bytes::Bytes;
use futures_rustls::TlsConnector;
use http_body_util::Full;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper_util::client::legacy::{Client, Error as ClientError};
use thiserror::Error;

use crate::hyper_io::{Clock, Executor, Io, Socket};

/// Below kube-apiserver's 100 streams a connection, with room for a count that lags.
const STREAMS_PER_CONNECTION: usize = 80;
/// What a stream may send before it is read. A child that does not read holds no more than that...
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// ... and the connection has room for all of its streams: none of them can starve the others.
const CONNECTION_WINDOW_BYTES: u32 = STREAM_WINDOW_BYTES * 100;
/// An unanswered TCP or TLS handshake is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pings on HTTP/2 connections with open streams; client-go's `http2.Transport` uses the same
/// figures (`ReadIdleTimeout`, `PingTimeout`).
const PING_AFTER: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// The body of every request: whole, in memory.
pub type RequestBody = Full<Bytes>;

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum TransportError {
    /// No connection, or it broke before the head of the answer.
    #[error("{}", chain(.0))]
    Client(#[from] ClientError),
    /// A layer above the connection failed (credentials, base URL).
    #[error("{0}")]
    Layer(String),
    /// No answer in time.
    #[error("no answer within {} s", .0.as_secs())]
    TimedOut(Duration),
}

/// An error with its causes, which hyper keeps out of its own text.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What a request's connection is used for; an extension of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Answered soon.
    Call,
    /// Open for minutes.
    Watch,
}

/// A family of connections with one TLS configuration. Cheap to clone.
#[derive(Clone)]
pub struct Transport {
    inner: Arc<Inner>,
}

struct Inner {
    dialer: Dialer,
    calls: Pool,
    watches: Pool,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transport")
    }
}

impl Transport {
    /// A transport with that TLS configuration; its ALPN list is set here. `server_name` replaces
    /// the host name in TLS (kubeconfig's `tls-server-name`).
    pub fn new(mut tls: rustls::ClientConfig, server_name: Option<String>) -> Self {
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let dialer = Dialer {
            tls: Arc::new(tls),
            server_name: server_name.map(Into::into),
        };
        Self {
            inner: Arc::new(Inner {
                dialer,
                calls: Pool::default(),
                watches: Pool::default(),
            }),
        }
    }

    /// Sends a request to the server its URL names.
    ///
    /// # Errors
    /// [`TransportError::Client`]. Statuses are not errors.
    pub async fn send(
        &self,
        lane: Lane,
        request: http::Request<RequestBody>,
    ) -> Result<http::Response<Body>, TransportError> {
        let pool = match lane {
            Lane::Call => &self.inner.calls,
            Lane::Watch => &self.inner.watches,
        };
        let stream = pool.stream(&self.inner.dialer);
        let response = stream.connection.client.request(request).await?;
        Ok(response.map(|incoming| Body {
            incoming,
            _stream: stream,
        }))
    }
}

/// A response's body; holds its place in the connection until it is dropped.
#[derive(Debug)]
pub struct Body {
    incoming: Incoming,
    _stream: Stream,
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.incoming).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// The connections of one lane. Each entry is a client that shares one HTTP/2 connection among its
/// requests, or opens one per request under HTTP/1.1.
#[derive(Default)]
struct Pool {
    /// Held for the time of a search.
    connections: Mutex<Vec<Arc<PooledConnection>>>,
}

struct PooledConnection {
    client: Client<Dialer, RequestBody>,
    streams: AtomicUsize,
}

/// A request's place in a connection.
struct Stream {
    connection: Arc<PooledConnection>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stream")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.connection.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    fn stream(&self, dialer: &Dialer) -> Stream {
        let mut connections = self
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let with_room = connections
            .iter()
            .find(|c| c.streams.load(Ordering::Relaxed) < STREAMS_PER_CONNECTION)
            .cloned();
        let connection = with_room.unwrap_or_else(|| {
            let connection = Arc::new(PooledConnection {
                client: dialer.client(),
                streams: AtomicUsize::new(0),
            });
            connections.push(connection.clone());
            connection
        });
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Stream { connection }
    }
}

/// Opens connections.
#[derive(Clone)]
struct Dialer {
    tls: Arc<rustls::ClientConfig>,
    server_name: Option<Arc<str>>,
}

impl Dialer {
    fn client(&self) -> Client<Dialer, RequestBody> {
        Client::builder(Executor)
            .timer(Clock)
            .pool_timer(Clock)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
            .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(PING_AFTER)
            .http2_keep_alive_timeout(PING_TIMEOUT)
            .build(self.clone())
    }

    async fn dial(self, uri: http::Uri) -> io::Result<Io> {
        let https = uri.scheme() == Some(&http::uri::Scheme::HTTPS);
        let host = uri
            .host()
            .unwrap_or_default()
            .trim_matches(['[', ']'])
            .to_owned();
        let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
        let connect = async {
            let tcp = TcpStream::connect((host.as_str(), port)).await?;
            tcp.set_nodelay(true)?;
            if !https {
                return Ok(Io::new(Socket::Plain(tcp)));
            }
            let name = self.server_name.as_deref().unwrap_or(&host).to_owned();
            let name = rustls::pki_types::ServerName::try_from(name).map_err(io::Error::other)?;
            let tls = TlsConnector::from(self.tls).connect(name, tcp).await?;
            Ok(Io::new(Socket::Tls(Box::new(tls))))
        };
        async_std::future::timeout(CONNECT_TIMEOUT, connect)
            .await
            .unwrap_or_else(|_| {
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no connection to {host}:{port}"),
                ))
            })
    }
}

impl tower::Service<http::Uri> for Dialer {
    type Response = Io;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Io>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        Box::pin(self.clone().dial(uri))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_spread_over_connections_and_places_are_given_back() {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let transport = Transport::new(tls, None);
        let pool = &transport.inner.calls;
        let count = || pool.connections.lock().unwrap().len();
        let streams: Vec<_> = (0..=STREAMS_PER_CONNECTION)
            .map(|_| pool.stream(&transport.inner.dialer))
            .collect();
        assert_eq!(count(), 2);
        drop(streams);
        let _again: Vec<_> = (0..STREAMS_PER_CONNECTION)
            .map(|_| pool.stream(&transport.inner.dialer))
            .collect();
        assert_eq!(count(), 2);
    }
}
