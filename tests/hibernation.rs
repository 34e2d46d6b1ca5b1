//! Children that go to sleep and are woken, seen from outside: what they know, what they are told,
//! and what happens when a snapshot cannot be made or is not what it was.
//!
//! Most guests go from one step to the next when the test says so ([`Steps`], [`Gates`]), so that
//! a test can wait for a child to be asleep between them. What a guest finds wrong in its memory it
//! says in a line that begins with `wrong`.

mod common;

use std::fmt::Write;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::cluster::Cluster;
use common::fault_proxy::{Fault, FaultProxy, Injected};
use common::operator::{Operator, PROGRAM, Setup, message};
use common::wat::{Wat, kind, ticking};
use common::{PATIENCE, wait_for};
use serde_json::{Value, json};

/// Size of a page of wasm.
const PAGE: usize = 65_536;
/// Where test guests have a heap of their own: behind the harness's memory.
const HEAP: usize = 4 * PAGE;
/// What [`Wat`] guests' memory begins with, in bytes.
const FIRST_BYTES: usize = 4 * PAGE;
/// Soon.
const IDLE: f64 = 0.05;

/// Fields of a child that sleeps after that many idle seconds, and until something happens.
fn idle(seconds: f64) -> Value {
    json!({"idleSeconds": seconds, "prediction": "never"})
}

/// Has the parent say when children sleep and wake, and keep snapshots where the test can look.
fn observed(mut setup: Setup) -> Setup {
    let directory = snapshot_directory(&setup);
    setup.set("RUST_LOG", "debug,wasmer=error,virtual_fs=error");
    setup
        .argument("--snapshot-dir")
        .argument(directory.to_str().unwrap());
    setup
}

fn snapshot_directory(setup: &Setup) -> PathBuf {
    setup.directory.path().join("snapshots")
}

/// What a child's snapshot was.
#[derive(Clone, Copy, Debug)]
struct Volume {
    written: usize,
    memory: usize,
}

/// Reads `hibernated in 1.234 ms, 45056 of 458752 bytes written`.
fn volume(message: &str) -> Option<Volume> {
    let rest = message.strip_prefix("hibernated in ")?;
    let numbers = rest.split_once(" ms, ")?.1.strip_suffix(" bytes written")?;
    let (written, memory) = numbers.split_once(" of ")?;
    Some(Volume {
        written: written.parse().unwrap(),
        memory: memory.parse().unwrap(),
    })
}

fn volumes(lines: &[String], child: &str) -> Vec<Volume> {
    let own = lines.iter().filter_map(|l| message(l, child));
    own.filter_map(volume).collect()
}

/// Waits until a child is asleep that has said that; its last snapshot.
fn wait_asleep(operator: &Operator, child: &str, said: &str) -> Volume {
    operator.wait_for(&format!("{child} to sleep after {said}"), |lines| {
        let own: Vec<_> = lines.iter().filter_map(|l| message(l, child)).collect();
        let at = own.iter().rposition(|m| *m == said)?;
        let after = own.get(at..)?;
        let slept = after.iter().rposition(|m| volume(m).is_some())?;
        let woken = after.iter().rposition(|m| m.starts_with("woken"));
        let sleeps = woken.is_none_or(|woken| woken < slept);
        sleeps.then(|| volume(after[slept]))?
    })
}

/// Nobody found anything wrong in its memory, and these children had one life each.
fn assert_whole(operator: &Operator, children: &[&str]) {
    for line in operator.lines() {
        assert!(!line.contains("wrong"), "{line}");
    }
    for child in children {
        let messages = operator.messages(child);
        let restarted = messages.iter().find(|m| m.contains("starting again"));
        assert_eq!(restarted, None, "{child}");
    }
}

/// Descriptors of snapshots that the parent holds, and the sizes of the files.
fn snapshots(operator: &Operator, directory: &Path) -> Vec<(PathBuf, u64)> {
    let open = fs::read_dir(operator.proc().join("fd")).unwrap();
    open.filter_map(|entry| {
        let path = entry.ok()?.path();
        let target = fs::read_link(&path).ok()?;
        target.starts_with(directory).then_some(())?;
        let bytes = fs::metadata(&path).ok()?.len();
        Some((path, bytes))
    })
    .collect()
}

/// The one snapshot of that size.
fn snapshot_of(operator: &Operator, directory: &Path, bytes: usize) -> File {
    let found: Vec<_> = snapshots(operator, directory)
        .into_iter()
        .filter(|(_, size)| *size == bytes as u64)
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    let file = OpenOptions::new().read(true).write(true).open(&found[0].0);
    file.unwrap()
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What `$fill` puts at an address.
fn word(at: usize, seed: u64) -> u64 {
    seed.wrapping_mul((at as u64).wrapping_add(GOLDEN))
}

/// `$fill` and `$holds` for ranges of whole words; seed 0 stands for zeros.
fn contents(wat: &mut Wat) {
    let word = format!(
        "local.get $seed local.get $at i64.extend_i32_u i64.const {} i64.add i64.mul",
        GOLDEN.cast_signed()
    );
    let next = "local.get $at i32.const 8 i32.add local.tee $at local.get $end i32.lt_u br_if 0";
    let end = "local.get $at local.get $bytes i32.add local.set $end";
    wat.functions(&format!(
        "(func $fill (param $at i32) (param $bytes i32) (param $seed i64) (local $end i32)
            {end} loop local.get $at {word} i64.store {next} end)
        (func $holds (param $at i32) (param $bytes i32) (param $seed i64) (result i32) (local $end i32)
            {end} loop local.get $at i64.load {word} i64.ne if i32.const 0 return end {next} end i32.const 1)"
    ));
}

fn fill(at: usize, bytes: usize, seed: u64) -> String {
    format!("i32.const {at} i32.const {bytes} i64.const {seed} call $fill\n")
}

/// A guest that does one step after the other, the first one at its start and each later one when
/// its gate is opened. It says `step=0`, `step=1`, ... after each.
struct Steps {
    name: &'static str,
    wat: Wat,
    steps: Vec<String>,
}

impl Steps {
    fn new(name: &'static str) -> Self {
        let mut wat = Wat::default();
        contents(&mut wat);
        wat.wasi("proc_exit", "(param i32)");
        wat.functions(
            "(global $step (mut i32) (i32.const 0)) (global $busy (mut i32) (i32.const 0))",
        );
        wat.on(kind::START, "call $run");
        wat.on(
            kind::END,
            "global.get $step i32.const 1 i32.add global.set $step call $run",
        );
        wat.on_any("global.get $busy if i64.const 5000000 call $timer drop end");
        Self {
            name,
            wat,
            steps: Vec::new(),
        }
    }

    /// The next step does that.
    fn then(&mut self, code: impl Into<String>) -> &mut Self {
        self.steps.push(code.into());
        self
    }

    /// Code that looks whether a range is what [`fill`] made of it.
    fn check(&mut self, what: &str, at: usize, bytes: usize, seed: u64) -> String {
        let wrong = self.wat.say(&format!("wrong: {what}"));
        format!(
            "i32.const {at} i32.const {bytes} i64.const {seed} call $holds i32.eqz if {wrong} end\n"
        )
    }

    /// Code that looks whether the number on the stack is that one.
    fn expect(&mut self, what: &str, number: i32) -> String {
        let wrong = self.wat.say32(&format!("wrong {what}"));
        format!("local.tee $i i32.const {number} i32.ne if local.get $i {wrong} end\n")
    }

