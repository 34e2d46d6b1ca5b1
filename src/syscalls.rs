//! WASI functions of our own: files, descriptors, output, `poll_oneoff`, `proc_exit`.
//!
//! Files are those of `files`; nothing waits for long, and `poll_oneoff` means "I am idle". The layouts are
//! those of WASI preview 1 (witx/wasi_snapshot_preview1/typenames.witx).

use std::time::Duration;

use thiserror::Error;
use wasmer::{AsStoreMut, Function, FunctionEnv, FunctionEnvMut, MemoryView};
use wasmer_wasix::wasmer_wasix_types::wasi::Errno;

use crate::abi::IDLE_DESCRIPTOR;
use crate::files::{Kind, ROOT};
use crate::host::HostState;
use crate::starting::Overslept;

/// The longest real sleep in one event: it holds a worker, and costs no CPU time that the watchdog
/// could see.
const MAX_SLEEP: Duration = Duration::from_millis(10);
/// Most subscriptions in one `poll_oneoff`.
const MAX_SUBSCRIPTIONS: u32 = 1024;
/// Most buffers in one read; POSIX's `IOV_MAX`.
const MAX_BUFFERS: u32 = 1024;
/// Most bytes of one write.
const MAX_WRITE_BYTES: u32 = 65_536;
const MAX_PATH_BYTES: u32 = 4096;

/// A guest called `proc_exit`.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the guest exited with code {0}")]
pub struct GuestExit(pub u32);

type Context<'a> = FunctionEnvMut<'a, HostState>;

/// The function of that name, if it is one of ours.
pub fn function(
    store: &mut impl AsStoreMut,
    env: &FunctionEnv<HostState>,
    name: &str,
) -> Option<Function> {
    macro_rules! function {
        (|$context:ident $(, $argument:ident: $ty:ty)*| $body:expr) => {
            Function::new_typed_with_env(
                store,
                env,
                |mut context: Context $(, $argument: $ty)*| -> i32 {
                    let $context = &mut context;
                    let result: Result<(), Errno> = $body;
                    result.map_or_else(|errno| errno as i32, |()| 0)
                },
            )
        };
    }
    Some(match name {
        "proc_exit" => Function::new_typed_with_env(
            store,
            env,
            |_: Context, code: u32| -> Result<(), GuestExit> { Err(GuestExit(code)) },
        ),
        "poll_oneoff" => Function::new_typed_with_env(
            store,
            env,
            |mut context: Context,
             input: u32,
             output: u32,
             count: u32,
             written: u32|
             -> Result<i32, Overslept> {
                match poll_oneoff(&mut context, input, output, count, written) {
                    Ok(()) => Ok(0),
                    Err(Refusal::Errno(errno)) => Ok(errno as i32),
                    Err(Refusal::Overslept(overslept)) => Err(overslept),
                }
            },
        ),
        "fd_read" => function!(|c, fd: u32, buffers: u32, count: u32, out: u32| {
            fd_read(c, fd, buffers, count, None, out)
        }),
        "fd_pread" => function!(|c, fd: u32, buffers: u32, count: u32, at: u64, out: u32| {
            fd_read(c, fd, buffers, count, Some(at), out)
        }),
        "fd_write" => function!(|c, fd: u32, buffers: u32, count: u32, out: u32| {
            fd_write(c, fd, buffers, count, out)
        }),
        "fd_seek" => function!(|c, fd: u32, offset: i64, whence: u32, out: u32| {
            fd_seek(c, fd, offset, whence, out)
        }),
        "fd_tell" => function!(|c, fd: u32, out: u32| fd_seek(c, fd, 0, 1, out)),
        "fd_close" => function!(|c, fd: u32| c.data_mut().descriptors.close(fd)),
        "fd_fdstat_get" => function!(|c, fd: u32, out: u32| fd_fdstat_get(c, fd, out)),
        "fd_filestat_get" => function!(|c, fd: u32, out: u32| {
            let kind = c.data().descriptors.kind(fd);
            kind.and_then(|kind| write(c, out, &file_stat(kind)))
        }),
        "path_filestat_get" => {
            function!(
                |c, fd: u32, _flags: u32, path: u32, length: u32, out: u32| {
                    path_kind(c, fd, path, length).and_then(|kind| write(c, out, &file_stat(kind)))
                }
            )
        }
        "path_readlink" => {
            function!(
                |c, fd: u32, path: u32, length: u32, _out: u32, _size: u32, _used: u32| {
                    // There are no links.
                    path_kind(c, fd, path, length).and(Err(Errno::Inval))
                }
            )
        }
        "path_open" => function!(|c,
                                  fd: u32,
                                  _lookup: u32,
                                  path: u32,
                                  length: u32,
                                  how: u32,
                                  rights: u64,
                                  _inheriting: u64,
                                  _flags: u32,
                                  out: u32| {
            path_open(c, fd, path, length, how, rights, out)
        }),
        "fd_prestat_get" => function!(|c, fd: u32, out: u32| match fd {
            // A directory (tag 0) whose name has 1 byte.
            ROOT => write(c, out, &[0, 0, 0, 0, 1, 0, 0, 0]),
            _ => Err(Errno::Badf),
        }),
        "fd_prestat_dir_name" => {
            function!(|c, fd: u32, out: u32, length: u32| match (fd, length) {
                (ROOT, 0) => Err(Errno::Nametoolong),
                (ROOT, _) => write(c, out, b"/"),
                _ => Err(Errno::Badf),
            })
        }
        "fd_readdir" => function!(|c, fd: u32, out: u32, size: u32, cookie: u64, used: u32| {
            fd_readdir(c, fd, out, size, cookie, used)
        }),
        _ => return None,
    })
}

