//! async-std under hyper: sockets, tasks and time.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_std::net::TcpStream;
use futures::io::{AsyncRead, AsyncWrite};
use futures_rustls::client::TlsStream;
use hyper_util::client::legacy::connect::{Connected, Connection};

const READ_BUFFER_BYTES: usize = 16 << 10;

/// A connected socket.
pub enum Socket {
    /// Plain text.
    Plain(TcpStream),
    /// A client's TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connected socket as hyper sees it.
pub struct Io {
    socket: Socket,
    /// hyper reads into memory that need not be initialised; this buffer keeps that safe.
    buffer: Vec<u8>,
}

impl Io {
    /// For that socket.
    pub fn new(socket: Socket) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
        }
    }
}

macro_rules! socket {
    ($self:ident, $method:ident $(, $argument:expr)*) => {
        match &mut $self.socket {
            Socket::Plain(tcp) => Pin::new(tcp).$method($($argument),*),
            Socket::Tls(tls) => Pin::new(tls.as_mut()).$method($($argument),*),
        }
    };
}

impl hyper::rt::Read for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut cursor: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(READ_BUFFER_BYTES, 0);
        let length = cursor.remaining().min(READ_BUFFER_BYTES);
        let result = socket!(self, poll_read, cx, &mut buffer[..length]);
        if let Poll::Ready(Ok(read)) = result {
            cursor.put_slice(&buffer[..read]);
        }
        // An idle connection keeps no buffer.
        if result.is_ready() {
            self.buffer = buffer;
        }
        result.map_ok(|_| ())
    }
}

impl hyper::rt::Write for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        socket!(self, poll_write, cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        socket!(self, poll_flush, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        socket!(self, poll_close, cx)
    }
}

impl Connection for Io {
    fn connected(&self) -> Connected {
        match &self.socket {
            Socket::Tls(tls) if tls.get_ref().1.alpn_protocol() == Some(b"h2") => {
                Connected::new().negotiated_h2()
            }
            _ => Connected::new(),
        }
    }
}

/// Runs hyper's background work on async-std.
#[derive(Clone, Copy, Debug)]
pub struct Executor;

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        async_std::task::spawn(async move {
            future.await;
        });
    }
}

/// hyper's clock on async-std.
#[derive(Clone, Copy, Debug)]
pub struct Clock;

/// A sleep of async-std's, which is not `Sync` by itself: polling takes `&mut`, so the lock is
/// never contended.
struct Sleep(Mutex<Pin<Box<dyn Future<Output = ()> + Send>>>);

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        ready!(
            self.0
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner)
                .as_mut()
                .poll(cx)
        );
        Poll::Ready(())
    }
}

impl hyper::rt::Sleep for Sleep {}

impl hyper::rt::Timer for Clock {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(Sleep(Mutex::new(Box::pin(async_std::task::sleep(
            duration,
        )))))
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep(deadline.saturating_duration_since(Instant::now()))
    }
}