    fn module(&mut self) -> Vec<u8> {
        let steps = std::mem::take(&mut self.steps);
        let mut run = String::from("(func $run (local $i i32) (local $j i32)");
        for (number, code) in steps.iter().enumerate() {
            let mut request = String::new();
            if number + 1 < steps.len() {
                let gate = format!("GET /{}/{}\n\n", self.name, number + 1);
                request = format!("{} call $request drop", self.wat.text(gate));
            }
            let said = self.wat.say(&format!("step={number}"));
            write!(
                run,
                "\nglobal.get $step i32.const {number} i32.eq if {code} {request} {said} end"
            )
            .unwrap();
        }
        run.push(')');
        self.steps = steps;
        self.wat.functions(&run);
        self.wat.on(kind::STOP, "i32.const 0 call $proc_exit");
        self.wat.build()
    }
}

/// Keeps the steps of guests from being done too early.
struct Gates {
    proxy: FaultProxy,
    closed: Vec<(String, Arc<Injected>)>,
}

impl Gates {
    fn new() -> Self {
        Self {
            proxy: FaultProxy::to_nowhere(),
            closed: Vec::new(),
        }
    }

    fn setup(&self) -> Setup {
        observed(Setup::through(&self.proxy))
    }

    /// Adds a child, all of whose gates are closed.
    fn add(&mut self, setup: &mut Setup, steps: &mut Steps, fields: Value) {
        setup.module(steps.name, &steps.module(), fields);
        for number in 1..steps.steps.len() {
            self.close(steps.name, number);
        }
    }

    fn close(&mut self, child: &str, step: usize) {
        let path = format!("/{child}/{step}");
        let wanted = path.clone();
        let stall = self
            .proxy
            .inject(Fault::Stall, usize::MAX, move |r| r.path == wanted);
        self.closed.push((path, stall));
    }

    /// Lets a child do that step, once it waits for it.
    fn open(&mut self, child: &str, step: usize) {
        let path = format!("/{child}/{step}");
        let found = self.closed.iter().position(|(closed, _)| *closed == path);
        let (_, stall) = self.closed.remove(found.unwrap());
        stall.wait_for_hits(1);
        stall.off();
    }

    /// Has a sleeping child do a step, and waits until it sleeps again; its snapshot then.
    fn pass(&mut self, operator: &Operator, child: &str, step: usize) -> Volume {
        self.open(child, step);
        wait_asleep(operator, child, &format!("step={step}"))
    }
}

#[test]
fn timers_come_on_time_while_their_child_sleeps() {
    const AHEAD: u64 = 300_000_000;
    let now = "i32.const 1 i64.const 0 i32.const 0 call $clock_time_get drop i32.const 0 i64.load";
    let mut wat = Wat::default();
    wat.wasi("clock_time_get", "(param i32 i64 i32) (result i32)");
    wat.functions("(global $due (mut i64) (i64.const 0)) (global $ticks (mut i32) (i32.const 0))");
    let (tick, late) = (wat.say32("tick"), wat.say64("late"));
    wat.on(
        kind::TIMER,
        &format!(
            "{now} global.get $due i64.sub {late}
            global.get $ticks i32.const 1 i32.add global.set $ticks global.get $ticks {tick}"
        ),
    );
    wat.on_any(&format!(
        "{now} i64.const {AHEAD} i64.add global.set $due i64.const {AHEAD} call $timer drop"
    ));
    let mut setup = observed(Setup::alone());
    setup.module("child", &wat.build(), idle(IDLE));
    let mut operator = setup.start();
    // Between two ticks it slept, as a rule; how often, the log says.
    let messages = operator.wait_for("eight ticks after sleep", |lines| {
        let own: Vec<_> = lines.iter().filter_map(|l| message(l, "child")).collect();
        let after_sleep = own.windows(4).filter(|four| {
            volume(four[0]).is_some()
                && four[1].starts_with("woken in ")
                && four[2].starts_with("late=")
                && four[3].starts_with("tick=")
        });
        (after_sleep.count() >= 8).then(|| own.into_iter().map(str::to_owned).collect::<Vec<_>>())
    });
    let numbers = |key: &str| -> Vec<i64> {
        let values = messages.iter().filter_map(|m| m.strip_prefix(key));
        values.map(|v| v.parse().unwrap()).collect()
    };
    let ticks = numbers("tick=");
    assert!(
        ticks.iter().copied().eq(1..=ticks.len() as i64),
        "{ticks:?}"
    );
    let mut late = numbers("late=");
    late.sort_unstable();
    assert!(late[0] >= 0, "too early: {late:?}");
    // Bounds for a busy machine.
    assert!(late[late.len() / 2] < 200_000_000, "{late:?}");
    assert!(late[late.len() - 1] < 5_000_000_000, "{late:?}");
    operator.stop();
    assert_whole(&operator, &["child"]);
}

#[test]
fn answers_that_come_while_their_child_sleeps_wake_it_and_each_comes_once() {
    const CALLS: usize = 6;
    let proxy = FaultProxy::to_nowhere();
    let mut wat = Wat::default();
    wat.functions("(global $events (mut i64) (i64.const 0))");
    let mut requests = String::new();
    for call in 1..=CALLS {
        let request = wat.text(format!("GET /{call}\n\n"));
        writeln!(requests, "{request} call $request drop").unwrap();
    }
    wat.on(kind::START, &requests);
    // NUMBER KIND=OPERATION.
    wat.on_any(
        "global.get $events i64.const 1 i64.add global.set $events
        global.get $events call $put_number i32.const 32 call $put_byte
        local.get $kind i64.extend_i32_u call $put_number i32.const 61 call $put_byte
        local.get $op call $put_number call $flush",
    );
    let stalls: Vec<_> = (1..=CALLS)
        .map(|call| {
            let path = format!("/{call}");
            proxy.inject(Fault::Stall, usize::MAX, move |r| r.path == path)
        })
        .collect();
    let mut setup = observed(Setup::through(&proxy));
    setup.module("child", &wat.build(), idle(IDLE));
    let operator = setup.start();
    stalls.iter().for_each(|stall| stall.wait_for_hits(1));
    let mut expected = vec!["1 1=0".to_owned()];
    // Answered in another order than they were asked.
    for call in (1..=CALLS).rev() {
        wait_asleep(&operator, "child", expected.last().unwrap());
        stalls[call - 1].off();
        for kind in [kind::HEAD, kind::DATA, kind::END] {
            expected.push(format!("{} {kind}={call}", expected.len() + 1));
        }
    }
    wait_asleep(&operator, "child", expected.last().unwrap());
    let mut messages = operator.messages("child");
    messages.retain(|m| m.contains('=') && !m.contains("bytes"));
    assert_eq!(messages, expected);
    assert_whole(&operator, &["child"]);
}

