//! Processes that do not outlive the benchmark, and how much memory they take.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, anyhow};
use rustix::fs::{Advice, CWD, Mode, OFlags};
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::process::{Child, Command};

/// A command whose process is killed with the handle, or when this process dies in whatever way.
/// Ctrl-C does not reach it: the benchmark stops what it has started in its own order.
pub fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.kill_on_drop(true).process_group(0);
    // SAFETY: between fork and exec, only async-signal-safe functions may be called: this is one
    // system call, and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(std::io::Error::from)
        });
    }
    command
}

/// Starts an operator as a process of its own.
///
/// # Errors
/// When it cannot be started.
pub fn operator(
    program: &Path,
    kubeconfig: &Path,
    environment: &[(&str, String)],
    log: Stdio,
) -> Result<Child> {
    let process = command(program)
        .env("KUBECONFIG", kubeconfig)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn();
    process.with_context(|| program.display().to_string())
}

/// Stops operators, all at once.
///
/// # Errors
/// When one does not end.
pub async fn stop(mut operators: Vec<Child>) -> Result<()> {
    for process in &mut operators {
        process.start_kill().context("stopping a native operator")?;
    }
    for process in &mut operators {
        process.wait().await.context("stopping a native operator")?;
    }
    Ok(())
}

/// The numbers of running processes.
///
/// # Errors
/// When one has ended.
pub fn pids(operators: &[Child]) -> Result<Vec<u32>> {
    let pid = |operator: &Child| operator.id().context("a native operator has ended");
    operators.iter().map(pid).collect()
}

/// Memory of one or more processes together, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Resident, total; a page that several processes share counts for each.
    pub resident: u64,
    /// Of that, anonymous.
    pub anonymous: u64,
    /// Of that, pages of files.
    pub file: u64,
    /// Of that, shared memory.
    pub shared: u64,
    /// The largest `resident` so far.
    pub peak: u64,
    /// Resident, with each shared page divided by the number of its users. Only when asked for:
    /// the kernel walks the page tables.
    pub proportional: u64,
    /// Resident, without the pages that are mapped a second time, be it by the same process. Only
    /// when asked for.
    pub private: u64,
}

/// Sums up what the kernel says of processes.
///
/// # Errors
/// When one of them is gone.
pub fn memory(pids: &[u32], with_proportional: bool) -> Result<Memory> {
    let mut sum = Memory::default();
    for pid in pids {
        let status = proc_file(*pid, "status")?;
        let field = |name: &str| kibibytes(&status, name).with_context(|| gone(*pid));
        sum.resident += field("VmRSS:")?;
        sum.anonymous += field("RssAnon:")?;
        sum.file += field("RssFile:")?;
        sum.shared += field("RssShmem:")?;
        sum.peak += field("VmHWM:")?;
        if with_proportional {
            let rollup = proc_file(*pid, "smaps_rollup")?;
            let field = |name: &str| kibibytes(&rollup, name).with_context(|| gone(*pid));
            sum.proportional += field("Pss:")?;
            sum.private += field("Private_Clean:")? + field("Private_Dirty:")?;
        }
    }
    Ok(sum)
}

fn gone(pid: u32) -> String {
    format!("process {pid} has ended")
}

fn proc_file(pid: u32, name: &str) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/{name}")).with_context(|| gone(pid))
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// CPU time of all threads, in the kernel's ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cpu {
    /// In user mode.
    pub user: u64,
    /// In the kernel.
    pub system: u64,
}

impl Cpu {
    /// Both together.
    pub fn ticks(self) -> u64 {
        self.user + self.system
    }

    /// What has been used since, in milliseconds: user, system.
    pub fn millis_since(self, before: Self) -> (f64, f64) {
        let tick = 1000.0 / rustix::param::clock_ticks_per_second() as f64;
        let millis = |now: u64, then: u64| now.saturating_sub(then) as f64 * tick;
        (
            millis(self.user, before.user),
            millis(self.system, before.system),
        )
    }
}

