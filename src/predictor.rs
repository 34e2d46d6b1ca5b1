//! A prediction server, with the protocol and the model names of the WASM-operator prototype's.
//!
//! | function | here |
//! |---|---|
//! | `SES` | exponential smoothing, its parameters fitted (augurs) |
//! | `Holt` | the same with a linear trend (augurs) |
//! | `Winter` | as `SES`: the prototype fits Holt and Winters's model without trend and season |
//! | `autoReg`, and when none is named | autoregression over 10 intervals, or 2 when the history is short |
//! | `ARIMA` | ARIMA(2,0,0): autoregression over 2 intervals |
//! | `SARIMA` | not implemented, nor is it there: seasons need a period, which the protocol does not have |
//!
//! Where the prototype answers errors with status 200, this server uses 400, 404 and 501, with the
//! same `{"error": ...}`. A single wake-up is answered by itself plus 3 s, none by now plus 3 s, as there.

use augurs_core::{Fit, Predict};
use augurs_ets::AutoETS;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use thiserror::Error;

use crate::forecast::autoregression;
use crate::prediction::{Answer, Question};
use crate::serve::text;

/// Of a question. The prototype sends 50.
const MAX_HISTORY: usize = 1000;
const FEW: SignedDuration = SignedDuration::from_secs(3);

/// Why there is no prediction.
#[derive(Debug, Error)]
enum Refusal {
    #[error("not a question: {0}")]
    Question(#[from] serde_json::Error),
    #[error("the history has more than {MAX_HISTORY} entries")]
    TooLong,
    #[error("the history is not in order")]
    Disordered,
    #[error("{0} is not implemented")]
    NotImplemented(String),
    #[error("no function of that name: {0}; there are SES, Holt, Winter, autoReg, ARIMA")]
    Unknown(String),
    #[error("no prediction is possible from that history")]
    Impossible,
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::NotImplemented(_) => StatusCode::NOT_IMPLEMENTED,
            Self::Impossible => StatusCode::UNPROCESSABLE_ENTITY,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// Answers a request to the prediction server.
pub async fn answer(request: Request<Bytes>) -> Response<Bytes> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::POST, "/prediction") => {
            // Fitting takes milliseconds at most; it is not to hold up an executor's thread.
            let work = async_std::task::spawn_blocking(move || predict(request.body()));
            match work.await {
                Ok(answer) => (StatusCode::OK, json!(answer)),
                Err(refusal) => (refusal.status(), json!({"error": refusal.to_string()})),
            }
        }
        (_, "/prediction") => (StatusCode::METHOD_NOT_ALLOWED, json!({"error": "use POST"})),
        (&Method::GET, "/healthz") => (StatusCode::OK, json!("ok")),
        _ => (
            StatusCode::NOT_FOUND,
            json!({"error": "there is POST /prediction"}),
        ),
    };
    let mut response = text(status, body.to_string());
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

fn predict(body: &[u8]) -> Result<Answer, Refusal> {
    let Question { history, function } = serde_json::from_slice(body)?;
    log::debug!("asked for {function} over {} wake-ups", history.len());
    if history.len() > MAX_HISTORY {
        return Err(Refusal::TooLong);
    }
    if !history.is_sorted() {
        return Err(Refusal::Disordered);
    }
    let last = history.last().copied().unwrap_or_else(Timestamp::now);
    let intervals: Vec<f64> = history
        .iter()
        .zip(history.iter().skip(1))
        .map(|(earlier, later)| later.duration_since(*earlier).as_secs_f64())
        .collect();
    let mean = || {
        #[expect(clippy::cast_precision_loss, reason = "at most MAX_HISTORY")]
        let count = intervals.len() as f64;
        intervals.iter().sum::<f64>() / count
    };
    let fitted = match function.as_str() {
        "SES" | "Winter" => exponential_smoothing("ANN", &intervals),
        "Holt" => exponential_smoothing("AAN", &intervals),
        // A fork of the prototype has it with a capital.
        "autoReg" | "AutoReg" => {
            autoregression(10, &intervals).or_else(|| autoregression(2, &intervals))
        }
        "ARIMA" => autoregression(2, &intervals),
        "SARIMA" => return Err(Refusal::NotImplemented(function)),
        _ => return Err(Refusal::Unknown(function)),
    };
    if intervals.is_empty() {
        return add(last, FEW);
    }
    // As the prototype: what cannot be fitted is the mean.
    let next = fitted.filter(|next| next.is_finite() && *next > 0.0);
    let next = SignedDuration::try_from_secs_f64(next.unwrap_or_else(mean));
    add(last, next.map_err(|_| Refusal::Impossible)?)
}

