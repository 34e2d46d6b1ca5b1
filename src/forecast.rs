//! When a child will probably be woken next. Pure: no clock, no input or output.
//!
//! A child's wake-ups are a series of intervals; a model says what the next one will be.
//!
//! # When it abstains
//! Waking a child ahead in vain costs one wake-up, and a right guess saves waiting for one, so a
//! guess pays when it is right more often than not. But with a window wide enough every guess is
//! right, and the child awake all the time. So each model is tried on the history itself first,
//! one step ahead: when five in six of the last errors do not fit into a window that is narrow
//! for these intervals, there is no forecast. Random wake-ups are in such a window one time in six.
//! `cargo bench --bench prediction` measures the rule.

use std::collections::VecDeque;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// Wake-ups that are remembered.
pub const HISTORY: usize = 50;
/// Fewer intervals say nothing.
const MIN_INTERVALS: usize = 8;
/// Intervals a model sees before its first trial.
const MIN_FIT: usize = 3;
/// Trials that count, the last ones: after a change of habits it takes no longer to believe again.
const TRIALS: usize = 20;
/// Trials that may fail: one in that many.
const FAILURES: usize = 6;
/// The window is wider than the trials say by that factor: they were few, and to wait a little
/// longer costs less than a miss.
const WIDENING: f64 = 2.0;
/// Wake-ups that follow each other faster are one: the child was hardly asleep in between.
const SAME_WAKE: Duration = Duration::from_millis(250);
/// What a wake-up itself takes, at least.
const MIN_MARGIN: f64 = 0.02;
/// The largest error of the trials that did not fail, as a part of the usual interval.
const MAX_RELATIVE_ERROR: f64 = 0.3;
/// Half of the window, likewise.
const MAX_RELATIVE_MARGIN: f64 = 0.3;
/// Median deviations from the median, beyond which an interval is an outlier.
const OUTLIER: f64 = 8.0;
/// More outliers than one in that many are not outliers, but how it is.
const OUTLIERS: usize = 10;
/// Neither are that many in a row at the end: it has changed.
const NEW_HABIT: usize = 2;
/// Smoothing factors that are tried.
const FACTORS: [f64; 4] = [0.1, 0.3, 0.5, 0.8];
/// Intervals that the autoregression looks back.
const LAGS: usize = 3;

/// How the next interval is predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Model {
    /// Simple exponential smoothing.
    #[default]
    SimpleExponentialSmoothing,
    /// Holt's linear trend: smoothing of level and slope.
    Holt,
    /// A linear function of the intervals before, fitted by least squares.
    AutoRegression,
    /// The mean.
    Mean,
}

impl Model {
    /// All of them, each with its name in configurations.
    pub const ALL: [(Self, &'static str); 4] = [
        (Self::SimpleExponentialSmoothing, "ses"),
        (Self::Holt, "holt"),
        (Self::AutoRegression, "autoregression"),
        (Self::Mean, "mean"),
    ];

    /// Its name in the protocol of prediction servers, if they know it.
    pub fn remote_name(self) -> Option<&'static str> {
        match self {
            Self::SimpleExponentialSmoothing => Some("SES"),
            Self::Holt => Some("Holt"),
            Self::AutoRegression => Some("autoReg"),
            Self::Mean => None,
        }
    }
}

/// No model has that name.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be one of ses, holt, autoregression, mean")]
pub struct UnknownModel;

impl FromStr for Model {
    type Err = UnknownModel;

    fn from_str(name: &str) -> Result<Self, UnknownModel> {
        let found = Self::ALL.into_iter().find(|(_, known)| *known == name);
        found.map(|(model, _)| model).ok_or(UnknownModel)
    }
}

/// The last wake-ups of a child.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    times: VecDeque<SystemTime>,
    /// The last one that was noted, be it a part of the one before.
    latest: Option<SystemTime>,
}

impl History {
    /// Notes a wake-up. One that follows closely upon another is a part of it, and so is a whole
    /// burst of them. When the clock was set back, what was before it is forgotten.
    pub fn push(&mut self, at: SystemTime) {
        let since = self.latest.map(|latest| at.duration_since(latest));
        match since {
            Some(Ok(since)) if since < SAME_WAKE => {
                self.latest = Some(at);
                return;
            }
            // The clock is being adjusted.
            Some(Err(before)) if before.duration() < SAME_WAKE => return,
            Some(Err(_)) => self.times.clear(),
            _ => {}
        }
        if self.times.len() == HISTORY {
            self.times.pop_front();
        }
        self.times.push_back(at);
        self.latest = Some(at);
    }

