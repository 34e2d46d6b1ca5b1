//! surf over our own transport: everything that is not the Kubernetes API.

use std::sync::OnceLock;

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use http_client::{HttpClient, Request, Response};
use rustls_platform_verifier::ConfigVerifierExt;
use surf::{Body, Client, StatusCode};

use crate::transport::{Lane, RequestBody, Transport};

/// A surf client that trusts the certificates of the system.
#[derive(Debug, Default)]
pub struct Outbound {
    /// Made when it is first needed: most configurations have no use for it, and trust nobody.
    client: OnceLock<Client>,
}

impl Outbound {
    /// The client.
    ///
    /// # Errors
    /// When the system has no certificates.
    pub fn client(&self) -> Result<&Client, rustls::Error> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let transport = Transport::new(rustls::ClientConfig::with_platform_verifier()?, None);
        Ok(self
            .client
            .get_or_init(|| Client::with_http_client(SurfTransport(transport))))
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
