//! A real API server for tests, and a plain client for it.
//!
//! By default the control plane of `tests/control-plane`, one for each test binary, alive as long
//! as the binary. With `WASM_OPERATOR_TEST_CONTEXT=NAME` it is that context of the user's
//! kubeconfig; never by accident.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};

use super::http::Head;
use super::{PATIENCE, repository, wait_for};

/// Names a context of the user's kubeconfig to test against.
const CONTEXT_VARIABLE: &str = "WASM_OPERATOR_TEST_CONTEXT";

static SHARED: LazyLock<Cluster> = LazyLock::new(Cluster::open);

/// See the module's documentation.
pub struct Cluster {
    /// The kubeconfig to reach it with; `None`: the user's own.
    pub kubeconfig: Option<PathBuf>,
    /// The context to choose in it.
    pub context: Option<String>,
    /// Where it is.
    pub endpoint: Endpoint,
    control_plane: Option<Mutex<ControlPlane>>,
}

/// A server that answers.
#[derive(Clone)]
pub struct Endpoint {
    tls: Arc<rustls::ClientConfig>,
    host: String,
    port: u16,
    token: Option<String>,
}

/// What the API server said.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body, `Null` when it is not JSON.
    pub body: Value,
}

/// Our own control plane. It ends when its standard input does.
struct ControlPlane {
    process: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // It has stopped its servers and removed their state when it is gone.
        let _ = self.process.wait();
    }
}

impl Endpoint {
    fn of(config: &kube::Config) -> Self {
        let url = &config.cluster_url;
        assert_eq!(url.scheme_str(), Some("https"), "{url}");
        // Secrets show themselves to a serializer only.
        let token = serde_json::to_value(&config.auth_info).unwrap()["token"]
            .as_str()
            .map(str::to_owned);
        let certificate = &config.auth_info.client_certificate_data;
        assert!(
            token.is_some()
                || certificate.is_some()
                || config.auth_info.client_certificate.is_some(),
            "the tests' own client takes client certificates and tokens only; choose another context"
        );
        let tls = config.rustls_client_config().expect("the kubeconfig's TLS");
        Self {
            tls: Arc::new(tls),
            host: url.host().unwrap().trim_matches(['[', ']']).to_owned(),
            port: url.port_u16().unwrap_or(443),
            token,
        }
    }

    /// Opens a connection.
    pub fn connect(&self) -> std::io::Result<Connection> {
        let tcp = TcpStream::connect((self.host.as_str(), self.port))?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(self.host.clone()).map_err(std::io::Error::other)?;
        let tls =
            rustls::ClientConnection::new(self.tls.clone(), name).map_err(std::io::Error::other)?;
        Ok(rustls::StreamOwned::new(tls, tcp))
    }

    /// The headers that every request needs, each with its line end.
    pub fn own_headers(&self) -> String {
        let (host, port) = (&self.host, self.port);
        let mut headers = format!("host: {host}:{port}\r\nconnection: close\r\n");
        if let Some(token) = &self.token {
            headers.push_str(&format!("authorization: Bearer {token}\r\n"));
        }
        headers
    }

    /// Sends a request and reads the whole answer.
    pub fn call(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> std::io::Result<Answer> {
        let mut stream = self.connect()?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\n{}content-type: {content_type}\r\naccept: application/json\r\ncontent-length: {}\r\n\r\n",
            self.own_headers(),
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        stream.flush()?;
        let mut stream = BufReader::new(stream);
        let head = Head::read(&mut stream)?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let body = head.body().read_all(&mut stream)?;
        Ok(Answer {
            status: head.status()?,
            body: serde_json::from_slice(&body).unwrap_or_default(),
        })
    }
}

/// A TLS connection.
pub type Connection = rustls::StreamOwned<rustls::ClientConnection, TcpStream>;

impl Cluster {
    /// The cluster of this test binary.
    pub fn shared() -> &'static Self {
        &SHARED
    }

    /// A control plane that a test may stop, and nobody else uses; `None`, and a line that says
    /// so, when the user has chosen a cluster.
    pub fn own() -> Option<Self> {
        if std::env::var_os(CONTEXT_VARIABLE).is_some() {
            println!("skipped: {CONTEXT_VARIABLE} is set, and this test stops the API server");
            return None;
        }
        Some(Self::start())
    }

    fn open() -> Self {
        let Ok(context) = std::env::var(CONTEXT_VARIABLE) else {
            return Self::start();
        };
        let kubeconfig = Kubeconfig::read().expect("the user's kubeconfig");
        let cluster = Self {
            endpoint: Endpoint::of(&config(kubeconfig, Some(&context))),
            kubeconfig: None,
            context: Some(context),
            control_plane: None,
        };
        cluster.prepare();
        cluster
    }

