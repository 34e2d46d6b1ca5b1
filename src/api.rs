//! The API server: who we are to it, and on whose behalf a request is made.
//!
//! Configuration, credentials and their renewal are kube's; connections are `transport`'s.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use pem::Pem;
use thiserror::Error;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, ServiceBuilder, ServiceExt};

use crate::abi::MAX_RESULT_BYTES;
use crate::transport::{Body, Lane, RequestBody, Transport, TransportError};

/// How long an answer's head may take. The API server ends requests after 60 s itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(70);
/// How long a part of an answer's body may take.
const FRAME_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: &str = concat!("wasm-operator/", env!("CARGO_PKG_VERSION"));

/// Why there is no API server to talk to.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No configuration was found, or it is bad.
    #[error(
        "no usable Kubernetes configuration: {0}. Set KUBECONFIG, or run inside a cluster with a ServiceAccount"
    )]
    Infer(#[from] kube::config::InferConfigError),
    /// The kubeconfig lacks the context asked for, or is bad.
    #[error("kubeconfig: {0}")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// Certificates or credentials cannot be used.
    #[error("Kubernetes configuration: {0}")]
    Client(#[from] kube::Error),
    /// A setting that is not served.
    #[error("Kubernetes configuration: {0}")]
    Unsupported(&'static str),
}

/// On whose behalf a request is made.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// `Impersonate-*` headers; empty for the parent itself.
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Identity {
    /// The user and groups of a ServiceAccount, as the API server would authenticate them
    /// (see [impersonation]). The parent needs the verb `impersonate` for them.
    ///
    /// [impersonation]: https://kubernetes.io/docs/reference/access-authn-authz/authentication/#user-impersonation
    ///
    /// # Errors
    /// When a name cannot stand in a header.
    pub fn service_account(
        namespace: &str,
        name: &str,
    ) -> Result<Self, http::header::InvalidHeaderValue> {
        let user = HeaderName::from_static("impersonate-user");
        let group = || HeaderName::from_static("impersonate-group");
        Ok(Self {
            headers: vec![
                (
                    user,
                    format!("system:serviceaccount:{namespace}:{name}").parse()?,
                ),
                (group(), HeaderValue::from_static("system:serviceaccounts")),
                (
                    group(),
                    format!("system:serviceaccounts:{namespace}").parse()?,
                ),
                (group(), HeaderValue::from_static("system:authenticated")),
            ],
        })
    }
}

/// A request to the API server, before identity and credentials.
#[derive(Clone, Debug)]
pub struct ApiRequest {
    /// HTTP method.
    pub method: Method,
    /// Path and query.
    pub path_and_query: String,
    /// Headers, filtered.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The body, empty for none.
    pub body: Bytes,
}

impl ApiRequest {
    /// A GET for JSON.
    pub fn get(path_and_query: String) -> Self {
        let accept = (
            http::header::ACCEPT,
            HeaderValue::from_static("application/json"),
        );
        Self {
            method: Method::GET,
            path_and_query,
            headers: vec![accept],
            body: Bytes::new(),
        }
    }
}

/// A complete answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: StatusCode,
    /// `Retry-After`, when the server sent it.
    pub retry_after: Option<Duration>,
    /// The whole body.
    pub body: Bytes,
}

/// Why there is no complete answer.
#[derive(Debug, Error)]
pub enum AnswerError {
    /// No answer, or it broke off.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The connection broke in the middle of the body.
    #[error("the answer broke off: {0}")]
    Body(hyper::Error),
    /// The body is above [`MAX_RESULT_BYTES`].
    #[error("the answer is above {MAX_RESULT_BYTES} bytes; ask for pages with `limit`")]
    TooLarge,
}

/// The API server. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Api {
    service: BoxCloneSyncService<Request<RequestBody>, Response<Body>, BoxError>,
    default_namespace: String,
    authorities: Bytes,
}