fn add(last: Timestamp, interval: SignedDuration) -> Result<Answer, Refusal> {
    let prediction = last.checked_add(interval);
    Ok(Answer {
        prediction: prediction.map_err(|_| Refusal::Impossible)?,
    })
}

/// The next value by a model of that specification (error, trend, season).
fn exponential_smoothing(specification: &'static str, intervals: &[f64]) -> Option<f64> {
    let fitted = AutoETS::new(1, specification).ok()?.fit(intervals).ok()?;
    fitted.predict(1, None).ok()?.point.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTIONS: [&str; 6] = ["SES", "Holt", "Winter", "autoReg", "AutoReg", "ARIMA"];

    fn ask(function: &str, intervals: &[f64]) -> Result<f64, Refusal> {
        let mut at = Timestamp::UNIX_EPOCH;
        let mut history = vec![at];
        for interval in intervals {
            at += SignedDuration::from_secs_f64(*interval);
            history.push(at);
        }
        let question = json!({"history": history, "function": function}).to_string();
        let Answer { prediction } = predict(question.as_bytes())?;
        Ok(prediction.duration_since(at).as_secs_f64())
    }

    #[test]
    fn every_function_foretells_a_period() {
        let mut random = fastrand::Rng::with_seed(1);
        let intervals: Vec<_> = (0..49).map(|_| 5.2 + random.f64() * 0.2).collect();
        for function in FUNCTIONS {
            let next = ask(function, &intervals).unwrap();
            assert!((next - 5.3).abs() < 0.3, "{function}: {next}");
        }
    }

    #[test]
    fn short_histories_are_answered_as_by_the_prototype() {
        for function in FUNCTIONS {
            assert!((ask(function, &[]).unwrap() - 3.0).abs() < 1e-6);
            for short in [&[7.0][..], &[7.0, 7.0], &[7.0, 7.0, 7.0]] {
                let next = ask(function, short).unwrap();
                assert!((next - 7.0).abs() < 0.5, "{function}: {next}");
            }
        }
    }

    #[test]
    fn no_history_is_too_odd() {
        let mut random = fastrand::Rng::with_seed(1);
        for round in 0..300 {
            let length = random.usize(0..60);
            let scale = 10_f64.powi(random.i32(-9..7));
            let odd: Vec<_> = (0..length)
                .map(|_| match round % 3 {
                    0 => 0.0,
                    1 => scale,
                    _ => random.f64().powi(20) * scale,
                })
                .collect();
            for function in FUNCTIONS {
                if let Ok(next) = ask(function, &odd) {
                    assert!(next >= 0.0, "{function} of {odd:?}: {next}");
                }
            }
        }
    }

    #[test]
    fn offsets_are_understood() {
        let body = r#"{"history":["2026-01-01T02:00:00+02:00","2026-01-01T00:00:07Z"]}"#;
        let answer = json!(predict(body.as_bytes()).unwrap()).to_string();
        assert_eq!(answer, r#"{"prediction":"2026-01-01T00:00:14Z"}"#);
    }

    #[test]
    fn what_is_not_there_is_said() {
        let refusal = ask("SARIMA", &[5.0; 20]).unwrap_err();
        assert_eq!(refusal.status(), StatusCode::NOT_IMPLEMENTED);
        assert!(matches!(ask("LSTM", &[5.0]), Err(Refusal::Unknown(_))));
        for body in [
            "",
            "{}",
            r#"{"history":["2026-01-01T00:00:00"],"function":"SES"}"#,
            "[]",
            r#"{"history":["yesterday"],"function":"SES"}"#,
        ] {
            assert!(matches!(
                predict(body.as_bytes()),
                Err(Refusal::Question(_))
            ));
        }
        let empty = r#"{"history":[],"function":"SES"}"#;
        let soon = predict(empty.as_bytes()).unwrap().prediction;
        let ahead = soon.duration_since(Timestamp::now()).as_secs_f64();
        assert!((2.0..=3.0).contains(&ahead), "{ahead}");
        let ends =
            r#"{"history":["9999-12-30T22:00:00Z","9999-12-30T22:00:00.5Z"],"function":"SES"}"#;
        drop(predict(ends.as_bytes()));
    }
}