/// CPU time that processes have used so far.
///
/// # Errors
/// When one of them is gone.
pub fn cpu(pids: &[u32]) -> Result<Cpu> {
    let mut sum = Cpu::default();
    for pid in pids {
        let stat = proc_file(*pid, "stat")?;
        // The second field is a name in parentheses, with anything in it; 14 and 15 are wanted.
        let fields = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest.split_whitespace());
        let mut times = fields.into_iter().flatten().skip(11);
        let mut time = || {
            let time = times.next().and_then(|time| time.parse::<u64>().ok());
            time.with_context(|| format!("/proc/{pid}/stat"))
        };
        sum.user += time()?;
        sum.system += time()?;
    }
    Ok(sum)
}

/// Bytes that the process has made storage read so far.
///
/// # Errors
/// When it is gone.
pub fn bytes_read_from_storage(pid: u32) -> Result<u64> {
    let io = proc_file(pid, "io")?;
    io.lines()
        .find_map(|line| line.strip_prefix("read_bytes: ")?.parse().ok())
        .ok_or_else(|| anyhow!("no read_bytes in /proc/{pid}/io"))
}

/// Removed files that a process holds open or mapped: where its sleeping children are.
#[derive(Debug, Default)]
pub struct RemovedFiles {
    /// Links in /proc that open them.
    pub links: Vec<PathBuf>,
    /// What they take, in bytes (blocks, not lengths).
    pub bytes: u64,
    /// How much of that is not on a disk at all (tmpfs, memfd), but in memory that no RSS shows.
    pub bytes_in_memory: u64,
}

/// Finds the removed files of a process.
///
/// # Errors
/// When it is gone, or belongs to somebody else.
pub fn removed_files(pid: u32) -> Result<RemovedFiles> {
    use std::os::unix::fs::MetadataExt;
    const TMPFS_MAGIC: i128 = 0x0102_1994;
    let mut found = RemovedFiles::default();
    let mut seen = std::collections::HashSet::new();
    for kind in ["fd", "map_files"] {
        let directory = PathBuf::from(format!("/proc/{pid}/{kind}"));
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            // map_files is for root.
            Err(error) if error.kind() == ErrorKind::PermissionDenied && kind != "fd" => continue,
            Err(error) => return Err(error).with_context(|| directory.display().to_string()),
        };
        for entry in entries.flatten() {
            let link = entry.path();
            // What was closed meanwhile, and what is no file.
            let (Ok(target), Ok(metadata)) = (fs::read_link(&link), fs::metadata(&link)) else {
                continue;
            };
            let is_removed = target.to_string_lossy().ends_with(" (deleted)");
            if !is_removed || !metadata.is_file() || !seen.insert((metadata.dev(), metadata.ino()))
            {
                continue;
            }
            let bytes = metadata.blocks() * 512;
            found.bytes += bytes;
            let file_system = rustix::fs::statfs(&link).map(|s| i128::from(s.f_type));
            if file_system == Ok(TMPFS_MAGIC) {
                found.bytes_in_memory += bytes;
            }
            found.links.push(link);
        }
    }
    Ok(found)
}

/// Makes the kernel forget the cached pages of these files, as far as nobody has them mapped:
/// what was written goes to the disk first (fdatasync), then posix_fadvise(DONTNEED).
///
/// # Errors
/// When a file cannot be opened or written back.
pub fn forget_cached_pages(files: &[PathBuf]) -> Result<()> {
    for path in files {
        let name = || path.display().to_string();
        let file = rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .with_context(name)?;
        rustix::fs::fdatasync(&file).with_context(name)?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).with_context(name)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn this_process_has_memory() {
        let memory = memory(&[std::process::id()], true).unwrap();
        let parts = memory.anonymous + memory.file + memory.shared;
        assert!(memory.resident > 0 && memory.proportional > 0 && memory.peak >= memory.resident);
        // The kernel keeps these counters for each thread, and adds them up lazily.
        assert!(parts.abs_diff(memory.resident) < 1024, "{memory:?}");
        assert!(cpu(&[std::process::id()]).unwrap().ticks() < 6000);
    }

    #[test]
    fn removed_files_are_found_through_proc() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 123_456]).unwrap();
        file.sync_all().unwrap();
        let found = removed_files(std::process::id()).unwrap();
        assert!(found.bytes >= 123_456, "{found:?}");
        forget_cached_pages(&found.links).unwrap();
    }
}
