//! What the log looks like: one line a fact, with the time, the level and who it is about.
//!
//! `RUST_LOG` works as everywhere (see `env_logger`); a child's name is a target, so
//! `RUST_LOG=info,ring-0=debug` turns up one child. The default is `info`.

use std::borrow::Cow;
use std::io::Write;
use std::time::Instant;

use env_logger::fmt::style::{AnsiColor, Style};
use log::Level;

/// Longest piece of a child's line, in bytes.
const MAX_LINE_BYTES: usize = 16 << 10;

/// Starts logging to stderr.
pub fn start() {
    // wasmer reports through `log` what only its own developers can use, once per bad pointer or
    // wake-up. Who wants to see that names it in RUST_LOG.
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Info)
        .filter_module("wasmer", log::LevelFilter::Error)
        .filter_module("virtual_fs", log::LevelFilter::Error)
        .parse_default_env()
        .format(|out, record| {
            let target = record.target();
            let who = if target.starts_with("wasm_operator") {
                "parent"
            } else {
                target
            };
            let style = out.default_level_style(record.level());
            let dim = match record.level() {
                Level::Debug | Level::Trace => {
                    Style::new().fg_color(Some(AnsiColor::BrightBlack.into()))
                }
                _ => Style::new(),
            };
            let time = out.timestamp_millis();
            // Texts of guests and servers are in many messages: none leaves its line.
            let text = record.args().to_string();
            let cut = text.floor_char_boundary(MAX_LINE_BYTES.min(text.len()));
            let (level, message) = (record.level(), printable(&text.as_bytes()[..cut]));
            writeln!(
                out,
                "{time} {style}{level:<5}{style:#} {who:<12} {dim}{message}{dim:#}"
            )
        })
        .init();
}

/// How much a guest may log: a burst, and so much a second after it. Logging is a write to a pipe
/// that all of the parent shares.
const LOG_BURST_BYTES: f64 = 1_048_576.0;
const LOG_BYTES_PER_SECOND: f64 = 131_072.0;

/// Keeps a guest from filling the log: a token bucket, in bytes.
#[derive(Debug)]
pub struct LogBudget {
    child: String,
    tokens: f64,
    filled: Instant,
    dropped: u64,
}

impl LogBudget {
    /// For the output of that child.
    pub fn new(child: &str) -> Self {
        let child = child.to_owned();
        Self {
            child,
            tokens: LOG_BURST_BYTES,
            filled: Instant::now(),
            dropped: 0,
        }
    }

    /// Whether that many bytes may be logged now. What may not is counted, and told of later.
    pub fn allow(&mut self, bytes: usize) -> bool {
        let refill = self.filled.elapsed().as_secs_f64() * LOG_BYTES_PER_SECOND;
        self.filled = Instant::now();
        self.tokens = (self.tokens + refill).min(LOG_BURST_BYTES);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let cost = bytes as f64;
        if cost > self.tokens {
            self.dropped += bytes as u64;
            return false;
        }
        self.tokens -= cost;
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            log::warn!(target: &self.child, "{dropped} bytes of its output came too fast and were dropped");
        }
        true
    }
}

/// A guest's bytes as text that cannot disturb a terminal or a log: control characters, line feeds
/// among them, become escapes, and what is not UTF-8 the replacement character.
pub fn printable(bytes: &[u8]) -> Cow<'_, str> {
    let text = String::from_utf8_lossy(bytes);
    if text.contains(disturbs) {
        let escape = |c: char| match c {
            c if disturbs(c) => c.escape_default().to_string(),
            c => c.to_string(),
        };
        Cow::Owned(text.chars().map(escape).collect())
    } else {
        text
    }
}

/// Control characters, line separators, and marks that turn the direction of what follows.
fn disturbs(c: char) -> bool {
    let turns =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    (c.is_control() && c != '\t') || matches!(c, '\u{2028}' | '\u{2029}') || turns
}

/// Turns a guest's stdout or stderr into log lines.
#[derive(Debug)]
pub struct LineLogger {
    child: String,
    line: Vec<u8>,
}

impl LineLogger {
    /// For the output of that child.
    pub fn new(child: &str) -> Self {
        Self {
            child: child.to_owned(),
            line: Vec::new(),
        }
    }

    /// Takes output; logs the lines that are complete.
    pub fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            for part in piece.chunks(MAX_LINE_BYTES) {
                self.line.extend_from_slice(part);
                if part.ends_with(b"\n") || self.line.len() >= MAX_LINE_BYTES {
                    self.flush();
                }
            }
        }
    }

    /// Logs the rest.
    pub fn flush(&mut self) {
        let line = self.line.trim_ascii_end();
        if !line.is_empty() {
            log::info!(target: &self.child, "{}", printable(line));
        }
        self.line.clear();
    }
}

impl Drop for LineLogger {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_write_to_the_terminal() {
        assert_eq!(printable("a\tä".as_bytes()), "a\tä");
        assert_eq!(printable(b"a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
        assert_eq!(
            printable("a\u{2028}\u{202e}".as_bytes()),
            "a\\u{2028}\\u{202e}"
        );
        assert_eq!(printable(b"\xff"), "\u{fffd}");
    }

    #[test]
    fn a_flood_of_output_is_dropped_and_counted() {
        let mut budget = LogBudget::new("a");
        let allowed = (0..1_000).filter(|_| budget.allow(65_536)).count();
        assert!((16..100).contains(&allowed), "{allowed}");
        assert!(budget.dropped > 0);
        budget.filled -= std::time::Duration::from_secs(60);
        assert!(budget.allow(65_536));
        assert_eq!(budget.dropped, 0);
    }

    #[test]
    fn the_rest_of_a_line_waits_for_its_end_but_not_for_ever() {
        let mut logger = LineLogger::new("a");
        logger.write(b"one\ntw");
        assert_eq!(logger.line, b"tw");
        logger.write(b"o\n");
        assert!(logger.line.is_empty());
        logger.write(&[b'x'; MAX_LINE_BYTES * 2 + 1]);
        assert_eq!(logger.line, b"x");
    }
}
