//! Measures the memory of N operators: as children, as native processes, as one native process.
//!
//! Prints tables in Markdown, and draws a plot. What is measured, and when:
//!
//! - *loaded*: the largest RSS while every operator handles an event, sampled every 20 ms;
//! - *idle*: the median RSS of some seconds, once it has settled after that;
//! - *hibernated*: the same, once all children are asleep (in a process of its own, so that the
//!   other two do not contain what waking leaves behind);
//! - *hibernated again*: the same after a nonce has gone round, waking all of them.
//!
//! Modules are compiled before: a process that has compiled anything is not measured.

use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use tokio::process::Child as Process;
use tools::cluster::{Cluster, ControlPlane, Ring, with_control_plane};
use tools::modules::Modules;
use tools::options::Places;
use tools::parent::{Abilities, Child, Hibernation, Parent, Settings, abilities};
use tools::plot::{self, Series};
use tools::process::{Memory, memory, operator, pids, removed_files, stop};
use tools::say;
use tools::settled::{QUIET_INTERVAL, hold, loaded, mebibytes, settle};
use tools::statistics::cell;

/// After so many seconds children hibernate, where they do.
const IDLE_SECONDS: f64 = 2.0;
/// How many children are woken by the nonce that is sent with `--children`.
const WOKEN: usize = 100;

/// Measures the memory of N operators, as children, as native processes and as one native process.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    places: Places,
    /// Numbers of operators.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 20, 100])]
    sizes: Vec<usize>,
    /// The same as --sizes 1,20,100,1000. Compiling 1000 unique modules takes half an hour, once.
    #[arg(long, conflicts_with = "sizes")]
    full: bool,
    /// What to measure.
    #[arg(long, value_name = "KIND,...", value_delimiter = ',', default_values_t = Kind::ALL)]
    kinds: Vec<Kind>,
    /// How long a settled state is watched.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    hold: u64,
    /// Where the plot is written to [default: benches/memory.svg].
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Compile all modules again.
    #[arg(long)]
    fresh: bool,
    /// Instead of all that: start a parent with so many thin children that hibernate.
    #[arg(long, value_name = "N", conflicts_with_all = ["sizes", "full", "kinds"])]
    children: Option<usize>,
    /// How many different modules the children of --children have.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "children")]
    modules: usize,
    /// The parent's --memory-budget.
    #[arg(long, value_name = "SIZE")]
    memory_budget: Option<String>,
}

/// What operators are.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Kind {
    /// Children with kube-rs in them.
    KubeRs,
    /// Children on the ABI alone.
    Thin,
    /// A native process each.
    Native,
    /// One native process for all.
    Combined,
}

impl Kind {
    const ALL: [Self; 4] = [Self::KubeRs, Self::Thin, Self::Native, Self::Combined];

    fn label(self) -> &'static str {
        match self {
            Self::KubeRs => "children, kube-rs",
            Self::Thin => "children, thin",
            Self::Native => "N native processes",
            Self::Combined => "one native process",
        }
    }

    /// The guest, if it is one.
    fn guest(self) -> Option<&'static str> {
        match self {
            Self::KubeRs => Some("ring"),
            Self::Thin => Some("ring-thin"),
            Self::Native | Self::Combined => None,
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::KubeRs => "kube-rs",
            Self::Thin => "thin",
            Self::Native => "native",
            Self::Combined => "combined",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Loaded,
    Idle,
    Hibernated,
    HibernatedAgain,
}

impl State {
    fn label(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::Idle => "idle",
            Self::Hibernated => "hibernated",
            Self::HibernatedAgain => "hibernated again",
        }
    }
}

/// A row of the table.
#[derive(Debug)]
struct Row {
    operators: usize,
    kind: Kind,
    state: State,
    memory: Memory,
    /// Files of sleeping children, in bytes.
    snapshots: Option<u64>,
    /// How many children woke while the state was watched.
    wakes: u64,
}

