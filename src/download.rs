//! Modules from HTTP servers, fetched with surf over our own transport.
//!
//! What is fetched is checked against the hash in the configuration, so the server need not be
//! trusted, and a module whose artifact is in the cache is native code of exactly these bytes.

use std::sync::OnceLock;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{AsyncReadExt, TryStreamExt};
use http_client::{HttpClient, Request, Response};
use rustls_platform_verifier::ConfigVerifierExt;
use sha2::{Digest, Sha256};
use surf::{Body, Client, StatusCode, Url};
use thiserror::Error;

use crate::transport::{Lane, RequestBody, Transport};

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
    /// More than [`MAX_MODULE_BYTES`].
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
    /// Made with the first download: most configurations have none, and trust nobody.
    client: OnceLock<Client>,
}

impl Downloader {
    fn client(&self) -> Result<&Client, DownloadError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let transport = Transport::new(rustls::ClientConfig::with_platform_verifier()?, None);
        Ok(self
            .client
            .get_or_init(|| Client::with_http_client(SurfTransport(transport))))
    }

    /// Fetches a module and checks its hash.
    ///
    /// # Errors
    /// [`DownloadError`].
    pub async fn fetch(&self, url: &Url, sha256: &str) -> Result<Vec<u8>, DownloadError> {
        let mut response = self.client()?.get(url).send().await?;
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

/// surf's requests on our transport.
#[derive(Debug)]
struct SurfTransport(Transport);

fn failed(error: impl std::fmt::Display) -> http_client::Error {
    http_client::Error::from_str(StatusCode::BadGateway, error.to_string())
}

#[async_trait]
impl HttpClient for SurfTransport {
    async fn send(&self, mut surf: Request) -> Result<Response, http_client::Error> {
        let mut builder = http::Request::builder().method(surf.method().as_ref());
        builder = builder.uri(surf.url().as_str());
        for (name, values) in &surf {
            for value in values {
                builder = builder.header(name.as_str(), value.as_str());
            }
        }
        let body = Bytes::from(surf.take_body().into_bytes().await?);
        let request = builder.body(RequestBody::new(body)).map_err(failed)?;
        let (head, body) = self
            .0
            .send(Lane::Call, request)
            .await
            .map_err(failed)?
            .into_parts();
        let status = StatusCode::try_from(head.status.as_u16()).map_err(failed)?;
        let mut response = Response::new(status);
        for (name, value) in &head.headers {
            if let Ok(value) = value.to_str() {
                response.append_header(name.as_str(), value);
            }
        }
        let chunks = http_body_util::BodyStream::new(body)
            .try_filter_map(|frame| std::future::ready(Ok(frame.into_data().ok())))
            .map_err(std::io::Error::other);
        let reader = futures::io::BufReader::new(Box::pin(chunks).into_async_read());
        response.set_body(Body::from_reader(reader, None));
        Ok(response)
    }
}