    /// The wake-ups, oldest first.
    pub fn times(&self) -> impl Iterator<Item = SystemTime> {
        self.times.iter().copied()
    }

    /// Seconds between them.
    fn intervals(&self) -> Vec<f64> {
        self.times()
            .zip(self.times().skip(1))
            .filter_map(|(earlier, later)| Some(later.duration_since(earlier).ok()?.as_secs_f64()))
            .collect()
    }
}

/// When the next wake-up will probably be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// The most probable time.
    pub at: SystemTime,
    /// How far off it may well be, in either direction: the child should be awake that long before.
    pub margin: Duration,
}

/// The next wake-up by that model; `None` when the history does not allow to say.
pub fn forecast(model: Model, history: &History) -> Option<Forecast> {
    let intervals = history.intervals();
    let margin = margin(model, &intervals)?;
    let next = predict(model, &intervals)?;
    let last = history.times().last()?;
    Some(Forecast {
        at: last.checked_add(Duration::try_from_secs_f64(next).ok()?)?,
        margin: Duration::try_from_secs_f64(margin).ok()?,
    })
}

/// How far off a prediction may be, in seconds; see the module's documentation.
fn margin(model: Model, intervals: &[f64]) -> Option<f64> {
    if intervals.len() < MIN_INTERVALS {
        return None;
    }
    let first = intervals.len().saturating_sub(TRIALS).max(MIN_FIT);
    let mut errors = Vec::with_capacity(TRIALS);
    for (index, actual) in intervals.iter().enumerate().skip(first) {
        let before = intervals.get(..index)?;
        errors.push(predict(model, before).map_or(f64::INFINITY, |next| (next - actual).abs()));
    }
    errors.sort_by(f64::total_cmp);
    let kept = errors.len() - errors.len() / FAILURES;
    let error = *errors.get(kept.checked_sub(1)?)?;
    let usual = median(intervals)?;
    let margin = (error * WIDENING)
        .min(usual * MAX_RELATIVE_MARGIN)
        .max(MIN_MARGIN);
    (error.is_finite() && error <= usual * MAX_RELATIVE_ERROR).then_some(margin)
}

/// The next interval, in seconds. Positive and finite.
fn predict(model: Model, intervals: &[f64]) -> Option<f64> {
    let intervals = &without_outliers(intervals)?;
    let next = match model {
        Model::Mean => mean(intervals)?,
        Model::SimpleExponentialSmoothing => best(|factor| smooth(intervals, factor))?,
        Model::Holt => best(|factor| holt(intervals, factor))?,
        // Too short a history for its coefficients: the mean has to do.
        Model::AutoRegression => autoregression(LAGS, intervals).or_else(|| mean(intervals))?,
    };
    (next.is_finite() && next > 0.0).then_some(next)
}

/// The intervals, with rare ones that are far off (a pause, an event that did not come) brought to
/// the border of what is usual, lest every model follow them.
fn without_outliers(intervals: &[f64]) -> Option<Vec<f64>> {
    let middle = median(intervals)?;
    let deviations: Vec<f64> = intervals.iter().map(|i| (i - middle).abs()).collect();
    let border = OUTLIER * median(&deviations)?.max(MIN_MARGIN / OUTLIER);
    let outliers = deviations.iter().filter(|d| **d > border).count();
    let latest = deviations.iter().rev().take_while(|d| **d > border).count();
    if latest >= NEW_HABIT || outliers * OUTLIERS > intervals.len() {
        return Some(intervals.to_vec());
    }
    // Not clamp(), which panics on borders that are no numbers.
    let usual = |i: &f64| i.min(middle + border).max(middle - border);
    Some(intervals.iter().map(usual).collect())
}

/// The prediction of the factor whose errors over the history are smallest.
fn best(fit: impl Fn(f64) -> Option<(f64, f64)>) -> Option<f64> {
    let fits = FACTORS.iter().filter_map(|factor| fit(*factor));
    let (_, next) = fits.min_by(|(one, _), (other, _)| one.total_cmp(other))?;
    Some(next)
}