struct Bench {
    options: Options,
    cluster: Cluster,
    directory: PathBuf,
    abilities: Abilities,
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
        options.sizes = vec![1, 20, 100, 1000];
    }
    options.sizes.sort_unstable();
    options.sizes.dedup();
    ensure!(options.sizes.first() > Some(&0), "--sizes begin with 1");
    let places = &options.places;
    if options.fresh {
        for guest in Kind::ALL.into_iter().filter_map(Kind::guest) {
            Modules::open(&places.cache, guest, &places.guest(guest)?, true)?;
        }
    }
    let directory = control_plane.directory().to_owned();
    let abilities = abilities(&places.parent, &directory, &places.guest("ring")?).await?;
    if !abilities.hibernation {
        say("this wasm-operator does not hibernate: loaded and idle only");
    }
    let cluster = control_plane.ready().await?;
    let circumstances = options.places.circumstances(&cluster.version)?;
    let mut bench = Bench {
        options,
        cluster,
        directory,
        abilities,
        rows: Vec::new(),
    };
    println!("{circumstances}\n");
    match bench.options.children {
        Some(children) => bench.many(children).await,
        None => bench.all().await,
    }
}

impl Bench {
    /// All kinds in all sizes. What fails is told, and the rest goes on.
    async fn all(&mut self) -> Result<()> {
        let mut failed = 0;
        for operators in self.options.sizes.clone() {
            let mut ring = Ring::make(&self.cluster.client, "ring-", operators).await?;
            for kind in self.options.kinds.clone() {
                say(format_args!("{operators} × {kind}"));
                if let Err(error) = self.measure(kind, operators, &mut ring).await {
                    say(format_args!("{operators} × {kind} failed: {error:#}"));
                    failed += 1;
                }
            }
        }
        self.print();
        let path = self.options.svg.clone();
        let path =
            path.unwrap_or_else(|| self.options.places.repository.join("benches/memory.svg"));
        std::fs::write(&path, self.plot()).with_context(|| path.display().to_string())?;
        say(format_args!("the plot is {}", path.display()));
        ensure!(failed == 0, "{failed} measurements failed");
        Ok(())
    }

    async fn measure(&mut self, kind: Kind, operators: usize, ring: &mut Ring) -> Result<()> {
        let Some(guest) = kind.guest() else {
            return self.measure_native(kind, operators, ring).await;
        };
        let modules = self.modules(guest)?;
        let children = children(&modules, ring, operators)?;
        self.compile(&modules, &children, ring).await?;

        let parent = self.start(&modules, &children, Hibernation::Never)?;
        let states = parent.during(async |parent| {
            ring.travel(0, operators, || Ok(())).await?;
            self.busy_and_idle(kind, &[parent.pid], ring).await
        });
        states.await?;
        if !self.abilities.hibernation {
            return Ok(());
        }
        let after = Hibernation::After(IDLE_SECONDS);
        let parent = self.start(&modules, &children, after)?;
        let states = parent.during(async |parent| {
            for state in [State::Hibernated, State::HibernatedAgain] {
                ring.travel(0, operators, || Ok(())).await?;
                self.asleep(kind, state, operators, parent).await?;
            }
            Ok(())
        });
        states.await
    }

    /// Watches children that are all asleep.
    async fn asleep(
        &mut self,
        kind: Kind,
        state: State,
        operators: usize,
        parent: &mut Parent,
    ) -> Result<()> {
        let before = parent.wait_asleep(operators).await?;
        let pids = [parent.pid];
        settle(&pids).await?;
        let memory = hold(&pids, self.options.hold).await?;
        let files = removed_files(parent.pid)?;
        let in_memory = files.bytes_in_memory;
        if in_memory > 0 {
            say(format_args!(
                "{} MiB of the snapshots are in memory (tmpfs or memfd), which no RSS shows",
                mebibytes(in_memory >> 10, 1)
            ));
        }
        let after = parent.counts().await?;
        ensure!(
            after.failures == 0,
            "{} hibernations failed",
            after.failures
        );
        self.add(Row {
            operators,
            kind,
            state,
            memory,
            snapshots: Some(files.bytes),
            wakes: after.wakes - before.wakes,
        });
        Ok(())
    }

