//! How well wake-ups are foretold: prints a Markdown table.
//!
//! `cargo bench --bench prediction`. Traces are made up from fixed seeds; the figures are the same
//! on every machine, but for the last line. A child is simulated as the worker treats it: it sleeps
//! once it has been idle for [`IDLE`], its first event then is a wake-up, a forecast is made when it
//! falls asleep, and a child that was woken in vain is not woken ahead again before a real event.
//!
//! - **hit**: wake-ups that found the child awake because it had been woken ahead.
//! - **±1 s**, **±200 ms**: wake-ups that close to the forecast, the windows that were used for the
//!   WASM-operator prototype. Wake-ups without a forecast count as missed.
//! - **no forecast**: wake-ups before which the child was not woken ahead, on purpose or because
//!   the time was past when it fell asleep.
//! - **in vain**: wakes ahead that no event followed, per wake-up.
//! - **waiting**: time awake ahead of the event, or in vain, as a part of the trace.

use std::hint::black_box;
use std::time::{Duration, Instant, SystemTime};

use fastrand::Rng;
use wasm_operator::forecast::{Forecast, History, Model, forecast};

/// Of the prototype (`SHUTDOWN_INACTIVE`).
const IDLE: f64 = 1.0;
const EVENTS: usize = 1000;

fn normal(random: &mut Rng) -> f64 {
    // Box and Muller.
    let (one, other) = (1.0 - random.f64(), random.f64());
    (-2.0 * one.ln()).sqrt() * (std::f64::consts::TAU * other).cos()
}

fn exponential(random: &mut Rng) -> f64 {
    -(1.0 - random.f64()).ln()
}

/// Times of events from intervals.
fn times(mut interval: impl FnMut(usize) -> f64) -> Vec<f64> {
    let mut now = 0.0;
    (0..EVENTS)
        .map(|index| {
            now += interval(index).max(0.001);
            now
        })
        .collect()
}

fn bursts(random: &mut Rng) -> Vec<f64> {
    let (mut now, mut events) = (0.0, Vec::new());
    while events.len() < EVENTS {
        now += 60.0 * exponential(random);
        let mut burst: Vec<_> = (0..random.usize(3..=20))
            .map(|_| now + random.f64())
            .collect();
        burst.sort_by(f64::total_cmp);
        now = *burst.last().unwrap_or(&now);
        events.append(&mut burst);
    }
    events.truncate(EVENTS);
    events
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn traces() -> Vec<(&'static str, Vec<f64>)> {
    let random = &mut Rng::with_seed(1);
    let part = |index: usize| index as f64 / EVENTS as f64;
    let mut traces = vec![
        (
            "5.20 s, σ 0.61 s, normal",
            times(|_| 5.2 + 0.61 * normal(random)),
        ),
        // The same mean and deviation, from rare missing events, as the prototype's figures suggest.
        (
            "5.20 s, σ 0.61 s, 1.4 % doubled",
            times(|_| {
                let period = 5.13 + 0.045 * normal(random);
                if random.f64() < 0.014 {
                    period * 2.0
                } else {
                    period
                }
            }),
        ),
        (
            "5.20 s to 10.4 s, σ 0.61 s",
            times(|index| 5.2 * (1.0 + part(index)) + 0.61 * normal(random)),
        ),
        (
            "30 s, jitter 1 %",
            times(|_| 30.0 * (1.0 + 0.01 * normal(random))),
        ),
        (
            "30 s, jitter 1 %, 3 % pauses of 10 min",
            times(|_| {
                let pause = if random.f64() < 0.03 {
                    600.0 * exponential(random)
                } else {
                    0.0
                };
                30.0 * (1.0 + 0.01 * normal(random)) + pause
            }),
        ),
        (
            "5, 20 or 60 s, changes every 200, jitter 2 %",
            times(|index| {
                [5.0, 20.0, 60.0, 5.0, 60.0][index / 200 % 5] * (1.0 + 0.02 * normal(random))
            }),
        ),
        (
            "5 s, 5 s, 20 s, jitter 2 %",
            times(|index| [5.0, 5.0, 20.0][index % 3] * (1.0 + 0.02 * normal(random))),
        ),
    ];
    let mut two: Vec<f64> = (1..EVENTS)
        .flat_map(|index| [7.0 * index as f64, 11.0 * index as f64])
        .collect();
    two.sort_by(f64::total_cmp);
    two.truncate(EVENTS);
    traces.push(("every 7 s and every 11 s", two));
    traces.push((
        "random (Poisson), 10 s",
        times(|_| 10.0 * exponential(random)),
    ));
    traces.push(("bursts of 3-20, pauses 60 s", bursts(random)));
    traces
}

#[derive(Default)]
struct Outcome {
    wakes: f64,
    hits: f64,
    within_1s: f64,
    within_200ms: f64,
    without: f64,
    in_vain: f64,
    waiting: f64,
}

fn at(seconds: f64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds + 1e9)
}