impl Api {
    /// Reads the configuration: that context of the kubeconfig, or else whatever
    /// [`kube::Config::infer`] finds. Opens no connection.
    ///
    /// # Errors
    /// [`ConnectError`], with what to do about it.
    pub async fn connect(context: Option<&str>) -> Result<Self, ConnectError> {
        let config = match context {
            Some(context) => {
                let options = KubeConfigOptions {
                    context: Some(context.to_owned()),
                    ..Default::default()
                };
                kube::Config::from_custom_kubeconfig(Kubeconfig::read()?, &options).await?
            }
            None => kube::Config::infer().await?,
        };
        if config.proxy_url.is_some() {
            return Err(ConnectError::Unsupported("`proxy-url` is not available"));
        }
        let auth = &config.auth_info;
        if auth.impersonate.is_some()
            || auth.impersonate_groups.is_some()
            || !config.headers.is_empty()
        {
            // Silently acting as more than the administrator asked for would be worse.
            return Err(ConnectError::Unsupported(
                "`as` and `as-groups` are not available: give the parent credentials of its own, and children a serviceAccountName",
            ));
        }
        let authorities = config.root_cert.iter().flatten();
        let authorities: Vec<_> = authorities
            .map(|der| Pem::new("CERTIFICATE", der.as_slice()))
            .collect();
        let authorities = pem::encode_many(&authorities).into();
        let transport = Transport::new(
            config.rustls_client_config()?,
            config.tls_server_name.clone(),
        );
        let send = tower::service_fn(move |request: Request<RequestBody>| {
            let transport = transport.clone();
            async move {
                let lane = request.extensions().get().copied().unwrap_or(Lane::Call);
                transport.send(lane, request).await.map_err(BoxError::from)
            }
        });
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer()?)
            .map_err(BoxError::from)
            .service(send);
        Ok(Self {
            service: BoxCloneSyncService::new(service),
            default_namespace: config.default_namespace,
            authorities,
        })
    }

    /// The namespace of the context, or of the Pod we run in.
    pub fn default_namespace(&self) -> &str {
        &self.default_namespace
    }

    /// The certificate authorities of the server, as PEM; empty where the configuration has none.
    pub fn authorities(&self) -> &Bytes {
        &self.authorities
    }

    /// Sends a request; the body of the answer is still to be read.
    ///
    /// # Errors
    /// [`TransportError`]. Statuses are not errors.
    pub async fn send(
        &self,
        identity: &Identity,
        lane: Lane,
        request: ApiRequest,
    ) -> Result<Response<Body>, TransportError> {
        let mut http = Request::new(RequestBody::new(request.body));
        *http.method_mut() = request.method;
        *http.uri_mut() = request
            .path_and_query
            .parse()
            .map_err(|e| TransportError::Layer(format!("{}: {e}", request.path_and_query)))?;
        http.extensions_mut().insert(lane);
        let headers = http.headers_mut();
        headers.insert(
            http::header::USER_AGENT,
            HeaderValue::from_static(USER_AGENT),
        );
        // `append` keeps what a child says twice; a child's own user agent replaces ours.
        for (name, value) in request.headers {
            if name == http::header::USER_AGENT {
                headers.insert(name, value);
            } else {
                headers.append(name, value);
            }
        }
        for (name, value) in &identity.headers {
            headers.append(name.clone(), value.clone());
        }
        let answer = self.service.clone().oneshot(http);
        match async_std::future::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(match error.downcast::<TransportError>() {
                Ok(error) => *error,
                Err(other) => TransportError::Layer(other.to_string()),
            }),
            Err(_) => Err(TransportError::TimedOut(ANSWER_TIMEOUT)),
        }
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// [`AnswerError`]. Statuses are not errors.
    pub async fn call(
        &self,
        identity: &Identity,
        request: ApiRequest,
    ) -> Result<Answer, AnswerError> {
        let response = self.send(identity, Lane::Call, request).await?;
        let status = response.status();
        let retry_after = retry_after(response.headers());
        let body = read_to_end(response.into_body()).await?;
        Ok(Answer {
            status,
            retry_after,
            body,
        })
    }
}

/// Reads a body to its end.
///
/// # Errors
/// [`AnswerError`], also when nothing comes for a minute.
pub async fn read_to_end(mut body: Body) -> Result<Bytes, AnswerError> {
    let mut whole = BytesMut::new();
    loop {
        let frame = async_std::future::timeout(FRAME_TIMEOUT, body.frame());
        let Some(frame) = frame
            .await
            .map_err(|_| TransportError::TimedOut(FRAME_TIMEOUT))?
        else {
            return Ok(whole.freeze());
        };
        let Ok(data) = frame.map_err(AnswerError::Body)?.into_data() else {
            continue;
        };
        if whole.len() + data.len() > MAX_RESULT_BYTES {
            return Err(AnswerError::TooLarge);
        }
        whole.extend_from_slice(&data);
    }
}

/// `Retry-After` in seconds (RFC 9110, 10.2.3); the API server uses no dates.
pub fn retry_after(headers: &http::HeaderMap) -> Option<Duration> {
    headers
        .get(http::header::RETRY_AFTER)?
        .to_str()
        .ok()?
        .parse()
        .ok()
        .map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_account_is_impersonated_with_its_groups() {
        let identity = Identity::service_account("ns", "sa").unwrap();
        let headers: Vec<_> = identity
            .headers
            .iter()
            .map(|(n, v)| (n.as_str(), v.to_str().unwrap()))
            .collect();
        assert_eq!(
            headers,
            [
                ("impersonate-user", "system:serviceaccount:ns:sa"),
                ("impersonate-group", "system:serviceaccounts"),
                ("impersonate-group", "system:serviceaccounts:ns"),
                ("impersonate-group", "system:authenticated"),
            ]
        );
        assert!(Identity::service_account("a\nb", "c").is_err());
    }
}