#[test]
fn a_watch_goes_on_while_its_child_sleeps_and_loses_nothing() {
    const OBJECTS: usize = 60;
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    // In pieces, so that events come at any moment of falling asleep and waking.
    let proxy = FaultProxy::to(cluster);
    proxy.inject(Fault::Split, usize::MAX, |_| true);
    let mut wat = Wat::default();
    let watch = json!({"version": "v1", "plural": "configmaps", "namespace": namespace.name, "labelSelector": "watched"});
    let watch = wat.text(watch.to_string());
    wat.on(kind::START, &format!("{watch} call $watch drop"));
    let item = wat.text("item");
    wat.on(
        kind::ITEM,
        &format!("local.get $ptr local.get $len {item} call $say_bytes"),
    );
    let mut setup = observed(Setup::through(&proxy));
    setup.module("child", &wat.build(), idle(0.01));
    let operator = setup.start();
    let told = |lines: &[String]| -> Vec<String> {
        let own = lines.iter().filter_map(|l| message(l, "child"));
        let items = own.filter_map(|m| {
            let item: Value = serde_json::from_str(m.strip_prefix("item=")?).unwrap();
            item["object"]["metadata"]["name"]
                .as_str()
                .map(str::to_owned)
        });
        items.collect()
    };
    let mut expected = Vec::new();
    for number in 0..OBJECTS {
        // The first few each find it asleep, the others whatever it does.
        if number < 5 {
            operator.wait_for("the child to sleep", |lines| {
                let done =
                    told(lines).len() == number && lines.iter().any(|l| l.contains("InitDone"));
                let last = lines.iter().filter_map(|l| message(l, "child")).next_back();
                (done && last.is_some_and(|m| volume(m).is_some())).then_some(())
            });
        }
        let name = format!("object-{number}");
        namespace.create_config_map(&name, json!({"watched": "yes"}));
        expected.push(name);
    }
    operator.wait_for("all of them", |lines| {
        (told(lines).len() >= OBJECTS).then_some(())
    });
    wait_for("sleep", PATIENCE, || {
        volume(operator.messages("child").last()?).map(|_| ())
    });
    assert_eq!(told(&operator.lines()), expected);
    assert_whole(&operator, &["child"]);
}

/// A guest with a heap of random numbers that it changes at every timer event, at random times. It
/// knows the checksum without looking; sometimes, and in the end, it looks.
fn juggler(heap_pages: usize, seed: u64) -> Vec<u8> {
    let end = HEAP + heap_pages * PAGE;
    let words = heap_pages * PAGE / 8;
    let small_pages = heap_pages * PAGE / 4096;
    let mut wat = Wat::default();
    wat.wasi("proc_exit", "(param i32)");
    let wrong = ["checksum", "f32", "f64", "v128", "size"].map(|w| wat.say(&format!("wrong: {w}")));
    let [checksum, f32, f64, v128, size] = &wrong;
    wat.functions(&format!(
        "(global $rng (mut i64) (i64.const {seed})) (global $sum (mut i64) (i64.const 0))
        (global $events (mut i32) (i32.const 0))
        (global $f32 (mut f32) (f32.const 0)) (global $f64 (mut f64) (f64.const 0))
        (global $v128 (mut v128) (v128.const i64x2 0 -1))
        (func $random (result i64)
            global.get $rng global.get $rng i64.const 13 i64.shl i64.xor global.set $rng
            global.get $rng global.get $rng i64.const 7 i64.shr_u i64.xor global.set $rng
            global.get $rng global.get $rng i64.const 17 i64.shl i64.xor global.set $rng
            global.get $rng)
        (func $below (param $limit i64) (result i32)
            call $random local.get $limit i64.rem_u i32.wrap_i64)
        ;; Each address counts with a factor of its own.
        (func $set (param $at i32) (param $value i64)
            local.get $value local.get $at i64.load i64.sub
            local.get $at i32.const 1 i32.add i64.extend_i32_u i64.mul
            global.get $sum i64.add global.set $sum
            local.get $at local.get $value i64.store)
        (func $verify (local $at i32) (local $sum i64)
            i32.const {HEAP} local.set $at
            loop
              local.get $at i64.load local.get $at i32.const 1 i32.add i64.extend_i32_u i64.mul
              local.get $sum i64.add local.set $sum
              local.get $at i32.const 8 i32.add local.tee $at i32.const {end} i32.lt_u br_if 0
            end
            local.get $sum global.get $sum i64.ne if {checksum} end
            global.get $events f32.convert_i32_s f32.const 0.25 f32.mul global.get $f32 f32.ne if {f32} end
            global.get $events f64.convert_i32_s f64.const 0.125 f64.mul global.get $f64 f64.ne if {f64} end
            global.get $v128 i64x2.extract_lane 0 global.get $events i64.extend_i32_s i64.ne
            global.get $v128 i64x2.extract_lane 1 global.get $events i64.extend_i32_s i64.const -1 i64.xor i64.ne
            i32.or if {v128} end
            memory.size i32.const {} i32.ne if {size} end)",
        end / PAGE
    ));
    wat.on(
        kind::START,
        &format!(
            "i32.const {heap_pages} memory.grow drop i32.const {HEAP} local.set $i
            loop
              local.get $i call $random call $set
              local.get $i i32.const 8 i32.add local.tee $i i32.const {end} i32.lt_u br_if 0
            end"
        ),
    );
    let event = wat.say32("event");
    wat.on(
        kind::TIMER,
        &format!(
            "global.get $events i32.const 1 i32.add global.set $events
            global.get $f32 f32.const 0.25 f32.add global.set $f32
            global.get $f64 f64.const 0.125 f64.add global.set $f64
            global.get $events i64.extend_i32_s i64x2.splat
            global.get $events i64.extend_i32_s i64.const -1 i64.xor i64x2.replace_lane 1 global.set $v128
            i32.const 5 local.set $j
            loop
              i64.const {words} call $below i32.const 8 i32.mul i32.const {HEAP} i32.add call $random call $set
              local.get $j i32.const 1 i32.sub local.tee $j br_if 0
            end
            ;; A whole page becomes zeros again.
            i64.const 4 call $below i32.eqz if
              i64.const {small_pages} call $below i32.const 4096 i32.mul i32.const {HEAP} i32.add local.set $i
              loop
                local.get $i i64.const 0 call $set
                local.get $i i32.const 8 i32.add local.tee $i i32.const 4095 i32.and br_if 0
              end
            end
            i64.const 4 call $below i32.eqz if call $verify end
            global.get $events {event}"
        ),
    );
    let right = wat.say("looked a last time");
    wat.on(
        kind::STOP,
        &format!("call $verify {right} i32.const 0 call $proc_exit"),
    );
    wat.on_any("i64.const 70 call $below i64.extend_i32_s i64.const 10 i64.add i64.const 1000000 i64.mul call $timer drop");
    wat.build()
}

/// Setup with several of them, that sleep after different times.
fn jugglers(setup: &mut Setup) -> Vec<&'static str> {
    let children = [
        ("one", 1, 0.01),
        ("two", 16, 0.02),
        ("three", 40, 0.03),
        ("four", 3, 0.05),
    ];
    for (number, (name, pages, seconds)) in (1..).zip(children) {
        setup.module(name, &juggler(pages, GOLDEN >> number), idle(seconds));
    }
    children.map(|(name, ..)| name).into()
}

