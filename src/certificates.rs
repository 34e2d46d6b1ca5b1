//! Certificates that children find in files, none of which protects anything.
//!
//! TLS to the API server is the parent's. Programs look for its authorities all the same, and
//! client-go logs an error about a file without a certificate; webhook servers, which nobody can
//! reach inside a child, do not start without a key pair.

use bytes::Bytes;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use thiserror::Error;

/// No certificate could be made.
#[derive(Debug, Error)]
#[error("a certificate for children: {0}")]
pub struct CertificateError(#[from] rcgen::Error);

/// See the module's documentation. All are PEM.
#[derive(Clone, Debug, Default)]
pub struct Certificates {
    /// Those of the API server, or the placeholder where the parent needs none.
    pub authorities: Bytes,
    /// A certificate for `localhost`, made for this process and trusted by nobody.
    pub placeholder: Bytes,
    /// Its key.
    pub placeholder_key: Bytes,
}

impl Certificates {
    /// With these authorities of the API server, if there are any.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn make(authorities: &Bytes) -> Result<Self, CertificateError> {
        let key = KeyPair::generate()?;
        let names = vec!["localhost".to_owned()];
        let mut parameters = CertificateParams::new(names)?;
        parameters.distinguished_name = DistinguishedName::new();
        parameters
            .distinguished_name
            .push(DnType::CommonName, "wasm-operator placeholder");
        let certificate = parameters.self_signed(&key)?;
        let placeholder = Bytes::from(certificate.pem());
        Ok(Self {
            authorities: if authorities.is_empty() {
                placeholder.clone()
            } else {
                authorities.clone()
            },
            placeholder,
            placeholder_key: key.serialize_pem().into(),
        })
    }
}
