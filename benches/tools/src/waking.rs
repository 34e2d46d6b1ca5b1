//! A child that is put to sleep and woken again and again, alone in its process.

use std::path::Path;

use anyhow::{Context, Result};

use crate::cluster::Ring;
use crate::modules::Modules;
use crate::parent::{Change, Parent};
use crate::process::{bytes_read_from_storage, forget_cached_pages, removed_files};
use crate::statistics::{cell, median, millis, quantile};

/// What it took. Times in ms.
#[derive(Debug, Default)]
pub struct Waking {
    /// Linear memory, in bytes.
    pub memory: u64,
    /// The first hibernations.
    pub first: Vec<f64>,
    /// Bytes written then.
    pub first_written: Vec<f64>,
    /// All later ones.
    pub later: Vec<f64>,
    /// Bytes written then.
    pub later_written: Vec<f64>,
    /// With a warm page cache.
    pub warm: Wakes,
    /// With a cold one.
    pub cold: Wakes,
    /// From the write of an object to its copy, the child being awake.
    pub awake: Vec<f64>,
}

/// Wakes with one kind of page cache.
#[derive(Debug, Default)]
pub struct Wakes {
    /// Until the first instruction, as the parent says.
    pub wake: Vec<f64>,
    /// From the write of an object to its copy.
    pub copy: Vec<f64>,
    /// KiB read from storage.
    pub read: Vec<f64>,
}

impl Waking {
    /// Measures in one process with changes: the child's first hibernation, and `wakes` wakes of
    /// each kind, by writes to the ring of one hop. `drop_caches`: of the whole machine.
    ///
    /// # Errors
    /// When the child does not hibernate, wake or copy.
    pub async fn measure(
        &mut self,
        parent: &mut Parent,
        modules: &Modules,
        ring: &mut Ring,
        wakes: usize,
        drop_caches: bool,
    ) -> Result<()> {
        let (millis, written, memory) = hibernated(parent).await?;
        self.first.push(millis);
        self.first_written.push(written);
        self.memory = memory;
        // Its first wake is a warm-up: the API server may not have served it before.
        for is_cold in [false, true] {
            for _ in 0..wakes {
                if is_cold {
                    make_cold(parent, &modules.artifacts(), drop_caches)?;
                }
                self.one_wake(parent, ring, is_cold).await?;
            }
        }
        Ok(())
    }

    /// Wakes a child that is asleep, and waits until it sleeps again.
    async fn one_wake(
        &mut self,
        parent: &mut Parent,
        ring: &mut Ring,
        is_cold: bool,
    ) -> Result<()> {
        until_asleep(parent).await?;
        let read_before = bytes_read_from_storage(parent.pid)?;
        let copied = ring.travel(0, 1, || Ok(())).await?;
        let read = bytes_read_from_storage(parent.pid)? - read_before;
        let wakes = if is_cold {
            &mut self.cold
        } else {
            &mut self.warm
        };
        match parent.next_change().await? {
            Change::Woken { millis } => wakes.wake.push(millis),
            Change::Hibernated { .. } => return Ok(()),
        }
        wakes.copy.push(millis(copied));
        wakes.read.push(read as f64 / 1024.0);
        if !is_cold {
            let copied = ring.travel(0, 1, || Ok(())).await?;
            // Unless it went to sleep before that.
            let changes = parent.forget_changes();
            if changes.is_empty() {
                self.awake.push(millis(copied));
            } else if matches!(changes.last(), Some(Change::Hibernated { .. })) {
                return Ok(());
            }
        }
        let (millis, written, _) = hibernated(parent).await?;
        self.later.push(millis);
        self.later_written.push(written);
        Ok(())
    }
}

/// Waits until the only child is asleep. Something else than the benchmark may have woken it, such
/// as the end of a watch.
///
/// # Errors
/// When it does not fall asleep.
pub async fn until_asleep(parent: &mut Parent) -> Result<()> {
    let mut last = parent.forget_changes().pop();
    while matches!(last, Some(Change::Woken { .. })) {
        last = Some(parent.next_change().await?);
    }
    Ok(())
}

/// Waits until the child hibernates: ms, bytes written, bytes of memory.
///
/// # Errors
/// When it does not.
pub async fn hibernated(parent: &mut Parent) -> Result<(f64, f64, u64)> {
    loop {
        if let Change::Hibernated {
            millis,
            written,
            bytes,
        } = parent.next_change().await?
        {
            return Ok((millis, written as f64, bytes));
        }
    }
}

fn make_cold(parent: &Parent, artifacts: &Path, drop_caches: bool) -> Result<()> {
    let mut files = removed_files(parent.pid)?.links;
    for entry in std::fs::read_dir(artifacts).context("compiled modules")? {
        let path = entry.context("compiled modules")?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    forget_cached_pages(&files)?;
    if drop_caches {
        std::fs::write("/proc/sys/vm/drop_caches", "1").context("drop_caches")?;
    }
    Ok(())
}

/// Prints both tables, with one row or two for each child; `head` says what its label is.
pub fn print(head: &str, children: &[(String, Waking)]) {
    println!(
        "| wake: {head} | memory MiB | page cache | N | p50 ms | p95 ms | p99 ms | copied, p50 ms | p95 ms | copied when awake, p50 ms | read KiB, p50 |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (label, child) in children {
        for (cache, wakes) in [("warm", &child.warm), ("cold", &child.cold)] {
            println!(
                "| {label} | {:.1} | {cache} | {} | {} | {} | {} | {} | {} | {} | {} |",
                child.memory as f64 / 1024.0 / 1024.0,
                wakes.wake.len(),
                cell(quantile(&wakes.wake, 0.5), 2),
                cell(quantile(&wakes.wake, 0.95), 2),
                cell(quantile(&wakes.wake, 0.99), 2),
                cell(median(&wakes.copy), 1),
                cell(quantile(&wakes.copy, 0.95), 1),
                cell(median(&child.awake), 1),
                cell(median(&wakes.read), 0),
            );
        }
    }
    println!(
        "\nWake: from a worker's taking it up until the first instruction. Copied: from the \
         benchmark's write of an object until a watch shows that the child has copied it.\n"
    );
    println!("| hibernate: {head} | which | N | p50 ms | p95 ms | p99 ms | written KiB, p50 |");
    println!("|---|---|---|---|---|---|---|");
    for (label, child) in children {
        let kinds = [
            ("first", &child.first, &child.first_written),
            ("later", &child.later, &child.later_written),
        ];
        for (which, times, written) in kinds {
            println!(
                "| {label} | {which} | {} | {} | {} | {} | {} |",
                times.len(),
                cell(quantile(times, 0.5), 2),
                cell(quantile(times, 0.95), 2),
                cell(quantile(times, 0.99), 2),
                cell(median(written) / 1024.0, 0),
            );
        }
    }
}