#[test]
fn heaps_and_globals_are_right_after_hundreds_of_sleeps() {
    let mut setup = observed(Setup::alone());
    let children = jugglers(&mut setup);
    // And one whose wake-ups are foretold, as well or badly as it goes.
    let fields = json!({"idleSeconds": 0.02});
    setup.module("foretold", &juggler(5, GOLDEN >> 9), fields);
    // Always busy, a millisecond or so at a time.
    let mut busy = Wat::default();
    busy.on_any("loop local.get $i i32.const 1 i32.add local.tee $i i32.const 200000 i32.lt_u br_if 0 end i64.const 1000000 call $timer drop");
    busy.wasi("proc_exit", "(param i32)");
    busy.on(kind::STOP, "i32.const 0 call $proc_exit");
    setup.module("busy", &busy.build(), idle(0.01));
    setup.argument("--workers").argument("2");
    let mut operator = setup.start();
    let children = [&children[..], &["foretold"]].concat();
    operator.wait_for("hundreds of sleeps", |lines| {
        let counts: Vec<_> = children.iter().map(|c| volumes(lines, c).len()).collect();
        let enough = counts.iter().sum::<usize>() >= 300 && counts.iter().all(|c| *c >= 30);
        enough.then_some(())
    });
    operator.stop();
    for child in &children {
        let messages = operator.messages(child);
        let events: Vec<usize> = messages
            .iter()
            .filter_map(|m| m.strip_prefix("event=")?.parse().ok())
            .collect();
        assert!(events.iter().copied().eq(1..=events.len()), "{events:?}");
        let last = messages
            .iter()
            .filter(|m| *m == "looked a last time")
            .count();
        assert_eq!(last, 1, "{child}");
    }
    assert_whole(&operator, &children);
    assert_whole(&operator, &["busy"]);
}

#[test]
fn a_memory_that_grows_and_pages_that_become_zero_again_are_kept() {
    // Four small pages of the module's data, of which two change, and one that is not in its image.
    const IMAGE: usize = 49 * 4096;
    const KEPT: usize = IMAGE;
    const CHANGED: usize = IMAGE + 4096;
    const ZEROED: usize = IMAGE + 2 * 4096;
    const OWN: usize = 60 * 4096;
    let fifth = FIRST_BYTES;
    let image: String = (IMAGE..IMAGE + 3 * 4096)
        .step_by(8)
        .flat_map(|at| word(at, 3).to_le_bytes())
        .fold(String::new(), |text, byte| text + &format!("\\{byte:02x}"));
    let mut child = Steps::new("child");
    child
        .wat
        .functions(&format!("(data (i32.const {IMAGE}) \"{image}\")"));

    let image = child.check("image", IMAGE, 3 * 4096, 3);
    child.then(image + &fill(CHANGED, 4096, 5) + &fill(ZEROED, 4096, 0) + &fill(OWN, 4096, 7));

    let mut code = child.check("kept", KEPT, 4096, 3)
        + &child.check("changed", CHANGED, 4096, 5)
        + &child.check("zeroed", ZEROED, 4096, 0)
        + &child.check("own", OWN, 4096, 7);
    code += &format!("i32.const 2 memory.grow {}", child.expect("size", 4));
    code += &child.check("new pages", fifth, 2 * PAGE, 0);
    // Back to what the image has, and to zeros that are something else in the snapshot.
    code += &(fill(CHANGED, 4096, 3) + &fill(OWN, 4096, 0) + &fill(fifth, PAGE, 9));
    child.then(code);

    let mut code = child.check("as in the image", KEPT, 2 * 4096, 3)
        + &child.check("zeroed in the image", ZEROED, 4096, 0)
        + &child.check("zeroed again", OWN, 4096, 0)
        + &child.check("beyond the first size", fifth, PAGE, 9)
        + &child.check("never written", fifth + PAGE, PAGE, 0);
    code += &format!("i32.const 3 memory.grow {}", child.expect("size", 6));
    code += &child.check("more new pages", fifth + 2 * PAGE, 3 * PAGE, 0);
    code += &(fill(fifth, 4096, 0) + &fill(fifth + 4 * PAGE + 8, 4096 - 16, 11));
    child.then(code);

    let all = child.check("as in the image, later", KEPT, 2 * 4096, 3)
        + &child.check("zeroed in the image, later", ZEROED, 4096, 0)
        + &child.check("zeroed again, later", OWN, 4096, 0)
        + &child.check("zeroed beyond the first size", fifth, 4096, 0)
        + &child.check("rest of that", fifth + 4096, PAGE - 4096, 9)
        + &child.check("never written, later", fifth + PAGE, 3 * PAGE, 0)
        + &child.check("before the last piece", fifth + 4 * PAGE, 8, 0)
        + &child.check("the last piece", fifth + 4 * PAGE + 8, 4096 - 16, 11)
        + &child.check(
            "after the last piece",
            fifth + 4 * PAGE + 4088,
            PAGE - 4088,
            0,
        );
    // 16 pages are its limit, whenever it asks.
    let mut code = all.clone();
    for (pages, answer) in [(8, -1), (7, 9), (1, -1)] {
        code += &format!(
            "i32.const {pages} memory.grow {}",
            child.expect("growth", answer)
        );
    }
    child.then(code);
    let size = format!("memory.size {}", child.expect("size", 16));
    child.then(all.clone() + &size);
    // Changes nothing, looks at nothing.
    child.then("");
    child.then(all + &size);

    let mut gates = Gates::new();
    let mut setup = gates.setup();
    let mut fields = idle(IDLE);
    fields["limits"] = json!({"memory": "1Mi"});
    gates.add(&mut setup, &mut child, fields);
    let operator = setup.start();
    let mut sizes = vec![wait_asleep(&operator, "child", "step=0").memory / PAGE];
    for step in 1..child.steps.len() {
        sizes.push(gates.pass(&operator, "child", step).memory / PAGE);
    }
    assert_eq!(sizes, [4, 6, 9, 16, 16, 16, 16]);
    assert_whole(&operator, &["child"]);
}

#[test]
fn a_large_heap_sleeps_without_a_second_copy_and_then_only_its_changes_are_written() {
    const BYTES: usize = 90 << 20;
    const CHANGED: usize = HEAP + 50 * PAGE + 4096;
    let end = HEAP + BYTES;
    let mut child = Steps::new("child");
    child.then(format!(
        "i32.const 1 global.set $busy i32.const {} memory.grow drop {}",
        BYTES / PAGE,
        fill(HEAP, BYTES, 3)
    ));
    // From now on it sleeps.
    child.then("i32.const 0 global.set $busy");
    child.then("");
    let code = child.check("heap", HEAP, BYTES, 3);
    child.then(code);
    child.then(fill(CHANGED, 4096, 5));
    let code = child.check("before", HEAP, CHANGED - HEAP, 3)
        + &child.check("changed", CHANGED, 4096, 5)
        + &child.check("behind", CHANGED + 4096, end - CHANGED - 4096, 3);
    child.then(code);
    let mut gates = Gates::new();
    let mut setup = gates.setup();
    let mut fields = idle(0.3);
    fields["limits"] = json!({"memory": "100Mi"});
    gates.add(&mut setup, &mut child, fields);
    let operator = setup.start();

    operator.wait_for_line("step=0");
    let loaded = operator.memory();
    assert!(loaded > BYTES as u64);
    operator.reset_peak_memory();
    assert_eq!(operator.count("hibernated in"), 0, "a slow machine");
    let first = gates.pass(&operator, "child", 1);
    let peak = operator.peak_memory();
    assert!(peak <= loaded + loaded / 20, "{peak} after {loaded}");
    assert_eq!(first.memory, HEAP + BYTES);
    assert!(first.written >= BYTES, "{first:?}");
    wait_for("its memory to be free", PATIENCE, || {
        (operator.memory() + (80 << 20) < loaded).then_some(())
    });

    operator.reset_peak_memory();
    let untouched = gates.pass(&operator, "child", 2);
    assert!(untouched.written <= 64 << 10, "{untouched:?}");
    let peak = operator.peak_memory();
    assert!(
        peak < loaded / 2,
        "{peak}: what it does not touch, it does not load"
    );
    let read = gates.pass(&operator, "child", 3);
    assert!(read.written <= 64 << 10, "{read:?}");
    let peak = operator.peak_memory();
    assert!(peak <= loaded + loaded / 20, "{peak} after {loaded}");
    let changed = gates.pass(&operator, "child", 4);
    assert!((4096..=68 << 10).contains(&changed.written), "{changed:?}");
    gates.open("child", 5);
    operator.wait_for_line("step=5");
    assert_whole(&operator, &["child"]);
}

