//! Asks when a child will be woken next: a prediction server, or the built-in models.
//!
//! The protocol is that of the WASM-operator prototype: `POST {base}prediction` with
//! `{"history":[RFC 3339 ...],"function":"SES"}`, answered by `{"prediction": RFC 3339}`. A server
//! that fails, hangs or talks nonsense costs a line in the log; the built-in model answers instead.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_lock::Semaphore;
use async_std::future::timeout;
use async_std::io::ReadExt;
use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};
use surf::Url;
use thiserror::Error;

use crate::forecast::{self, Forecast, History, Model};
use crate::outbound::Outbound;

const TIMEOUT: Duration = Duration::from_secs(2);
const MAX_ANSWER_BYTES: u64 = 4096;
/// Questions at a time; a slow server does not collect more.
const MAX_QUESTIONS: usize = 8;
/// A later prediction is no use to anybody.
const FAR: Duration = Duration::from_secs(30 * 24 * 3600);
/// Failures of the server are in the log that often at most.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// A question of the protocol.
#[derive(Debug, Serialize, Deserialize)]
pub struct Question {
    /// Wake-ups, oldest first.
    #[serde(serialize_with = "with_nanoseconds")]
    pub history: Vec<Timestamp>,
    /// Name of the model.
    #[serde(default = "default_function")]
    pub function: String,
}

/// Always with nine digits: the prototype's server cuts times after the sixth, and fails on
/// shorter ones.
fn with_nanoseconds<S: Serializer>(times: &[Timestamp], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(times.iter().map(|time| format!("{time:.9}")))
}

/// What the prototype's server does when none is named.
fn default_function() -> String {
    "autoReg".into()
}

/// Its answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// The next wake-up.
    pub prediction: Timestamp,
}

/// Why a server's answer is not used.
#[derive(Debug, Error)]
enum RemoteError {
    #[error("{0}")]
    Http(String),
    #[error("it answered {0}")]
    Status(surf::StatusCode),
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    TimedOut,
    #[error("its answer is not understood: {0}")]
    Answer(#[from] serde_json::Error),
    #[error("it predicts {0}, which is too far ahead")]
    Time(Timestamp),
}

impl From<surf::Error> for RemoteError {
    fn from(error: surf::Error) -> Self {
        Self::Http(error.into_inner().to_string())
    }
}

/// Where predictions come from: a server, or (`None`) the built-in models.
pub type Server = Option<Url>;

/// See the module's documentation.
#[derive(Debug)]
pub struct Predictor {
    server: Server,
    outbound: Outbound,
    questions: Semaphore,
    warned: Mutex<Option<Instant>>,
}

/// The address of a prediction server: what is put before `prediction` in the path. `none` and
/// nothing mean that there is none, as in the prototype.
///
/// # Errors
/// What is wrong with it.
pub fn server(base: &str) -> Result<Server, String> {
    if base.is_empty() || base == "none" {
        return Ok(None);
    }
    let slash = if base.ends_with('/') { "" } else { "/" };
    let url = Url::parse(&format!("{base}{slash}prediction")).map_err(|e| e.to_string())?;
    if matches!(url.scheme(), "http" | "https") {
        Ok(Some(url))
    } else {
        Err("must begin with http:// or https://".into())
    }
}

impl Predictor {
    /// With that server (see [`server`]), or with the built-in models alone.
    pub fn new(server: Server) -> Self {
        Self {
            server,
            outbound: Outbound::default(),
            questions: Semaphore::new(MAX_QUESTIONS),
            warned: Mutex::default(),
        }
    }

    /// The next wake-up of a child; `None` when it cannot be foretold.
    pub async fn next_wake(
        &self,
        child: &str,
        model: Model,
        history: &History,
    ) -> Option<Forecast> {
        // Whether it can be foretold at all, we say ourselves: the protocol has no word for "no".
        let built_in = forecast::forecast(model, history)?;
        let (Some(server), Some(function)) = (&self.server, model.remote_name()) else {
            return Some(built_in);
        };
        let Some(_place) = self.questions.try_acquire() else {
            return Some(built_in);
        };
        let asked = timeout(TIMEOUT, self.ask(server, function, history)).await;
        match asked.unwrap_or(Err(RemoteError::TimedOut)) {
            Ok(Some(at)) => Some(Forecast { at, ..built_in }),
            Ok(None) => Some(built_in),
            Err(error) => {
                self.warn(child, &error);
                Some(built_in)
            }
        }
    }