    fn start() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let state = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("control-plane-{}-{count}", std::process::id()));
        // The shell outlives us and removes the state; both it and the control plane end with our
        // end of the pipe.
        let mut process = Command::new("bash")
            .args([
                "-c",
                r#""$0" run "$1" --no-controller-manager; rm -rf "$1""#,
            ])
            .arg(repository().join("tests/control-plane/control-plane"))
            .arg(&state)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash");
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let kubeconfig = line
            .strip_prefix("ready kubeconfig=")
            .and_then(|rest| rest.split(" server=").next());
        let kubeconfig = PathBuf::from(
            kubeconfig.unwrap_or_else(|| panic!("the control plane did not start: {line:?}")),
        );
        let cluster = Self {
            endpoint: Endpoint::of(&config(Kubeconfig::read_from(&kubeconfig).unwrap(), None)),
            kubeconfig: Some(kubeconfig),
            context: None,
            control_plane: Some(Mutex::new(ControlPlane {
                stdin: process.stdin.take(),
                process,
                stdout,
            })),
        };
        cluster.prepare();
        cluster
    }

    /// Installs the sample operators' CRD.
    fn prepare(&self) {
        let crd = std::fs::read(repository().join("yaml/crd.yaml")).expect("yaml/crd.yaml");
        self.install_crd(&crd, "/apis/amurant.io/v1/testresources");
    }

    /// Creates a CRD from YAML, and waits until its collection is served.
    pub fn install_crd(&self, yaml: &[u8], collection: &str) {
        let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        let answer = self.send("POST", path, "application/yaml", yaml);
        assert!([201, 409].contains(&answer.status), "{answer:?}");
        wait_for(collection, PATIENCE, || self.get(collection));
    }

    /// Tells our control plane something, such as `stop kube-apiserver`.
    pub fn command(&self, command: &str) {
        let control_plane = self
            .control_plane
            .as_ref()
            .expect("a control plane of ours");
        let mut control_plane = control_plane.lock().unwrap_or_else(PoisonError::into_inner);
        let stdin = control_plane.stdin.as_mut().unwrap();
        writeln!(stdin, "{command}").unwrap();
        let mut answer = String::new();
        control_plane.stdout.read_line(&mut answer).unwrap();
        assert_eq!(answer.trim(), "ok", "{command}");
    }

    /// Runs kubectl; returns what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        static KUBECTL: LazyLock<PathBuf> = LazyLock::new(|| {
            let program = repository().join("tests/control-plane/control-plane");
            let output = Command::new(program)
                .args(["path", "kubectl"])
                .output()
                .unwrap();
            assert!(output.status.success(), "control-plane path kubectl");
            String::from_utf8(output.stdout).unwrap().trim().into()
        });
        let mut command = Command::new(&*KUBECTL);
        if let Some(kubeconfig) = &self.kubeconfig {
            command.arg("--kubeconfig").arg(kubeconfig);
        }
        if let Some(context) = &self.context {
            command.args(["--context", context]);
        }
        let output = command.args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "kubectl {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Sends a request with a JSON body.
    pub fn call(&self, method: &str, path: &str, content_type: &str, body: &Value) -> Answer {
        self.send(method, path, content_type, body.to_string().as_bytes())
    }

    /// Sends a request, again when the API server is busy.
    fn send(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> Answer {
        wait_for(&format!("{method} {path}"), PATIENCE, || {
            let answer = self
                .endpoint
                .call(method, path, content_type, body)
                .unwrap_or_else(|e| panic!("{method} {path}: {e}"));
            (answer.status != 429).then_some(answer)
        })
    }

    /// Reads an object; `None` when it is not there.
    pub fn get(&self, path: &str) -> Option<Value> {
        let answer = self.send("GET", path, "application/json", b"");
        match answer.status {
            200 => Some(answer.body),
            404 => None,
            _ => panic!("GET {path}: {answer:?}"),
        }
    }

    /// Creates an object in a collection.
    pub fn create(&self, path: &str, object: &Value) -> Value {
        let answer = self.call("POST", path, "application/json", object);
        assert_eq!(answer.status, 201, "POST {path}: {answer:?}");
        answer.body
    }

    /// Brings an object about by server-side apply, whoever owns it.
    pub fn apply(&self, path: &str, object: &Value) -> Value {
        let query = format!("{path}?fieldManager=test&force=true");
        let answer = self.call("PATCH", &query, "application/apply-patch+yaml", object);
        assert!(
            [200, 201].contains(&answer.status),
            "apply {path}: {answer:?}"
        );
        answer.body
    }

    /// Deletes an object.
    pub fn delete(&self, path: &str) {
        let answer = self.call("DELETE", path, "application/json", &json!({}));
        assert!(
            [200, 202].contains(&answer.status),
            "DELETE {path}: {answer:?}"
        );
    }

    /// A new namespace.
    pub fn namespace(&self) -> Namespace<'_> {
        self.namespaces(&[""]).remove(0)
    }

    /// New namespaces, whose names differ in these endings.
    pub fn namespaces(&self, endings: &[&str]) -> Vec<Namespace<'_>> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let time = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() % 1_000_000_000;
        let name = format!("test-{}-{time}-{count}", std::process::id());
        let new = |ending: &&str| {
            let name = format!("{name}{ending}");
            let metadata = json!({"metadata": {"name": name}});
            self.create("/api/v1/namespaces", &metadata);
            Namespace {
                cluster: self,
                name,
            }
        };
        endings.iter().map(new).collect()
    }
}