/// A guest that logs ten ticks a second, with more in its module and more to do at each tick.
fn ticking_with(functions: &str, at_tick: &str) -> Vec<u8> {
    let mut wat = Wat::default();
    let tick = wat.say32("tick");
    wat.functions("(global $ticks (mut i32) (i32.const 0))");
    wat.functions(functions);
    wat.on(
        kind::TIMER,
        &format!(
            "{at_tick} global.get $ticks i32.const 1 i32.add global.set $ticks global.get $ticks {tick}"
        ),
    );
    wat.on_any("i64.const 100000000 call $timer drop");
    wat.build()
}

#[test]
fn modules_whose_state_cannot_be_saved_stay_in_memory_and_the_log_says_why() {
    let refused = [
        (
            "memories",
            "(memory $second 1)",
            "i32.const 0 i32.const 1 i32.store $second",
            "has several memories",
        ),
        (
            "tables",
            "(table $table 2 funcref)",
            "i32.const 1 ref.null func table.set $table",
            "changes its tables at run time",
        ),
        (
            "passive",
            r#"(data $passive "text")"#,
            "i32.const 0 i32.const 0 i32.const 4 memory.init $passive",
            "uses passive data segments",
        ),
        (
            "references",
            "(global $reference (mut externref) (ref.null extern))",
            "ref.null extern global.set $reference",
            "keeps references in globals",
        ),
        (
            "functions",
            "(global $reference (mut funcref) (ref.null func))",
            "ref.null func global.set $reference",
            "keeps references in globals",
        ),
        (
            "place",
            r#"(data (offset i32.const 100000 i32.const 100000 i32.add) "text")"#,
            "",
            "has a data segment whose place is not a constant inside its memory",
        ),
    ];
    let mut setup = observed(Setup::alone());
    for (name, functions, at_tick, _) in refused {
        setup.module(name, &ticking_with(functions, at_tick), idle(IDLE));
    }
    let mut never = idle(IDLE);
    never["hibernate"] = "never".into();
    setup.module("never", &ticking_with("", ""), never.clone());
    setup.module(
        "never-tables",
        &ticking_with(refused[1].1, refused[1].2),
        never,
    );
    setup.module("sleeper", &ticking_with("", ""), idle(IDLE));
    let operator = setup.start();
    let everybody = refused.map(|(name, ..)| name);
    operator.wait_for("ten sleeps, and ten ticks of all", |lines| {
        let ticks = |name| {
            let own = lines.iter().filter_map(|l| message(l, name));
            own.filter(|m| m.starts_with("tick=")).count() >= 10
        };
        let all = ["never", "never-tables"]
            .iter()
            .chain(&everybody)
            .all(|n| ticks(n));
        (all && volumes(lines, "sleeper").len() >= 10).then_some(())
    });
    for (name, .., why) in refused {
        let messages = operator.messages(name);
        let warnings: Vec<_> = messages
            .iter()
            .filter(|m| m.contains("stays in memory"))
            .collect();
        assert_eq!(warnings.len(), 1, "{messages:?}");
        let expected = format!("stays in memory when it is idle, because its module {why}");
        assert!(warnings[0].starts_with(&expected), "{warnings:?}");
    }
    for name in ["never", "never-tables"] {
        let messages = operator.messages(name);
        assert!(
            !messages.iter().any(|m| m.contains("stays in memory")),
            "{messages:?}"
        );
    }
    for name in everybody.iter().chain(&["never", "never-tables"]) {
        assert!(volumes(&operator.lines(), name).is_empty(), "{name}");
    }
    assert_whole(&operator, &everybody);
}

/// A child that does not sleep before its second step, and then looks at its memory in each.
fn late_sleeper(name: &'static str, pages: usize) -> Steps {
    let mut child = Steps::new(name);
    let bytes = pages * PAGE;
    child.then(format!(
        "i32.const 1 global.set $busy i32.const {pages} memory.grow drop {}",
        fill(HEAP, bytes, 3)
    ));
    child.then("i32.const 0 global.set $busy");
    for seed in [3, 5, 7] {
        let check = child.check("heap", HEAP, bytes, seed);
        child.then(check + &fill(HEAP, bytes, seed + 2));
    }
    child
}

const CANNOT: &str = "cannot hibernate, and stays in memory: snapshot in ";

/// The snapshot directory becomes unusable before anybody has slept.
fn without_directory(spoil: impl Fn(&Path), why: &str) {
    let mut gates = Gates::new();
    let mut setup = gates.setup();
    let mut child = late_sleeper("child", 3);
    gates.add(&mut setup, &mut child, idle(0.5));
    setup.module("neighbour", &ticking(), json!({"hibernate": "never"}));
    let mut operator = setup.start();
    operator.wait_for_line("step=0");
    assert_eq!(operator.count("hibernated in"), 0, "a slow machine");
    let directory = snapshot_directory(&setup);
    spoil(&directory);
    gates.open("child", 1);
    let line = operator.wait_for_line(CANNOT);
    let message = message(&line, "child").expect("it is about the child");
    let expected = format!("{CANNOT}{}", directory.display());
    assert!(
        message.starts_with(&expected) && message.contains(why),
        "{message}"
    );
    assert!(
        message.ends_with("no child is put to sleep for 30 s"),
        "{message}"
    );
    for step in 2..child.steps.len() {
        gates.open("child", step);
        operator.wait_for_line(&format!("step={step}"));
    }
    wait_for_neighbour(&operator);
    assert_eq!(operator.count(CANNOT), 1);
    assert_eq!(operator.count("hibernated in"), 0);
    operator.stop();
    assert_whole(&operator, &["child", "neighbour"]);
}

/// Waits until the neighbour got further than it was.
fn wait_for_neighbour(operator: &Operator) {
    let ticks = operator.messages("neighbour").len();
    operator.wait_for("two more ticks of the neighbour", |lines| {
        let now = lines.iter().filter_map(|l| message(l, "neighbour")).count();
        (now >= ticks + 2).then_some(())
    });
}

#[test]
fn a_child_whose_snapshot_cannot_be_made_goes_on_when_the_directory_is_gone() {
    without_directory(
        |directory| fs::remove_dir(directory).unwrap(),
        "No such file",
    );
}

#[test]
fn a_child_whose_snapshot_cannot_be_made_goes_on_when_the_directory_is_a_file() {
    let spoil = |directory: &Path| {
        fs::remove_dir(directory).unwrap();
        fs::write(directory, "").unwrap();
    };
    without_directory(spoil, "Not a directory");
}

/// A command that gives the parent a small file system of its own at a directory; `None`, and a
/// line that says so, when that cannot be had.
fn with_small_disk(directory: &Path, size: &str) -> Option<Command> {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
        command.arg(format!(
            r#"mount -t tmpfs -o size={size},mode=700 none "$0" && exec "$@""#
        ));
        command.arg(directory);
        command
    };
    fs::create_dir(directory).unwrap();
    let works = unshare().arg("true").status();
    if !works.is_ok_and(|status| status.success()) {
        println!("skipped: no user and mount namespaces here");
        return None;
    }
    let mut command = unshare();
    command.arg(PROGRAM);
    Some(command)
}

