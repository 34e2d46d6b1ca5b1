//! `wasm-operator build-rust`: ordinary kube-rs programs become children, and those that cannot
//! are told why before rustc runs.
//!
//! The programs are in `tests/rust-operators`, a workspace that knows nothing of wasm-operator.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::cluster::Cluster;
use common::operator::{Operator, PROGRAM, Setup, artifacts, message};
use common::{PATIENCE, repository, wait_for};
use serde_json::json;

/// What is made on the way stays between runs: a build takes minutes the first time.
fn build_directory() -> PathBuf {
    artifacts().with_file_name("rust-build")
}

fn build_rust(project: &Path, arguments: &[&str], output: &Path) -> Output {
    Command::new(PROGRAM)
        .arg("build-rust")
        .arg(project)
        .args(arguments)
        .arg("--output")
        .arg(output)
        .env("WASM_OPERATOR_BUILD_DIR", build_directory())
        // These would break a build that took them over.
        .env("RUSTFLAGS", "-C target-cpu=native --cfg nonsense")
        .env("CARGO_BUILD_TARGET", "nowhere")
        .output()
        .expect("wasm-operator")
}

/// What a build that has to fail says.
fn refusal(project: &Path) -> String {
    let directory = tempfile::tempdir().unwrap();
    let module = directory.path().join("out.wasm");
    let output = build_rust(project, &[], &module);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(!module.exists());
    said
}

/// All files beneath a directory, with what is in them.
fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let content = fs::read(&path).unwrap();
                all.insert(path, content);
            }
        }
    }
    all
}

/// Waits until a child has slept.
fn asleep(operator: &Operator, child: &str) {
    operator.wait_for(&format!("{child} sleeps"), |lines| {
        let mut messages = lines.iter().filter_map(|line| message(line, child));
        messages
            .find(|m| m.starts_with("hibernated in"))
            .map(|_| ())
    });
}

#[test]
fn ordinary_operators_become_children_and_do_their_work() {
    let checkout = repository().join("tests/rust-operators");
    let before = files(&checkout);
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let crd = fs::read(checkout.join("greeter/crd.yaml")).unwrap();
    cluster.install_crd(&crd, "/apis/example.com/v1/greetings");

    let mut setup = Setup::on(cluster);
    // Each sleeps between any two events.
    setup.set("RUST_LOG", "debug,wasmer=error,virtual_fs=error");
    for (name, arguments) in [
        ("greeter", &["greeter"][..]),
        ("heartbeat", &["watchers", "--bin", "heartbeat"]),
        ("mirror", &["--bin", "mirror"]),
    ] {
        let module = setup.directory.path().join(format!("{name}.wasm"));
        let output = build_rust(&checkout, arguments, &module);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{name}: {said}");
        assert!(!said.contains("may not work"), "{name}: {said}");
        let line = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(line.contains(" KiB  "), "{line}");
        let env = [
            ("NAMESPACE", &*namespace.name),
            ("NO_COLOR", "1"),
            ("RUST_LOG", "info"),
        ]
        .map(|(name, value)| json!({"name": name, "value": value}));
        let mut fields = json!({"env": env, "idleSeconds": 0.2, "prediction": "never"});
        if name == "greeter" {
            fields["args"] = json!(["--word", "welcome"]);
        }
        setup.child(name, module.to_str().unwrap(), fields);
    }
    assert!(files(&checkout) == before, "the checkout has changed");

    let greetings = format!(
        "/apis/example.com/v1/namespaces/{}/greetings",
        namespace.name
    );
    let greeting = |name: &str, whom: &str| {
        json!({
            "apiVersion": "example.com/v1", "kind": "Greeting",
            "metadata": {"name": name, "namespace": namespace.name}, "spec": {"name": whom},
        })
    };
    let text = |name: &str, expected: &str| {
        wait_for(&format!("{name}: {expected}"), PATIENCE, || {
            (namespace.data(name)?["text"] == expected).then_some(())
        });
    };
    let mut operator = setup.start();

    // A Controller with a finalizer, its status, an object that it owns, and arguments.
    cluster.create(&greetings, &greeting("world", "world"));
    text("world", "welcome, world");
    let status = wait_for("a status", PATIENCE, || {
        let object = cluster.get(&format!("{greetings}/world"))?;
        object["status"]["greeted"].as_str().map(str::to_owned)
    });
    assert_eq!(status, "welcome, world");
    asleep(&operator, "greeter");
    // What it owns comes back; what it watches changes the text.
    cluster.delete(&format!("{}/world", namespace.config_maps()));
    text("world", "welcome, world");
    let words = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "data": {"word": "ahoy"},
        "metadata": {"name": "words", "namespace": namespace.name},
    });
    cluster.create(&namespace.config_maps(), &words);
    text("world", "ahoy, world");
    // The second controller in the same program sees the first one's store.
    namespace.create_config_map("counted", json!({"count": "greetings"}));
    let greeted = |count: &str| {
        wait_for(&format!("{count} greetings"), PATIENCE, || {
            (namespace.data("counted")?["greetings"] == count).then_some(())
        });
    };
    greeted("1");
    cluster.create(&greetings, &greeting("moon", "moon"));
    greeted("2");
    // The finalizer's other half, and Events.
    cluster.delete(&format!("{greetings}/world"));
    greeted("1");
    let events = format!(
        "/apis/events.k8s.io/v1/namespaces/{}/events",
        namespace.name
    );
    let parted = wait_for("an Event", PATIENCE, || {
        let events = cluster.get(&events)?;
        let events = events["items"].as_array()?.clone();
        events.into_iter().find(|event| event["reason"] == "Parted")
    });
    assert_eq!(parted["note"], "good-bye, world");

    // A watcher alone, with a reflector beside it.
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "treasure", "namespace": namespace.name},
    });
    let secrets = format!("/api/v1/namespaces/{}/secrets", namespace.name);
    cluster.create(&secrets, &secret);
    let mirrored = |state: &str| {
        wait_for(&format!("treasure is {state}"), PATIENCE, || {
            let data = namespace.data("mirror")?;
            (data["treasure"] == state).then_some(data)
        })
    };
    let maps = mirrored("there")["maps"].clone();
    assert!(
        maps.as_str()
            .is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n >= 3)),
        "{maps}"
    );
    asleep(&operator, "mirror");
    cluster.delete(&format!("{secrets}/treasure"));
    mirrored("gone");

    // A Lease that is renewed each second.
    let lease = format!(
        "/apis/coordination.k8s.io/v1/namespaces/{}/leases/heartbeat",
        namespace.name
    );
    let beats = || -> Option<i64> { cluster.get(&lease)?["spec"]["leaseTransitions"].as_i64() };
    let first = wait_for("a heartbeat", PATIENCE, beats);
    wait_for("two more", PATIENCE, || {
        (beats()? >= first + 2).then_some(())
    });

    // Both kinds of good end.
    operator.stop();
    assert_eq!(
        operator.count("starting again"),
        0,
        "{:#?}",
        operator.lines()
    );
    operator.wait_for_line("stopped after");
    operator.wait_for_line("good-bye");
    assert!(files(&checkout) == before, "the checkout has changed");
}

