//! Measures how long children take to hibernate and to wake, and how long a nonce takes through a
//! ring of children that are all asleep.
//!
//! Part 1, for each size of heap, with one child in the process, and several starts of it:
//!
//! - the first hibernation, which writes the whole heap, and the later ones of a heap that hardly
//!   changes;
//! - a change of the object that the child watches wakes it; the parent logs how long that took,
//!   and here is measured when the child has copied the object. With a *warm* page cache, and with
//!   a *cold* one: the snapshot and the compiled module were written back and dropped from it
//!   (`posix_fadvise`), and what the parent then had to read from storage is reported;
//! - for comparison, another change right after that, of which the child is awake.
//!
//! Part 2: two parents with a ring each, side by side and in turn; in one of them the children
//! hibernate, and are all asleep when the nonce sets out.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use tools::cluster::{Cluster, ControlPlane, Ring, with_control_plane};
use tools::modules::Modules;
use tools::options::Places;
use tools::parent::{Abilities, Child, Hibernation, Parent, Settings, abilities};
use tools::say;
use tools::statistics::{cell, median, millis, quantile};
use tools::waking::{self, Waking};

/// The child of part 1 hibernates after so many seconds without an event.
const SHORT_IDLE_SECONDS: f64 = 0.25;
/// Those of part 2: longer than a nonce takes through the ring, so that none goes back to sleep
/// and is woken twice.
const RING_IDLE_SECONDS: f64 = 3.0;

/// Measures how long children take to hibernate and to wake.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    places: Places,
    /// Bytes that a child allocates, in MiB (its memory is somewhat larger).
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', default_values_t = [1.2, 10.0, 48.0, 87.0])]
    heaps: Vec<f64>,
    /// How often each child is woken, with a warm and with a cold page cache.
    #[arg(long, value_name = "N", default_value_t = 30)]
    wakes: usize,
    /// In how many starts of the parent: as many first hibernations are measured.
    #[arg(long, value_name = "N", default_value_t = 10)]
    starts: usize,
    /// Children of the ring; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 100)]
    ring: usize,
    /// How often a nonce is sent through each ring.
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: usize,
    /// For a cold page cache, drop the whole machine's (needs root, and disturbs everybody else).
    #[arg(long)]
    drop_caches: bool,
}

struct Bench {
    options: Options,
    cluster: Cluster,
    directory: PathBuf,
    abilities: Abilities,
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

async fn run(options: Options, control_plane: &mut ControlPlane) -> Result<()> {
    ensure!(
        options.wakes > 0 && options.starts > 0 && options.rounds > 0,
        "--wakes, --starts and --rounds are at least 1"
    );
    let places = &options.places;
    let directory = control_plane.directory().to_owned();
    let abilities = abilities(&places.parent, &directory, &places.guest("ring")?).await?;
    let cluster = control_plane.ready().await?;
    println!("{}\n", options.places.circumstances(&cluster.version)?);
    let bench = Bench {
        options,
        cluster,
        directory,
        abilities,
    };
    if abilities.hibernation {
        bench.heaps().await?;
    } else {
        say("this wasm-operator does not hibernate: only a ring that is awake");
    }
    if bench.options.ring > 0 {
        bench.rings().await?;
    }
    Ok(())
}

impl Bench {
    async fn heaps(&self) -> Result<()> {
        let mut ring = Ring::make(&self.cluster.client, "heap-", 1).await?;
        let modules = self.modules("ring")?;
        let mut heaps = Vec::new();
        for mebibytes in self.options.heaps.clone() {
            say(format_args!("a heap of {mebibytes} MiB"));
            let mut heap = Waking::default();
            for start in 0..self.options.starts {
                // What remains of the wakes is divided among the starts that remain.
                let left = self.options.wakes - heap.warm.wake.len().min(self.options.wakes);
                let wakes = left.div_ceil(self.options.starts - start);
                self.one_start(&modules, &mut ring, &mut heap, mebibytes, wakes)
                    .await?;
            }
            say(format_args!(
                "a heap of {mebibytes} MiB: woken in {} ms (warm), {} ms (cold); hibernated in {} ms, later {} ms",
                cell(median(&heap.warm.wake), 2),
                cell(median(&heap.cold.wake), 2),
                cell(median(&heap.first), 1),
                cell(median(&heap.later), 1),
            ));
            heaps.push((mebibytes.to_string(), heap));
        }
        waking::print("heap MiB", &heaps);
        let how = if self.options.drop_caches {
            "`drop_caches`, the whole machine's"
        } else {
            "`posix_fadvise(DONTNEED)` on the snapshot and the compiled module"
        };
        println!("\nCold: page cache dropped by {how}.\n");
        Ok(())
    }

