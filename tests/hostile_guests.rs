//! Guests that do what they must not, beside a healthy neighbour. No cluster.

mod common;

use std::sync::Arc;

use common::fault_proxy::{Fault, FaultProxy, Request};
use common::operator::{Operator, Setup, message};
use common::wat::{PAYLOAD, Wat, kind, ticking};
use serde_json::json;

/// Size of a test guest's memory.
const MEMORY: i64 = 4 * 65_536;

const INVALID: i64 = -2;
const FAULT: i64 = -1;
const TOO_MANY: i64 = -3;
const TOO_LARGE: i64 = -4;
const UNKNOWN: i64 = -5;
const REFUSED: i64 = -6;

/// The neighbour has answered since: it gets further than it was.
fn assert_neighbour_lives(operator: &mut Operator) {
    let ticks = operator.messages("neighbour").len();
    operator.wait_for("two more ticks of the neighbour", |lines| {
        let now = lines.iter().filter_map(|l| message(l, "neighbour")).count();
        (now >= ticks + 2).then_some(())
    });
    assert!(operator.is_running());
}

fn with_neighbour() -> Setup {
    let mut setup = Setup::alone();
    setup.module("neighbour", &ticking(), json!({}));
    // One worker: who holds it holds everybody.
    setup.argument("--workers").argument("1");
    setup
}