/// Sum of squared errors, and the next value.
fn smooth(intervals: &[f64], factor: f64) -> Option<(f64, f64)> {
    let (first, rest) = intervals.split_first()?;
    let (mut level, mut squares) = (*first, 0.0);
    for value in rest {
        let error = value - level;
        squares += error * error;
        level += factor * error;
    }
    Some((squares, level))
}

/// Sum of squared errors, and the next value. The slope follows half as fast as the level, and is
/// damped, so that a trend does not run away.
fn holt(intervals: &[f64], factor: f64) -> Option<(f64, f64)> {
    const DAMPING: f64 = 0.9;
    let (first, rest) = intervals.split_first()?;
    let (mut level, mut slope, mut squares) = (*first, 0.0, 0.0);
    for value in rest {
        let error = value - (level + slope);
        squares += error * error;
        let before = level;
        level += slope + factor * error;
        slope = DAMPING * (slope + factor / 2.0 * (level - before - slope));
    }
    Some((squares, level + slope))
}

/// The next value as a linear function of the `lags` values before it, fitted by least squares:
/// Gaussian elimination of the normal equations, with a small ridge that keeps them solvable.
/// `None` when there are too few values for that many coefficients.
pub fn autoregression(lags: usize, values: &[f64]) -> Option<f64> {
    const RIDGE: f64 = 1e-3;
    let size = lags + 1;
    let centre = mean(values)?;
    if values.len() < 3 * size || centre <= 0.0 {
        return None;
    }
    let scaled: Vec<f64> = values.iter().map(|value| value / centre - 1.0).collect();
    // A constant, then the values; the last column is the right side.
    let mut matrix = vec![vec![0.0; size + 1]; size];
    for window in scaled.windows(size) {
        let columns = || std::iter::once(1.0).chain(window.iter().copied());
        for (line, left) in matrix.iter_mut().zip(columns()) {
            for (cell, right) in line.iter_mut().zip(columns()) {
                *cell += left * right;
            }
        }
    }
    for (index, line) in matrix.iter_mut().enumerate() {
        *line.get_mut(index)? += RIDGE;
    }
    for pivot in 0..size {
        let (above, below) = matrix.split_at_mut(pivot + 1);
        let pivot_line = above.last()?;
        let divisor = *pivot_line.get(pivot)?;
        for line in below {
            let factor = line.get(pivot)? / divisor;
            for (cell, upper) in line.iter_mut().zip(pivot_line) {
                *cell -= factor * upper;
            }
        }
    }
    let mut coefficients = vec![0.0; size];
    for (index, line) in matrix.iter().enumerate().rev() {
        let known: f64 = line.iter().zip(&coefficients).map(|(a, c)| a * c).sum();
        *coefficients.get_mut(index)? = (line.get(size)? - known) / line.get(index)?;
    }
    let last = scaled.get(scaled.len() - lags..)?;
    let last = std::iter::once(&1.0).chain(last);
    let next: f64 = last.zip(&coefficients).map(|(x, c)| x * c).sum();
    Some((next + 1.0) * centre)
}

/// The upper one when there are two in the middle.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / count(values))
}