fn config(kubeconfig: Kubeconfig, context: Option<&str>) -> kube::Config {
    let options = KubeConfigOptions {
        context: context.map(str::to_owned),
        ..KubeConfigOptions::default()
    };
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options);
    async_std::task::block_on(config).expect("a usable kubeconfig")
}

/// A namespace of one test.
pub struct Namespace<'a> {
    /// Where it is.
    pub cluster: &'a Cluster,
    /// Its name.
    pub name: String,
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        // Our own control plane goes as a whole; the user's cluster is left as it was.
        if self.cluster.control_plane.is_none() {
            let path = format!("/api/v1/namespaces/{}", self.name);
            let _ = self
                .cluster
                .endpoint
                .call("DELETE", &path, "application/json", b"");
        }
    }
}

impl Namespace<'_> {
    /// The URL path of its ConfigMaps.
    pub fn config_maps(&self) -> String {
        format!("/api/v1/namespaces/{}/configmaps", self.name)
    }

    /// Creates a ConfigMap.
    pub fn create_config_map(&self, name: &str, labels: Value) -> Value {
        let object = json!({"metadata": {"name": name, "labels": labels}});
        self.cluster.create(&self.config_maps(), &object)
    }

    /// Creates that many ConfigMaps, and returns how many there are then: a cluster with all its
    /// controllers adds one of its own.
    pub fn create_config_maps(&self, count: usize) -> usize {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for i in (thread..count).step_by(4) {
                        self.create_config_map(&format!("object-{i}"), json!({}));
                    }
                });
            }
        });
        let list = self.cluster.get(&self.config_maps()).unwrap();
        let there = list["items"].as_array().unwrap().len();
        assert!(there >= count);
        there
    }

    /// Waits until a ConfigMap is there again after it was deleted.
    pub fn delete_and_wait_for_another(&self, name: &str) {
        let path = format!("{}/{name}", self.config_maps());
        let uid = || Some(self.cluster.get(&path)?["metadata"]["uid"].clone());
        let first = uid();
        self.cluster.delete(&path);
        wait_for("another one", PATIENCE, || {
            (uid().is_some() && uid() != first).then_some(())
        });
    }

    /// Waits for an Event of that reason about an object.
    pub fn wait_for_event(&self, reason: &str, object: &str) {
        let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events", self.name);
        wait_for("the event", PATIENCE, || {
            let events = self.cluster.get(&path)?;
            let mut events = events["items"].as_array()?.iter();
            let found = events.find(|event| event["reason"] == reason)?;
            assert_eq!(found["regarding"]["name"], object);
            Some(())
        });
    }

    /// The data of a ConfigMap.
    pub fn data(&self, name: &str) -> Option<Value> {
        let object = self
            .cluster
            .get(&format!("{}/{name}", self.config_maps()))?;
        Some(object["data"].clone())
    }

    /// Waits until a ConfigMap is there; returns its data.
    pub fn wait_for_data(&self, name: &str) -> Value {
        wait_for(&format!("ConfigMap {name}"), PATIENCE, || self.data(name))
    }

    /// The URL path of its TestResources.
    pub fn test_resources(&self) -> String {
        format!("/apis/amurant.io/v1/namespaces/{}/testresources", self.name)
    }

    /// Creates a TestResource or raises its nonce.
    pub fn set_nonce(&self, name: &str, nonce: i64) {
        let object = json!({
            "apiVersion": "amurant.io/v1", "kind": "TestResource",
            "metadata": {"name": name}, "spec": {"nonce": nonce},
        });
        self.cluster
            .apply(&format!("{}/{name}", self.test_resources()), &object);
    }

    /// A TestResource's nonce.
    pub fn nonce(&self, name: &str) -> Option<i64> {
        let path = format!("{}/{name}", self.test_resources());
        self.cluster.get(&path)?["spec"]["nonce"].as_i64()
    }

    /// Waits until a TestResource has that nonce.
    pub fn wait_for_nonce(&self, name: &str, nonce: i64) {
        let what = format!("nonce {nonce} of {name} in {}", self.name);
        wait_for(&what, PATIENCE, || {
            (self.nonce(name) == Some(nonce)).then_some(())
        });
    }
}
