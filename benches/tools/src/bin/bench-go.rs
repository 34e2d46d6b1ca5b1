//! Measures Go operators (controller-runtime) as children, against native processes of the same source.
//!
//! - *memory* of N of them: children of N different modules, children of one module, and native
//!   processes; loaded, idle and hibernated, as in bench-memory; and what they take of the disk.
//! - *wake*: how long one takes to hibernate, to wake and to copy an object, as in bench-wake.
//! - *cpu* per reconcile: a nonce after the other through a native process, a child, and a child that
//!   hibernates between any two; in turn, all against one API server. What counts is the CPU time of
//!   the whole process, so HTTP and TLS are on both sides.
//! - *idle*: CPU time of N sleeping children, N that are awake, and N native processes with nothing
//!   to do, and how often sleeping ones are woken for nothing.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use tools::cluster::{Cluster, ControlPlane, Ring, with_control_plane};
use tools::modules::Modules;
use tools::options::Places;
use tools::parent::{Abilities, Child, Hibernation, Parent, Settings, abilities};
use tools::process::{Cpu, Memory, cpu, memory, operator, pids, removed_files, stop};
use tools::say;
use tools::settled::{hold, loaded, mebibytes, settle};
use tools::statistics::{cell, median, millis};
use tools::waking::{self, Waking, hibernated, until_asleep};

const GUEST: &str = "go-ring";
/// After so many seconds children hibernate in the measurements of memory and idleness.
const IDLE_SECONDS: f64 = 2.0;
/// And in that of wakes.
const WAKE_IDLE_SECONDS: f64 = 0.25;
/// And between reconciles: longer than the API server takes to answer, or a reconcile would be
/// several wakes.
const CPU_IDLE_SECONDS: f64 = 0.05;
/// Reconciles before CPU time is measured.
const WARM_UP: usize = 50;
/// What is going on after a start is over by then.
const CALM: Duration = Duration::from_secs(20);

/// Measures Go operators as children, against native processes of the same source.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    places: Places,
    /// The guest's source as a native program.
    #[arg(long, value_name = "FILE")]
    native: PathBuf,
    /// Numbers of operators. A unique module takes half a minute to compile and 200 MiB, once.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 10])]
    sizes: Vec<usize>,
    /// The same as --sizes 1,10,50.
    #[arg(long, conflicts_with = "sizes")]
    full: bool,
    /// What to measure.
    #[arg(long, value_name = "PART,...", value_delimiter = ',', default_values_t = Part::ALL)]
    parts: Vec<Part>,
    /// How long settled memory is watched.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    hold: u64,
    /// How often the child is woken, with a warm and with a cold page cache.
    #[arg(long, value_name = "N", default_value_t = 40)]
    wakes: usize,
    /// In how many starts of the parent: as many first hibernations are measured.
    #[arg(long, value_name = "N", default_value_t = 5)]
    starts: usize,
    /// Reconciles in each round of measuring CPU time.
    #[arg(long, value_name = "N", default_value_t = 300)]
    reconciles: usize,
    /// Such rounds.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// How long idle operators are watched.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    idle: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Part {
    Memory,
    Wake,
    Cpu,
    Idle,
}

impl Part {
    const ALL: [Self; 4] = [Self::Memory, Self::Wake, Self::Cpu, Self::Idle];
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Wake => "wake",
            Self::Cpu => "cpu",
            Self::Idle => "idle",
        })
    }
}

/// What operators are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Different,
    OneModule,
    Native,
}

impl Kind {
    fn label(self) -> &'static str {
        match self {
            Self::Different => "children, different modules",
            Self::OneModule => "children, one module",
            Self::Native => "native processes",
        }
    }
}

/// A row of the table of memory.
struct Row {
    operators: usize,
    kind: Kind,
    state: &'static str,
    memory: Memory,
    /// Files of sleeping children, in bytes.
    snapshots: Option<u64>,
}

struct Bench {
    options: Options,
    cluster: Cluster,
    directory: PathBuf,
    abilities: Abilities,
    modules: Modules,
    rows: Vec<Row>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options = Options::parse();
    let places = options.places.clone();
    with_control_plane(&places, async |control_plane| {
        run(options, control_plane).await
    })
    .await
}