#[test]
fn bad_calls_of_every_host_function_get_their_error_code() {
    let mut wat = Wat::default();
    let mut code = String::new();
    let mut expected: Vec<(String, i64)> = Vec::new();
    let mut expect = |wat: &mut Wat, key: String, call: &str, wide: bool, result: i64| {
        let say = if wide {
            wat.say64(&key)
        } else {
            wat.say32(&key)
        };
        code.push_str(&format!("{call} {say}"));
        expected.push((key, result));
    };
    let at = |pointer: i64, length: i64| {
        format!(" i32.const {} i32.const {} ", pointer as i32, length as i32)
    };
    let places = [
        ("last byte", at(0xffff_ffff, 1), FAULT),
        ("over the end", at(MEMORY - 1, 2), FAULT),
        ("behind the end", at(MEMORY, 1), FAULT),
        ("behind, empty", at(MEMORY + 1, 0), FAULT),
        ("middle", at(0x7fff_0000, 65_536), FAULT),
        ("poll page", at(0x7ffe_0000, 16), FAULT),
        ("whole", at(0, 8 << 20), FAULT),
        ("above the limit", at(0, (8 << 20) + 1), TOO_LARGE),
        ("all ones", at(0xffff_ffff, 0xffff_ffff), TOO_LARGE),
        ("empty", at(0, 0), INVALID),
        ("empty at the end", at(MEMORY, 0), INVALID),
    ];
    let typed = [
        ("text", "hello".as_bytes().to_vec()),
        ("not UTF-8", vec![0xff, 0xfe, 0]),
        ("a list", b"[]".to_vec()),
        ("nothing in it", b"{}".to_vec()),
        ("open for ever", b"[".repeat(4_000)),
        (
            "unknown field",
            br#"{"version":"v1","plural":"pods","nmae":"a"}"#.to_vec(),
        ),
        ("wrong type", br#"{"version":1,"plural":"pods"}"#.to_vec()),
        (
            "two of them",
            br#"{"version":"v1","plural":"pods"}{"version":"v1","plural":"pods"}"#.to_vec(),
        ),
        (
            "out of its place",
            br#"{"version":"v1","plural":"..","namespace":"a/../../b"}"#.to_vec(),
        ),
    ];
    let raw = [
        ("text", "hello", INVALID),
        ("no empty line", "GET /", INVALID),
        ("no path", "GET\n\n", INVALID),
        ("up and away", "GET /api/../x\n\n", INVALID),
        ("bad method", "GE T /\n\n", INVALID),
        ("header without colon", "GET /\nhost\n\n", INVALID),
        ("bad header", "GET /\nx: \u{1}\n\n", INVALID),
        ("tunnel", "CONNECT example.org:443\n\n", REFUSED),
        ("upgrade", "GET /\nupgrade: websocket\n\n", REFUSED),
    ];
    for verb in [
        "get", "list", "watch", "create", "replace", "patch", "delete", "request",
    ] {
        for (what, place, result) in &places {
            let call = format!("{place} call ${verb}");
            expect(&mut wat, format!("{verb} {what}"), &call, true, *result);
        }
        if verb == "request" {
            continue;
        }
        for (what, descriptor) in &typed {
            let call = format!("{} call ${verb}", wat.text(descriptor));
            expect(&mut wat, format!("{verb} {what}"), &call, true, INVALID);
        }
    }
    for (what, request, result) in raw {
        let call = format!("{} call $request", wat.text(request));
        expect(&mut wat, format!("request {what}"), &call, true, result);
    }
    for number in [0, 1, -1, i64::MIN, i64::MAX] {
        let call = format!("i64.const {number} call $cancel");
        expect(&mut wat, format!("cancel {number}"), &call, false, UNKNOWN);
        let call = format!("i64.const {number} call $timer");
        expect(&mut wat, format!("timer {number}"), &call, false, 0);
    }
    for level in [0, 6, -1] {
        let call = format!("i32.const {level} i32.const 1024 i32.const 5 call $log");
        expect(
            &mut wat,
            format!("log level {level}"),
            &call,
            false,
            INVALID,
        );
    }
    for (what, place, result) in [
        ("last byte", at(0xffff_ffff, 1), FAULT),
        ("over the end", at(MEMORY - 1, 2), FAULT),
        ("above the limit", at(0, 65_537), TOO_LARGE),
    ] {
        let call = format!("i32.const 3 {place} call $log");
        expect(&mut wat, format!("log {what}"), &call, false, result);
    }
    let done = wat.say("all refused");
    wat.on(
        kind::START,
        &format!("{code} i64.const -1 call $timer drop {done}"),
    );

    let mut setup = with_neighbour();
    setup.module("hostile", &wat.build(), json!({}));
    let mut operator = setup.start();
    operator.wait_for_line("all refused");
    for (key, result) in &expected {
        assert_eq!(
            operator.wait_for_value("hostile", key),
            result.to_string(),
            "{key}"
        );
    }
    // Not every one is logged, but that there were some is.
    operator.wait_for_line("further bad calls of this instance are not logged");
    assert_neighbour_lives(&mut operator);
    assert_eq!(operator.count("starting again"), 0);
}

#[test]
fn operations_and_their_bytes_are_limited() {
    let mut few = Wat::default();
    let mut code = String::new();
    for call in ["1", "2", "3"] {
        let request = few.text("GET /api\n\n");
        code.push_str(&format!("{request} call $request {}", few.say64(call)));
    }
    // A place is free again once an operation is cancelled.
    let again = few.text("GET /api\n\n");
    code.push_str(&format!(
        "i64.const 1 call $cancel {} {again} call $request {}",
        few.say32("cancel"),
        few.say64("4")
    ));
    few.on(kind::START, &code);

    let mut large = Wat::default();
    let (at, length) = large.place("POST /api\n\n");
    let mut code = format!(
        "i32.const 132 memory.grow drop i32.const {PAYLOAD} i32.const {at} i32.const {length} memory.copy\n"
    );
    for call in ["1", "2", "3", "4", "5"] {
        let request = format!("i32.const {PAYLOAD} i32.const {}", 8 << 20);
        code.push_str(&format!("{request} call $request {}", large.say64(call)));
    }
    large.on(kind::START, &code);

    let mut setup = with_neighbour();
    setup.module("few", &few.build(), json!({"limits": {"operations": 2}}));
    setup.module("large", &large.build(), json!({}));
    let mut operator = setup.start();
    for (child, results) in [
        ("few", vec![1, 2, TOO_MANY, 3]),
        ("large", vec![1, 2, 3, 4, TOO_MANY]),
    ] {
        for (call, result) in results.iter().enumerate() {
            let key = (call + 1).to_string();
            assert_eq!(
                operator.wait_for_value(child, &key),
                result.to_string(),
                "{child} {key}"
            );
        }
    }
    assert_neighbour_lives(&mut operator);
}

/// A function of WASI, and bad calls of it.
struct BadWasi {
    name: &'static str,
    ty: &'static str,
    calls: Vec<String>,
}

/// `P` in a call stands for a bad pointer; each call is made with several.
fn bad_wasi(name: &'static str, ty: &'static str, calls: &[&str]) -> BadWasi {
    let pointers = [-1_i64, 0x7fff_ffff, 0x7ffe_0000, MEMORY, MEMORY - 1];
    let calls = calls
        .iter()
        .flat_map(|call| {
            let count = if call.contains('P') {
                pointers.len()
            } else {
                1
            };
            pointers[..count]
                .iter()
                .map(|p| call.replace('P', &p.to_string()))
        })
        .collect();
    BadWasi { name, ty, calls }
}

#[test]
fn bad_pointers_in_wasi_calls_get_an_error_and_hurt_nobody() {
    const I2: &str = "(param i32 i32) (result i32)";
    const I3: &str = "(param i32 i32 i32) (result i32)";
    const I4: &str = "(param i32 i32 i32 i32) (result i32)";
    const I5: &str = "(param i32 i32 i32 i32 i32) (result i32)";
    let mut wat = Wat::default();
    let (token, length) = wat.place("var/run/secrets/kubernetes.io/serviceaccount/token");
    let place = |wat: &mut Wat, pointer: i64, length: i64| {
        let iov = [pointer as u32, length as u32]
            .map(u32::to_le_bytes)
            .concat();
        wat.place(iov).0
    };
    let good = place(&mut wat, 0, 16);
    let behind = place(&mut wat, MEMORY, 16);
    let over = place(&mut wat, MEMORY - 8, 0xffff_ffff);
    // A subscription to the clock that has come.
    let (clock, _) = wat.place([0; 48]);
    let vectors = |prefix: &str, suffix: &str| -> Vec<String> {
        vec![
            format!("{prefix} P 1 {suffix} 16"),
            format!("{prefix} {behind} 1 {suffix} 16"),
            format!("{prefix} {over} 1 {suffix} 16"),
            format!("{prefix} {good} 1 {suffix} P"),
            format!("{prefix} {good} -1 {suffix} 16"),
            format!("{prefix} {good} {} {suffix} 16", 0x1fff_ffff),
        ]
    };
    let owned = |calls: &[String]| -> Vec<&'static str> {
        calls.iter().map(|c| &*c.clone().leak()).collect()
    };
    let functions = [
        bad_wasi("fd_write", I4, &owned(&vectors("1", ""))),
        bad_wasi("fd_read", I4, &owned(&vectors("4", ""))),
        bad_wasi(
            "fd_pread",
            "(param i32 i32 i32 i64 i32) (result i32)",
            &owned(&vectors("4", "0")),
        ),
        bad_wasi("random_get", I2, &["P 16", "0 -1", "16 0x7fffffff"]),
        bad_wasi("args_sizes_get", I2, &["P 0", "0 P"]),
        bad_wasi("args_get", I2, &["P 0", "0 P"]),
        bad_wasi("environ_sizes_get", I2, &["P 0", "0 P"]),
        bad_wasi("environ_get", I2, &["P 0", "0 P"]),
        bad_wasi(
            "clock_time_get",
            "(param i32 i64 i32) (result i32)",
            &["0 0 P", "99 0 0", "-1 0 0"],
        ),
        bad_wasi("clock_res_get", I2, &["0 P", "99 0"]),
        bad_wasi("fd_prestat_get", I2, &["3 P", "4 0", "-1 0"]),
        bad_wasi(
            "fd_prestat_dir_name",
            I3,
            &["3 -1 1", "3 262144 1", "4 0 1"],
        ),
        bad_wasi("fd_fdstat_get", I2, &["3 P", "999 0"]),
        bad_wasi("fd_filestat_get", I2, &["3 P", "-1 0"]),
        bad_wasi("path_filestat_get", I5, &["3 0 P 8 0", "3 0 0 -1 0"]),
        bad_wasi(
            "path_readlink",
            "(param i32 i32 i32 i32 i32 i32) (result i32)",
            &["3 P 8 0 16 0"],
        ),
        bad_wasi(
            "path_open",
            "(param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)",
            &owned(&[
                "3 0 P 8 0 0 0 0 16".into(),
                "3 0 0 -1 0 0 0 0 16".into(),
                format!("3 0 {token} {length} 0 0 0 0 P"),
                format!("99 0 {token} {length} 0 0 0 0 16"),
            ]),
        ),
        bad_wasi(
            "fd_readdir",
            "(param i32 i32 i32 i64 i32) (result i32)",
            &["3 P 64 0 16", "3 16 64 0 P", "4 16 64 0 16"],
        ),
        bad_wasi(
            "fd_seek",
            "(param i32 i64 i32 i32) (result i32)",
            &["4 0 0 P", "4 -1 0 16", "4 0 7 16"],
        ),
        bad_wasi("fd_tell", I2, &["4 P", "77 16"]),
        bad_wasi("fd_close", "(param i32) (result i32)", &["77", "-1"]),
        bad_wasi(
            "poll_oneoff",
            I4,
            &owned(&[
                "P 16 1 16".into(),
                "0 16 0 16".into(),
                "0 16 -1 16".into(),
                format!("{clock} P 1 16"),
                format!("{clock} 16 1 P"),
            ]),
        ),
    ];
    for function in &functions {
        wat.wasi(function.name, function.ty);
    }
    // The file comes first: descriptor 4.
    let mut code = format!(
        "i32.const 3 i32.const 0 i32.const {token} i32.const {length} i32.const 0 i64.const 0 i64.const 0 i32.const 0 i32.const 0 call $path_open {}\n",
        wat.say32("opened")
    );
    let mut keys = Vec::new();
    for function in &functions {
        let types: Vec<_> = function.ty[7..]
            .split([' ', ')'])
            .take_while(|t| !t.is_empty())
            .collect();
        for call in &function.calls {
            for (value, ty) in call.split_whitespace().zip(&types) {
                code.push_str(&format!("{ty}.const {value} "));
            }
            assert_eq!(
                call.split_whitespace().count(),
                types.len(),
                "{} {call}",
                function.name
            );
            let key = format!("{} {call}", function.name);
            code.push_str(&format!("call ${} {}", function.name, wat.say32(&key)));
            keys.push(key);
        }
    }
    let done = wat.say("all refused");
    wat.on(kind::START, &format!("{code}{done}"));

    let mut setup = with_neighbour();
    setup.module("hostile", &wat.build(), json!({}));
    let mut operator = setup.start();
    operator.wait_for("the end of it, or its own", |lines| {
        let ended = |l: &String| l.contains("all refused") || l.contains("starting again");
        lines.iter().any(ended).then_some(())
    });
    assert_eq!(operator.wait_for_value("hostile", "opened"), "0");
    let messages = operator.messages("hostile");
    for key in &keys {
        let result = messages
            .iter()
            .find_map(|m| m.strip_prefix(key.as_str())?.strip_prefix('='));
        assert!(result.is_some_and(|r| r != "0"), "{key}: {result:?}");
    }
    assert_eq!(operator.count("all refused"), 1);
    // What the runtime has to say of it would fill the log, and names no child.
    assert_eq!(operator.count("wasmer::"), 0);
    assert_eq!(operator.count("starting again"), 0);
    assert_neighbour_lives(&mut operator);
}