#[test]
fn a_full_disk_keeps_a_child_in_memory_as_it_was() {
    let mut gates = Gates::new();
    let mut setup = gates.setup();
    let directory = snapshot_directory(&setup);
    let Some(command) = with_small_disk(&directory, "512k") else {
        return;
    };
    // Has a snapshot when it grows too large for the next one.
    let mut child = Steps::new("child");
    child.then(fill(200_704, 8192, 3));
    let old = child.check("old", 200_704, 8192, 3);
    let grow = "i32.const 16 memory.grow drop ";
    child.then(old + &fill(200_704, 8192, 5) + grow + &fill(HEAP, 16 * PAGE, 7));
    for seed in [7, 9, 11] {
        let old = child.check("changed", 200_704, 8192, 5);
        let new = child.check("new", HEAP, 16 * PAGE, seed);
        child.then(old + &new + &fill(HEAP, 16 * PAGE, seed + 2));
    }
    gates.add(&mut setup, &mut child, idle(IDLE));
    setup.module("neighbour", &ticking(), json!({"hibernate": "never"}));
    let mut operator = setup.start_by(command);
    wait_asleep(&operator, "child", "step=0");
    gates.open("child", 1);
    let line = operator.wait_for_line(CANNOT);
    let message = message(&line, "child").expect("it is about the child");
    assert!(message.contains("No space left on device"), "{message}");
    for step in 2..child.steps.len() {
        gates.open("child", step);
        operator.wait_for_line(&format!("step={step}"));
    }
    wait_for_neighbour(&operator);
    operator.stop();
    assert_whole(&operator, &["child", "neighbour"]);
}