async fn run(mut options: Options, control_plane: &mut ControlPlane) -> Result<()> {
    if options.full {
        options.sizes = vec![1, 10, 50];
    }
    options.sizes.sort_unstable();
    options.sizes.dedup();
    ensure!(options.sizes.first() == Some(&1), "--sizes begin with 1");
    ensure!(
        options.wakes > 0 && options.starts > 0 && options.reconciles > 0 && options.rounds > 0,
        "--wakes, --starts, --reconciles and --rounds are at least 1"
    );
    let places = &options.places;
    let module = places.guest(GUEST)?;
    let directory = control_plane.directory().to_owned();
    let abilities = abilities(&places.parent, &directory, &module).await?;
    ensure!(
        abilities.hibernation && abilities.metrics,
        "this wasm-operator is too old"
    );
    let modules = Modules::open(&places.cache, GUEST, &module, false)?;
    let cluster = control_plane.ready().await?;
    println!("{}\n", places.circumstances(&cluster.version)?);
    let mut bench = Bench {
        options,
        cluster,
        directory,
        abilities,
        modules,
        rows: Vec::new(),
    };
    let mut failed = 0;
    for part in bench.options.parts.clone() {
        say(part);
        let result = match part {
            Part::Memory => bench.memory().await,
            Part::Wake => bench.wake().await,
            Part::Cpu => bench.cpu().await,
            Part::Idle => bench.idle().await,
        };
        // What fails is told, and the rest goes on.
        if let Err(error) = result {
            say(format_args!("{part} failed: {error:#}"));
            failed += 1;
        }
    }
    ensure!(failed == 0, "{failed} parts failed");
    Ok(())
}

impl Bench {
    async fn memory(&mut self) -> Result<()> {
        let mut measured = Ok(());
        for operators in self.options.sizes.clone() {
            measured = self.memory_of(operators).await;
            if measured.is_err() {
                break;
            }
        }
        self.print_memory();
        measured?;
        self.print_disk()
    }

    async fn memory_of(&mut self, operators: usize) -> Result<()> {
        let mut ring = Ring::make(&self.cluster.client, "go-", operators).await?;
        self.children_memory(Kind::Different, &mut ring).await?;
        if operators > 1 {
            self.children_memory(Kind::OneModule, &mut ring).await?;
        }
        let processes = self.natives(&ring)?;
        let pids = pids(&processes)?;
        ring.travel(0, operators, || cpu(&pids).map(drop)).await?;
        let measured = self.busy_and_idle(Kind::Native, &pids, &mut ring).await;
        stop(processes).await?;
        measured
    }

    async fn children_memory(&mut self, kind: Kind, ring: &mut Ring) -> Result<()> {
        let operators = ring.hops;
        let distinct = if kind == Kind::Different {
            operators
        } else {
            1
        };
        let children = self.children(ring, distinct).await?;
        let parent = self.start("awake", &children, Hibernation::Never, false)?;
        let states = parent.during(async |parent| {
            parent.wait_started(operators).await?;
            ring.travel(0, operators, || Ok(())).await?;
            self.busy_and_idle(kind, &[parent.pid], ring).await
        });
        states.await?;

        let after = Hibernation::After(IDLE_SECONDS);
        let parent = self.start("asleep", &children, after, false)?;
        let states = parent.during(async |parent| {
            parent.wait_started(operators).await?;
            for state in ["hibernated", "hibernated again"] {
                ring.travel(0, operators, || Ok(())).await?;
                parent.wait_asleep(operators).await?;
                settle(&[parent.pid]).await?;
                let memory = hold(&[parent.pid], self.options.hold).await?;
                let snapshots = Some(removed_files(parent.pid)?.bytes);
                let failures = parent.counts().await?.failures;
                ensure!(failures == 0, "{failures} hibernations failed");
                self.add(operators, kind, state, memory, snapshots);
            }
            Ok(())
        });
        states.await
    }

    async fn busy_and_idle(&mut self, kind: Kind, pids: &[u32], ring: &mut Ring) -> Result<()> {
        let mut loaded = loaded(pids, ring).await?;
        if kind == Kind::Native {
            // They keep what they have loaded, so that there is time for a walk.
            let walked = memory(pids, true)?;
            loaded.proportional = walked.proportional;
            loaded.private = walked.private;
        }
        self.add(ring.hops, kind, "loaded", loaded, None);
        settle(pids).await?;
        let idle = hold(pids, self.options.hold).await?;
        self.add(ring.hops, kind, "idle", idle, None);
        Ok(())
    }

