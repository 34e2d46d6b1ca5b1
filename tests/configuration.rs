//! The command line and `wasm_config.yaml`, as a person meets them. No cluster.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::PATIENCE;
use common::fault_proxy::{Fault, FaultProxy};
use common::operator::{Operator, PROGRAM, Setup, artifacts, kubeconfig, message};
use common::wat::{Wat, ticking};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn directory(config: &str, files: &[(&str, &[u8])]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("wasm_config.yaml"), config).unwrap();
    for (name, content) in files {
        std::fs::write(directory.path().join(name), content).unwrap();
    }
    directory
}

fn command(arguments: &[&str], directory: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(arguments)
        .arg(directory)
        .env_remove("RUST_LOG");
    command
}

fn check(directory: &TempDir) -> (Option<i32>, String, String) {
    let output = command(&["check"], directory.path()).output().unwrap();
    let prefix = format!("{}/", directory.path().display());
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(&prefix, "");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn wat(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap()
}

#[test]
fn check_accepts_a_good_configuration() {
    let config = "# Two of them\r\nname: a\r\nwasm: a.wasm\r\nenv:\r\n- name: TEXT\r\n  value: |\r\n    one\r\n    ---\r\n    two\r\n---\r\n---\r\nname: b\r\nwasm: ./a.wasm\r\nargs: [-v]\r\nserviceAccountName: someone\r\nnamespace: somewhere\r\nlimits: {memory: 64Mi, eventSeconds: 0.5, operations: 16}\r\n";
    let directory = directory(config, &[("a.wasm", &ticking())]);
    let (code, out, err) = check(&directory);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert_eq!(out, "2 children in order, 0 problems\n");
}

#[test]
fn check_reports_all_problems_at_once_with_document_line_and_field() {
    let bare = wat("(module (memory (export \"memory\") 1))");
    let mut version_2 = Wat::default();
    version_2.import("kube_v2", "get_many", "(param i32 i32) (result i64)");
    let mut unknown = Wat::default();
    unknown.import("host_v1", "spawn", "(param i32) (result i32)");
    let starting = wat(r#"(module (memory (export "memory") 1) (func $f) (start $f)
            (func (export "_initialize")) (func (export "_start"))
            (func (export "alloc") (param i64) (result i32) i32.const 0)
            (func (export "on_event") (param i64 i32 i32 i32)))"#);
    let config = "\
name: good
wasm: good.wasm
---
name: good
wasm: missing.wasm
colour: red
---
name: text
wasm: text.wasm
---
name: bare
wasm: bare.wasm
---
name: later
wasm: later.wasm
---
name: unknown
wasm: unknown.wasm
---
name: starting
wasm: starting.wasm
---
name: component
wasm: component.wasm
limits:
  memory: much
";
    let directory = directory(
        config,
        &[
            ("good.wasm", &ticking()),
            ("text.wasm", b"#!/bin/sh\n"),
            ("bare.wasm", &bare),
            ("later.wasm", &version_2.build()),
            ("unknown.wasm", &unknown.build()),
            ("starting.wasm", &starting),
            ("component.wasm", &wat("(component)")),
        ],
    );
    let (code, out, err) = check(&directory);
    assert_eq!(code, Some(1));
    let mut lines = err.lines();
    for expected in [
        "wasm_config.yaml:4: document 2, `name`: \"good\" is already used in line 1",
        "wasm_config.yaml:5: document 2, `wasm`: missing.wasm: No such file",
        "wasm_config.yaml:6: document 2, `colour`: unknown field; there are name, wasm,",
        "wasm_config.yaml:9: document 3, `wasm`: text.wasm not a WebAssembly module",
        "wasm_config.yaml:12: document 4, `wasm`: bare.wasm lacks the export `alloc`",
        "wasm_config.yaml:12: document 4, `wasm`: bare.wasm lacks the export `on_event`",
        "wasm_config.yaml:12: document 4, `wasm`: bare.wasm must export exactly one of `_start` and `_initialize`",
        "wasm_config.yaml:15: document 5, `wasm`: later.wasm imports `kube_v2`: this wasm-operator serves `kube_v1`",
        "wasm_config.yaml:18: document 6, `wasm`: unknown.wasm imports `host_v1.spawn`, which nothing here provides",
        "wasm_config.yaml:21: document 7, `wasm`: starting.wasm export `alloc` has the type",
        "wasm_config.yaml:21: document 7, `wasm`: starting.wasm must export exactly one of",
        "wasm_config.yaml:21: document 7, `wasm`: starting.wasm has a start function",
        "wasm_config.yaml:26: document 8, `limits.memory`: must be a number of bytes",
    ] {
        let line = lines.next().unwrap_or_default();
        assert!(line.starts_with(expected), "{expected}\n{line}\n\n{err}");
    }
    assert_eq!(lines.next(), None);
    assert_eq!(out, "1 child in order, 13 problems\n");
}

#[test]
fn check_tells_a_component_from_a_module() {
    let directory = directory(
        "name: a\nwasm: a.wasm\n",
        &[("a.wasm", &wat("(component)"))],
    );
    let (code, _, err) = check(&directory);
    assert_eq!(code, Some(1));
    assert!(err.contains("is a WebAssembly component"), "{err}");
}

#[test]
fn a_missing_configuration_and_bad_yaml_are_told_with_the_file() {
    let empty = tempfile::tempdir().unwrap();
    let (code, _, err) = check(&empty);
    assert_eq!(code, Some(1));
    assert!(err.starts_with("wasm_config.yaml:1: "), "{err}");
    let broken = directory(
        "name: a\nwasm: a.wasm\n---\nname: [\n",
        &[("a.wasm", &ticking())],
    );
    let (code, out, err) = check(&broken);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("document 2") && err.contains("nothing after this is read"),
        "{err}"
    );
    assert_eq!(out, "1 child in order, 1 problem\n");
}

