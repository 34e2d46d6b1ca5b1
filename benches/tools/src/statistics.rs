//! Quantiles of a handful of measurements.

use std::time::Duration;

/// The nearest-rank quantile: the smallest measurement that is not below `quantile` of all.
/// NaN when there is none.
pub fn quantile(measurements: &[f64], quantile: f64) -> f64 {
    let mut sorted = measurements.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rank = (quantile * sorted.len() as f64).ceil() as usize;
    let index = rank.clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// Half of them are not above it.
pub fn median(measurements: &[f64]) -> f64 {
    quantile(measurements, 0.5)
}

/// A figure for a table, or a dash where there is none.
pub fn cell(value: f64, decimals: usize) -> String {
    if value.is_finite() {
        format!("{value:.decimals$}")
    } else {
        "–".to_owned()
    }
}

/// A duration in milliseconds.
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measurements() {
        let all: Vec<_> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&all, 0.5), 50.0);
        assert_eq!(quantile(&all, 0.99), 99.0);
        assert_eq!(quantile(&all, 1.0), 100.0);
        assert_eq!(quantile(&all, 0.0), 1.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert!(median(&[]).is_nan());
        assert_eq!(cell(f64::NAN, 1), "–");
    }
}