fn seconds(forecast: Forecast) -> f64 {
    let since = forecast.at.duration_since(at(0.0));
    since.map_or(0.0, |since| since.as_secs_f64())
}

fn simulate(model: Model, events: &[f64]) -> Outcome {
    let mut outcome = Outcome::default();
    let mut history = History::default();
    let mut events = events.iter().copied().peekable();
    // The first event makes the child and is no wake-up.
    let mut event = events.next();
    let mut stays_until = 0.0_f64;
    while let Some(now) = event {
        history.push(at(now));
        let mut sleeps = stays_until.max(now + IDLE);
        while let Some(next) = events.next_if(|next| *next < sleeps) {
            sleeps = sleeps.max(next + IDLE);
        }
        event = events.next();
        let Some(next) = event else { break };
        outcome.wakes += 1.0;
        stays_until = 0.0;
        let found = forecast(model, &history).map(|found| (seconds(found), found.margin));
        let Some((predicted, margin)) = found else {
            outcome.without += 1.0;
            continue;
        };
        let off = (next - predicted).abs();
        outcome.within_1s += f64::from(u8::from(off <= 1.0));
        outcome.within_200ms += f64::from(u8::from(off <= 0.2));
        let margin = margin.as_secs_f64();
        let ahead = predicted - margin;
        if ahead <= sleeps {
            outcome.without += 1.0;
            continue;
        }
        let until = (ahead + IDLE).max(predicted + margin);
        if (ahead..until).contains(&next) {
            outcome.hits += 1.0;
            outcome.waiting += next - ahead;
            stays_until = until;
        } else if next >= until {
            outcome.in_vain += 1.0;
            outcome.waiting += until - ahead;
        }
    }
    outcome
}

fn main() {
    println!(
        "| wake-ups | model | hit | ±1 s | ±200 ms | no forecast | in vain | waiting |\n\
         |---|---|---|---|---|---|---|---|"
    );
    let traces = traces();
    for (name, events) in &traces {
        for (model, model_name) in Model::ALL {
            let outcome = simulate(model, events);
            let part = |count: f64| count / outcome.wakes;
            println!(
                "| {name} | {model_name} | {:.3} | {:.3} | {:.3} | {:.3} | {:.3} | {:.3} |",
                part(outcome.hits),
                part(outcome.within_1s),
                part(outcome.within_200ms),
                part(outcome.without),
                part(outcome.in_vain),
                outcome.waiting / events.last().unwrap_or(&1.0),
            );
        }
    }
    let mut history = History::default();
    for event in traces.iter().take(1).flat_map(|(_, events)| events) {
        history.push(at(*event));
    }
    let costs = Model::ALL.map(|(model, name)| {
        const TIMES: u32 = 200;
        let start = Instant::now();
        for _ in 0..TIMES {
            black_box(forecast(model, black_box(&history)));
        }
        format!("{name} {} µs", (start.elapsed() / TIMES).as_micros())
    });
    println!("\nA forecast takes: {}.", costs.join(", "));
}