#[test]
fn an_endless_loop_is_stopped_wherever_it_is_and_the_neighbour_still_answers() {
    let mut in_event = Wat::default();
    in_event.on(kind::START, "loop br 0 end");
    let mut in_entry = Wat::default();
    in_entry.initialize("loop br 0 end");
    // Nobody listens there, so the answer is an `error` event, which has a payload.
    let mut in_alloc = Wat::default();
    let request = in_alloc.text("GET /api\n\n");
    in_alloc.on(kind::START, &format!("{request} call $request drop"));
    in_alloc.alloc("loop br 0 end i32.const 0");
    let mut by_calls = Wat::default();
    by_calls.functions("(func $f (param i32) local.get 0 i32.const 40 i32.lt_s if local.get 0 i32.const 1 i32.add call $f local.get 0 i32.const 1 i32.add call $f end)");
    by_calls.on(kind::START, "i32.const 0 call $f");
    let mut by_host = Wat::default();
    by_host.on(kind::START, "loop i64.const 7 call $cancel drop br 0 end");
    // No loop and no call: a minute of single instructions.
    let mut straight = Wat::default();
    let fill = "i32.const 0 i32.const 0 i32.const 67108864 memory.fill\n".repeat(5_000);
    straight.on(
        kind::START,
        &format!("i32.const 1024 memory.grow drop {fill}"),
    );

    let mut setup = with_neighbour();
    let limits = json!({"limits": {"eventSeconds": 0.2}});
    let children = [
        ("event", in_event, "on_event"),
        ("entry", in_entry, "its entry point"),
        ("alloc", in_alloc, "alloc"),
        ("calls", by_calls, "on_event"),
        ("host", by_host, "on_event"),
        ("straight", straight, "on_event"),
    ];
    for (name, wat, _) in &children {
        setup.module(name, &wat.build(), limits.clone());
    }
    let mut operator = setup.start();
    for (name, _, place) in &children {
        let expected =
            format!("used more than 0.2 s of CPU time in one call of {place} and was stopped");
        operator.wait_for(&format!("two ends of {name}"), |lines| {
            let own: Vec<_> = lines.iter().filter_map(|l| message(l, name)).collect();
            let ends = own.iter().filter(|m| m.contains(&expected)).count();
            (ends >= 2).then_some(())
        });
        let pauses: Vec<f64> = operator
            .messages(name)
            .iter()
            .filter_map(|m| {
                m.rsplit_once("starting again in ")?
                    .1
                    .trim_end_matches(" s")
                    .parse()
                    .ok()
            })
            .collect();
        assert!(
            pauses[1] > pauses[0],
            "{name} pauses longer each time: {pauses:?}"
        );
    }
    assert_neighbour_lives(&mut operator);
    operator.stop();
}

