//! The parent operator as a process: its configuration, its log and its metrics.

use std::collections::{HashSet, VecDeque};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child as Process;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::Patience;
use crate::process::command;

/// What children are called, before their number. The log is turned up for it, so that nothing
/// else of the process has a target that begins so.
pub const CHILD: &str = "bench-";
/// Children that have not changed for that long do nothing more.
const UNCHANGED: Duration = Duration::from_millis(250);
/// Lines of the log that are kept for when something goes wrong.
const KEPT_LINES: usize = 30;

/// Whether and when children hibernate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hibernation {
    /// Never.
    Never,
    /// After so many seconds without an event.
    After(f64),
}

/// A child operator to be configured.
#[derive(Debug)]
pub struct Child {
    /// Its module.
    pub wasm: PathBuf,
    /// Its environment.
    pub environment: Vec<(&'static str, String)>,
}

/// How the parent is to be run.
#[derive(Debug)]
pub struct Settings<'a> {
    /// The program.
    pub program: &'a Path,
    /// A directory for its configuration.
    pub directory: PathBuf,
    /// Of the cluster.
    pub kubeconfig: &'a Path,
    /// For compiled modules.
    pub artifacts: PathBuf,
    /// Of all children.
    pub hibernation: Hibernation,
    /// `--memory-budget`, if any.
    pub memory_budget: Option<&'a str>,
    /// Whether children's debug messages are logged, and so received as [`Change`]s.
    pub with_changes: bool,
    /// Whether children are woken ahead of events that can be foretold, which is the default.
    pub with_prediction: bool,
}

/// What a parent operator can do, as far as it differs between versions.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// Children hibernate; `idleSeconds` and `hibernate` are fields of theirs.
    pub hibernation: bool,
    /// There is `--metrics-listen`. Without it, children are counted in the log.
    pub metrics: bool,
}

/// Asks a parent operator what it can do.
///
/// # Errors
/// When it does not run.
pub async fn abilities(program: &Path, directory: &Path, wasm: &Path) -> Result<Abilities> {
    let context = || program.display().to_string();
    let help = command(program).args(["run", "--help"]).output().await;
    let help = help.with_context(context)?.stdout;
    let metrics = String::from_utf8_lossy(&help).contains("--metrics-listen");
    let directory = directory.join("abilities");
    let child = Child {
        wasm: wasm.to_owned(),
        environment: Vec::new(),
    };
    let text = configuration(&[child], Hibernation::After(0.5), true, true);
    write_configuration(&directory, &text)?;
    let checked = command(program).arg("check").arg(&directory).output().await;
    let checked = checked.with_context(context)?;
    let problems = String::from_utf8_lossy(&checked.stderr).into_owned();
    let unknown = problems.contains("idleSeconds") || problems.contains("hibernate");
    ensure!(
        checked.status.success() || unknown,
        "{} check: {problems}",
        context()
    );
    Ok(Abilities {
        hibernation: checked.status.success(),
        metrics,
    })
}

/// A child that went to sleep or woke.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// In so many ms, with so many bytes written of so many.
    Hibernated {
        /// How long it took, in ms.
        millis: f64,
        /// What had to be written to the snapshot.
        written: u64,
        /// The child's memory.
        bytes: u64,
    },
    /// In so many ms, until its first instruction.
    Woken {
        /// How long it took, in ms.
        millis: f64,
    },
}

/// What the log has told so far.
#[derive(Debug, Default)]
struct Logged {
    asleep: HashSet<String>,
    counts: Counts,
}

impl Logged {
    fn add(&mut self, child: &str, change: &Change) {
        match change {
            Change::Hibernated { .. } => {
                self.asleep.insert(child.to_owned());
                self.counts.hibernations += 1;
            }
            Change::Woken { .. } => {
                self.asleep.remove(child);
                self.counts.wakes += 1;
            }
        }
        self.counts.asleep = self.asleep.len() as u64;
    }
}

/// How many children are in which state, and what happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Children that are loaded.
    pub awake: u64,
    /// Children that hibernate.
    pub asleep: u64,
    /// How often one has hibernated.
    pub hibernations: u64,
    /// How often one was woken.
    pub wakes: u64,
    /// How often hibernating failed.
    pub failures: u64,
}