#[test]
fn a_wrong_command_line_is_exit_code_2() {
    let directory = tempfile::tempdir().unwrap();
    for arguments in [
        &["run", "--workers", "0"][..],
        &["run", "--colour"],
        &["check", "x"],
    ] {
        let output = command(arguments, directory.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(err.contains("try '--help'"), "{arguments:?}: {err}");
    }
    let output = Command::new(PROGRAM).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "no arguments");
}

/// `run` where no configuration leads to an API server.
fn run_without_cluster(arguments: &[&str], home: &Path, kubeconfig: Option<&Path>) -> Output {
    let directory = directory("name: a\nwasm: a.wasm\n", &[("a.wasm", &ticking())]);
    let mut command = command(arguments, directory.path());
    command
        .env("HOME", home)
        .env_remove("KUBECONFIG")
        .env_remove("KUBERNETES_SERVICE_HOST")
        .env_remove("KUBERNETES_SERVICE_PORT");
    if let Some(kubeconfig) = kubeconfig {
        command.env("KUBECONFIG", kubeconfig);
    }
    command.output().unwrap()
}

#[test]
fn run_without_a_usable_kubeconfig_is_one_clear_error() {
    let home = tempfile::tempdir().unwrap();
    let broken = home.path().join("broken");
    std::fs::write(&broken, "clusters: [").unwrap();
    let good = home.path().join("good");
    std::fs::write(&good, kubeconfig("http://127.0.0.1:1")).unwrap();
    for (arguments, kubeconfig, expected) in [
        (&["run"][..], None, "KUBECONFIG"),
        (&["run"], Some(home.path().join("missing")), "missing"),
        (&["run"], Some(broken), "kubeconfig"),
        (&["run", "--context", "elsewhere"], Some(good), "elsewhere"),
    ] {
        let output = run_without_cluster(arguments, home.path(), kubeconfig.as_deref());
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert_eq!(err.matches("ERROR").count(), 1, "{err}");
        assert!(err.contains(expected), "{expected}: {err}");
    }
}

#[test]
fn run_is_what_is_done_when_no_command_is_given() {
    let directory = directory("name: a\nwasm: a.wasm\n", &[("a.wasm", &ticking())]);
    let kubeconfig_file = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig_file, kubeconfig("http://127.0.0.1:1")).unwrap();
    for arguments in [&[][..], &["run"]] {
        let mut command = command(arguments, directory.path());
        command
            .arg("--cache-dir")
            .arg(artifacts())
            .env("KUBECONFIG", &kubeconfig_file);
        let mut operator = Operator::spawn(command);
        operator.wait_for_line("runs 1 child");
        operator.wait_for_value("a", "tick");
        operator.stop();
    }
}

