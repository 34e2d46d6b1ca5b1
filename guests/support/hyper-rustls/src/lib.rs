//! Stands in for hyper-rustls: its connector is the one that it wraps, which never connects.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::HttpConnector;
use rustls::client::WantsClientCert;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ConfigBuilder, WantsVerifier};

/// Ways to trust servers.
pub trait ConfigBuilderExt {
    /// Those that the system trusts.
    ///
    /// # Errors
    /// None.
    fn with_native_roots(self) -> io::Result<ConfigBuilder<ClientConfig, WantsClientCert>>;

    /// Those that the platform trusts.
    fn with_platform_verifier(self) -> ConfigBuilder<ClientConfig, WantsClientCert>;

    /// Those that browsers trust.
    fn with_webpki_roots(self) -> ConfigBuilder<ClientConfig, WantsClientCert>;
}

impl ConfigBuilderExt for ConfigBuilder<ClientConfig, WantsVerifier> {
    fn with_native_roots(self) -> io::Result<ConfigBuilder<ClientConfig, WantsClientCert>> {
        Ok(rustls::stand_in::trusting())
    }

    fn with_platform_verifier(self) -> ConfigBuilder<ClientConfig, WantsClientCert> {
        rustls::stand_in::trusting()
    }

    fn with_webpki_roots(self) -> ConfigBuilder<ClientConfig, WantsClientCert> {
        rustls::stand_in::trusting()
    }
}

/// A name for all servers.
#[derive(Clone, Debug)]
pub struct FixedServerNameResolver(());

impl FixedServerNameResolver {
    /// Takes it.
    pub fn new(_: ServerName<'static>) -> Self {
        Self(())
    }
}

/// Builds connectors.
#[derive(Clone, Debug, Default)]
pub struct HttpsConnectorBuilder(());

impl HttpsConnectorBuilder {
    /// A builder.
    pub fn new() -> Self {
        Self(())
    }

    /// Has no effect.
    pub fn with_tls_config(self, _: ClientConfig) -> Self {
        self
    }

    /// Has no effect.
    ///
    /// # Errors
    /// None.
    pub fn with_native_roots(self) -> io::Result<Self> {
        Ok(self)
    }

    /// Has no effect.
    pub fn with_platform_verifier(self) -> Self {
        self
    }

    /// Has no effect.
    pub fn with_webpki_roots(self) -> Self {
        self
    }

    /// Has no effect.
    pub fn https_only(self) -> Self {
        self
    }

    /// Has no effect.
    pub fn https_or_http(self) -> Self {
        self
    }

    /// Has no effect.
    pub fn with_server_name(self, _: String) -> Self {
        self
    }

    /// Has no effect.
    pub fn with_server_name_resolver(self, _: FixedServerNameResolver) -> Self {
        self
    }

    /// Has no effect.
    pub fn enable_http1(self) -> Self {
        self
    }

    /// Has no effect.
    pub fn enable_http2(self) -> Self {
        self
    }

    /// Has no effect.
    pub fn enable_all_versions(self) -> Self {
        self
    }

    /// A connector.
    pub fn build(self) -> HttpsConnector<HttpConnector> {
        HttpsConnector(HttpConnector::new())
    }

    /// A connector around another.
    pub fn wrap_connector<H>(self, connector: H) -> HttpsConnector<H> {
        HttpsConnector(connector)
    }
}

/// A connector around another.
#[derive(Clone, Debug)]
pub struct HttpsConnector<T>(T);

impl HttpsConnector<HttpConnector> {
    /// A builder.
    pub fn builder() -> HttpsConnectorBuilder {
        HttpsConnectorBuilder::new()
    }
}

impl<T, C: Into<Arc<ClientConfig>>> From<(T, C)> for HttpsConnector<T> {
    fn from((connector, _): (T, C)) -> Self {
        Self(connector)
    }
}

impl<T: tower_service::Service<http::Uri>> tower_service::Service<http::Uri> for HttpsConnector<T> {
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
