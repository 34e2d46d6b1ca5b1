//! Growing waits between attempts.

use std::time::Duration;

/// Doubles from a first wait up to a longest one, with up to a quarter of it added at random so
/// that many who failed together do not come back together.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    /// A back-off that has not failed yet.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// How long to wait now; the next wait is twice as long.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        wait.mul_f64(1.0 + fastrand::f64() / 4.0)
    }

    /// Starts over: the last attempt went well.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_over() {
        let second = Duration::from_secs(1);
        let mut backoff = Backoff::new(second, second * 5);
        for expected in [1, 2, 4, 5, 5] {
            let wait = backoff.wait();
            let expected = second * expected;
            assert!(
                wait >= expected && wait <= expected * 5 / 4,
                "{wait:?} for {expected:?}"
            );
        }
        backoff.reset();
        assert!(backoff.wait() < second * 2);
    }
}