/// A running parent operator. It is killed when this is dropped.
pub struct Parent {
    process: Process,
    /// Its process number.
    pub pid: u32,
    metrics: Option<SocketAddr>,
    changes: mpsc::UnboundedReceiver<Change>,
    logged: Arc<Mutex<Logged>>,
    /// Reads the log; returns its last lines when it ends.
    log: Option<JoinHandle<VecDeque<String>>>,
}

impl Parent {
    /// Starts one with these children.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(settings: &Settings, abilities: Abilities, children: &[Child]) -> Result<Self> {
        let Settings {
            program, directory, ..
        } = settings;
        let text = configuration(
            children,
            settings.hibernation,
            abilities.hibernation,
            settings.with_prediction,
        );
        write_configuration(directory, &text)?;
        let level = if settings.with_changes || !abilities.metrics {
            format!("warn,{CHILD}=debug")
        } else {
            "warn".to_owned()
        };
        let mut parent = command(program);
        parent
            .arg("run")
            .arg(directory)
            .arg("--cache-dir")
            .arg(&settings.artifacts)
            .env("KUBECONFIG", settings.kubeconfig)
            .env("RUST_LOG", level)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(budget) = settings.memory_budget {
            parent.args(["--memory-budget", budget]);
        }
        let metrics = abilities.metrics.then(free_address).transpose()?;
        if let Some(address) = metrics {
            parent.args(["--metrics-listen", &address.to_string()]);
        }
        let mut process = parent
            .spawn()
            .with_context(|| program.display().to_string())?;
        let pid = process.id().context("the parent has ended")?;
        let log = process.stderr.take().context("no log")?;
        let (sender, changes) = mpsc::unbounded_channel();
        let logged = Arc::new(Mutex::new(Logged::default()));
        let all_logged = logged.clone();
        let log = tokio::spawn(async move {
            let mut kept = VecDeque::new();
            let mut lines = BufReader::new(log).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some((child, change)) = change(&line) {
                    let mut logged = all_logged.lock().unwrap_or_else(PoisonError::into_inner);
                    logged.add(child, &change);
                    // Nobody may be interested any more.
                    let _ = sender.send(change);
                } else {
                    kept.push_back(line);
                    if kept.len() > KEPT_LINES {
                        kept.pop_front();
                    }
                }
            }
            kept
        });
        Ok(Self {
            process,
            pid,
            metrics,
            changes,
            logged,
            log: Some(log),
        })
    }

    /// # Errors
    /// When it has ended by itself; with the end of its log.
    pub async fn check_alive(&mut self) -> Result<()> {
        let Some(status) = self.process.try_wait().context("waiting for the parent")? else {
            return Ok(());
        };
        bail!("the parent ended: {status}\n{}", self.rest_of_log().await)
    }

    async fn rest_of_log(&mut self) -> String {
        let Some(log) = self.log.take() else {
            return String::new();
        };
        let lines = log.await.unwrap_or_default();
        Vec::from(lines).join("\n")
    }

    /// Runs something that needs this parent; if that fails, the end of the log is told.
    ///
    /// # Errors
    /// Those of `work`.
    pub async fn during<T>(mut self, work: impl AsyncFnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let result = work(&mut self).await;
        match result {
            Ok(result) => {
                self.stop().await?;
                Ok(result)
            }
            Err(error) => {
                let ended = self.process.try_wait().ok().flatten();
                let ended = ended.map_or(String::new(), |status| format!(", ended: {status}"));
                // What cannot be killed has ended.
                let _ = self.process.kill().await;
                let log = self.rest_of_log().await;
                Err(error.context(format!("the parent{ended}; the end of its log:\n{log}")))
            }
        }
    }

    /// The next change of any child.
    ///
    /// # Errors
    /// When none comes.
    pub async fn next_change(&mut self) -> Result<Change> {
        let next = tokio::time::timeout(crate::PATIENCE, self.changes.recv()).await;
        next.context("no child hibernated or woke")?
            .context("the parent has ended")
    }

    /// Changes that have been received and not asked for.
    pub fn forget_changes(&mut self) -> Vec<Change> {
        std::iter::from_fn(|| self.changes.try_recv().ok()).collect()
    }

    /// What its metrics say, or its log, where it has none.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn counts(&mut self) -> Result<Counts> {
        let Some(address) = self.metrics else {
            let logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
            return Ok(logged.counts);
        };
        // It listens soon after it has started.
        let mut patience = Patience::default();
        let mut stream = loop {
            match TcpStream::connect(address).await {
                Ok(stream) => break stream,
                Err(error) => {
                    self.check_alive().await?;
                    patience.check(&format!("metrics on {address}: {error}"), ())?;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        };
        let request =
            format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(counts(&answer))
    }

    /// Waits until that many children have started.
    ///
    /// # Errors
    /// When they do not.
    pub async fn wait_started(&mut self, children: usize) -> Result<()> {
        let mut patience = Patience::default();
        loop {
            let counts = self.counts().await?;
            let started = counts.awake + counts.asleep;
            if started as usize >= children {
                return Ok(());
            }
            self.check_alive().await?;
            let what = format!("{started} of {children} children have started");
            patience.check(&what, started)?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until that many children are asleep, and no snapshot is being written any more (it
    /// counts when it is finished): nothing has changed for a while.
    ///
    /// # Errors
    /// When the metrics do not come to say so.
    pub async fn wait_asleep(&mut self, children: usize) -> Result<Counts> {
        let mut patience = Patience::default();
        let (mut last, mut since) = (Counts::default(), Instant::now());
        loop {
            let counts = self.counts().await?;
            if counts != last {
                (last, since) = (counts, Instant::now());
            } else if counts.asleep as usize == children && since.elapsed() > UNCHANGED {
                return Ok(counts);
            }
            self.check_alive().await?;
            let what = format!(
                "{} of {children} children are asleep, {} awake, {} hibernations failed",
                counts.asleep, counts.awake, counts.failures
            );
            patience.check(&what, (counts.asleep, counts.wakes))?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops it, and waits until it has ended.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(pid_of);
        // If it has ended, that is all right.
        if let (Some(pid), Ok(None)) = (pid, self.process.try_wait()) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)
                .context("stopping the parent")?;
        }
        if tokio::time::timeout(Duration::from_secs(20), self.process.wait())
            .await
            .is_err()
        {
            self.process.kill().await.context("killing the parent")?;
        }
        Ok(())
    }
}

fn pid_of(pid: i32) -> Option<rustix::process::Pid> {
    rustix::process::Pid::from_raw(pid)
}

fn free_address() -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("a free port")?;
    listener.local_addr().context("a free port")
}

/// As `wasm_config.yaml` has it.
fn configuration(
    children: &[Child],
    hibernation: Hibernation,
    can_hibernate: bool,
    with_prediction: bool,
) -> String {
    let mut text = String::new();
    for (i, child) in children.iter().enumerate() {
        // JSON strings are YAML strings.
        let wasm = Value::String(child.wasm.display().to_string());
        text.push_str(&format!("---\nname: {CHILD}{i}\nwasm: {wasm}\n"));
        if can_hibernate {
            text.push_str(&match hibernation {
                Hibernation::Never => "hibernate: never\n".to_owned(),
                Hibernation::After(seconds) => {
                    format!("hibernate: auto\nidleSeconds: {seconds}\n")
                }
            });
            if !with_prediction {
                text.push_str("prediction: never\n");
            }
        }
        if !child.environment.is_empty() {
            text.push_str("env:\n");
        }
        for (name, value) in &child.environment {
            let value = Value::String(value.clone());
            text.push_str(&format!("- {{name: {name}, value: {value}}}\n"));
        }
    }
    text
}

fn write_configuration(directory: &Path, text: &str) -> Result<()> {
    let context = || directory.display().to_string();
    fs::create_dir_all(directory).with_context(context)?;
    fs::write(directory.join("wasm_config.yaml"), text).with_context(context)
}

/// Has the modules of children compiled, one after the other, as far as they are not.
///
/// # Errors
/// When one cannot be compiled.
pub async fn compile(
    program: &Path,
    directory: &Path,
    artifacts: &Path,
    children: &[Child],
    mut progress: impl FnMut(),
) -> Result<()> {
    write_configuration(
        directory,
        &configuration(children, Hibernation::Never, false, true),
    )?;
    let mut compiler = command(program);
    compiler.arg("compile").arg(directory);
    compiler.arg("--cache-dir").arg(artifacts);
    let output = compiler.stdin(Stdio::null()).output();
    let mut output = std::pin::pin!(output);
    let output = loop {
        tokio::select! {
            output = &mut output => break output,
            () = tokio::time::sleep(Duration::from_secs(20)) => progress(),
        }
    };
    let output = output.with_context(|| program.display().to_string())?;
    ensure!(
        output.status.success(),
        "{} compile: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// `TIME DEBUG bench-3      woken in 0.812 ms`, or
/// `TIME DEBUG bench-3      hibernated in 1.234 ms, 45056 of 458752 bytes written`.
fn change(line: &str) -> Option<(&str, Change)> {
    let mut words = line.split_whitespace().skip(2);
    let child = words.next().filter(|who| who.starts_with(CHILD))?;
    let words: Vec<_> = words.collect();
    let change = match words[..] {
        ["woken", "in", millis, "ms", ..] => Change::Woken {
            millis: millis.parse().ok()?,
        },
        [
            "hibernated",
            "in",
            millis,
            "ms,",
            written,
            "of",
            bytes,
            "bytes",
            ..,
        ] => Change::Hibernated {
            millis: millis.parse().ok()?,
            written: written.parse().ok()?,
            bytes: bytes.parse().ok()?,
        },
        _ => return None,
    };
    Some((child, change))
}

/// Reads what is needed from Prometheus's text format.
fn counts(answer: &str) -> Counts {
    let mut counts = Counts::default();
    for line in answer.lines() {
        let Some((name, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let Ok(value) = value.trim().parse::<f64>() else {
            continue;
        };
        let place = match name {
            r#"wasm_operator_children{state="awake"}"# => &mut counts.awake,
            r#"wasm_operator_children{state="asleep"}"# => &mut counts.asleep,
            "wasm_operator_hibernations_total" => &mut counts.hibernations,
            "wasm_operator_wakes_total" => &mut counts.wakes,
            "wasm_operator_hibernation_failures_total" => &mut counts.failures,
            _ => continue,
        };
        *place = value as u64;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_understood() {
        let line = "2026-11-21T07:00:00.123Z DEBUG bench-0      hibernated in 1.234 ms, 45056 of 458752 bytes written";
        let expected = Change::Hibernated {
            millis: 1.234,
            written: 45056,
            bytes: 458_752,
        };
        assert_eq!(change(line), Some(("bench-0", expected)));
        let line = "2026-11-21T07:00:00.123Z DEBUG bench-12     woken in 0.812 ms";
        let expected = Change::Woken { millis: 0.812 };
        assert_eq!(change(line), Some(("bench-12", expected)));
        let line = "2026-11-21T07:00:00.123Z DEBUG parent       woken in 0.812 ms";
        assert_eq!(change(line), None);
        assert_eq!(
            change("2026-11-21T07:00:00.123Z INFO  bench-1 a/b: x"),
            None
        );
    }

    #[test]
    fn metrics_are_understood() {
        let text = "HTTP/1.1 200 OK\r\n\r\n# HELP wasm_operator_children Children.\n\
            wasm_operator_children{state=\"awake\"} 3\nwasm_operator_children{state=\"asleep\"} 97\n\
            wasm_operator_hibernations_total 109\nwasm_operator_wakes_total 12\nwasm_operator_hibernation_failures_total 0\nother 1\n";
        let expected = Counts {
            awake: 3,
            asleep: 97,
            hibernations: 109,
            wakes: 12,
            failures: 0,
        };
        assert_eq!(counts(text), expected);
    }

    #[test]
    fn a_configuration_is_yaml() {
        let child = Child {
            wasm: "/a b.wasm".into(),
            environment: vec![("A", "1".into())],
        };
        let written = configuration(&[child], Hibernation::After(0.5), true, false);
        let expected = "---\nname: bench-0\nwasm: \"/a b.wasm\"\nhibernate: auto\nidleSeconds: 0.5\nprediction: never\nenv:\n- {name: A, value: \"1\"}\n";
        assert_eq!(written, expected);
    }
}
