//! Stands in for rustls: settings are taken and never used, since a child's requests are the
//! parent's, and so is their TLS.
//!
//! There are the names that kube-client uses and those by which a program chooses a crypto
//! provider. Servers, and connections of one's own, are left out: a program that names them does
//! not compile.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

pub use rustls_pki_types as pki_types;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// An error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Whatever it is.
    General(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::General(text) = self;
        f.write_str(text)
    }
}

impl std::error::Error for Error {}

/// Certificates that would be trusted.
#[derive(Clone, Debug, Default)]
pub struct RootCertStore(usize);

impl RootCertStore {
    /// None.
    pub fn empty() -> Self {
        Self(0)
    }

    /// Takes one.
    ///
    /// # Errors
    /// None.
    pub fn add(&mut self, _: CertificateDer<'_>) -> Result<(), Error> {
        self.0 += 1;
        Ok(())
    }

    /// Takes many; how many it took and refused.
    pub fn add_parsable_certificates<'a>(
        &mut self,
        certificates: impl IntoIterator<Item = CertificateDer<'a>>,
    ) -> (usize, usize) {
        let count = certificates.into_iter().count();
        self.0 += count;
        (count, 0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0 == 0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0
    }
}

/// A step of [`ConfigBuilder`].
#[derive(Clone, Debug)]
pub struct WantsVersions(());

/// A step of [`ConfigBuilder`].
#[derive(Clone, Debug)]
pub struct WantsVerifier(());

/// Builds a configuration.
pub struct ConfigBuilder<Side, State>(PhantomData<fn() -> (Side, State)>);

impl<Side, State> Clone for ConfigBuilder<Side, State> {
    fn clone(&self) -> Self {
        Self(PhantomData)
    }
}

impl<Side, State> fmt::Debug for ConfigBuilder<Side, State> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConfigBuilder")
    }
}

impl<Side> ConfigBuilder<Side, WantsVersions> {
    /// The next step.
    ///
    /// # Errors
    /// None.
    pub fn with_safe_default_protocol_versions(
        self,
    ) -> Result<ConfigBuilder<Side, WantsVerifier>, Error> {
        Ok(ConfigBuilder(PhantomData))
    }
}

impl ConfigBuilder<ClientConfig, WantsVerifier> {
    /// The next step.
    pub fn with_root_certificates(
        self,
        _: impl Into<Arc<RootCertStore>>,
    ) -> ConfigBuilder<ClientConfig, client::WantsClientCert> {
        ConfigBuilder(PhantomData)
    }

    /// The next step.
    pub fn with_webpki_verifier(
        self,
        _: Arc<client::WebPkiServerVerifier>,
    ) -> ConfigBuilder<ClientConfig, client::WantsClientCert> {
        ConfigBuilder(PhantomData)
    }

    /// Leads to a verifier of one's own.
    pub fn dangerous(self) -> client::danger::DangerousClientConfigBuilder {
        client::danger::DangerousClientConfigBuilder(())
    }
}

impl ConfigBuilder<ClientConfig, client::WantsClientCert> {
    /// The configuration.
    ///
    /// # Errors
    /// None.
    pub fn with_client_auth_cert(
        self,
        _: Vec<CertificateDer<'static>>,
        _: PrivateKeyDer<'static>,
    ) -> Result<ClientConfig, Error> {
        Ok(ClientConfig::default())
    }

    /// The configuration.
    pub fn with_no_client_auth(self) -> ClientConfig {
        ClientConfig::default()
    }
}

/// A client's configuration, which nobody uses.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ClientConfig {
    /// Has no effect.
    pub alpn_protocols: Vec<Vec<u8>>,
    /// Has no effect.
    pub enable_sni: bool,
}

impl ClientConfig {
    /// A builder.
    pub fn builder() -> ConfigBuilder<Self, WantsVerifier> {
        ConfigBuilder(PhantomData)
    }

    /// A builder.
    pub fn builder_with_provider(
        _: Arc<crypto::CryptoProvider>,
    ) -> ConfigBuilder<Self, WantsVersions> {
        ConfigBuilder(PhantomData)
    }

    /// Leads to a verifier of one's own.
    pub fn dangerous(&mut self) -> client::danger::DangerousClientConfig<'_> {
        client::danger::DangerousClientConfig { cfg: self }
    }
}

/// A signed message of a handshake. There is none.
#[derive(Clone, Debug)]
pub struct DigitallySignedStruct(());

/// How messages are signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(non_camel_case_types, missing_docs)]
pub enum SignatureScheme {
    RSA_PKCS1_SHA1,
    ECDSA_SHA1_Legacy,
    RSA_PKCS1_SHA256,
    ECDSA_NISTP256_SHA256,
    RSA_PKCS1_SHA384,
    ECDSA_NISTP384_SHA384,
    RSA_PKCS1_SHA512,
    ECDSA_NISTP521_SHA512,
    RSA_PSS_SHA256,
    RSA_PSS_SHA384,
    RSA_PSS_SHA512,
    ED25519,
    ED448,
    ML_DSA_44,
    ML_DSA_65,
    ML_DSA_87,
    Unknown(u16),
}

pub mod client {
    //! Clients.

    use std::fmt;
    use std::sync::Arc;

    pub use super::ClientConfig;
    use super::{DigitallySignedStruct, Error, RootCertStore, SignatureScheme, crypto};
    use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

    /// A step of [`super::ConfigBuilder`].
    #[derive(Clone, Debug)]
    pub struct WantsClientCert(());

    /// Would verify servers.
    #[derive(Debug)]
    pub struct WebPkiServerVerifier(());

    impl WebPkiServerVerifier {
        /// A builder.
        pub fn builder(_: Arc<RootCertStore>) -> ServerCertVerifierBuilder {
            ServerCertVerifierBuilder(())
        }