    fn add(
        &mut self,
        operators: usize,
        kind: Kind,
        state: &'static str,
        memory: Memory,
        snapshots: Option<u64>,
    ) {
        let (label, resident) = (kind.label(), mebibytes(memory.resident, 1));
        say(format_args!("{operators} {label}, {state}: {resident} MiB"));
        self.rows.push(Row {
            operators,
            kind,
            state,
            memory,
            snapshots,
        });
    }

    fn print_memory(&self) {
        println!(
            "| N | operators | state | RSS | anonymous | file | PSS | private | RSS per operator | PSS per operator | snapshot files |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|---|");
        for row in &self.rows {
            let m = &row.memory;
            let walked = |kibibytes| match m.proportional {
                0 => "–".to_owned(),
                _ => mebibytes(kibibytes, 1),
            };
            let snapshots = row
                .snapshots
                .map_or_else(|| "–".to_owned(), |bytes| mebibytes(bytes >> 10, 1));
            let proportional = match m.proportional {
                0 => f64::NAN,
                _ => self.per_operator(row, |memory| memory.proportional),
            };
            println!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {snapshots} |",
                row.operators,
                row.kind.label(),
                row.state,
                mebibytes(m.resident, 1),
                mebibytes(m.anonymous, 1),
                mebibytes(m.file, 1),
                walked(m.proportional),
                walked(m.private),
                cell(self.per_operator(row, |memory| memory.resident), 3),
                cell(proportional, 3),
            );
        }
        println!(
            "\nMiB, summed up over the processes. Per operator: of native processes, a share of the \
             sum; of children, that of N = 1 in the same state taken off and the rest divided by \
             N - 1. What children of one module share counts in RSS for each, in PSS once, and is not \
             private, which is what is mapped once.\n"
        );
    }

    /// MiB for each operator: what one more of them costs, or the share of a process.
    fn per_operator(&self, row: &Row, value: impl Fn(&Memory) -> u64) -> f64 {
        let (n, mebibytes) = (row.operators as f64, value(&row.memory) as f64 / 1024.0);
        if row.kind == Kind::Native {
            return mebibytes / n;
        }
        // One child is the same, whatever the others would be.
        let first = self.rows.iter().find(|other| {
            other.operators == 1 && other.kind == Kind::Different && other.state == row.state
        });
        match first {
            Some(first) if row.operators > 1 => {
                (mebibytes - value(&first.memory) as f64 / 1024.0) / (n - 1.0)
            }
            _ => f64::NAN,
        }
    }

    fn print_disk(&self) -> Result<()> {
        let module = std::fs::metadata(self.modules.module(0)?).context("module")?;
        let native = &self.options.native;
        let program = std::fs::metadata(native).with_context(|| native.display().to_string())?;
        let [code, image] = self.modules.disk();
        println!("| on disk | MiB |\n|---|---|");
        for (what, bytes) in [
            ("module", module.len()),
            ("its code (ELF)", code),
            ("its memory's first content", image),
            ("native program", program.len()),
        ] {
            println!("| {what} | {} |", mebibytes(bytes >> 10, 1));
        }
        println!();
        Ok(())
    }

    async fn wake(&self) -> Result<()> {
        let mut ring = Ring::make(&self.cluster.client, "wake-", 1).await?;
        let children = self.children(&ring, 1).await?;
        let mut waking = Waking::default();
        for start in 0..self.options.starts {
            // What remains of the wakes is divided among the starts that remain.
            let left = self.options.wakes - waking.warm.wake.len().min(self.options.wakes);
            let wakes = left.div_ceil(self.options.starts - start);
            let after = Hibernation::After(WAKE_IDLE_SECONDS);
            let parent = self.start("wake", &children, after, true)?;
            let measured = parent.during(async |parent| {
                waking
                    .measure(parent, &self.modules, &mut ring, wakes, false)
                    .await
            });
            measured.await?;
        }
        waking::print("child", &[(GUEST.to_owned(), waking)]);
        println!(
            "\nCold: page cache dropped by `posix_fadvise(DONTNEED)` on the snapshot and the compiled module.\n"
        );
        Ok(())
    }

    async fn cpu(&self) -> Result<()> {
        let client = &self.cluster.client;
        let mut rings = Vec::new();
        for prefix in ["cpu-native-", "cpu-awake-", "cpu-asleep-"] {
            rings.push(Ring::make(client, prefix, 1).await?);
        }
        let processes = self.natives(&rings[0])?;
        let native = pids(&processes)?[0];
        let (awake, asleep) = (
            self.children(&rings[1], 1).await?,
            self.children(&rings[2], 1).await?,
        );
        let mut streams = [
            Stream::new("native process"),
            Stream::new("child"),
            Stream::new("child, hibernates between"),
        ];
        let after = Hibernation::After(CPU_IDLE_SECONDS);
        let awake = self.start("awake", &awake, Hibernation::Never, false)?;
        let measured = awake.during(async |awake| {
            let asleep = self.start("asleep", &asleep, after, true)?;
            let measured = asleep.during(async |asleep| {
                for round in 0..=self.options.rounds {
                    let is_warm_up = round == 0;
                    let count = if is_warm_up {
                        WARM_UP
                    } else {
                        self.options.reconciles
                    };
                    for (i, stream) in streams.iter_mut().enumerate() {
                        let pid = [native, awake.pid, asleep.pid][i];
                        let sleeper = (i == 2).then_some(&mut *asleep);
                        stream.round(pid, &mut rings[i], count, sleeper).await?;
                        if is_warm_up {
                            *stream = Stream::new(stream.label);
                        }
                    }
                    say(format_args!("round {round} of {}", self.options.rounds));
                }
                Ok(())
            });
            measured.await
        });
        measured.await?;
        stop(processes).await?;
        self.print_cpu(&streams);
        Ok(())
    }

    fn print_cpu(&self, streams: &[Stream]) {
        println!(
            "| operator | rounds × reconciles | user ms | system ms | user + system ms | user, ratio | user + system, ratio | wakes per reconcile | copied, p50 ms |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        let base = &streams[0];
        for stream in streams {
            let ratio = |of: fn(&Round) -> f64| {
                let pairs = stream.rounds.iter().zip(&base.rounds);
                median(&pairs.map(|(a, b)| of(a) / of(b)).collect::<Vec<_>>())
            };
            let middle =
                |of: fn(&Round) -> f64| median(&stream.rounds.iter().map(of).collect::<Vec<_>>());
            println!(
                "| {} | {} × {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.1} |",
                stream.label,
                stream.rounds.len(),
                self.options.reconciles,
                middle(|r| r.user),
                middle(|r| r.system),
                middle(|r| r.user + r.system),
                ratio(|r| r.user),
                ratio(|r| r.user + r.system),
                middle(|r| r.wakes),
                median(&stream.copied),
            );
        }
        println!(
            "\nCPU time of the whole process per reconcile, median of the rounds; ratio to the native \
             process in the same round, median.\n"
        );
    }

    async fn idle(&self) -> Result<()> {
        let operators = self.options.sizes.last().copied().unwrap_or(1);
        let client = &self.cluster.client;
        let mut rings = Vec::new();
        for prefix in ["idle-native-", "idle-awake-", "idle-asleep-"] {
            rings.push(Ring::make(client, prefix, operators).await?);
        }
        let processes = self.natives(&rings[0])?;
        let natives = pids(&processes)?;
        let awake = self.children(&rings[1], operators).await?;
        let asleep = self.children(&rings[2], operators).await?;
        let after = Hibernation::After(IDLE_SECONDS);
        let awake = self.start("awake", &awake, Hibernation::Never, false)?;
        let measured = awake.during(async |awake| {
            let asleep = self.start("asleep", &asleep, after, false)?;
            let measured = asleep.during(async |asleep| {
                awake.wait_started(operators).await?;
                asleep.wait_started(operators).await?;
                for ring in &mut rings {
                    ring.travel(0, operators, || Ok(())).await?;
                }
                asleep.wait_asleep(operators).await?;
                tokio::time::sleep(CALM).await;

                let all = [natives.clone(), vec![awake.pid], vec![asleep.pid]];
                let (wakes, started) = (asleep.counts().await?.wakes, Instant::now());
                let before = all.iter().map(|pids| cpu(pids));
                let before = before.collect::<Result<Vec<Cpu>>>()?;
                tokio::time::sleep(Duration::from_secs(self.options.idle)).await;
                let minutes = started.elapsed().as_secs_f64() / 60.0;
                println!(
                    "| N | operators, {minutes:.1} minutes | user ms | system ms | wakes of children |"
                );
                println!("|---|---|---|---|---|");
                let per_minute = |value: f64| value / minutes / operators as f64;
                let labels = ["native processes", "children, awake", "children, asleep"];
                for (i, label) in labels.into_iter().enumerate() {
                    let (user, system) = cpu(&all[i])?.millis_since(before[i]);
                    let wakes = match i {
                        2 => per_minute((asleep.counts().await?.wakes - wakes) as f64),
                        _ => f64::NAN,
                    };
                    println!(
                        "| {operators} | {label} | {:.1} | {:.1} | {} |",
                        per_minute(user),
                        per_minute(system),
                        cell(wakes, 2)
                    );
                }
                println!("\nPer operator and minute.\n");
                Ok(())
            });
            measured.await
        });
        measured.await?;
        stop(processes).await
    }

    /// A native process for each hop.
    fn natives(&self, ring: &Ring) -> Result<Vec<tokio::process::Child>> {
        let start = |i| {
            let (program, kubeconfig) = (&self.options.native, &self.cluster.kubeconfig);
            // It logs each reconcile, as the children do, whose parent is told to drop that.
            operator(program, kubeconfig, &ring.environment(i), Stdio::null())
        };
        (0..ring.hops).map(start).collect()
    }

    /// A child for each hop, of so many different modules, all of them compiled.
    async fn children(&self, ring: &Ring, distinct: usize) -> Result<Vec<Child>> {
        let child = |i: usize| {
            Ok(Child {
                wasm: self.modules.module(i % distinct)?,
                environment: ring.environment(i).to_vec(),
            })
        };
        let children = (0..ring.hops).map(child).collect::<Result<Vec<_>>>()?;
        let program: &Path = &self.options.places.parent;
        let directory = self.directory.join("compile");
        self.modules.compile(program, &directory, &children).await?;
        Ok(children)
    }

    /// With changes, wakes are not foretold: all come from the benchmark.
    fn start(
        &self,
        name: &str,
        children: &[Child],
        hibernation: Hibernation,
        with_changes: bool,
    ) -> Result<Parent> {
        let settings = Settings {
            program: &self.options.places.parent,
            directory: self.directory.join(name),
            kubeconfig: &self.cluster.kubeconfig,
            artifacts: self.modules.artifacts(),
            hibernation,
            memory_budget: None,
            with_changes,
            with_prediction: !with_changes,
        };
        Parent::start(&settings, self.abilities, children)
    }
}