#[test]
fn every_way_to_end_is_put_into_words_and_hurts_nobody_else() {
    let mut setup = with_neighbour();
    let mut expected: Vec<(&str, &str)> = Vec::new();
    let mut child = |name: &'static str, text: &'static str, wat: &Wat| {
        setup.module(name, &wat.build(), json!({"limits": {"memory": "1Mi"}}));
        expected.push((name, text));
    };
    for (name, code, text) in [
        (
            "unreachable",
            "unreachable",
            "trapped in on_event: unreachable",
        ),
        (
            "division",
            "i32.const 1 i32.const 0 i32.div_s drop",
            "trapped in on_event: integer divide by zero",
        ),
        (
            "beyond",
            "i32.const 262143 i32.load drop",
            "trapped in on_event: out of bounds memory access",
        ),
        (
            "limit",
            "i32.const 0x7ffd0000 i32.const 1 i32.store",
            "trapped in on_event: out of bounds memory access",
        ),
        (
            "far",
            "i32.const -1 i32.load offset=0xffffffff drop",
            "trapped in on_event: out of bounds memory access",
        ),
        (
            "copy",
            "i32.const 0 i32.const 1024 i32.const -1 memory.copy",
            "trapped in on_event: out of bounds memory access",
        ),
    ] {
        let mut wat = Wat::default();
        wat.on(kind::START, code);
        child(name, text, &wat);
    }
    let mut wat = Wat::default();
    wat.initialize("unreachable");
    child("entry", "trapped in its entry point: unreachable", &wat);

    let mut wat = Wat::default();
    let mut hour = [0; 48];
    hour[16] = 1;
    hour[24..32].copy_from_slice(&3_600_000_000_000_u64.to_le_bytes());
    let (hour, _) = wat.place(hour);
    wat.import("host_v1", "wait", "(param i32) (result i32)");
    wat.wasi("poll_oneoff", "(param i32 i32 i32 i32) (result i32)");
    wat.initialize(&format!(
        "i32.const {hour} i32.const 0 i32.const 1 i32.const 64 call $poll_oneoff drop"
    ));
    child(
        "overslept",
        "its entry point wants to sleep for 3600 s, and may for 10 s in all",
        &wat,
    );

    let mut wat = Wat::default();
    wat.functions("(table 1 funcref) (type $none (func))");
    wat.on(kind::START, "i32.const 0 call_indirect (type $none)");
    child("null", "trapped in on_event: uninitialized element", &wat);

    for (name, code) in [
        ("recursion", ""),
        ("recursion-host", "i64.const 5 call $cancel drop"),
    ] {
        let mut wat = Wat::default();
        wat.functions(&format!("(func $f (param i64) (result i64) {code} local.get 0 i64.const 1 i64.add call $f i64.const 1 i64.add)"));
        wat.on(kind::START, "i64.const 0 call $f drop");
        child(name, "trapped in on_event: call stack exhausted", &wat);
    }
    for (name, code, text) in [
        (
            "exit-3",
            "i32.const 3 call $proc_exit",
            "exited with code 3",
        ),
        (
            "exit-0",
            "i32.const 0 call $proc_exit",
            "exited with code 0",
        ),
        (
            "exit-max",
            "i32.const -1 call $proc_exit",
            "exited with code 4294967295",
        ),
    ] {
        let mut wat = Wat::default();
        wat.wasi("proc_exit", "(param i32)");
        wat.on(kind::START, code);
        child(name, text, &wat);
    }
    for (name, code, text) in [
        ("alloc-0", "i32.const 0", "`alloc` failed (limits.memory)"),
        (
            "alloc-edge",
            "i32.const 262143",
            "trapped in alloc: returned 0x3ffff, which has no room",
        ),
        (
            "alloc-wild",
            "i32.const -16",
            "trapped in alloc: returned 0xfffffff0, which has no room",
        ),
        (
            "alloc-poll",
            "i32.const 0x7ffe0000",
            "trapped in alloc: returned 0x7ffe0000, which has no room",
        ),
        ("alloc-trap", "unreachable", "trapped in alloc: unreachable"),
    ] {
        let mut wat = Wat::default();
        let request = wat.text("GET /api\n\n");
        wat.on(kind::START, &format!("{request} call $request drop"));
        wat.alloc(code);
        child(name, text, &wat);
    }
    let mut wat = Wat::default();
    wat.functions("(memory $more 17)");
    child("too-big", "cannot be instantiated", &wat);

    // And one that asks for too much memory and is content with a no.
    let mut wat = Wat::default();
    let (grown, refused) = (wat.say32("12 pages"), wat.say32("1 more"));
    wat.on(
        kind::START,
        &format!("i32.const 12 memory.grow {grown} i32.const 1 memory.grow {refused}"),
    );
    setup.module("modest", &wat.build(), json!({"limits": {"memory": "1Mi"}}));

    let mut operator = setup.start();
    for (name, text) in expected {
        let line = operator.wait_for(&format!("the end of {name}"), |lines| {
            let mut own = lines.iter().filter_map(|l| message(l, name));
            own.find(|m| m.contains("starting again in"))
                .map(str::to_owned)
        });
        assert!(line.contains(text), "{name}: expected {text:?} in {line:?}");
    }
    assert_eq!(operator.wait_for_value("modest", "12 pages"), "4");
    assert_eq!(operator.wait_for_value("modest", "1 more"), "-1");
    assert_eq!(
        operator.count("please report this"),
        0,
        "no host function panicked"
    );
    assert_neighbour_lives(&mut operator);
    operator.stop();
}

