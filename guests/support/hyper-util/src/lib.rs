//! Stands in for hyper-util: its `client::legacy::Client` sends requests through the parent.
//!
//! Connectors are accepted and never asked to connect; TLS, pooling and credentials are the
//! parent's.

pub mod rt {
    //! tokio under hyper.

    use std::future::Future;
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    /// Spawns on the child's runtime.
    #[derive(Clone, Debug, Default)]
    pub struct TokioExecutor(());

    impl TokioExecutor {
        /// The executor.
        pub fn new() -> Self {
            Self(())
        }
    }

    impl<F> hyper::rt::Executor<F> for TokioExecutor
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        fn execute(&self, future: F) {
            tokio::spawn(future);
        }
    }

    /// The wrapper between hyper's and tokio's traits. Nothing is ever read or written.
    #[derive(Debug)]
    pub struct TokioIo<T>(T);

    impl<T> TokioIo<T> {
        /// Wraps.
        pub fn new(inner: T) -> Self {
            Self(inner)
        }

        /// What is wrapped.
        pub fn inner(&self) -> &T {
            &self.0
        }

        /// Unwraps.
        pub fn into_inner(self) -> T {
            self.0
        }
    }

    fn unsupported<T>() -> Poll<io::Result<T>> {
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }

    impl<T> tokio::io::AsyncRead for TokioIo<T> {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            unsupported()
        }
    }

    impl<T> tokio::io::AsyncWrite for TokioIo<T> {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            unsupported()
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            unsupported()
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            unsupported()
        }
    }
}

pub mod client {
    //! Clients.

    pub mod legacy {
        //! The client that kube-client uses.

        use std::future::{Future, poll_fn, ready};
        use std::marker::PhantomData;
        use std::pin::{Pin, pin};
        use std::task::{Context, Poll};

        use bytes::{BufMut, BytesMut};
        use http_body::Body;
        use wasm_operator_guest::transport::{self, send};

        type Response = http::Response<hyper::body::Incoming>;

        /// The transport's error. A type of its own, as kube-client tells it from hyper's.
        #[derive(Debug)]
        pub struct Error(transport::Error);

        impl std::fmt::Display for Error {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::error::Error for Error {}

        impl Error {
            /// Whether it is about connecting, which is the parent's.
            pub fn is_connect(&self) -> bool {
                false
            }
        }

        /// The answer that is to come.
        pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

        /// Makes clients.
        #[derive(Clone, Debug)]
        pub struct Builder(());

        impl Builder {
            /// The executor is not needed.
            pub fn new<E>(_: E) -> Self {
                Self(())
            }

            /// The connector is not needed.
            pub fn build<C, B>(&self, _: C) -> Client<C, B> {
                Client(PhantomData)
            }
        }

        /// Sends requests through the parent.
        pub struct Client<C, B>(PhantomData<fn(C, B)>);

        impl Client<(), ()> {
            /// A builder.
            pub fn builder<E>(executor: E) -> Builder {
                Builder::new(executor)
            }
        }

        impl<C, B> Clone for Client<C, B> {
            fn clone(&self) -> Self {
                Self(PhantomData)
            }
        }

        impl<C, B> std::fmt::Debug for Client<C, B> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("Client")
            }
        }

        async fn request<B: Body>(request: http::Request<B>) -> Result<Response, Error> {
            let (parts, body) = request.into_parts();
            let mut body = pin!(body);
            let mut bytes = BytesMut::new();
            while let Some(frame) = poll_fn(|context| body.as_mut().poll_frame(context)).await {
                let frame =
                    frame.map_err(|_| Error(transport::Error::new("the request's body failed")))?;
                if let Ok(data) = frame.into_data() {
                    bytes.put(data);
                }
            }
            send(&parts, &bytes).map_err(Error)?.await.map_err(Error)
        }

        impl<C, B: Body + Send + 'static> Client<C, B>
        where
            B::Data: Send,
            B::Error: Send,
        {
            /// Sends a request. Only the API server can be called, so all others are answered with
            /// an error.
            pub fn request(&self, http: http::Request<B>) -> ResponseFuture {
                // The parent would send it to the API server all the same.
                let host = http.uri().host().unwrap_or_default();
                if !["kubernetes", "kubernetes.default"].contains(&host)
                    && !host.starts_with("kubernetes.default.svc")
                {
                    let text = format!("{host}: a child can call the Kubernetes API only");
                    return Box::pin(ready(Err(Error(transport::Error::new(text)))));
                }
                Box::pin(request(http))
            }

            /// Sends a request without a body.
            pub fn get(&self, uri: http::Uri) -> ResponseFuture
            where
                B: Default,
            {
                let mut http = http::Request::new(B::default());
                *http.uri_mut() = uri;
                self.request(http)
            }
        }