        /// A builder.
        pub fn builder_with_provider(
            _: Arc<RootCertStore>,
            _: Arc<crypto::CryptoProvider>,
        ) -> ServerCertVerifierBuilder {
            ServerCertVerifierBuilder(())
        }
    }

    /// Builds a [`WebPkiServerVerifier`].
    #[derive(Clone, Debug)]
    pub struct ServerCertVerifierBuilder(());

    impl ServerCertVerifierBuilder {
        /// The verifier.
        ///
        /// # Errors
        /// None.
        pub fn build(self) -> Result<Arc<WebPkiServerVerifier>, VerifierBuilderError> {
            Ok(Arc::new(WebPkiServerVerifier(())))
        }
    }

    /// An error that never comes.
    #[derive(Clone, Debug)]
    pub enum VerifierBuilderError {}

    impl fmt::Display for VerifierBuilderError {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            match *self {}
        }
    }

    impl std::error::Error for VerifierBuilderError {}

    impl danger::ServerCertVerifier for WebPkiServerVerifier {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<danger::ServerCertVerified, Error> {
            Err(Error::General("a child has no TLS of its own".into()))
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<danger::HandshakeSignatureValid, Error> {
            Err(Error::General("a child has no TLS of its own".into()))
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<danger::HandshakeSignatureValid, Error> {
            Err(Error::General("a child has no TLS of its own".into()))
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            Vec::new()
        }
    }

    pub mod danger {
        //! Verifiers of one's own, which are never asked.

        use std::fmt::Debug;
        use std::marker::PhantomData;
        use std::sync::Arc;

        use super::super::{ConfigBuilder, DigitallySignedStruct, Error, SignatureScheme};
        use super::{ClientConfig, WantsClientCert};
        use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

        /// The server's certificate is good.
        #[derive(Debug)]
        pub struct ServerCertVerified(());

        impl ServerCertVerified {
            /// It is.
            pub fn assertion() -> Self {
                Self(())
            }
        }

        /// The signature is good.
        #[derive(Debug)]
        pub struct HandshakeSignatureValid(());

        impl HandshakeSignatureValid {
            /// It is.
            pub fn assertion() -> Self {
                Self(())
            }
        }

        /// Verifies servers.
        pub trait ServerCertVerifier: Debug + Send + Sync {
            /// Whether the certificate is good.
            ///
            /// # Errors
            /// When it is not.
            fn verify_server_cert(
                &self,
                end_entity: &CertificateDer<'_>,
                intermediates: &[CertificateDer<'_>],
                server_name: &ServerName<'_>,
                ocsp_response: &[u8],
                now: UnixTime,
            ) -> Result<ServerCertVerified, Error>;

            /// Whether the signature is good.
            ///
            /// # Errors
            /// When it is not.
            fn verify_tls12_signature(
                &self,
                message: &[u8],
                cert: &CertificateDer<'_>,
                dss: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, Error>;

            /// Whether the signature is good.
            ///
            /// # Errors
            /// When it is not.
            fn verify_tls13_signature(
                &self,
                message: &[u8],
                cert: &CertificateDer<'_>,
                dss: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, Error>;

            /// What it can verify.
            fn supported_verify_schemes(&self) -> Vec<SignatureScheme>;

            /// Whether raw keys are wanted.
            fn requires_raw_public_keys(&self) -> bool {
                false
            }
        }

        /// Changes a configuration.
        #[derive(Debug)]
        pub struct DangerousClientConfig<'a> {
            /// It.
            pub cfg: &'a mut ClientConfig,
        }

        impl DangerousClientConfig<'_> {
            /// Has no effect.
            pub fn set_certificate_verifier(&mut self, _: Arc<dyn ServerCertVerifier>) {}
        }

        /// A step of [`ConfigBuilder`].
        #[derive(Debug)]
        pub struct DangerousClientConfigBuilder(pub(in super::super) ());

        impl DangerousClientConfigBuilder {
            /// The next step.
            pub fn with_custom_certificate_verifier(
                self,
                _: Arc<dyn ServerCertVerifier>,
            ) -> ConfigBuilder<ClientConfig, WantsClientCert> {
                ConfigBuilder(PhantomData)
            }
        }
    }
}

pub mod crypto {
    //! Crypto providers, of which there is none: one can be chosen.

    use std::sync::{Arc, OnceLock};

    static DEFAULT: OnceLock<Arc<CryptoProvider>> = OnceLock::new();

    /// A crypto provider that provides nothing.
    #[derive(Clone, Debug)]
    pub struct CryptoProvider(());

    impl CryptoProvider {
        /// The one that was chosen.
        pub fn get_default() -> Option<&'static Arc<Self>> {
            DEFAULT.get()
        }

        /// Chooses this one.
        ///
        /// # Errors
        /// When there is one already.
        pub fn install_default(self) -> Result<(), Arc<Self>> {
            DEFAULT.set(Arc::new(self))
        }
    }

    pub mod aws_lc_rs {
        //! It is not there.

        use super::CryptoProvider;

        /// Something to choose.
        pub fn default_provider() -> CryptoProvider {
            CryptoProvider(())
        }
    }

    pub mod ring {
        //! It is not there.

        use super::CryptoProvider;

        /// Something to choose.
        pub fn default_provider() -> CryptoProvider {
            CryptoProvider(())
        }
    }
}

#[doc(hidden)]
pub mod stand_in {
    //! For the crates that stand in beside this one.

    use std::marker::PhantomData;

    use super::{ClientConfig, ConfigBuilder, client::WantsClientCert};

    /// What any way to trust servers leads to.
    pub fn trusting() -> ConfigBuilder<ClientConfig, WantsClientCert> {
        ConfigBuilder(PhantomData)
    }
}