#[test]
fn the_memory_limit_is_for_all_of_a_guests_memory() {
    let mut setup = with_neighbour();
    let limits = json!({"limits": {"memory": "1Mi"}});
    // 4 pages of its own, and two memories below the limit of 16 pages that are above it together.
    let mut wat = Wat::default();
    wat.functions("(memory $second 12) (memory $third 12)");
    let began = wat.say("began");
    wat.on(kind::START, &began);
    setup.module("crowd", &wat.build(), limits.clone());
    // A table counts elements, not bytes; it must not grow for ever either.
    let mut wat = Wat::default();
    wat.functions("(table $table 0 funcref)");
    let (large, small) = (wat.say32("large"), wat.say32("small"));
    wat.on(
        kind::START,
        &format!(
            "ref.null func i32.const 0x7fffffff table.grow $table {large}
            ref.null func i32.const 10 table.grow $table {small}"
        ),
    );
    setup.module("table", &wat.build(), limits);
    let mut operator = setup.start();
    assert_eq!(operator.wait_for_value("table", "large"), "-1");
    assert_eq!(operator.wait_for_value("table", "small"), "0");
    operator.wait_for("the end of crowd, or its beginning", |lines| {
        let mut own = lines.iter().filter_map(|l| message(l, "crowd"));
        own.next().map(|_| ())
    });
    assert!(!operator.messages("crowd").contains(&"began".to_owned()));
    assert_neighbour_lives(&mut operator);
}