    async fn measure_native(
        &mut self,
        kind: Kind,
        operators: usize,
        ring: &mut Ring,
    ) -> Result<()> {
        let mut processes = Vec::new();
        if kind == Kind::Native {
            for i in 0..operators {
                processes.push(self.native("ring-native", &ring.environment(i))?);
            }
        } else if operators == 1 {
            // The same as the native process; and its ring of one would have nowhere to write.
            return Ok(());
        } else {
            // It closes its ring of N + 1 operators. One of them more does not matter.
            let count = ("NR_OPERATORS", (operators + 1).to_string());
            let prefix = ("NAMESPACE_PREFIX", ring.prefix.clone());
            processes.push(self.native("comb-native", &[count, prefix])?);
        }
        let pids = pids(&processes)?;
        // Fails when one of them is gone.
        let all_alive = || memory(&pids, false).map(drop);
        ring.travel(0, operators, all_alive).await?;
        let result = self.busy_and_idle(kind, &pids, ring).await;
        stop(processes).await?;
        result
    }

    fn native(&self, name: &str, environment: &[(&str, String)]) -> Result<Process> {
        let program = self.options.places.tools.join(name);
        let kubeconfig = &self.cluster.kubeconfig;
        operator(&program, kubeconfig, environment, Stdio::inherit())
    }

    /// Sends an event to all operators, and looks at their memory meanwhile and later.
    async fn busy_and_idle(&mut self, kind: Kind, pids: &[u32], ring: &mut Ring) -> Result<()> {
        let operators = ring.hops;
        let loaded = loaded(pids, ring).await?;
        let row = |state, memory| Row {
            operators,
            kind,
            state,
            memory,
            snapshots: None,
            wakes: 0,
        };
        self.add(row(State::Loaded, loaded));
        settle(pids).await?;
        let idle = hold(pids, self.options.hold).await?;
        self.add(row(State::Idle, idle));
        Ok(())
    }

    fn add(&mut self, row: Row) {
        say(format_args!(
            "{} × {}, {}: {} MiB",
            row.operators,
            row.kind,
            row.state.label(),
            mebibytes(row.memory.resident, 1)
        ));
        self.rows.push(row);
    }

    fn modules(&self, guest: &str) -> Result<Modules> {
        let places = &self.options.places;
        Modules::open(&places.cache, guest, &places.guest(guest)?, false)
    }

    fn start(
        &self,
        modules: &Modules,
        children: &[Child],
        hibernation: Hibernation,
    ) -> Result<Parent> {
        let settings = Settings {
            program: &self.options.places.parent,
            directory: self.directory.join("parent"),
            kubeconfig: &self.cluster.kubeconfig,
            artifacts: modules.artifacts(),
            hibernation,
            memory_budget: self.options.memory_budget.as_deref(),
            with_changes: false,
            with_prediction: true,
        };
        Parent::start(&settings, self.abilities, children)
    }

    /// Runs the children until a start compiles nothing.
    async fn compile(&self, modules: &Modules, children: &[Child], ring: &mut Ring) -> Result<()> {
        for _ in 0..2 {
            let before = modules.compiled();
            let mut told = Instant::now();
            let parent = self.start(modules, children, Hibernation::Never)?;
            let hops = ring.hops;
            let progress = || {
                let compiled = modules.compiled();
                if compiled != before && told.elapsed() > Duration::from_secs(20) {
                    say(format_args!("{compiled} modules are compiled"));
                    told = Instant::now();
                }
                Ok(compiled)
            };
            parent
                .during(async |_| ring.travel(0, hops, progress).await)
                .await?;
            if modules.compiled() == before {
                return Ok(());
            }
        }
        bail!("the parent does not keep what it compiles")
    }

    /// One process start with thousands of children, which all hibernate.
    async fn many(&mut self, operators: usize) -> Result<()> {
        ensure!(operators > 0 && self.options.modules > 0, "at least one");
        ensure!(
            self.abilities.hibernation,
            "this wasm-operator does not hibernate"
        );
        let mut ring = Ring::make(&self.cluster.client, "ring-", operators).await?;
        let modules = self.modules("ring-thin")?;
        let distinct = self.options.modules.min(operators);
        self.compile_few(&modules, distinct).await?;
        let mut all = children(&modules, &ring, operators)?;
        for i in distinct..operators {
            all[i].wasm = all[i % distinct].wasm.clone();
        }
        say(format_args!("starting a parent with {operators} children"));
        let started = Instant::now();
        let parent = self.start(&modules, &all, Hibernation::After(IDLE_SECONDS))?;
        let measured = parent.during(async |parent| {
            self.many_in(parent, operators, distinct, &mut ring, started)
                .await
        });
        measured.await
    }