#[test]
fn the_cache_directory_may_come_from_the_environment() {
    let directory = directory("name: a\nwasm: a.wasm\n", &[("a.wasm", &ticking())]);
    let kubeconfig_file = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig_file, kubeconfig("http://127.0.0.1:1")).unwrap();
    for (place, arguments) in [("one", &[][..]), ("two", &["run"])] {
        let cache = directory.path().join(place);
        let mut command = command(arguments, directory.path());
        command
            .env("KUBECONFIG", &kubeconfig_file)
            .env("WASM_OPERATOR_CACHE_DIR", &cache);
        let mut operator = Operator::spawn(command);
        operator.wait_for_value("a", "tick");
        operator.stop();
        let is_manifest = |path: PathBuf| path.extension().is_some_and(|e| e == "manifest");
        assert_eq!(
            std::fs::read_dir(&cache)
                .unwrap()
                .filter(|entry| is_manifest(entry.as_ref().unwrap().path()))
                .count(),
            1,
            "one artifact"
        );
    }
    let output = command(&["check"], directory.path())
        .env("WASM_OPERATOR_CACHE_DIR", directory.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_bad_child_is_logged_and_does_not_keep_the_others_from_starting() {
    let mut setup = Setup::alone();
    setup
        .module("good", &ticking(), json!({}))
        .module("bad", &ticking(), json!({"limits": {"memory": 5}}))
        .module("worse", b"not wasm", json!({}));
    let mut operator = setup.start();
    operator.wait_for_value("good", "tick");
    operator.wait_for_line("document 2, `limits.memory`");
    // The file may be put right while the parent runs.
    operator.wait_for_line("not a WebAssembly module");
    operator.wait_for_line("starting again in");
    operator.stop();
}

#[test]
fn run_with_no_usable_child_at_all_ends_with_code_1() {
    let mut setup = Setup::alone();
    setup.module("a", &ticking(), json!({"colour": "red"}));
    let mut operator = setup.start();
    let status = operator.wait_exit(PATIENCE);
    assert_eq!(status.code(), Some(1));
    operator.wait_for_line("`colour`: unknown field");
    operator.wait_for_line("no child in");
}

#[test]
fn a_module_comes_from_a_server_and_must_have_its_hash() {
    let wasm = ticking();
    let hash: String = Sha256::digest(&wasm)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let server = FaultProxy::to_nowhere();
    let module = server.inject(Fault::Canned(wasm.into()), usize::MAX, |r| {
        r.path == "/good.wasm" || r.path == "/other.wasm"
    });
    let cut = server.inject(Fault::Cut { after: 0 }, usize::MAX, |r| {
        r.path == "/cut.wasm"
    });
    let mut setup = Setup::alone();
    let other = "0".repeat(64);
    for (name, hash) in [
        ("good", &hash.to_uppercase()),
        ("other", &other),
        ("missing", &hash),
        ("cut", &hash),
    ] {
        let url = format!("{}/{name}.wasm", server.url());
        setup.child(name, &url, json!({"sha256": hash}));
    }
    setup.child("no-hash", &format!("{}/good.wasm", server.url()), json!({}));
    let mut operator = setup.start();
    operator.wait_for_value("good", "tick");
    operator.wait_for_line("document 5, `sha256`: a URL in `wasm` needs");
    for (name, reason) in [
        ("other", format!("its SHA-256 is {hash}, not {other}")),
        ("missing", "the server answered 404".to_owned()),
        ("cut", String::new()),
    ] {
        let failure = operator.wait_for(&format!("failure of {name}"), |lines| {
            let mut own = lines.iter().filter_map(|l| message(l, name));
            own.find(|m| m.contains("starting again in"))
                .map(str::to_owned)
        });
        assert!(failure.contains(&reason), "{name}: {failure}");
    }
    assert!(module.hits() >= 2 && cut.hits() >= 1);
    operator.stop();
}

#[test]
fn a_server_that_does_not_answer_does_not_keep_the_parent_from_stopping() {
    let server = FaultProxy::to_nowhere();
    let stall = server.inject(Fault::Stall, usize::MAX, |_| true);
    let mut setup = Setup::alone();
    let fields = json!({"sha256": "0".repeat(64)});
    setup.child("waiting", &format!("{}/a.wasm", server.url()), fields);
    setup.module("neighbour", &ticking(), json!({}));
    setup.argument("--grace-period").argument("1");
    let mut operator = setup.start();
    stall.wait_for_hits(1);
    operator.wait_for_value("neighbour", "tick");
    operator.stop();
}