#[test]
fn one_write_of_terabytes_does_not_hold_a_worker() {
    // 8,000 buffers, each of them 64 MiB: the watchdog cannot stop what the host does.
    const BUFFERS: usize = 8_000;
    let mut wat = Wat::default();
    wat.wasi("fd_write", "(param i32 i32 i32 i32) (result i32)");
    let done = wat.say("done");
    wat.on(
        kind::START,
        &format!(
            "i32.const 1020 memory.grow drop
            i32.const {PAYLOAD} i32.const 32 i32.const 67000000 i32.const {PAYLOAD} i32.sub memory.fill
            loop
              i32.const {PAYLOAD} local.get $i i32.const 8 i32.mul i32.add local.tee $j
              i32.const {} i32.store
              local.get $j i32.const 66000000 i32.store offset=4
              local.get $i i32.const 1 i32.add local.tee $i i32.const {BUFFERS} i32.lt_u br_if 0
            end
            i32.const 1 i32.const {PAYLOAD} i32.const {BUFFERS} i32.const 0 call $fd_write drop {done}",
            PAYLOAD + BUFFERS * 8
        ),
    );
    let mut setup = with_neighbour();
    setup.module(
        "hostile",
        &wat.build(),
        json!({"limits": {"eventSeconds": 0.5}}),
    );
    let mut operator = setup.start();
    operator.wait_for("its end", |lines| {
        let mut own = lines.iter().filter_map(|l| message(l, "hostile"));
        own.any(|m| m == "done" || m.contains("starting again in"))
            .then_some(())
    });
    assert_neighbour_lives(&mut operator);
}