#[expect(clippy::cast_precision_loss, reason = "at most some thousands")]
fn count(values: &[f64]) -> f64 {
    values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(intervals: impl IntoIterator<Item = f64>) -> History {
        let mut history = History::default();
        let mut at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        history.push(at);
        for interval in intervals {
            at += Duration::from_secs_f64(interval);
            history.push(at);
        }
        history
    }

    /// Seconds from the last wake-up.
    fn next(model: Model, history: &History) -> Option<f64> {
        let forecast = forecast(model, history)?;
        let last = history.times().last().unwrap();
        Some(forecast.at.duration_since(last).unwrap().as_secs_f64())
    }

    #[test]
    fn every_model_foretells_a_period() {
        let mut random = fastrand::Rng::with_seed(1);
        let periodic = history((0..40).map(|_| 5.2 + (random.f64() - 0.5) * 0.4));
        for (model, name) in Model::ALL {
            let next = next(model, &periodic).unwrap();
            assert!((next - 5.2).abs() < 0.3, "{name}: {next}");
            assert_eq!(name.parse(), Ok(model));
        }
    }

    #[test]
    fn holt_follows_a_trend() {
        let growing = history((0..40).map(|i| 5.0 + f64::from(i) * 0.1));
        let next = next(Model::Holt, &growing).unwrap();
        assert!((next - 9.0).abs() < 0.5, "{next}");
    }

    #[test]
    fn autoregression_follows_a_pattern_that_others_do_not() {
        let two = history((0..49).map(|i| [2.0, 2.0, 9.0][i % 3]));
        let next = next(Model::AutoRegression, &two).unwrap();
        assert!((next - 2.0).abs() < 0.5, "{next}");
        assert_eq!(forecast(Model::Mean, &two), None);
    }

    #[test]
    fn what_cannot_be_foretold_is_not() {
        let mut random = fastrand::Rng::with_seed(2);
        let mut foretold = 0;
        for _ in 0..2000 {
            let length = random.usize(MIN_INTERVALS..20);
            let short = history((0..length).map(|_| 0.3 - (1.0 - random.f64()).ln() * 10.0));
            foretold += usize::from(forecast(Model::default(), &short).is_some());
        }
        assert!(foretold < 20, "{foretold} of 2000 short random histories");
        let poisson = history((0..49).map(|_| -random.f64().max(1e-9).ln() * 10.0));
        let bursty = history((0..49).map(|i| if i % 7 == 0 { 60.0 * random.f64() } else { 0.3 }));
        for (model, name) in Model::ALL {
            assert_eq!(forecast(model, &poisson), None, "{name}");
            assert_eq!(forecast(model, &bursty), None, "{name}");
            assert_eq!(
                forecast(model, &history([5.0; 4])),
                None,
                "too short: {name}"
            );
            assert_eq!(forecast(model, &History::default()), None);
        }
    }

    #[test]
    fn no_history_is_too_odd() {
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..500 {
            let scale = 10_f64.powi(random.i32(-3..9));
            let length = random.usize(0..120);
            let odd = history((0..length).map(|_| random.f64() * scale));
            assert!(odd.times().count() <= HISTORY);
            for (model, _) in Model::ALL {
                if let Some(forecast) = forecast(model, &odd) {
                    assert!(forecast.at > odd.times().last().unwrap());
                }
            }
        }
    }

    #[test]
    fn a_burst_is_one_wake_up() {
        let mut random = fastrand::Rng::with_seed(4);
        let periodic =
            history((0..140).map(|i| if i % 7 == 0 { 30.0 } else { random.f64() / 5.0 }));
        let next = next(Model::default(), &periodic).unwrap();
        assert!((next - 30.6).abs() < 1.0, "{next}");
        assert_eq!(history([0.2; 1000]).times().count(), 1);
    }

    #[test]
    fn a_pause_does_not_change_what_is_usual() {
        for (model, name) in Model::ALL {
            let paused = history((0..40).map(|i| {
                if i == 36 {
                    86_400.0
                } else {
                    5.0 + f64::from(i % 2) / 10.0
                }
            }));
            let next = next(model, &paused).unwrap();
            assert!((next - 5.05).abs() < 0.3, "{name}: {next}");
        }
        // Nor does it make a wide window look narrow.
        let mut random = fastrand::Rng::with_seed(5);
        let odd = history((0..40).map(|i| {
            if i == 30 {
                1e6
            } else {
                1.0 + random.f64() * 9.0
            }
        }));
        assert_eq!(forecast(Model::default(), &odd), None);
    }

    #[test]
    fn a_new_habit_is_followed() {
        let changed = history((0..49).map(|i| if i < 43 { 5.0 } else { 20.0 }));
        let next = next(Model::default(), &changed).unwrap();
        assert!((next - 20.0).abs() < 2.0, "{next}");
    }

    #[test]
    fn a_clock_that_was_set_back_begins_a_new_history() {
        let mut history = history([5.0; 10]);
        let last = history.times().last().unwrap();
        history.push(last - Duration::from_millis(10));
        assert_eq!(history.times().count(), 11, "only adjusted");
        history.push(SystemTime::UNIX_EPOCH);
        assert_eq!(history.times().count(), 1);
    }
}