const FLAG_NONBLOCK: u8 = 4;
const OPEN_CREATE: u32 = 1;
const OPEN_DIRECTORY: u32 = 2;
const OPEN_TRUNCATE: u32 = 8;
const RIGHT_WRITE: u64 = 1 << 6;
const SUBSCRIPTION_BYTES: u32 = 48;
const EVENT_BYTES: usize = 32;
const DIRENT_BYTES: usize = 24;

fn view<'a>(context: &'a Context) -> Result<MemoryView<'a>, Errno> {
    context
        .data()
        .memory
        .as_ref()
        .map(|memory| memory.view(context))
        .ok_or(Errno::Fault)
}

fn read(context: &Context, pointer: u32, length: u32) -> Result<Vec<u8>, Errno> {
    crate::host::read(&view(context)?, pointer, length).map_err(|_| Errno::Fault)
}

fn write(context: &Context, pointer: u32, bytes: &[u8]) -> Result<(), Errno> {
    view(context)?
        .write(u64::from(pointer), bytes)
        .map_err(|_| Errno::Fault)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

fn file_type(kind: Kind) -> u8 {
    match kind {
        Kind::Device => 2,
        Kind::Directory => 3,
        Kind::File(_) => 4,
    }
}

fn file_stat(kind: Kind) -> [u8; 64] {
    let mut stat = [0; 64];
    stat[16] = file_type(kind);
    stat[24] = 1;
    if let Kind::File(size) = kind {
        stat[32..40].copy_from_slice(&size.to_le_bytes());
    }
    stat
}

fn read_path(context: &Context, pointer: u32, length: u32) -> Result<String, Errno> {
    if length > MAX_PATH_BYTES {
        return Err(Errno::Nametoolong);
    }
    String::from_utf8(read(context, pointer, length)?).map_err(|_| Errno::Ilseq)
}

fn path_kind(context: &Context, fd: u32, path: u32, length: u32) -> Result<Kind, Errno> {
    context
        .data()
        .descriptors
        .path_kind(fd, &read_path(context, path, length)?)
}

fn fd_fdstat_get(context: &Context, fd: u32, out: u32) -> Result<(), Errno> {
    let mut stat = [0_u8; 24];
    stat[0] = file_type(context.data().descriptors.kind(fd)?);
    if fd == IDLE_DESCRIPTOR {
        stat[2] = FLAG_NONBLOCK;
    }
    // All rights: what cannot be done is refused when it is tried.
    stat[8..].fill(0xff);
    write(context, out, &stat)
}

fn fd_seek(
    context: &mut Context,
    fd: u32,
    offset: i64,
    whence: u32,
    out: u32,
) -> Result<(), Errno> {
    let whence = u8::try_from(whence).map_err(|_| Errno::Inval)?;
    let at = context.data_mut().descriptors.seek(fd, offset, whence)?;
    write(context, out, &at.to_le_bytes())
}

/// Reads into the guest's buffers, from where the descriptor stands or from `at`.
fn fd_read(
    context: &mut Context,
    fd: u32,
    buffers: u32,
    count: u32,
    at: Option<u64>,
    out: u32,
) -> Result<(), Errno> {
    if count > MAX_BUFFERS {
        return Err(Errno::Inval);
    }
    let vectors = read(context, buffers, count * 8)?;
    let mut total = 0_u32;
    for vector in vectors.chunks_exact(8) {
        let (pointer, length) = (u32_at(vector, 0), u32_at(vector, 4));
        let descriptors = &mut context.data_mut().descriptors;
        let bytes = match at {
            None => descriptors.read(fd, length as usize)?,
            Some(at) => descriptors.read_at(fd, at + u64::from(total), length as usize)?,
        };
        write(context, pointer, &bytes)?;
        // Files are far smaller than 4 GiB.
        total += u32::try_from(bytes.len()).map_err(|_| Errno::Overflow)?;
        if bytes.len() < length as usize {
            break;
        }
    }
    write(context, out, &total.to_le_bytes())
}

/// Takes output for the log: at most [`MAX_WRITE_BYTES`] of it, so that no write holds the worker;
/// the guest writes the rest again, as POSIX has it.
fn fd_write(
    context: &mut Context,
    fd: u32,
    buffers: u32,
    count: u32,
    out: u32,
) -> Result<(), Errno> {
    match fd {
        1 | 2 => {}
        fd => return context.data().descriptors.kind(fd).and(Err(Errno::Rofs)),
    }
    if count > MAX_BUFFERS {
        return Err(Errno::Inval);
    }
    let vectors = read(context, buffers, count * 8)?;
    let mut room = MAX_WRITE_BYTES;
    let mut output = Vec::new();
    for vector in vectors.chunks_exact(8) {
        let length = u32_at(vector, 4).min(room);
        output.extend_from_slice(&read(context, u32_at(vector, 0), length)?);
        room -= length;
    }
    let state = context.data_mut();
    if state.log_budget.allow(output.len()) {
        let logger = if fd == 1 {
            &mut state.stdout
        } else {
            &mut state.stderr
        };
        logger.write(&output);
    }
    write(context, out, &(MAX_WRITE_BYTES - room).to_le_bytes())
}

fn path_open(
    context: &mut Context,
    fd: u32,
    path: u32,
    length: u32,
    how: u32,
    rights: u64,
    out: u32,
) -> Result<(), Errno> {
    let path = read_path(context, path, length)?;
    let descriptors = &mut context.data_mut().descriptors;
    let kind = descriptors.path_kind(fd, &path);
    let writes =
        how & OPEN_TRUNCATE != 0 || (rights & RIGHT_WRITE != 0 && kind != Ok(Kind::Directory));
    match kind {
        Err(Errno::Noent) if how & OPEN_CREATE != 0 => return Err(Errno::Rofs),
        Err(errno) => return Err(errno),
        Ok(_) if writes => return Err(Errno::Rofs),
        Ok(_) => {}
    }
    let opened = descriptors.open(fd, &path, how & OPEN_DIRECTORY != 0)?;
    write(context, out, &opened.to_le_bytes())
}

fn fd_readdir(
    context: &mut Context,
    fd: u32,
    out: u32,
    size: u32,
    cookie: u64,
    used: u32,
) -> Result<(), Errno> {
    let mut bytes = Vec::new();
    for (index, (name, kind)) in context.data().descriptors.entries(fd)?.iter().enumerate() {
        let next = index as u64 + 1;
        if next <= cookie {
            continue;
        }
        let mut entry = [0_u8; DIRENT_BYTES];
        entry[..8].copy_from_slice(&next.to_le_bytes());
        entry[8..16].copy_from_slice(&next.to_le_bytes());
        let length = u32::try_from(name.len()).map_err(|_| Errno::Overflow)?;
        entry[16..20].copy_from_slice(&length.to_le_bytes());
        entry[20] = file_type(*kind);
        bytes.extend_from_slice(&entry);
        bytes.extend_from_slice(name.as_bytes());
    }
    // A cut-off last entry tells the guest to come back with a larger buffer.
    bytes.truncate(size as usize);
    write(context, out, &bytes)?;
    let length = u32::try_from(bytes.len()).map_err(|_| Errno::Overflow)?;
    write(context, used, &length.to_le_bytes())
}

/// A subscription of `poll_oneoff`.
struct Subscription {
    user_data: u64,
    /// 0 clock, 1 readable, 2 writable.
    kind: u8,
    descriptor: u32,
    nanoseconds: u64,
    absolute: bool,
}

impl Subscription {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            user_data: u64_at(bytes, 0),
            kind: bytes[8],
            descriptor: u32_at(bytes, 16),
            nanoseconds: u64_at(bytes, 24),
            absolute: bytes[40] & 1 != 0,
        }
    }

    fn event(&self) -> [u8; EVENT_BYTES] {
        let mut event = [0; EVENT_BYTES];
        event[..8].copy_from_slice(&self.user_data.to_le_bytes());
        event[10] = self.kind;
        event
    }
}

