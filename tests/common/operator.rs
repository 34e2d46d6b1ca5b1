//! The parent operator as a process.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::cluster::Cluster;
use super::fault_proxy::FaultProxy;
use super::{PATIENCE, guest, wait_for};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_wasm-operator");

/// Where all tests keep compiled guests: each is compiled once.
pub fn artifacts() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("artifacts")
}

/// A directory with `wasm_config.yaml` and modules, and how to start the parent on it.
pub struct Setup {
    /// The directory.
    pub directory: Arc<TempDir>,
    documents: Vec<Value>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Setup {
    /// Children of that cluster.
    pub fn on(cluster: &Cluster) -> Self {
        let mut setup = Self::new();
        if let Some(kubeconfig) = &cluster.kubeconfig {
            setup.set("KUBECONFIG", kubeconfig.to_str().unwrap());
        }
        if let Some(context) = &cluster.context {
            setup.argument("--context").argument(context);
        }
        setup
    }

    /// Children that see the API server through a proxy.
    pub fn through(proxy: &FaultProxy) -> Self {
        let mut setup = Self::new();
        let file = setup.directory.path().join("kubeconfig");
        std::fs::write(&file, proxy.kubeconfig()).unwrap();
        setup.set("KUBECONFIG", file.to_str().unwrap());
        setup
    }

    /// Children that need no API server: there is none at the address they get.
    pub fn alone() -> Self {
        let mut setup = Self::new();
        let file = setup.directory.path().join("kubeconfig");
        // Port 1 belongs to a service that nobody runs.
        std::fs::write(&file, kubeconfig("http://127.0.0.1:1")).unwrap();
        setup.set("KUBECONFIG", file.to_str().unwrap());
        setup
    }

    fn new() -> Self {
        Self {
            directory: Arc::new(tempfile::tempdir().unwrap()),
            documents: Vec::new(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Adds a child with that module; `fields` are those of its document beside `name` and `wasm`.
    pub fn module(&mut self, name: &str, wasm: &[u8], fields: Value) -> &mut Self {
        let file = format!("{name}.wasm");
        std::fs::write(self.directory.path().join(&file), wasm).unwrap();
        self.child(name, &file, fields)
    }

    /// Adds a child that `guests/build.sh` makes, with environment variables and further fields.
    pub fn guest(
        &mut self,
        name: &str,
        which: &str,
        env: &[(&str, &str)],
        mut fields: Value,
    ) -> &mut Self {
        let env: Vec<_> = env
            .iter()
            .map(|(name, value)| json!({"name": name, "value": value}))
            .collect();
        fields["env"] = env.into();
        if which.starts_with("go-") {
            compile(which);
        }
        self.child(name, guest(which).to_str().unwrap(), fields)
    }

    /// Adds a child whose module is at that path or URL.
    pub fn child(&mut self, name: &str, wasm: &str, mut fields: Value) -> &mut Self {
        fields["name"] = name.into();
        fields["wasm"] = wasm.into();
        self.documents.push(fields);
        self
    }

    /// Adds an argument of the command line.
    pub fn argument(&mut self, argument: &str) -> &mut Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Sets an environment variable of the parent.
    pub fn set(&mut self, name: &str, value: &str) -> &mut Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the parent. The directory stays, so that it can be started again.
    pub fn start(&self) -> Operator {
        self.start_by(Command::new(PROGRAM))
    }

    /// Starts the parent by a command that wants its arguments at its own command line's end.
    pub fn start_by(&self, mut command: Command) -> Operator {
        // Each document is JSON, which is YAML.
        let config: String = self
            .documents
            .iter()
            .map(|d| format!("---\n{d}\n"))
            .collect();
        std::fs::write(self.directory.path().join("wasm_config.yaml"), config).unwrap();
        command
            .arg("run")
            .arg(self.directory.path())
            .arg("--cache-dir")
            .arg(artifacts())
            .args(&self.arguments)
            .env_remove("RUST_LOG")
            .envs(self.environment.iter().map(|(n, v)| (n, v)));
        let mut operator = Operator::spawn(command);
        operator.directory = Some(self.directory.clone());
        operator
    }
}

/// Compiles a guest ahead: a Go operator takes longer than a test waits for anything.
fn compile(which: &str) {
    // Held while it compiles: the other tests of this program want the same.
    static COMPILED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if compiled.iter().any(|name| name == which) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let config = json!({"name": which, "wasm": guest(which)}).to_string();
    std::fs::write(directory.path().join("wasm_config.yaml"), config).unwrap();
    let status = Command::new(PROGRAM)
        .arg("compile")
        .arg(directory.path())
        .arg("--cache-dir")
        .arg(artifacts())
        .status();
    assert!(status.unwrap().success(), "{which} does not compile");
    compiled.push(which.to_owned());
}

/// A kubeconfig for a server without TLS and credentials.
pub fn kubeconfig(server: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": server}}],
        "users": [{"name": "test", "user": {}}],
    })
    .to_string()
}

/// What a process has written to stderr so far.
#[derive(Default)]
struct Log {
    text: Mutex<Text>,
    grown: Condvar,
}

#[derive(Default)]
struct Text {
    lines: Vec<String>,
    /// The process has closed it: there will be no more.
    ended: bool,
}

impl Log {
    fn lock(&self) -> std::sync::MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running parent. Killed when dropped; a test that fails shows its log.
pub struct Operator {
    process: Child,
    log: Arc<Log>,
    /// What it reads stays as long as it runs.
    directory: Option<Arc<TempDir>>,
}

impl Operator {
    /// Starts a command line of the parent.
    pub fn spawn(mut command: Command) -> Self {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: prctl(2) is async-signal-safe. Even a test that is killed leaves no parent behind;
        // the signal comes at the end of this thread, which lives as long as its test.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut process = command.spawn().expect("wasm-operator");
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let log = Arc::new(Log::default());
        let writer = log.clone();
        std::thread::spawn(move || {
            for line in stderr.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                writer.lock().lines.push(line);
                writer.grown.notify_all();
            }
            writer.lock().ended = true;
            writer.grown.notify_all();
        });
        Self {
            process,
            log,
            directory: None,
        }
    }

    /// All lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.log.lock().lines.clone()
    }

    /// How many lines have that in them.
    pub fn count(&self, part: &str) -> usize {
        self.lines().iter().filter(|l| l.contains(part)).count()
    }

    /// Waits until `find` finds something in the lines.
    pub fn wait_for<T>(&self, what: &str, find: impl Fn(&[String]) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut text = self.log.lock();
        loop {
            if let Some(found) = find(&text.lines) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if text.ended || left.is_zero() {
                let why = if text.ended { "has ended" } else { "goes on" };
                drop(text);
                panic!("not in the log, which {why}: {what}");
            }
            text = self
                .log
                .grown
                .wait_timeout(text, left)
                .map_or_else(|e| e.into_inner().0, |(text, _)| text);
        }
    }

    /// Waits for a line with that in it.
    pub fn wait_for_line(&self, part: &str) -> String {
        self.wait_for_lines(part, 1).remove(0)
    }

    /// Waits for that many lines with that in them.
    pub fn wait_for_lines(&self, part: &str, count: usize) -> Vec<String> {
        self.wait_for(&format!("{count} lines with {part:?}"), |lines| {
            let found: Vec<_> = lines.iter().filter(|l| l.contains(part)).cloned().collect();
            (found.len() >= count).then_some(found)
        })
    }

    /// Waits for a line `KEY=VALUE` of a child; returns the value.
    pub fn wait_for_value(&self, child: &str, key: &str) -> String {
        self.wait_for(&format!("{key}= of {child}"), |lines| {
            value(lines, child, key)
        })
    }

    /// The messages of one child, in order.
    pub fn messages(&self, child: &str) -> Vec<String> {
        let lines = self.lines();
        lines
            .iter()
            .filter_map(|l| message(l, child))
            .map(str::to_owned)
            .collect()
    }

    /// Sends a signal such as `libc::SIGTERM`.
    pub fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.process.id()).unwrap();
        // SAFETY: kill(2) touches no memory; the process is ours and has not been waited for, so
        // the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for the process to end.
    pub fn wait_exit(&mut self, patience: Duration) -> ExitStatus {
        wait_for("the parent's end", patience, || {
            self.process.try_wait().unwrap()
        })
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    /// SIGTERM, and a good end.
    pub fn stop(&mut self) {
        self.signal(libc::SIGTERM);
        let status = self.wait_exit(PATIENCE);
        assert_eq!(status.code(), Some(0), "after SIGTERM");
    }

    /// Its directory in `/proc`.
    pub fn proc(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.process.id()))
    }

    /// Memory the process has in RAM now, in bytes.
    pub fn memory(&self) -> u64 {
        self.status_bytes("VmRSS:")
    }

    /// Most memory the process has had in RAM so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        self.status_bytes("VmHWM:")
    }

    /// Forgets the peak: it begins anew with what there is now.
    pub fn reset_peak_memory(&self) {
        // See proc_pid_clear_refs(5).
        std::fs::write(self.proc().join("clear_refs"), "5").unwrap();
    }

    fn status_bytes(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc().join("status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(key));
        let kib = line.unwrap().trim().trim_end_matches(" kB").parse::<u64>();
        kib.unwrap() << 10
    }
}

/// The message of a log line, when it is that child's.
pub fn message<'a>(line: &'a str, child: &str) -> Option<&'a str> {
    // TIME LEVEL WHO MESSAGE, with spaces that align them.
    let mut rest = line;
    for position in 0..3 {
        let (word, after) = rest.split_once(' ')?;
        if position == 2 && word != child {
            return None;
        }
        rest = after.trim_start();
    }
    Some(rest)
}

fn value(lines: &[String], child: &str, key: &str) -> Option<String> {
    let messages = lines.iter().filter_map(|l| message(l, child));
    messages
        .filter_map(|m| m.strip_prefix(key)?.strip_prefix('='))
        .next()
        .map(str::to_owned)
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("the parent's log:\n{}", self.lines().join("\n"));
        }
    }
}