#[test]
fn answers_that_nobody_can_take_yet_do_not_fill_the_parents_memory() {
    const CALLS: usize = 100;
    const BYTES: usize = 12 << 20;
    let proxy = FaultProxy::to_nowhere();
    let answers = proxy.inject(Fault::Canned(vec![b' '; BYTES].into()), usize::MAX, |_| {
        true
    });
    let mut wat = Wat::default();
    let get = wat.text(r#"{"version":"v1","plural":"configmaps","name":"large"}"#);
    wat.functions("(global $results (mut i64) (i64.const 0))");
    wat.on(
        kind::START,
        &format!(
            "loop {get} call $get drop
            local.get $i i32.const 1 i32.add local.tee $i i32.const {CALLS} i32.lt_u br_if 0 end"
        ),
    );
    let results = wat.say64("results");
    wat.on(
        kind::RESULT,
        &format!(
            "global.get $results i64.const 1 i64.add global.set $results
            global.get $results i64.const {CALLS} i64.eq if global.get $results {results} end"
        ),
    );
    let mut setup = Setup::through(&proxy);
    setup.module("child", &wat.build(), json!({}));
    let operator = setup.start();
    operator.wait_for_value("child", "results");
    assert_eq!(answers.hits(), CALLS);
    // All of them at once would be 1,200 MiB.
    let peak = operator.peak_memory() >> 20;
    assert!(peak < 700, "{peak} MiB");
}

#[test]
fn what_would_block_or_escape_is_refused_and_logged_once() {
    let mut wat = Wat::default();
    wat.import(
        "wasix_32v1",
        "sock_open",
        "(param i32 i32 i32 i32) (result i32)",
    );
    wat.import(
        "wasix_32v1",
        "thread_spawn_v2",
        "(param i32 i32) (result i32)",
    );
    wat.import("wasix_32v1", "proc_fork", "(param i32 i32) (result i32)");
    wat.import("wasix_32v1", "thread_sleep", "(param i64) (result i32)");
    wat.import(
        "wasix_32v1",
        "futex_wait",
        "(param i32 i32 i32 i32) (result i32)",
    );
    wat.wasi("sock_accept", "(param i32 i32 i32) (result i32)");
    wat.wasi("poll_oneoff", "(param i32 i32 i32 i32) (result i32)");
    wat.wasi("path_unlink_file", "(param i32 i32 i32) (result i32)");
    let mut code = String::new();
    for (name, arguments) in [
        ("sock_open", 4),
        ("thread_spawn_v2", 2),
        ("proc_fork", 2),
        ("futex_wait", 4),
        ("sock_accept", 3),
    ] {
        for _ in 0..2 {
            code.push_str(&"i32.const 0 ".repeat(arguments));
            code.push_str(&format!("call ${name} {}", wat.say32(name)));
        }
    }
    code.push_str(&format!(
        "i64.const 1000000000000 call $thread_sleep {}",
        wat.say32("thread_sleep")
    ));
    let path = wat.text("etc/hosts");
    code.push_str(&format!(
        "i32.const 3 {path} call $path_unlink_file {}",
        wat.say32("unlink")
    ));
    // A clock alone, of 1 s and then three times of 4 ms: 10 ms in one event is what there is.
    for (key, nanoseconds) in [
        ("sleep 1 s", 1_000_000_000_u64),
        ("sleep a", 4_000_000),
        ("sleep b", 4_000_000),
        ("sleep c", 4_000_000),
    ] {
        let mut subscription = [0; 48];
        subscription[16] = 1;
        subscription[24..32].copy_from_slice(&nanoseconds.to_le_bytes());
        let (at, _) = wat.place(subscription);
        let say = wat.say32(key);
        code.push_str(&format!(
            "i32.const {at} i32.const 0 i32.const 1 i32.const 512 call $poll_oneoff {say}"
        ));
    }
    let done = wat.say("done");
    wat.on(kind::START, &format!("{code}{done}"));
    let mut setup = with_neighbour();
    setup.module("hostile", &wat.build(), json!({}));
    let mut operator = setup.start();
    operator.wait_for_line("done");
    for (key, errno) in [
        ("sock_open", 52),
        ("thread_spawn_v2", 52),
        ("proc_fork", 52),
        ("futex_wait", 52),
        ("sock_accept", 52),
        ("thread_sleep", 52),
        ("unlink", 69),
        ("sleep 1 s", 58),
        ("sleep a", 0),
        ("sleep b", 0),
        ("sleep c", 58),
    ] {
        assert_eq!(
            operator.wait_for_value("hostile", key),
            errno.to_string(),
            "{key}"
        );
    }
    for name in [
        "wasix_32v1.sock_open",
        "wasix_32v1.thread_spawn_v2",
        "wasi_snapshot_preview1.sock_accept",
    ] {
        let line = format!("{name} is not available to a child operator: ENOSYS");
        assert_eq!(operator.count(&line), 1, "{line}");
    }
    assert_neighbour_lives(&mut operator);
}

#[test]
fn a_log_line_cannot_disturb_a_terminal_or_look_like_two() {
    let evil = "\u{1b}[2J\u{1b}]0;title\u{7}one\r\n2026-01-01T00:00:00.000Z ERROR parent two\u{9b}31m\u{0}";
    let mut wat = Wat::default();
    wat.wasi("fd_write", "(param i32 i32 i32 i32) (result i32)");
    let say = wat.say(evil);
    let (at, length) = wat.place(evil);
    let iov = [at as u32, length as u32].map(u32::to_le_bytes).concat();
    let (iov, _) = wat.place(iov);
    let done = wat.say("done");
    let write = |fd: u32| {
        format!("i32.const {fd} i32.const {iov} i32.const 1 i32.const 0 call $fd_write drop\n")
    };
    wat.on(kind::START, &format!("{say}{}{}{done}", write(1), write(2)));
    let mut setup = with_neighbour();
    setup.module("hostile", &wat.build(), json!({}));
    let operator = setup.start();
    operator.wait_for_line("done");
    for line in operator.lines() {
        assert!(!line.contains(|c: char| c.is_control()), "{line:?}");
        assert!(
            !line.contains("ERROR parent") || message(&line, "hostile").is_some(),
            "{line:?}"
        );
    }
    operator.wait_for_line(r"\u{1b}[2J\u{1b}]0;title\u{7}one\r\n2026-01-01T00:00:00.000Z ERROR parent two\u{9b}31m\u{0}");
}

#[test]
fn a_child_with_ten_thousand_events_does_not_delay_a_neighbours_single_one() {
    const EVENTS: usize = 10_000;
    let now = "i32.const 1 i64.const 0 i32.const 0 call $clock_time_get drop i32.const 0 i64.load";
    let mut flooded = Wat::default();
    flooded.wasi("clock_time_get", "(param i32 i64 i32) (result i32)");
    flooded.functions("(global $items (mut i64) (i64.const 0))");
    let watch = flooded.text(r#"{"version":"v1","plural":"configmaps"}"#);
    flooded.on(kind::START, &format!("{watch} call $watch drop"));
    // 0.3 ms of work for each event: 3 s in all.
    let progress = flooded.say64("items");
    flooded.on(
        kind::ITEM,
        &format!(
            "{now} i64.const 300000 i64.add local.set $n
            loop {now} local.get $n i64.lt_u br_if 0 end
            global.get $items i64.const 1 i64.add global.set $items
            global.get $items i64.const 1000 i64.rem_u i64.eqz if global.get $items {progress} end"
        ),
    );
    // Wants a timer event every 20 ms, and says by how many ns it came late.
    let mut punctual = Wat::default();
    punctual.wasi("clock_time_get", "(param i32 i64 i32) (result i32)");
    punctual.functions("(global $due (mut i64) (i64.const 0))");
    let late = punctual.say64("late");
    punctual.on(
        kind::TIMER,
        &format!("{now} global.get $due i64.sub {late}"),
    );
    punctual.on_any(&format!(
        "{now} i64.const 20000000 i64.add global.set $due i64.const 20000000 call $timer drop"
    ));
    // And one whose deadline is always now.
    let mut restless = Wat::default();
    restless.on_any("i64.const 0 call $timer drop");

    let items: Vec<_> = (0..EVENTS)
        .map(|i| json!({"metadata": {"name": format!("c{i}")}}))
        .collect();
    let list =
        json!({"kind": "ConfigMapList", "metadata": {"resourceVersion": "1"}, "items": items});
    let proxy = FaultProxy::to_nowhere();
    proxy.inject(Fault::Stall, usize::MAX, Request::is_watch);
    let list = proxy.inject(
        Fault::Canned(Arc::new(list.to_string().into())),
        usize::MAX,
        |_| true,
    );

    let mut setup = Setup::through(&proxy);
    setup.argument("--workers").argument("1");
    setup.module("flooded", &flooded.build(), json!({}));
    setup.module("restless", &restless.build(), json!({}));
    setup.module("punctual", &punctual.build(), json!({}));
    let operator = setup.start();
    let last = format!("items={EVENTS}");
    operator.wait_for_line(&last);
    assert_eq!(list.hits(), 1, "one listing");
    let lines = operator.lines();
    let position = |text: &str| lines.iter().position(|l| l.contains(text)).unwrap();
    let during = &lines[position("items=1000")..position(&last)];
    let mut late: Vec<u64> = during
        .iter()
        .filter_map(|l| message(l, "punctual")?.strip_prefix("late=")?.parse().ok())
        .collect();
    late.sort_unstable();
    assert!(
        late.len() >= 30,
        "only {} timers came during the flood",
        late.len()
    );
    // A turn is 16 events or 4 ms; both neighbours may be in front. The bound is for a busy machine.
    let (median, worst) = (late[late.len() / 2], late[late.len() - 1]);
    assert!(median < 30_000_000, "median {median} ns, worst {worst} ns");
    assert!(
        worst < 1_000_000_000,
        "median {median} ns, worst {worst} ns"
    );
}

#[test]
fn a_trap_at_the_very_end_of_the_stack_holds_up_nobody() {
    // The whole of it, of which a guest has not much less.
    const STACK: usize = 16 << 20;
    // Room for whatever the host does at a trap.
    const LAST: usize = 16 << 10;
    const CHILDREN: usize = 100;
    // Says how deep it is, until there is no more stack.
    let mut gauge = Wat::default();
    let depth = gauge.say32("depth");
    gauge.functions(&format!(
        "(func $f (param i32)
            local.get 0 i32.const 63 i32.and i32.eqz if local.get 0 {depth} end
            local.get 0 i32.const 1 i32.add call $f local.get 0 global.set $at)"
    ));
    gauge.on(kind::START, "i32.const 0 call $f");
    let mut setup = Setup::alone();
    setup.module("gauge", &gauge.build(), json!({}));
    let operator = setup.start();
    operator.wait_for_line("trapped in on_event: call stack exhausted");
    let depths = operator.messages("gauge");
    let depths = depths
        .iter()
        .filter_map(|m| m.strip_prefix("depth=")?.parse::<usize>().ok());
    let deepest = depths.max().unwrap();
    drop(operator);
    let frame = STACK / deepest;
    assert!((16..256).contains(&frame), "{frame} bytes");

    // Goes as deep as its argument says, and traps there inside the host.
    let mut deep = Wat::default();
    deep.wasi("args_get", "(param i32 i32) (result i32)");
    deep.functions(
        "(func $f (param i32)
            local.get 0 i32.eqz if i32.const 0 i32.const 0 i32.const -1 memory.fill end
            local.get 0 i32.const 1 i32.sub call $f local.get 0 global.set $at)",
    );
    deep.on(
        kind::START,
        &format!(
            "i32.const 0 i32.const {PAYLOAD} call $args_get drop
            i32.const 4 i32.load local.set $i
            loop
              local.get $j i32.const 10 i32.mul local.get $i i32.load8_u i32.const 48 i32.sub i32.add local.set $j
              local.get $i i32.const 1 i32.add local.tee $i i32.load8_u br_if 0
            end
            local.get $j call $f"
        ),
    );
    let mut trapping = Wat::default();
    trapping.on(kind::START, "unreachable");
    let mut setup = Setup::alone();
    setup.argument("--workers").argument("2");
    for number in 0..4 {
        setup.module(&format!("neighbour-{number}"), &ticking(), json!({}));
        setup.module(&format!("trapping-{number}"), &trapping.build(), json!({}));
    }
    std::fs::write(setup.directory.path().join("deep.wasm"), deep.build()).unwrap();
    // In small steps where the stack ends, in larger ones before that.
    let (least, end, most) = (deepest - LAST / frame, deepest - 32, deepest + 128);
    let stride = (end - least).div_ceil(CHILDREN);
    let depths: Vec<_> = (least..end).step_by(stride).chain(end..most).collect();
    for depth in &depths {
        let fields = json!({"args": [depth.to_string()]});
        setup.child(&format!("deep-{depth}"), "deep.wasm", fields);
    }
    let mut operator = setup.start();
    let ends = |lines: &[String], why: &str| -> usize {
        let ended = |depth: &&usize| {
            let name = format!("deep-{depth}");
            let mut own = lines.iter().filter_map(|l| message(l, &name));
            own.any(|m| m.contains(why))
        };
        depths.iter().filter(ended).count()
    };
    operator.wait_for("the end of all", |lines| {
        (ends(lines, "trapped in on_event: ") == depths.len()).then_some(())
    });
    let lines = operator.lines();
    let (inside, exhausted) = (
        ends(&lines, "out of bounds memory access"),
        ends(&lines, "call stack exhausted"),
    );
    assert!(inside > 0 && exhausted > 0, "{inside} and {exhausted}");
    // Everybody is still served, on both workers.
    for number in 0..4 {
        let name = format!("neighbour-{number}");
        let ticks = operator.messages(&name).len();
        operator.wait_for(&format!("two more ticks of {name}"), |lines| {
            let now = lines.iter().filter_map(|l| message(l, &name)).count();
            (now >= ticks + 2).then_some(())
        });
        let name = format!("trapping-{number}");
        operator.wait_for(&format!("two ends of {name}"), |lines| {
            let own = lines.iter().filter_map(|l| message(l, &name));
            (own.filter(|m| m.contains("unreachable")).count() >= 2).then_some(())
        });
    }
    operator.stop();
}
