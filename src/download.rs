//! Modules from HTTP servers, fetched with surf over our own transport.
//!
//! What is fetched is checked against the hash in the configuration, so the server need not be
//! trusted, and a module whose artifact is in the cache is native code of exactly these bytes.

use futures::AsyncReadExt;
use sha2::{Digest, Sha256};
use surf::{StatusCode, Url};
use thiserror::Error;

use crate::outbound::Outbound;

/// The largest module there can be: large Go operators have 140 MB.
const MAX_MODULE_BYTES: u64 = 512 << 20;

/// Why a module could not be fetched.
#[derive(Debug, Error)]
pub enum DownloadError {
    /// No certificates to trust.
    #[error("no TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// No answer, or it broke off.
    #[error("{0}")]
    Http(String),
    /// The server said no.
    #[error("the server answered {0}")]
    Status(StatusCode),
    /// It is not what the configuration names.
    #[error("its SHA-256 is {found}, not {expected}")]
    Hash {
        /// Of what came.
        found: String,
        /// In the configuration.
        expected: String,
    },
    /// More than 512 MiB.
    #[error("it is larger than {MAX_MODULE_BYTES} bytes")]
    TooLarge,
}

impl From<surf::Error> for DownloadError {
    fn from(error: surf::Error) -> Self {
        Self::Http(error.into_inner().to_string())
    }
}

/// Fetches modules.
#[derive(Debug, Default)]
pub struct Downloader {
    outbound: Outbound,
}

impl Downloader {
    /// Fetches a module and checks its hash.
    ///
    /// # Errors
    /// [`DownloadError`].
    pub async fn fetch(&self, url: &Url, sha256: &str) -> Result<Vec<u8>, DownloadError> {
        let mut response = self.outbound.client()?.get(url).send().await?;
        if response.status() != StatusCode::Ok {
            return Err(DownloadError::Status(response.status()));
        }
        let mut wasm = Vec::new();
        let mut body = response.take_body().take(MAX_MODULE_BYTES + 1);
        let read = body.read_to_end(&mut wasm).await;
        if read.map_err(|e| DownloadError::Http(e.to_string()))? as u64 > MAX_MODULE_BYTES {
            return Err(DownloadError::TooLarge);
        }
        let found: String = Sha256::digest(&wasm)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        if found != sha256 {
            return Err(DownloadError::Hash {
                found,
                expected: sha256.to_owned(),
            });
        }
        Ok(wasm)
    }
}
