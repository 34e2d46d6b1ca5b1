//! Counters of the whole process, in Prometheus's text format.
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>)

use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Something that is counted, or that goes up and down.
#[derive(Debug, Default)]
pub struct Number(AtomicI64);

impl Number {
    const fn new() -> Self {
        Self(AtomicI64::new(0))
    }

    /// Adds that much, which may be negative.
    pub fn add(&self, amount: i64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Its value now.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the buckets, in microseconds; a last one takes the rest.
const BUCKETS: [u64; 12] = [
    250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 256_000, 1_000_000,
];

/// How long something takes.
#[derive(Debug)]
pub struct Durations {
    counts: [AtomicU64; BUCKETS.len() + 1],
    sum_microseconds: AtomicU64,
}

impl Durations {
    const fn new() -> Self {
        Self {
            counts: [const { AtomicU64::new(0) }; BUCKETS.len() + 1],
            sum_microseconds: AtomicU64::new(0),
        }
    }

    /// Counts one.
    pub fn observe(&self, duration: Duration) {
        let microseconds = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS.partition_point(|bound| *bound < microseconds);
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_microseconds
            .fetch_add(microseconds, Ordering::Relaxed);
    }

    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    fn render(&self, out: &mut String, name: &str) -> std::fmt::Result {
        let mut total = 0;
        for (count, bound) in self
            .counts
            .iter()
            .zip(BUCKETS.iter().map(Some).chain([None]))
        {
            total += count.load(Ordering::Relaxed);
            match bound {
                Some(bound) => {
                    let seconds = *bound as f64 / 1e6;
                    writeln!(out, "{name}_bucket{{le=\"{seconds}\"}} {total}")?;
                }
                None => writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {total}")?,
            }
        }
        let sum = self.sum_microseconds.load(Ordering::Relaxed) as f64 / 1e6;
        writeln!(out, "{name}_sum {sum}\n{name}_count {total}")
    }
}

/// Children whose instance is in memory.
pub static AWAKE: Number = Number::new();
/// Children whose memory is in a snapshot, or on its way there.
pub static ASLEEP: Number = Number::new();
/// Children that went to sleep.
pub static HIBERNATIONS: Number = Number::new();
/// Snapshots that could not be made.
pub static HIBERNATION_FAILURES: Number = Number::new();
/// Children that were woken.
pub static WAKES: Number = Number::new();
/// Sleeping children that could not be woken, and started afresh.
pub static WAKE_FAILURES: Number = Number::new();
/// Children that were woken ahead of a predicted event.
pub static WAKES_AHEAD: Number = Number::new();
/// Of those, how many had that event before they went to sleep again.
pub static WAKES_AHEAD_USED: Number = Number::new();
/// From the decision to a finished snapshot.
pub static HIBERNATE_SECONDS: Durations = Durations::new();
/// From the decision to the instance's first instruction.
pub static WAKE_SECONDS: Durations = Durations::new();

/// All of it.
pub fn render() -> String {
    let mut out = String::new();
    let counters = [
        (
            "hibernations_total",
            "Children that went to sleep.",
            &HIBERNATIONS,
        ),
        (
            "hibernation_failures_total",
            "Snapshots that could not be made; the children stayed in memory.",
            &HIBERNATION_FAILURES,
        ),
        ("wakes_total", "Sleeping children that were woken.", &WAKES),
        (
            "wake_failures_total",
            "Sleeping children that could not be woken and started afresh.",
            &WAKE_FAILURES,
        ),
        (
            "wakes_ahead_total",
            "Children woken ahead of a predicted event.",
            &WAKES_AHEAD,
        ),
        (
            "wakes_ahead_used_total",
            "Children woken ahead whose event came before they slept again.",
            &WAKES_AHEAD_USED,
        ),
    ];
    // Writing to a String cannot fail.
    let _ = (|| {
        let name = "wasm_operator_children";
        writeln!(
            out,
            "# HELP {name} Children by where their instance is.\n# TYPE {name} gauge"
        )?;
        for (state, number) in [("awake", &AWAKE), ("asleep", &ASLEEP)] {
            writeln!(out, "{name}{{state=\"{state}\"}} {}", number.get())?;
        }
        for (name, help, number) in counters {
            let name = format!("wasm_operator_{name}");
            writeln!(
                out,
                "# HELP {name} {help}\n# TYPE {name} counter\n{name} {}",
                number.get()
            )?;
        }
        for (name, help, durations) in [
            (
                "hibernate_seconds",
                "Until a snapshot is finished.",
                &HIBERNATE_SECONDS,
            ),
            (
                "wake_seconds",
                "Until a woken instance can run.",
                &WAKE_SECONDS,
            ),
        ] {
            let name = format!("wasm_operator_{name}");
            writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram")?;
            durations.render(&mut out, &name)?;
        }
        Ok::<(), std::fmt::Error>(())
    })();
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_its_bucket_and_all_above() {
        let durations = Durations::new();
        durations.observe(Duration::from_micros(500));
        durations.observe(Duration::from_secs(9));
        let mut out = String::new();
        durations.render(&mut out, "x").unwrap();
        for line in [
            "x_bucket{le=\"0.00025\"} 0",
            "x_bucket{le=\"0.0005\"} 1",
            "x_bucket{le=\"1\"} 1",
            "x_bucket{le=\"+Inf\"} 2",
            "x_sum 9.0005",
            "x_count 2",
        ] {
            assert!(out.lines().any(|l| l == line), "{line} in {out}");
        }
    }
}
