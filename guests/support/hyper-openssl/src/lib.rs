//! Stands in for hyper-openssl: its connector is the one that it wraps, which never connects.

pub mod client {
    //! Clients.

    pub mod legacy {
        //! The connector that kube-client uses.

        use std::task::{Context, Poll};

        use hyper_util::client::legacy::connect::HttpConnector;
        use openssl::error::ErrorStack;
        use openssl::ssl::{ConnectConfiguration, SslConnectorBuilder};

        /// A connector around another.
        #[derive(Clone, Debug)]
        pub struct HttpsConnector<T>(T);

        impl HttpsConnector<HttpConnector> {
            /// A connector.
            ///
            /// # Errors
            /// None.
            pub fn new() -> Result<Self, ErrorStack> {
                Ok(Self(HttpConnector::new()))
            }
        }

        impl<T> HttpsConnector<T> {
            /// A connector around another.
            ///
            /// # Errors
            /// None.
            pub fn with_connector(http: T, _: SslConnectorBuilder) -> Result<Self, ErrorStack> {
                Ok(Self(http))
            }

            /// Has no effect.
            pub fn set_callback<F>(&mut self, _: F)
            where
                F: Fn(&mut ConnectConfiguration, &http::Uri) -> Result<(), ErrorStack>
                    + 'static
                    + Sync
                    + Send,
            {
            }
        }

        impl<T> tower_service::Service<http::Uri> for HttpsConnector<T>
        where
            T: tower_service::Service<http::Uri>,
        {
            type Response = T::Response;
            type Error = T::Error;
            type Future = T::Future;

            fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), T::Error>> {
                self.0.poll_ready(context)
            }

            fn call(&mut self, uri: http::Uri) -> T::Future {
                self.0.call(uri)
            }
        }
    }
}