/// Reconciles one after the other, by one operator.
struct Stream {
    label: &'static str,
    rounds: Vec<Round>,
    /// From the write of an object to its copy, in ms.
    copied: Vec<f64>,
}

/// Per reconcile; times in ms.
struct Round {
    user: f64,
    system: f64,
    wakes: f64,
}

impl Stream {
    fn new(label: &'static str) -> Self {
        Self {
            label,
            rounds: Vec::new(),
            copied: Vec::new(),
        }
    }

    /// So many reconciles; the parent is given if its child is to sleep before each.
    async fn round(
        &mut self,
        pid: u32,
        ring: &mut Ring,
        count: usize,
        mut sleeper: Option<&mut Parent>,
    ) -> Result<()> {
        let wakes = async |sleeper: &mut Option<&mut Parent>| match sleeper {
            Some(parent) => Ok(parent.counts().await?.wakes),
            None => anyhow::Ok(0),
        };
        let wakes_before = wakes(&mut sleeper).await?;
        let before = cpu(&[pid])?;
        for _ in 0..count {
            self.copied
                .push(millis(ring.travel(0, 1, || Ok(())).await?));
            if let Some(parent) = &mut sleeper {
                hibernated(parent).await?;
                until_asleep(parent).await?;
            }
        }
        let (user, system) = cpu(&[pid])?.millis_since(before);
        let woken = wakes(&mut sleeper).await? - wakes_before;
        let count = count as f64;
        self.rounds.push(Round {
            user: user / count,
            system: system / count,
            wakes: woken as f64 / count,
        });
        Ok(())
    }
}