/// A project of these files.
fn project(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (path, content) in files {
        let path = directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    directory
}

fn package(name: &str, dependencies: &str) -> String {
    format!(
        "[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2021\"\n\n[features]\ntokio = []\n\n[dependencies]\n{dependencies}"
    )
}

#[test]
fn what_a_child_cannot_have_is_named_before_anything_is_compiled() {
    // Only their names matter; the real ones would have to be fetched.
    let project = project(&[
        (
            "Cargo.toml",
            &package(
                "operator",
                "health = { path = \"health\" }\nreqwest = { path = \"reqwest\" }\n",
            ),
        ),
        ("src/main.rs", "fn main() { this is not even Rust }"),
        (
            "health/Cargo.toml",
            &package(
                "health",
                "axum = { path = \"../axum\", features = [\"tokio\"] }\n",
            ),
        ),
        ("health/src/lib.rs", ""),
        ("axum/Cargo.toml", &package("axum", "")),
        ("axum/src/lib.rs", ""),
        ("reqwest/Cargo.toml", &package("reqwest", "")),
        ("reqwest/src/lib.rs", ""),
    ]);
    let before = files(project.path());
    let said = refusal(project.path());
    for part in [
        "this cannot become a child",
        "axum 0.1.0: a web server, and a child cannot listen",
        "wanted by: operator 0.1.0 -> health 0.1.0 -> axum 0.1.0",
        "the parent serves metrics and health",
        "reqwest 0.1.0: it opens connections of its own",
        "wanted by: operator 0.1.0 -> reqwest 0.1.0",
    ] {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    assert!(!said.contains("Compiling"), "{said}");
    assert!(
        files(project.path()) == before,
        "there is no lock file, and there stays none"
    );
}

#[test]
fn the_likely_cause_follows_rustcs_errors() {
    let project = project(&[
        (
            "Cargo.toml",
            &package("operator", "tokio = { path = \"tokio\" }\n"),
        ),
        (
            "src/main.rs",
            "use tokio::net::TcpListener;\n\nfn main() {\n    let _: Option<TcpListener> = None;\n}\n",
        ),
        ("tokio/Cargo.toml", &package("tokio", "")),
        ("tokio/src/lib.rs", ""),
    ]);
    let said = refusal(project.path());
    let (rustc, ours) = said.split_once("cargo build failed").expect(&said);
    assert!(rustc.contains("error[E0432]"), "{said}");
    let place = project.path().join("src/main.rs");
    assert!(
        ours.contains(&format!("{}:1: a child cannot listen", place.display())),
        "{said}"
    );
}

#[test]
fn what_is_not_a_project_is_told() {
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("there is no Cargo.toml"));
    let library = project(&[("Cargo.toml", &package("library", "")), ("src/lib.rs", "")]);
    assert!(refusal(library.path()).contains("a child needs a `main`"));
    let said = refusal(&repository().join("tests/rust-operators"));
    assert!(
        said.contains("which package? there are: greeter, watchers"),
        "{said}"
    );
}