#[test]
fn a_child_that_sleeps_while_the_disk_becomes_full_is_woken() {
    let mut gates = Gates::new();
    let mut setup = gates.setup();
    let directory = snapshot_directory(&setup);
    let Some(command) = with_small_disk(&directory, "256k") else {
        return;
    };
    // Most of its memory is zeros, which take no place on the disk.
    let mut child = Steps::new("child");
    child.then(fill(200_704, 8192, 3));
    let code = child.check("own", 200_704, 8192, 3)
        + &child.check("zeros", 200_704 + 8192, FIRST_BYTES - 200_704 - 8192, 0);
    child.then(code);
    gates.add(&mut setup, &mut child, idle(IDLE));
    let mut operator = setup.start_by(command);
    wait_asleep(&operator, "child", "step=0");
    // The directory as the parent sees it.
    let inside = operator
        .proc()
        .join("root")
        .join(directory.strip_prefix("/").unwrap());
    let full = fs::write(inside.join("filler"), vec![1; 1 << 20]);
    assert_eq!(full.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    gates.open("child", 1);
    wait_for("its answer, or the end", PATIENCE, || {
        (operator.count("step=1") > 0 || !operator.is_running()).then_some(())
    });
    if !operator.is_running() {
        panic!("the parent has ended: {}", operator.wait_exit(PATIENCE));
    }
    operator.stop();
    assert_whole(&operator, &["child"]);
}

#[test]
fn a_snapshot_that_somebody_changed_is_not_used_and_its_child_starts_afresh() {
    type Spoil = fn(&File, u64);
    let victims: [(&'static str, Spoil); 6] = [
        ("emptied", |file, _| file.set_len(0).unwrap()),
        ("shortened", |file, bytes| file.set_len(bytes - 1).unwrap()),
        ("first-byte", |file, _| flip(file, 0)),
        ("last-byte", |file, bytes| flip(file, bytes - 1)),
        ("old-size", |file, bytes| {
            flip(file, bytes / 2);
            file.set_len(0).unwrap();
            file.set_len(bytes).unwrap();
        }),
        ("old-times", |file, bytes| {
            let modified = file.metadata().unwrap().modified().unwrap();
            flip(file, bytes / 2);
            file.set_times(fs::FileTimes::new().set_modified(modified))
                .unwrap();
        }),
    ];
    let mut gates = Gates::new();
    let mut setup = gates.setup();
    let directory = snapshot_directory(&setup);
    // Their sizes tell them apart.
    let names = victims.iter().map(|(name, _)| *name).chain(["neighbour"]);
    let names: Vec<_> = names.zip(1..).collect();
    for (name, pages) in &names {
        let mut child = Steps::new(name);
        let size = child.expect("first size", 4);
        child.then(format!(
            "i32.const {pages} memory.grow {size} {}",
            fill(HEAP, pages * PAGE, 3)
        ));
        let check = child.check("heap", HEAP, pages * PAGE, 3);
        child.then(check.clone() + &fill(HEAP, 4096, 5));
        let check = child.check("later", HEAP + 4096, pages * PAGE - 4096, 3);
        child.then(check);
        gates.add(&mut setup, &mut child, idle(IDLE));
    }
    let mut operator = setup.start();
    for (name, _) in &names {
        wait_asleep(&operator, name, "step=0");
    }
    for ((name, spoil), (_, pages)) in victims.iter().zip(&names) {
        println!("{name}");
        let bytes = HEAP + pages * PAGE;
        let file = snapshot_of(&operator, &directory, bytes);
        spoil(&file, bytes as u64);
    }
    for (name, _) in &names {
        gates.open(name, 1);
    }
    for (name, _) in &victims {
        wait_asleep(&operator, name, "step=1");
        let mut messages = operator.messages(name);
        messages.retain(|m| m.starts_with("step=") || m.contains("starting again"));
        // The second life is not told to wait before its second step.
        let expected = [
            "step=0",
            "cannot be woken: its snapshot was changed by somebody else; starting again in",
            "step=0",
            "step=1",
        ];
        assert_eq!(messages.len(), expected.len(), "{messages:?}");
        for (message, expected) in messages.iter().zip(expected) {
            assert!(message.starts_with(expected), "{messages:?}");
        }
    }
    // All of them sleep and wake again as ever.
    for (name, _) in &names {
        gates.pass(&operator, name, 2);
    }
    assert_eq!(snapshots(&operator, &directory).len(), names.len());
    operator.stop();
    assert_whole(&operator, &["neighbour"]);
}

#[test]
fn a_snapshot_that_changes_while_its_child_is_awake_ends_it_before_it_sees_that() {
    let mut gates = Gates::new();
    let mut setup = gates.setup();
    let directory = snapshot_directory(&setup);
    let names = [("flipped", 8), ("cut", 10), ("neighbour", 9)];
    for (name, pages) in names {
        let mut child = Steps::new(name);
        child.then(format!(
            "i32.const {pages} memory.grow drop {}",
            fill(HEAP, pages * PAGE, 3)
        ));
        // Awake for now, with most of its memory still in the file only.
        child.then("i32.const 1 global.set $busy");
        let check = child.check("heap", HEAP, pages * PAGE, 3);
        child.then(check);
        gates.add(&mut setup, &mut child, idle(0.5));
    }
    let mut operator = setup.start();
    for (name, _) in names {
        wait_asleep(&operator, name, "step=0");
        gates.open(name, 1);
    }
    operator.wait_for_lines("step=1", 3);
    let file_of = |pages| snapshot_of(&operator, &directory, HEAP + pages * PAGE);
    flip(&file_of(8), (HEAP + 5 * PAGE + 17) as u64);
    let shorter = (HEAP + 3 * PAGE) as u64;
    file_of(10).set_len(shorter).unwrap();
    for (name, _) in names {
        gates.open(name, 2);
    }
    let lines = operator.wait_for_lines("starting again in", 2);
    let expected =
        "cannot be woken: a part of its snapshot is not what was written; starting again in";
    for name in ["flipped", "cut"] {
        let of_it = lines.iter().find_map(|l| message(l, name));
        assert!(of_it.is_some_and(|m| m.starts_with(expected)), "{lines:?}");
    }
    operator.wait_for("all of them", |lines| {
        let done = |name| lines.iter().any(|l| message(l, name) == Some("step=2"));
        names.iter().all(|(name, _)| done(name)).then_some(())
    });
    operator.stop();
    assert_whole(&operator, &["neighbour"]);
    assert_eq!(operator.count("starting again in"), 2);
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn nothing_is_left_in_the_snapshot_directory_however_the_parent_ends() {
    let mut setup = observed(Setup::alone());
    let children = jugglers(&mut setup);
    let directory = snapshot_directory(&setup);
    for sleeps in [4, 11, 23] {
        let mut operator = setup.start();
        operator.wait_for_lines("hibernated in", sleeps);
        operator.signal(libc::SIGKILL);
        operator.wait_exit(PATIENCE);
        assert_eq!(entries(&directory), <[PathBuf; 0]>::default());
        assert_whole(&operator, &children);
    }
    let mut operator = setup.start();
    operator.wait_for("everybody to sleep", |lines| {
        children
            .iter()
            .all(|c| !volumes(lines, c).is_empty())
            .then_some(())
    });
    assert!(!snapshots(&operator, &directory).is_empty());
    assert_eq!(entries(&directory), <[PathBuf; 0]>::default());
    assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o7777, 0o700);
    operator.stop();
    assert_eq!(entries(&directory), <[PathBuf; 0]>::default());
    assert_whole(&operator, &children);
}

#[test]
fn snapshots_are_beside_the_compiled_modules_unless_told_otherwise() {
    let mut setup = Setup::alone();
    setup.set("RUST_LOG", "info,child=debug,wasmer=error,virtual_fs=error");
    setup.module("child", &ticking_with("", ""), idle(IDLE));
    let operator = setup.start();
    let is_snapshots = |link: &PathBuf| link.to_str().is_some_and(|l| l.ends_with(" (deleted)"));
    let link = wait_for("a snapshot", PATIENCE, || {
        let open = fs::read_dir(operator.proc().join("fd")).unwrap();
        let mut links = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.find(is_snapshots)
    });
    let directory = link.parent().unwrap();
    assert_eq!(directory.file_name().unwrap(), "snapshots");
    assert!(
        directory.starts_with(common::operator::artifacts()),
        "{directory:?}"
    );
    assert_eq!(fs::metadata(directory).unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn a_snapshot_directory_that_others_may_write_to_is_refused() {
    let mut setup = observed(Setup::alone());
    setup.module("child", &ticking(), idle(IDLE));
    let directory = snapshot_directory(&setup);
    fs::create_dir(&directory).unwrap();
    for mode in [0o777, 0o720, 0o1777] {
        fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
        let mut operator = setup.start();
        let status = operator.wait_exit(PATIENCE);
        assert!(status.code().is_some_and(|code| code != 0), "{status}");
        let line = operator.wait_for_line("snapshot directory ");
        assert!(line.contains(directory.to_str().unwrap()), "{line}");
        assert!(line.contains("nobody else may write to it"), "{line}");
        assert_eq!(operator.count("tick="), 0);
    }
}

#[test]
fn above_the_memory_budget_who_was_idle_longest_sleeps_first_and_without_one_nobody_does() {
    const LARGE: usize = 160 << 20;
    const ORDER: [&str; 4] = ["c", "a", "d", "b"];
    let run = |budget: Option<u64>| {
        let mut gates = Gates::new();
        let mut setup = gates.setup();
        if let Some(budget) = budget {
            setup
                .argument("--memory-budget")
                .argument(&budget.to_string());
        }
        for name in ["a", "b", "c", "d"] {
            let mut child = Steps::new(name);
            child.then("").then("");
            gates.add(&mut setup, &mut child, idle(600.0));
        }
        let mut large = Steps::new("large");
        large.then("");
        large.then(format!(
            "i32.const {} memory.grow drop i32.const {HEAP} i32.const 1 i32.const {LARGE} memory.fill",
            LARGE / PAGE
        ));
        let fields = json!({"hibernate": "never", "limits": {"memory": "200Mi"}});
        gates.add(&mut setup, &mut large, fields);
        // It shows that time goes by.
        setup.module("clock", &ticking_with("", ""), idle(IDLE));
        let operator = setup.start();
        // Its first sleep comes early for everybody.
        for name in ORDER {
            wait_asleep(&operator, name, "step=0");
        }
        let wait_for_clock = |sleeps: usize| {
            let before = volumes(&operator.lines(), "clock").len();
            operator.wait_for("some time", |lines| {
                (volumes(lines, "clock").len() >= before + sleeps).then_some(())
            });
        };
        for name in ORDER {
            gates.open(name, 1);
            operator.wait_for(name, |lines| {
                let mut own = lines.iter().filter_map(|l| message(l, name));
                own.any(|m| m == "step=1").then_some(())
            });
            // So that each is idle for another time.
            wait_for_clock(1);
        }
        wait_for_clock(3);
        // After those first sleeps.
        let slept = |lines: &[String]| -> Vec<&'static str> {
            let is_of =
                |line: &String, name| message(line, name).is_some_and(|m| volume(m).is_some());
            let sleeper = |line| ORDER.into_iter().find(|name| is_of(line, name));
            lines.iter().filter_map(sleeper).skip(ORDER.len()).collect()
        };
        assert!(slept(&operator.lines()).is_empty());
        let size = operator.memory();
        gates.open("large", 1);
        if budget.is_some() {
            let order = operator.wait_for("all to sleep", |lines| {
                let slept = slept(lines);
                (slept.len() >= 4).then_some(slept)
            });
            assert_eq!(order, ORDER);
        } else {
            wait_for("the memory", PATIENCE, || {
                (operator.memory() > size + LARGE as u64 / 2).then_some(())
            });
            wait_for_clock(10);
            assert!(slept(&operator.lines()).is_empty());
        }
        size
    };
    let size = run(None);
    run(Some(size + LARGE as u64 / 2));
}

#[test]
fn children_that_sleep_are_told_to_stop() {
    let mut setup = observed(Setup::alone());
    let names = ["a", "b", "c", "d", "e", "f"];
    for name in names {
        let mut wat = Wat::default();
        contents(&mut wat);
        wat.wasi("proc_exit", "(param i32)");
        let began = wat.say("began");
        wat.on(kind::START, &(fill(200_704, 8192, 3) + &began));
        let stopping = wat.say32("stopping");
        wat.on(
            kind::STOP,
            &format!("i32.const 200704 i32.const 8192 i64.const 3 call $holds {stopping} i32.const 0 call $proc_exit"),
        );
        setup.module(name, &wat.build(), idle(IDLE));
    }
    // Has nothing to do then, and is taken to be done.
    let mut silent = Wat::default();
    let began = silent.say("began");
    silent.on(kind::START, &began);
    setup.module("silent", &silent.build(), idle(IDLE));
    let mut operator = setup.start();
    for name in names.iter().chain(&["silent"]) {
        wait_asleep(&operator, name, "began");
    }
    let started = Instant::now();
    operator.stop();
    assert!(
        started.elapsed() < Duration::from_secs(9),
        "not the grace period"
    );
    for name in names {
        let messages = operator.messages(name);
        assert_eq!(
            messages.iter().filter(|m| *m == "stopping=1").count(),
            1,
            "{messages:?}"
        );
        assert_eq!(
            messages
                .iter()
                .filter(|m| m.starts_with("woken in"))
                .count(),
            1
        );
    }
    assert_eq!(operator.count("dropped"), 0);
    assert_whole(&operator, &names);
}

#[test]
fn a_child_that_traps_after_it_was_woken_starts_afresh_without_its_snapshot() {
    const IMAGE: usize = 200_704;
    let mut child = Steps::new("child");
    let image: String = (IMAGE..IMAGE + 4096)
        .step_by(8)
        .flat_map(|at| word(at, 3).to_le_bytes())
        .fold(String::new(), |text, byte| text + &format!("\\{byte:02x}"));
    child.wat.functions(&format!(
        "(data (i32.const {IMAGE}) \"{image}\") (global $lives (mut i32) (i32.const 0))"
    ));
    // All that a new instance finds, and what it makes of it.
    let first = child.check("image", IMAGE, 4096, 3)
        + &child.check("zeros", IMAGE + 4096, FIRST_BYTES - IMAGE - 4096, 0)
        + "global.get $lives "
        + &child.expect("lives", 0)
        + "i32.const 7 global.set $lives i32.const 3 memory.grow "
        + &child.expect("size", 4)
        + &child.check("new pages", HEAP, 3 * PAGE, 0)
        + &fill(IMAGE, 8192, 5)
        + &fill(HEAP, 3 * PAGE, 7);
    child.then(first);
    let second = child.check("changed", IMAGE, 8192, 5)
        + &child.check("heap", HEAP, 3 * PAGE, 7)
        + "global.get $lives "
        + &child.expect("lives", 7)
        + &fill(HEAP, 3 * PAGE, 9);
    child.then(second);
    child.then("unreachable");
    let mut gates = Gates::new();
    let mut setup = gates.setup();
    let directory = snapshot_directory(&setup);
    gates.add(&mut setup, &mut child, idle(IDLE));
    let operator = setup.start();
    wait_asleep(&operator, "child", "step=0");
    gates.pass(&operator, "child", 1);
    assert_eq!(snapshots(&operator, &directory).len(), 1);
    // For its second life.
    gates.close("child", 1);
    gates.open("child", 2);
    let ended = operator.wait_for_line("starting again in");
    assert!(
        ended.contains("trapped in on_event: unreachable"),
        "{ended}"
    );
    wait_for("its snapshot's end", PATIENCE, || {
        snapshots(&operator, &directory).is_empty().then_some(())
    });
    operator.wait_for_lines("step=0", 2);
    wait_asleep(&operator, "child", "step=0");
    assert_eq!(snapshots(&operator, &directory).len(), 1);
    gates.open("child", 1);
    operator.wait_for_lines("step=1", 2);
    for line in operator.lines() {
        assert!(!line.contains("wrong"), "{line}");
    }
}

#[test]
fn a_hundred_sleeps_leave_no_descriptor_and_no_mapping_behind() {
    let mut wat = Wat::default();
    wat.on_any("i64.const 40000000 call $timer drop");
    let mut setup = observed(Setup::alone());
    let directory = snapshot_directory(&setup);
    for name in ["a", "b"] {
        setup.module(name, &wat.build(), idle(0.01));
    }
    let operator = setup.start();
    let sleeps = |count: usize| {
        operator.wait_for(&format!("{count} sleeps"), |lines| {
            let enough = |name| volumes(lines, name).len() >= count;
            (enough("a") && enough("b")).then_some(())
        });
    };
    let count = |what: &str| fs::read_dir(operator.proc().join(what)).unwrap().count();
    let mappings = || {
        let maps = fs::read_to_string(operator.proc().join("maps")).unwrap();
        maps.lines().count()
    };
    sleeps(5);
    // As few as possible of those that come and go.
    let (descriptors, maps) = (0..20).fold((usize::MAX, 0), |(fewest, most), _| {
        (fewest.min(count("fd")), most.max(mappings()))
    });
    sleeps(100);
    wait_for("no more descriptors than before", PATIENCE, || {
        (count("fd") <= descriptors).then_some(())
    });
    wait_for("not many more mappings than before", PATIENCE, || {
        (mappings() <= maps + 20).then_some(())
    });
    assert!(snapshots(&operator, &directory).len() <= 2);
    assert_whole(&operator, &["a", "b"]);
}

#[test]
fn a_kube_rs_program_sleeps_between_its_requeues_and_is_back_on_time() {
    let namespace = Cluster::shared().namespace();
    namespace.create_config_map("object", json!({"probe": "requeue"}));
    let mut setup = observed(Setup::on(namespace.cluster));
    let env = [("PROBE", "requeue"), ("NAMESPACE", namespace.name.as_str())];
    setup.guest("probe", "probe", &env, idle(0.2));
    let operator = setup.start();
    let times: Vec<u64> = wait_for("four reconciles", PATIENCE, || {
        let data = namespace.data("object-out")?;
        let times = data["times"].as_str()?.split(',');
        let times: Vec<_> = times.map(|t| t.parse().unwrap()).collect();
        (times.len() >= 4).then_some(times)
    });
    let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for gap in &gaps {
        assert!(
            (1_950..5_000).contains(gap),
            "2 s were asked for: {times:?}"
        );
    }
    // Late is as bad as early, but a busy machine must be forgiven once.
    assert!(
        gaps.iter().min().is_some_and(|gap| *gap < 2_500),
        "{gaps:?}"
    );
    assert!(volumes(&operator.lines(), "probe").len() >= 3);
    assert_whole(&operator, &["probe"]);
}

#[test]
fn children_that_slept_while_the_api_server_was_away_see_what_changes_later() {
    let Some(cluster) = Cluster::own() else {
        return;
    };
    let mut setup = observed(Setup::on(&cluster));
    let rings: Vec<_> = ["ring-thin", "ring"]
        .map(|guest| (guest, cluster.namespace(), cluster.namespace()))
        .into();
    for (guest, source, target) in &rings {
        let env = [
            ("IN_NAMESPACE", source.name.as_str()),
            ("OUT_NAMESPACE", target.name.as_str()),
        ];
        setup.guest(guest, guest, &env, idle(0.2));
    }
    let mut operator = setup.start();
    let travel = |nonce| {
        for (_, source, _) in &rings {
            source.set_nonce("object", nonce);
        }
        for (_, _, target) in &rings {
            target.wait_for_nonce("object", nonce);
        }
        for (guest, ..) in &rings {
            let what = format!("{guest} to sleep");
            wait_for(&what, PATIENCE, || {
                let lines = operator.messages(guest);
                let slept = lines.iter().rposition(|m| volume(m).is_some())?;
                let woken = lines.iter().rposition(|m| m.starts_with("woken"));
                woken.is_none_or(|woken| woken < slept).then_some(())
            });
        }
    };
    travel(1);
    cluster.command("kill kube-apiserver");
    cluster.command("start kube-apiserver");
    travel(2);
    operator.stop();
    assert_whole(&operator, &["ring-thin", "ring"]);
}
