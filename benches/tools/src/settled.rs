//! Memory of processes over time: while they are busy, and once it has settled.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cluster::Ring;
use crate::process::{Memory, cpu, memory};
use crate::say;

/// How often RSS is looked at while operators are busy.
const BUSY_INTERVAL: Duration = Duration::from_millis(20);
/// And while they are not.
pub const QUIET_INTERVAL: Duration = Duration::from_millis(250);
/// How long a process is left alone before its RSS may count as settled: more than the second after
/// which the parent evicts code pages.
const SETTLE_AT_LEAST: Duration = Duration::from_secs(3);
/// For so many samples it must not have moved by more than `SETTLED_SPREAD`.
const SETTLED_SAMPLES: usize = 8;
const SETTLED_SPREAD: f64 = 0.005;
/// When it goes on moving, it is measured nevertheless, and said.
const SETTLE_AT_MOST: Duration = Duration::from_secs(60);

/// Sends an event to all operators of the ring, and returns the largest memory meanwhile.
///
/// # Errors
/// When an operator is gone, or what the API server says.
pub async fn loaded(pids: &[u32], ring: &mut Ring) -> Result<Memory> {
    settle(pids).await?;
    let mut loaded = memory(pids, false)?;
    let flood = async {
        ring.flood().await?;
        until_quiet(pids).await
    };
    let mut flood = std::pin::pin!(flood);
    loop {
        tokio::select! {
            result = &mut flood => break result?,
            () = tokio::time::sleep(BUSY_INTERVAL) => {}
        }
        let sample = memory(pids, false)?;
        if sample.resident > loaded.resident {
            loaded = sample;
        }
    }
    Ok(loaded)
}

/// Waits until processes use no CPU to speak of, which is before children are put away.
///
/// # Errors
/// When one of them is gone.
pub async fn until_quiet(pids: &[u32]) -> Result<()> {
    let mut before = cpu(pids)?.ticks();
    for _ in 0..100 {
        tokio::time::sleep(BUSY_INTERVAL * 10).await;
        let now = cpu(pids)?.ticks();
        // A tick may be somebody's timer.
        if now <= before + 1 {
            break;
        }
        before = now;
    }
    Ok(())
}

/// Waits until the memory of processes moves no more.
///
/// # Errors
/// When one of them is gone.
pub async fn settle(pids: &[u32]) -> Result<()> {
    let started = Instant::now();
    let mut last = VecDeque::new();
    loop {
        last.push_back(memory(pids, false)?.resident as f64);
        if last.len() > SETTLED_SAMPLES {
            last.pop_front();
        }
        let low = last.iter().copied().fold(f64::MAX, f64::min);
        let high = last.iter().copied().fold(0.0, f64::max);
        let is_settled = last.len() == SETTLED_SAMPLES && high - low <= SETTLED_SPREAD * high;
        let elapsed = started.elapsed();
        if is_settled && elapsed >= SETTLE_AT_LEAST {
            return Ok(());
        }
        if elapsed >= SETTLE_AT_MOST {
            say(format_args!(
                "RSS still moves: {low:.0} to {high:.0} KiB in the last seconds"
            ));
            return Ok(());
        }
        tokio::time::sleep(QUIET_INTERVAL).await;
    }
}

/// The median of some seconds.
///
/// # Errors
/// When a process is gone.
pub async fn hold(pids: &[u32], seconds: u64) -> Result<Memory> {
    let started = Instant::now();
    let mut samples = vec![memory(pids, true)?];
    while started.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(QUIET_INTERVAL).await;
        samples.push(memory(pids, false)?);
    }
    let (proportional, private) = (samples[0].proportional, samples[0].private);
    samples.sort_unstable_by_key(|sample| sample.resident);
    let median = samples[samples.len() / 2];
    Ok(Memory {
        proportional,
        private,
        ..median
    })
}

/// KiB as MiB.
pub fn mebibytes(kibibytes: u64, decimals: usize) -> String {
    format!("{:.decimals$}", kibibytes as f64 / 1024.0)
}