/// Why `poll_oneoff` does not return what was asked for.
enum Refusal {
    /// The guest is told.
    Errno(Errno),
    /// The guest ends.
    Overslept(Overslept),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<Overslept> for Refusal {
    fn from(overslept: Overslept) -> Self {
        Self::Overslept(overslept)
    }
}

/// Never waits for longer than [`MAX_SLEEP`]: see `docs/abi.md`, WASI.
fn poll_oneoff(
    context: &mut Context,
    input: u32,
    output: u32,
    count: u32,
    written: u32,
) -> Result<(), Refusal> {
    if count == 0 || count > MAX_SUBSCRIPTIONS {
        return Err(Errno::Inval.into());
    }
    let bytes = read(context, input, count * SUBSCRIPTION_BYTES)?;
    let subscriptions: Vec<_> = bytes
        .chunks_exact(SUBSCRIPTION_BYTES as usize)
        .map(Subscription::parse)
        .collect();
    if subscriptions.iter().any(|s| s.kind > 2) {
        return Err(Errno::Inval.into());
    }
    if subscriptions.iter().any(|s| s.kind == 0 && s.absolute) {
        return Err(Errno::Notsup.into());
    }
    let clocks = subscriptions.iter().filter(|s| s.kind == 0);
    let shortest = clocks.min_by_key(|s| s.nanoseconds);
    let is_idle = |s: &&Subscription| s.kind == 1 && s.descriptor == IDLE_DESCRIPTOR;
    let idle = subscriptions.iter().find(is_idle);
    // Nothing else of ours ever blocks: files and output are always ready.
    let ready: Vec<_> = subscriptions
        .iter()
        .filter(|s| s.kind != 0 && !is_idle(s))
        .collect();
    let reported = match (shortest, idle) {
        _ if !ready.is_empty() => ready,
        (Some(clock), _) if clock.nanoseconds == 0 => vec![clock],
        (clock, Some(idle)) => {
            context
                .data_mut()
                .set_deadline(clock.map_or(u64::MAX, |c| c.nanoseconds));
            vec![idle]
        }
        (Some(clock), None) => {
            let wait = Duration::from_nanos(clock.nanoseconds);
            let state = context.data_mut();
            if let Some(entry) = &mut state.entry {
                entry.sleep(wait)?;
            } else {
                if state.slept.saturating_add(wait) > MAX_SLEEP {
                    return Err(Errno::Notsup.into());
                }
                state.slept += wait;
                std::thread::sleep(wait);
            }
            vec![clock]
        }
        (None, None) => return Err(Errno::Inval.into()),
    };
    let events: Vec<u8> = reported.iter().flat_map(|s| s.event()).collect();
    write(context, output, &events)?;
    let length = u32::try_from(reported.len()).map_err(|_| Errno::Overflow)?;
    Ok(write(context, written, &length.to_le_bytes())?)
}
