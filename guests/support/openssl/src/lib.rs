//! Stands in for openssl: settings are taken and never used, since TLS is the parent's. There is no
//! cryptography: a program that uses it for more than kube does not compile.

pub mod error {
    //! Errors.

    use std::fmt;

    /// Errors, of which there are none.
    #[derive(Clone, Debug)]
    pub struct ErrorStack(());

    impl fmt::Display for ErrorStack {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a child has no TLS of its own")
        }
    }

    impl std::error::Error for ErrorStack {}
}

pub mod pkey {
    //! Keys.

    use std::marker::PhantomData;

    use super::error::ErrorStack;

    /// Marks private keys.
    #[derive(Clone, Debug)]
    pub enum Private {}

    /// A key.
    #[derive(Clone, Debug)]
    pub struct PKey<T>(PhantomData<T>);

    impl PKey<Private> {
        /// Takes it.
        ///
        /// # Errors
        /// None.
        pub fn private_key_from_pem(_: &[u8]) -> Result<Self, ErrorStack> {
            Ok(Self(PhantomData))
        }
    }
}

pub mod x509 {
    //! Certificates.

    use super::error::ErrorStack;

    /// A certificate.
    #[derive(Clone, Debug)]
    pub struct X509(());

    impl X509 {
        /// Takes one.
        ///
        /// # Errors
        /// None.
        pub fn from_der(_: &[u8]) -> Result<Self, ErrorStack> {
            Ok(Self(()))
        }

        /// Takes one.
        ///
        /// # Errors
        /// None.
        pub fn from_pem(_: &[u8]) -> Result<Self, ErrorStack> {
            Ok(Self(()))
        }

        /// Takes some; as one.
        ///
        /// # Errors
        /// None.
        pub fn stack_from_pem(_: &[u8]) -> Result<Vec<Self>, ErrorStack> {
            Ok(vec![Self(())])
        }
    }

    pub mod store {
        //! Certificates that would be trusted.

        use super::{ErrorStack, X509};

        /// Those.
        #[derive(Debug)]
        pub struct X509StoreBuilderRef(pub(crate) ());

        impl X509StoreBuilderRef {
            /// Takes one.
            ///
            /// # Errors
            /// None.
            pub fn add_cert(&mut self, _: X509) -> Result<(), ErrorStack> {
                Ok(())
            }
        }
    }

    pub mod verify {
        //! How certificates would be verified.

        use std::net::IpAddr;

        use super::ErrorStack;

        /// How names are compared.
        #[derive(Clone, Copy, Debug)]
        pub struct X509CheckFlags(());

        impl X509CheckFlags {
            /// Without wildcards in a part of a name.
            pub const NO_PARTIAL_WILDCARDS: Self = Self(());
        }

        /// Settings.
        #[derive(Debug)]
        pub struct X509VerifyParamRef(pub(crate) ());

        impl X509VerifyParamRef {
            /// Has no effect.
            pub fn set_hostflags(&mut self, _: X509CheckFlags) {}

            /// Has no effect.
            ///
            /// # Errors
            /// None.
            pub fn set_host(&mut self, _: &str) -> Result<(), ErrorStack> {
                Ok(())
            }

            /// Has no effect.
            ///
            /// # Errors
            /// None.
            pub fn set_ip(&mut self, _: IpAddr) -> Result<(), ErrorStack> {
                Ok(())
            }
        }
    }
}

pub mod ssl {
    //! Connections, of which there are none.

    use super::error::ErrorStack;
    use super::pkey::{PKey, Private};
    use super::x509::{X509, store::X509StoreBuilderRef, verify::X509VerifyParamRef};

    /// A protocol.
    #[derive(Clone, Copy, Debug)]
    pub struct SslMethod(());

    impl SslMethod {
        /// TLS.
        pub fn tls() -> Self {
            Self(())
        }
    }

    /// Who is verified.
    #[derive(Clone, Copy, Debug)]
    pub struct SslVerifyMode(());

    impl SslVerifyMode {
        /// Nobody.
        pub const NONE: Self = Self(());
        /// The peer.
        pub const PEER: Self = Self(());
    }

    /// Settings for connections.
    #[derive(Clone, Debug)]
    pub struct SslConnector(());

    impl SslConnector {
        /// A builder.
        ///
        /// # Errors
        /// None.
        pub fn builder(_: SslMethod) -> Result<SslConnectorBuilder, ErrorStack> {
            Ok(SslConnectorBuilder(X509StoreBuilderRef(())))
        }
    }

    /// Builds settings.
    #[derive(Debug)]
    pub struct SslConnectorBuilder(X509StoreBuilderRef);

    impl SslConnectorBuilder {
        /// Has no effect.
        ///
        /// # Errors
        /// None.
        pub fn set_certificate(&mut self, _: &X509) -> Result<(), ErrorStack> {
            Ok(())
        }

        /// Has no effect.
        ///
        /// # Errors
        /// None.
        pub fn add_extra_chain_cert(&mut self, _: X509) -> Result<(), ErrorStack> {
            Ok(())
        }

        /// Has no effect.
        ///
        /// # Errors
        /// None.
        pub fn set_private_key(&mut self, _: &PKey<Private>) -> Result<(), ErrorStack> {
            Ok(())
        }

        /// Has no effect.
        ///
        /// # Errors
        /// None.
        pub fn set_alpn_protos(&mut self, _: &[u8]) -> Result<(), ErrorStack> {
            Ok(())
        }

        /// Has no effect.
        pub fn set_verify(&mut self, _: SslVerifyMode) {}

        /// Certificates that would be trusted.
        pub fn cert_store_mut(&mut self) -> &mut X509StoreBuilderRef {
            &mut self.0
        }

        /// The settings.
        pub fn build(self) -> SslConnector {
            SslConnector(())
        }
    }

    /// Settings of one connection, which is never made.
    #[derive(Debug)]
    pub struct ConnectConfiguration(X509VerifyParamRef);

    impl ConnectConfiguration {
        /// Has no effect.
        pub fn set_verify(&mut self, _: SslVerifyMode) {}

        /// Has no effect.
        pub fn set_use_server_name_indication(&mut self, _: bool) {}

        /// Has no effect.
        pub fn set_verify_hostname(&mut self, _: bool) {}

        /// Has no effect.
        ///
        /// # Errors
        /// None.
        pub fn set_hostname(&mut self, _: &str) -> Result<(), ErrorStack> {
            Ok(())
        }

        /// Has no effect.
        pub fn param_mut(&mut self) -> &mut X509VerifyParamRef {
            &mut self.0
        }
    }
}