    /// One process: its first hibernation, and some wakes.
    async fn one_start(
        &self,
        modules: &Modules,
        ring: &mut Ring,
        heap: &mut Waking,
        mebibytes: f64,
        wakes: usize,
    ) -> Result<()> {
        let mut environment = ring.environment(0).to_vec();
        let bytes = (mebibytes * 1024.0 * 1024.0) as u64;
        environment.push(("HEAP_MEM_SIZE", bytes.to_string()));
        let child = Child {
            wasm: modules.module(0)?,
            environment,
        };
        let after = Hibernation::After(SHORT_IDLE_SECONDS);
        let parent = self.start("heap", modules, &[child], after, true)?;
        let drop_caches = self.options.drop_caches;
        let measured = parent.during(async |parent| {
            heap.measure(parent, modules, ring, wakes, drop_caches)
                .await
        });
        measured.await
    }

    async fn rings(&self) -> Result<()> {
        println!(
            "| ring of {} | N | p50 ms | p95 ms | max ms | p50 per hop | p50 against awake |",
            self.options.ring
        );
        println!("|---|---|---|---|---|---|---|");
        for guest in ["ring", "ring-thin"] {
            self.ring(guest).await?;
        }
        Ok(())
    }

    /// The same ring twice, in two parents: one whose children hibernate, and one whose do not.
    async fn ring(&self, guest: &str) -> Result<()> {
        let size = self.options.ring;
        let modules = self.modules(guest)?;
        let client = &self.cluster.client;
        let mut awake_ring = Ring::make(client, &format!("{guest}-awake-"), size).await?;
        let mut asleep_ring = Ring::make(client, &format!("{guest}-asleep-"), size).await?;
        let children = |ring: &Ring| -> Result<Vec<Child>> {
            let child = |i| {
                Ok(Child {
                    wasm: modules.module(i)?,
                    environment: ring.environment(i).to_vec(),
                })
            };
            (0..size).map(child).collect()
        };
        say(format_args!(
            "{guest}: starting (and compiling) {size} children"
        ));
        let (mut awake, mut asleep) = (Vec::new(), Vec::new());
        let awake_children = children(&awake_ring)?;
        let parent = self.start(
            "awake",
            &modules,
            &awake_children,
            Hibernation::Never,
            false,
        )?;
        let measured = parent.during(async |_| {
            // What is compiled here is there for the other one.
            awake_ring
                .travel(0, size, || Ok(modules.compiled()))
                .await?;
            if !self.abilities.hibernation {
                for _ in 0..self.options.rounds {
                    awake.push(millis(awake_ring.travel(0, size, || Ok(())).await?));
                }
                return Ok(());
            }
            let after = Hibernation::After(RING_IDLE_SECONDS);
            let other = self.start("asleep", &modules, &children(&asleep_ring)?, after, false)?;
            let measured = other.during(async |other| {
                asleep_ring.travel(0, size, || Ok(())).await?;
                for round in 1..=self.options.rounds {
                    let before = other.wait_asleep(size).await?;
                    let took = millis(asleep_ring.travel(0, size, || Ok(())).await?);
                    let after = other.counts().await?;
                    asleep.push(took);
                    awake.push(millis(awake_ring.travel(0, size, || Ok(())).await?));
                    say(format_args!(
                        "{guest}, round {round}: {took:.0} ms with {} wakes, {:.0} ms awake",
                        after.wakes - before.wakes,
                        awake.last().copied().unwrap_or(f64::NAN),
                    ));
                }
                Ok(())
            });
            measured.await
        });
        measured.await?;
        let base = median(&awake);
        for (state, times) in [("never hibernates", &awake), ("all asleep", &asleep)] {
            if times.is_empty() {
                continue;
            }
            println!(
                "| {guest}, {state} | {} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2} |",
                times.len(),
                median(times),
                quantile(times, 0.95),
                quantile(times, 1.0),
                median(times) / size as f64,
                median(times) / base,
            );
        }
        Ok(())
    }

    fn modules(&self, guest: &str) -> Result<Modules> {
        let places = &self.options.places;
        Modules::open(&places.cache, guest, &places.guest(guest)?, false)
    }

    fn start(
        &self,
        name: &str,
        modules: &Modules,
        children: &[Child],
        hibernation: Hibernation,
        with_changes: bool,
    ) -> Result<Parent> {
        let settings = Settings {
            program: &self.options.places.parent,
            directory: self.directory.join(name),
            kubeconfig: &self.cluster.kubeconfig,
            artifacts: modules.artifacts(),
            hibernation,
            memory_budget: None,
            with_changes,
            with_prediction: true,
        };
        Parent::start(&settings, self.abilities, children)
    }
}