    async fn compile_few(&self, modules: &Modules, distinct: usize) -> Result<()> {
        // Not in the namespaces of the others, through which its nonces would go on.
        let mut ring = Ring::make(&self.cluster.client, "compile-", distinct).await?;
        let children = children(modules, &ring, distinct)?;
        self.compile(modules, &children, &mut ring).await
    }

    async fn many_in(
        &self,
        parent: &mut Parent,
        operators: usize,
        distinct: usize,
        ring: &mut Ring,
        started: Instant,
    ) -> Result<()> {
        let pids = [parent.pid];
        let mut told = Instant::now();
        // Asleep all at once, and each has seen its object: the start is over.
        let counts = loop {
            let counts = parent.counts().await?;
            if counts.asleep as usize == operators {
                break counts;
            }
            parent.check_alive().await?;
            ensure!(
                started.elapsed() < Duration::from_secs(1800),
                "not all asleep after half an hour: {counts:?}"
            );
            if told.elapsed() > Duration::from_secs(10) {
                let resident = mebibytes(memory(&pids, false)?.resident, 1);
                let (seconds, asleep) = (started.elapsed().as_secs(), counts.asleep);
                say(format_args!("{seconds} s: {asleep} asleep, {resident} MiB"));
                told = Instant::now();
            }
            tokio::time::sleep(QUIET_INTERVAL).await;
        };
        let seconds = started.elapsed().as_secs();
        let peak_of_start = memory(&pids, false)?.peak;
        settle(&pids).await?;
        let asleep = hold(&pids, self.options.hold).await?;
        let files = removed_files(parent.pid)?;
        let hops = WOKEN.min(operators);
        let journey = ring.travel(operators - hops, operators, || Ok(())).await?;
        parent.wait_asleep(operators).await?;
        settle(&pids).await?;
        let again = hold(&pids, self.options.hold).await?;
        let after = parent.counts().await?;

        println!(
            "{operators} thin children, {distinct} modules, a watch each; all asleep {seconds} s \
             after the start. A nonce then went through {hops} of them in {:.1} s; {} wakes in \
             all, {} failed hibernations.\n",
            journey.as_secs_f64(),
            after.wakes - counts.wakes,
            after.failures
        );
        println!("| state | RSS | anonymous | file | shared | PSS | snapshot files |");
        println!("|---|---|---|---|---|---|---|");
        let row = |state: &str, m: &Memory, files: &str| {
            let parts = [m.resident, m.anonymous, m.file, m.shared, m.proportional];
            let parts = parts.map(|kibibytes| mebibytes(kibibytes, 1)).join(" | ");
            println!("| {state} | {parts} | {files} |");
        };
        row("hibernated", &asleep, &mebibytes(files.bytes >> 10, 1));
        row("hibernated again", &again, "");
        println!(
            "| largest RSS of the start | {} | | | | | |",
            mebibytes(peak_of_start, 1)
        );
        println!(
            "| largest RSS of all | {} | | | | | |",
            mebibytes(memory(&pids, false)?.peak, 1)
        );
        Ok(())
    }

    fn print(&self) {
        println!(
            "| N | operators | state | RSS | anonymous | file | shared | PSS | per operator | snapshot files |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|");
        for row in &self.rows {
            let m = &row.memory;
            let proportional = match m.proportional {
                0 => "–".to_owned(),
                measured => mebibytes(measured, 1),
            };
            let snapshots = row
                .snapshots
                .map_or_else(|| "–".to_owned(), |bytes| mebibytes(bytes >> 10, 1));
            println!(
                "| {} | {} | {} | {} | {} | {} | {} | {proportional} | {} | {snapshots} |",
                row.operators,
                row.kind.label(),
                row.state.label(),
                mebibytes(m.resident, 1),
                mebibytes(m.anonymous, 1),
                mebibytes(m.file, 1),
                mebibytes(m.shared, 1),
                cell(self.per_operator(row), 3),
            );
        }
        println!(
            "\nMiB, summed up over the processes. N native processes run one program file, whose pages \
             they share: in PSS these count once, in RSS for each, as they do when each operator is \
             a program of its own. \"Per operator\" of N native processes: RSS divided by N; of the \
             others: RSS less that of N = 1 in the same state, divided by N - 1 (the one native \
             process is a native process at N = 1; it runs one controller more than N)."
        );
        let woken: u64 = self.rows.iter().map(|row| row.wakes).sum();
        if woken > 0 {
            println!("\n{woken} wakes happened while hibernated children were watched.");
        }
    }

