//! A control plane of the benchmark's own, and rings of namespaces in it.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use kube::api::{
    Api, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams, WatchEvent,
    WatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::json;
use tempfile::TempDir;
use testresource::{TestResource, TestResourceSpec};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;

use crate::options::Places;
use crate::process::command;
use crate::{Patience, say, until_interrupted};

/// Requests that the benchmark has open at once.
const PARALLEL_REQUESTS: usize = 32;
/// The object that travels, one in each namespace.
const OBJECT: &str = "nonce";

/// The processes of a control plane; [`ControlPlane::stop`] ends them.
pub struct ControlPlane {
    process: Child,
    directory: TempDir,
    program: PathBuf,
    repository: PathBuf,
}

/// Runs a benchmark with a control plane of its own, which is stopped after it in any case.
pub async fn with_control_plane(
    places: &Places,
    work: impl AsyncFnOnce(&mut ControlPlane) -> Result<()>,
) -> ExitCode {
    let result = match ControlPlane::start(places) {
        Ok(mut control_plane) => {
            let result = until_interrupted(work(&mut control_plane)).await;
            control_plane.stop().await;
            result
        }
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        say(format_args!("{error:#}"));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// A control plane that can be used.
pub struct Cluster {
    /// A client with all rights.
    pub client: Client,
    /// Of an administrator.
    pub kubeconfig: PathBuf,
    /// Such as `v1.36.3`.
    pub version: String,
}

impl ControlPlane {
    /// Starts one: etcd and an API server (namespaces need no controller-manager here).
    ///
    /// # Errors
    /// When the program is not there.
    pub fn start(places: &Places) -> Result<Self> {
        let program = places.repository.join("tests/control-plane/control-plane");
        let directory = tempfile::tempdir().context("temporary directory")?;
        say("starting a control plane");
        let process = command(&program)
            .arg("run")
            .arg(directory.path().join("plane"))
            .arg("--no-controller-manager")
            // It ends when this pipe does.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| program.display().to_string())?;
        Ok(Self {
            process,
            directory,
            program,
            repository: places.repository.clone(),
        })
    }

    /// A directory that goes with the control plane.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Waits until it serves TestResources.
    ///
    /// # Errors
    /// When it does not come to that.
    pub async fn ready(&mut self) -> Result<Cluster> {
        let output = self.process.stdout.take().context("started twice")?;
        let answer = BufReader::new(output).lines().next_line().await?;
        let answer = answer.context("the control plane did not start")?;
        let kubeconfig: PathBuf = answer
            .split_whitespace()
            .find_map(|word| word.strip_prefix("kubeconfig="))
            .with_context(|| format!("no kubeconfig in: {answer}"))?
            .into();
        let options = KubeConfigOptions::default();
        let config = Kubeconfig::read_from(&kubeconfig)?;
        let config = Config::from_custom_kubeconfig(config, &options).await?;
        let client = Client::try_from(config)?;
        let version = client.apiserver_version().await?.git_version;

        let kubectl = command(&self.program).args(["path", "kubectl"]).output();
        let kubectl = String::from_utf8(kubectl.await?.stdout)?;
        let applied = command(kubectl.trim())
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .arg("--cache-dir")
            .arg(self.directory.path().join("kubectl"))
            .args(["apply", "--filename"])
            .arg(self.repository.join("yaml/crd.yaml"))
            .stdout(Stdio::null())
            .status()
            .await
            .with_context(|| kubectl.trim().to_owned())?;
        ensure!(applied.success(), "kubectl apply: {applied}");
        // For a second or two, the new resource is not there, or "being initialised".
        let objects: Api<TestResource> = Api::all(client.clone());
        let mut patience = Patience::default();
        while let Err(error) = objects.list(&ListParams::default().limit(1)).await {
            patience.check(&format!("TestResources: {error}"), ())?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(Cluster {
            client,
            kubeconfig,
            version,
        })
    }

    /// Stops it, and removes what it has written.
    pub async fn stop(mut self) {
        say("stopping the control plane");
        drop(self.process.stdin.take());
        let ended = tokio::time::timeout(Duration::from_secs(30), self.process.wait()).await;
        if ended.is_err() {
            // Its servers die with it.
            if let Err(error) = self.process.kill().await {
                say(format_args!("the control plane cannot be killed: {error}"));
            }
        }
        if let Err(error) = self.directory.close() {
            say(format_args!("its files are left: {error}"));
        }
    }
}

/// Namespaces PREFIX0 to PREFIX`hops`, with an object in each. Operator i copies from i to i + 1.
///
/// The ring is cut open: the last operator writes into a namespace that nobody watches. So each of
/// them has something to write, and the end of the journey can be seen.
pub struct Ring {
    client: Client,
    /// What the namespaces are called.
    pub prefix: String,
    /// Number of operators.
    pub hops: usize,
    /// The highest nonce so far.
    nonce: i64,
    /// What happens in the namespace `watched`. It stays open, for opening a watch takes longer
    /// than a hop, and takes the connection from the next write.
    arrivals: BoxStream<'static, kube::Result<WatchEvent<TestResource>>>,
    watched: Option<usize>,
}

impl Ring {
    /// Makes the namespaces and objects, as far as they are not there.
    ///
    /// # Errors
    /// What the API server says.
    pub async fn make(client: &Client, prefix: &str, hops: usize) -> Result<Self> {
        let mut ring = Self {
            client: client.clone(),
            prefix: prefix.to_owned(),
            hops,
            nonce: 0,
            arrivals: stream::empty().boxed(),
            watched: None,
        };
        let there: Api<TestResource> = Api::all(client.clone());
        let there = there.list(&ListParams::default()).await?.items;
        let is_ours = |object: &&TestResource| {
            let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
            number(namespace, prefix).is_some()
        };
        ring.nonce = (there.iter().filter(is_ours).map(|o| o.spec.nonce))
            .max()
            .unwrap_or(0);
        let missing: Vec<usize> = (0..=hops)
            .filter(|i| {
                let name = ring.namespace(*i);
                let is_there = |o: &TestResource| o.metadata.namespace.as_ref() == Some(&name);
                !there.iter().any(is_there)
            })
            .collect();
        if missing.len() > 200 {
            say(format_args!("making {} namespaces", missing.len()));
        }
        let made = stream::iter(missing).map(|i| ring.make_one(i));
        made.buffer_unordered(PARALLEL_REQUESTS)
            .try_collect::<()>()
            .await?;
        Ok(ring)
    }

    async fn make_one(&self, i: usize) -> Result<()> {
        let name = self.namespace(i);
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Namespace"));
        let namespaces: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let created = namespaces
            .create(
                &PostParams::default(),
                &DynamicObject::new(&name, &resource),
            )
            .await;
        match created {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            other => drop(other.with_context(|| format!("namespace {name}"))?),
        }
        let metadata = ObjectMeta {
            name: Some(OBJECT.into()),
            ..ObjectMeta::default()
        };
        let object = TestResource {
            metadata,
            spec: TestResourceSpec::now(self.nonce),
        };
        let created = self.api(i).create(&PostParams::default(), &object).await;
        created.with_context(|| format!("TestResource in {name}"))?;
        Ok(())
    }

    /// The name of a namespace.
    pub fn namespace(&self, i: usize) -> String {
        format!("{}{i}", self.prefix)
    }

    /// Environment of operator i.
    pub fn environment(&self, i: usize) -> [(&'static str, String); 2] {
        [
            ("IN_NAMESPACE", self.namespace(i)),
            ("OUT_NAMESPACE", self.namespace(i + 1)),
        ]
    }

    fn api(&self, i: usize) -> Api<TestResource> {
        Api::namespaced(self.client.clone(), &self.namespace(i))
    }

    async fn write(&self, i: usize, nonce: i64) -> Result<()> {
        let patch = Patch::Merge(json!({"spec": {"nonce": nonce}}));
        let (api, params) = (self.api(i), PatchParams::default());
        let patched = api.patch(OBJECT, &params, &patch).await;
        patched.with_context(|| format!("writing to {}", self.namespace(i)))?;
        Ok(())
    }

    /// Sends a nonce from namespace `from` to `to`, and returns how long it took.
    /// `progress` is asked now and then for anything else that shows that things go on.
    ///
    /// # Errors
    /// When it gets stuck, or `progress` fails.
    pub async fn travel<T: PartialEq>(
        &mut self,
        from: usize,
        to: usize,
        mut progress: impl FnMut() -> Result<T>,
    ) -> Result<Duration> {
        self.nonce += 1;
        if self.watched != Some(to) {
            self.watch(to).await?;
        }
        let started = Instant::now();
        self.write(from, self.nonce).await?;
        let mut patience = Patience::default();
        while !self.has_arrived(to).await? {
            let arrived = self.arrived().await?;
            let text = format!("the nonce is in {arrived} of {} namespaces", to - from + 1);
            patience.check(&text, (arrived, progress()?))?;
        }
        Ok(started.elapsed())
    }

    /// Writes a new nonce into every namespace, as fast as that goes: an event for every operator.
    /// The last comes first, so that each operator finds its target as it should be. (In the other
    /// order it would write at the same time as this, and try again a second later.)
    ///
    /// # Errors
    /// What the API server says.
    pub async fn flood(&mut self) -> Result<()> {
        self.nonce += 1;
        let writes = stream::iter((0..=self.hops).rev()).map(|i| self.write(i, self.nonce));
        let done = writes.buffered(PARALLEL_REQUESTS).try_collect::<()>();
        done.await
    }

    /// Waits until the watch shows the nonce, or until it has shown nothing for some seconds.
    async fn has_arrived(&mut self, to: usize) -> Result<bool> {
        loop {
            match tokio::time::timeout(Duration::from_secs(5), self.arrivals.next()).await {
                Ok(Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)))) => {
                    if object.spec.nonce >= self.nonce {
                        return Ok(true);
                    }
                }
                Ok(Some(Ok(_))) => {}
                // After 290 s the server ends it, which delays one measurement by some ms.
                Ok(Some(Err(_)) | None) => {
                    self.watch(to).await?;
                    if self.api(to).get(OBJECT).await?.spec.nonce >= self.nonce {
                        return Ok(true);
                    }
                }
                Err(_) => return Ok(false),
            }
        }
    }

    /// In how many namespaces the nonce is.
    async fn arrived(&self) -> Result<usize> {
        let all: Api<TestResource> = Api::all(self.client.clone());
        let all = all.list(&ListParams::default()).await?.items;
        let has_it = |object: &&TestResource| {
            let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
            object.spec.nonce >= self.nonce && number(namespace, &self.prefix).is_some()
        };
        Ok(all.iter().filter(has_it).count())
    }

    /// Opens a watch of the object in namespace i, and drops the one before.
    async fn watch(&mut self, i: usize) -> Result<()> {
        let api = self.api(i);
        let version = api.get(OBJECT).await?.metadata.resource_version;
        let config = WatchParams::default()
            .fields(&format!("metadata.name={OBJECT}"))
            .timeout(290);
        let events = api.watch(&config, &version.unwrap_or_default()).await?;
        self.arrivals = events.boxed();
        self.watched = Some(i);
        Ok(())
    }
}

/// The number in the name of a namespace.
fn number(namespace: &str, prefix: &str) -> Option<usize> {
    namespace.strip_prefix(prefix)?.parse().ok()
}
