//! Stands in for hyper: the types that kube-client and hyper-timeout name.
//!
//! kube-client's signatures say `Response<hyper::body::Incoming>`, which only hyper can make; here
//! it is the body of the parent's transport. There is no HTTP implementation: the parent has it.

pub use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version, header};
/// The transport's error.
pub use wasm_operator_guest::transport::Error;

pub mod body {
    //! Bodies.

    pub use bytes::{Buf, Bytes};
    pub use http_body::{Body, Frame, SizeHint};
    pub use wasm_operator_guest::transport::Body as Incoming;
}

pub mod rt {
    //! The runtime traits, for code that is generic over connections. Nothing is ever connected.

    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    /// Runs futures in the background.
    pub trait Executor<F> {
        /// Runs one.
        fn execute(&self, future: F);
    }

    /// A buffer to read into.
    #[derive(Debug)]
    pub struct ReadBuf<'a> {
        bytes: &'a mut [u8],
        filled: usize,
    }

    impl<'a> ReadBuf<'a> {
        /// An empty buffer over these bytes.
        pub fn new(bytes: &'a mut [u8]) -> Self {
            Self { bytes, filled: 0 }
        }

        /// What was read.
        pub fn filled(&self) -> &[u8] {
            &self.bytes[..self.filled]
        }

        /// The rest.
        pub fn unfilled<'b>(&'b mut self) -> ReadBufCursor<'b> {
            ReadBufCursor {
                bytes: &mut self.bytes[self.filled..],
                filled: &mut self.filled,
            }
        }
    }

    /// The unfilled part of a [`ReadBuf`].
    #[derive(Debug)]
    pub struct ReadBufCursor<'a> {
        bytes: &'a mut [u8],
        filled: &'a mut usize,
    }

    impl ReadBufCursor<'_> {
        /// Bytes that fit.
        pub fn remaining(&self) -> usize {
            self.bytes.len()
        }

        /// Puts bytes in.
        ///
        /// # Panics
        /// When they do not fit.
        pub fn put_slice(&mut self, source: &[u8]) {
            let (filled, rest) = std::mem::take(&mut self.bytes).split_at_mut(source.len());
            filled.copy_from_slice(source);
            self.bytes = rest;
            *self.filled += source.len();
        }
    }

    /// Reads bytes.
    pub trait Read {
        /// Reads into the buffer.
        fn poll_read(
            self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buffer: ReadBufCursor<'_>,
        ) -> Poll<io::Result<()>>;
    }

    /// Writes bytes.
    pub trait Write {
        /// Writes some of them.
        fn poll_write(
            self: Pin<&mut Self>,
            context: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>>;

        /// Writes out what is buffered.
        fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>>;

        /// Ends writing.
        fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>>;

        /// Whether [`Write::poll_write_vectored`] is worth using.
        fn is_write_vectored(&self) -> bool {
            false
        }

        /// Writes from several buffers.
        fn poll_write_vectored(
            self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buffers: &[io::IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let first = buffers
                .iter()
                .find(|b| !b.is_empty())
                .map_or(&[][..], |b| &**b);
            self.poll_write(context, first)
        }
    }

    impl<T: Read + Unpin + ?Sized> Read for &mut T {
        fn poll_read(
            self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buffer: ReadBufCursor<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut **self.get_mut()).poll_read(context, buffer)
        }
    }

    impl<T: Write + Unpin + ?Sized> Write for &mut T {
        fn poll_write(
            self: Pin<&mut Self>,
            context: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut **self.get_mut()).poll_write(context, bytes)
        }

        fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut **self.get_mut()).poll_flush(context)
        }

        fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut **self.get_mut()).poll_shutdown(context)
        }
    }
}
