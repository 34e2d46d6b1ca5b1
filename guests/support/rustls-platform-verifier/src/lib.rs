//! Stands in for rustls-platform-verifier: nothing is verified, since nothing is connected.

use rustls::client::WantsClientCert;
use rustls::{ClientConfig, ConfigBuilder, Error, WantsVerifier};

/// Trusts what the platform trusts.
pub trait BuilderVerifierExt {
    /// The next step.
    ///
    /// # Errors
    /// None.
    fn with_platform_verifier(self) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, Error>;
}

impl BuilderVerifierExt for ConfigBuilder<ClientConfig, WantsVerifier> {
    fn with_platform_verifier(self) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, Error> {
        Ok(rustls::stand_in::trusting())
    }
}

/// Trusts what the platform trusts.
pub trait ConfigVerifierExt {
    /// The configuration.
    ///
    /// # Errors
    /// None.
    fn with_platform_verifier() -> Result<ClientConfig, Error>;
}

impl ConfigVerifierExt for ClientConfig {
    fn with_platform_verifier() -> Result<ClientConfig, Error> {
        Ok(rustls::stand_in::trusting().with_no_client_auth())
    }
}