    /// `None` for a time that is past, which is no fault: the child was busy for longer.
    async fn ask(
        &self,
        server: &Url,
        function: &str,
        history: &History,
    ) -> Result<Option<SystemTime>, RemoteError> {
        let question = Question {
            history: history
                .times()
                .filter_map(|time| Timestamp::try_from(time).ok())
                .collect(),
            function: function.to_owned(),
        };
        let client = self.outbound.client();
        let client = client.map_err(|e| RemoteError::Http(e.to_string()))?;
        let request = client.post(server).body_json(&question)?;
        let mut response = request.send().await?;
        if response.status() != surf::StatusCode::Ok {
            return Err(RemoteError::Status(response.status()));
        }
        let mut text = Vec::new();
        let body = response.take_body();
        let read = body.take(MAX_ANSWER_BYTES).read_to_end(&mut text).await;
        read.map_err(|e| RemoteError::Http(e.to_string()))?;
        let Answer { prediction } = serde_json::from_slice(&text)?;
        let at = SystemTime::from(prediction);
        match at.duration_since(SystemTime::now()) {
            Ok(ahead) if ahead <= FAR => Ok(Some(at)),
            Ok(_) => Err(RemoteError::Time(prediction)),
            Err(_) => Ok(None),
        }
    }

    fn warn(&self, child: &str, error: &RemoteError) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            log::warn!(target: child, "prediction server: {error}; the built-in model answers");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_std::task::{block_on, spawn};
    use bytes::Bytes;
    use hyper::StatusCode;

    fn periodic() -> History {
        let mut history = History::default();
        let start = SystemTime::now() - Duration::from_secs(5 * 30);
        for i in 0..=30 {
            history.push(start + Duration::from_secs(5 * i));
        }
        history
    }

    /// What the predictor says when a server answers like that.
    fn with_server(status: StatusCode, body: &'static str) -> Option<Forecast> {
        block_on(async {
            let listener = crate::serve::listen("127.0.0.1:0".parse().unwrap())
                .await
                .unwrap();
            let base = format!("http://{}", listener.local_addr().unwrap());
            let answer = move |_| async move { crate::serve::text(status, Bytes::from(body)) };
            spawn(crate::serve::serve(listener, answer));
            let predictor = Predictor::new(server(&base).unwrap());
            predictor
                .next_wake("a", Model::default(), &periodic())
                .await
        })
    }

    #[test]
    fn a_server_that_fails_is_replaced_by_the_built_in_model() {
        let built_in = forecast::forecast(Model::default(), &periodic());
        assert!(built_in.is_some());
        for (status, body) in [
            (StatusCode::INTERNAL_SERVER_ERROR, "{}"),
            (StatusCode::OK, "{\"error\":\"no\"}"),
            (StatusCode::OK, "{\"prediction\":\"2001-01-01T00:00:00Z\"}"),
            (StatusCode::OK, "{\"prediction\":\"9001-01-01T00:00:00Z\"}"),
        ] {
            let found = with_server(status, body).unwrap();
            let off = found
                .at
                .duration_since(SystemTime::now())
                .unwrap_or_default();
            assert!(off < Duration::from_secs(7), "{body}: {off:?}");
        }
    }

    #[test]
    fn an_answer_is_used() {
        let soon = SystemTime::now() + Duration::from_secs(3);
        let soon = Timestamp::try_from(soon).unwrap().to_string();
        let body: &'static str = format!("{{\"prediction\":\"{soon}\"}}").leak();
        let found = with_server(StatusCode::OK, body).unwrap();
        assert_eq!(Timestamp::try_from(found.at).unwrap().to_string(), soon);
        let margin = forecast::forecast(Model::default(), &periodic())
            .unwrap()
            .margin;
        assert_eq!(found.margin, margin);
    }

    #[test]
    fn what_cannot_be_foretold_is_not_asked() {
        block_on(async {
            let nobody = server("http://127.0.0.1:1").unwrap();
            let found = Predictor::new(nobody)
                .next_wake("a", Model::default(), &History::default())
                .await;
            assert_eq!(found, None);
        });
    }

    #[test]
    fn times_have_all_their_digits() {
        let question = Question {
            history: vec![Timestamp::UNIX_EPOCH],
            function: "SES".into(),
        };
        let text = serde_json::to_string(&question).unwrap();
        assert!(text.contains("1970-01-01T00:00:00.000000000Z"), "{text}");
        let short: Question = serde_json::from_str(r#"{"history":[]}"#).unwrap();
        assert_eq!(short.function, "autoReg");
    }

    #[test]
    fn the_address_is_that_of_the_prototype() {
        for base in ["http://a:1/x", "http://a:1/x/"] {
            let url = server(base).unwrap().unwrap();
            assert_eq!(url.as_str(), "http://a:1/x/prediction");
        }
        assert_eq!(server("none"), Ok(None));
        assert!(server("a:1").is_err());
    }
}