        impl<C, B: Body + Send + 'static> tower_service::Service<http::Request<B>> for Client<C, B>
        where
            B::Data: Send,
            B::Error: Send,
        {
            type Response = Response;
            type Error = Error;
            type Future = ResponseFuture;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, http: http::Request<B>) -> Self::Future {
                Box::pin(request(http))
            }
        }

        pub mod connect {
            //! Connectors, none of which connects.

            use std::future::{Ready, ready};
            use std::io;
            use std::pin::Pin;
            use std::task::{Context, Poll};
            use std::time::Duration;

            /// What is known of a connection.
            #[derive(Clone, Debug)]
            pub struct Connected(());

            impl Connected {
                /// Nothing.
                pub fn new() -> Self {
                    Self(())
                }
            }

            impl Default for Connected {
                fn default() -> Self {
                    Self::new()
                }
            }

            /// A connection.
            pub trait Connection {
                /// What is known of it.
                fn connected(&self) -> Connected;
            }

            /// Accepts settings and refuses to connect.
            #[derive(Clone, Debug, Default)]
            pub struct HttpConnector(());

            impl HttpConnector {
                /// The connector.
                pub fn new() -> Self {
                    Self(())
                }

                /// Has no effect.
                pub fn enforce_http(&mut self, _: bool) {}

                /// Has no effect.
                pub fn set_nodelay(&mut self, _: bool) {}

                /// Has no effect.
                pub fn set_keepalive(&mut self, _: Option<Duration>) {}

                /// Has no effect.
                pub fn set_connect_timeout(&mut self, _: Option<Duration>) {}
            }

            /// The connection that is never made.
            #[derive(Debug)]
            pub enum NoConnection {}

            impl Connection for NoConnection {
                fn connected(&self) -> Connected {
                    match *self {}
                }
            }

            impl hyper::rt::Read for NoConnection {
                fn poll_read(
                    self: Pin<&mut Self>,
                    _: &mut Context<'_>,
                    _: hyper::rt::ReadBufCursor<'_>,
                ) -> Poll<io::Result<()>> {
                    match *self {}
                }
            }

            impl hyper::rt::Write for NoConnection {
                fn poll_write(
                    self: Pin<&mut Self>,
                    _: &mut Context<'_>,
                    _: &[u8],
                ) -> Poll<io::Result<usize>> {
                    match *self {}
                }

                fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                    match *self {}
                }

                fn poll_shutdown(
                    self: Pin<&mut Self>,
                    _: &mut Context<'_>,
                ) -> Poll<io::Result<()>> {
                    match *self {}
                }
            }

            pub mod proxy {
                //! Connectors by way of a proxy: the one they wrap, which never connects.

                use std::task::{Context, Poll};

                macro_rules! wrapper {
                    ($(#[$doc:meta] $name:ident),*) => {$(
                        #[$doc]
                        #[derive(Clone, Debug)]
                        pub struct $name<C>(C);

                        impl<C> $name<C> {
                            /// Wraps.
                            pub fn new(_: http::Uri, connector: C) -> Self {
                                Self(connector)
                            }
                        }

                        impl<C> tower_service::Service<http::Uri> for $name<C>
                        where
                            C: tower_service::Service<http::Uri>,
                        {
                            type Response = C::Response;
                            type Error = C::Error;
                            type Future = C::Future;

                            fn poll_ready(
                                &mut self,
                                context: &mut Context<'_>,
                            ) -> Poll<Result<(), C::Error>> {
                                self.0.poll_ready(context)
                            }

                            fn call(&mut self, uri: http::Uri) -> C::Future {
                                self.0.call(uri)
                            }
                        }
                    )*};
                }

                wrapper!(
                    /// By CONNECT.
                    Tunnel,
                    /// By SOCKS 5.
                    SocksV5
                );

                impl<C> Tunnel<C> {
                    /// Has no effect.
                    pub fn with_auth(self, _: http::HeaderValue) -> Self {
                        self
                    }
                }
            }

            impl tower_service::Service<http::Uri> for HttpConnector {
                type Response = NoConnection;
                type Error = io::Error;
                type Future = Ready<io::Result<NoConnection>>;

                fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                    Poll::Ready(Ok(()))
                }

                fn call(&mut self, _: http::Uri) -> Self::Future {
                    ready(Err(io::ErrorKind::Unsupported.into()))
                }
            }
        }
    }
}