    /// MiB for each operator: what one more of them costs, or the share of a process.
    fn per_operator(&self, row: &Row) -> f64 {
        let n = row.operators as f64;
        if row.kind == Kind::Native {
            return row.memory.resident as f64 / 1024.0 / n;
        }
        let first_kind = match row.kind {
            Kind::Combined => Kind::Native,
            kind => kind,
        };
        let first = self.rows.iter().find(|other| {
            other.operators == 1 && other.kind == first_kind && other.state == row.state
        });
        match first {
            Some(first) if row.operators > 1 => {
                (row.memory.resident as f64 - first.memory.resident as f64) / 1024.0 / (n - 1.0)
            }
            _ => f64::NAN,
        }
    }

    fn plot(&self) -> String {
        let lines = [
            (
                Kind::Native,
                State::Idle,
                "N native processes (PSS)",
                "#555",
            ),
            (
                Kind::KubeRs,
                State::Loaded,
                "children, kube-rs, loaded",
                "#b2182b",
            ),
            (
                Kind::KubeRs,
                State::Idle,
                "children, kube-rs, idle",
                "#ef8a62",
            ),
            (Kind::Combined, State::Idle, "one native process", "#aaa"),
            (
                Kind::KubeRs,
                State::Hibernated,
                "children, kube-rs, hibernated",
                "#2166ac",
            ),
            (
                Kind::Thin,
                State::Loaded,
                "children, thin, loaded",
                "#1b7837",
            ),
            (Kind::Thin, State::Idle, "children, thin, idle", "#7fbf7b"),
            (
                Kind::Thin,
                State::Hibernated,
                "children, thin, hibernated",
                "#67a9cf",
            ),
        ];
        let mut series: Vec<_> = lines
            .into_iter()
            .map(|(kind, state, label, colour)| {
                let is_it = |row: &&Row| row.kind == kind && row.state == state;
                let point = |row: &Row| {
                    let kibibytes = match kind {
                        Kind::Native if state == State::Idle => row.memory.proportional,
                        _ => row.memory.resident,
                    };
                    (row.operators as f64, kibibytes as f64 / 1024.0)
                };
                Series {
                    label: label.to_owned(),
                    colour,
                    is_reference: false,
                    points: self.rows.iter().filter(is_it).map(point).collect(),
                }
            })
            .filter(|series| !series.points.is_empty())
            .collect();
        // The figures of the prototype's authors, 2022 (blog figures: 185 and 86 MiB at N = 100).
        let prototype = |label: &str, colour, mebibytes: [f64; 6]| Series {
            label: label.to_owned(),
            colour,
            is_reference: true,
            points: [10.0, 20.0, 40.0, 60.0, 80.0, 100.0]
                .into_iter()
                .zip(mebibytes)
                .collect(),
        };
        series.push(prototype(
            "prototype (2022), loaded: 185 at 100",
            "#b2182b",
            [50.0, 70.0, 94.0, 130.0, 158.0, 185.0],
        ));
        series.push(prototype(
            "prototype (2022), unloading: 86 at 100",
            "#2166ac",
            [44.0, 49.0, 58.0, 67.0, 72.0, 86.0],
        ));
        plot::svg("Memory of N ring operators (RSS)", &series)
    }
}

/// One child for each hop of a ring, with a module of its own.
fn children(modules: &Modules, ring: &Ring, operators: usize) -> Result<Vec<Child>> {
    let child = |i| {
        Ok(Child {
            wasm: modules.module(i)?,
            environment: ring.environment(i).to_vec(),
        })
    };
    (0..operators).map(child).collect()
}
