//! `wasm-operator build-go`, on programs made for it: small ones, so that Go has little to compile.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::cluster::Cluster;
use common::fault_proxy::{Fault, FaultProxy};
use common::operator::{PROGRAM, Setup};
use serde_json::json;
use tempfile::TempDir;

/// A checkout, in a place with a space in its name.
struct Project(TempDir);

impl Project {
    fn new(files: &[(&str, &str)]) -> Self {
        let project = Self(TempDir::with_prefix("a checkout ").unwrap());
        for (path, content) in files {
            let path = project.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        project
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// All its files and what is in them.
    fn content(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut content = BTreeMap::new();
        let mut directories = vec![self.path().to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    content.insert(path.clone(), fs::read(path).unwrap());
                }
            }
        }
        content
    }

    fn build(&self, arguments: &[&str], environment: &[(&str, &str)]) -> (Output, PathBuf) {
        let out = self.path().with_extension("out").join("child.wasm");
        let output = Command::new(PROGRAM)
            .arg("build-go")
            .arg(self.path())
            .args(arguments)
            .arg("-o")
            .arg(&out)
            .env_remove("GOFLAGS")
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        (output, out)
    }

    /// Builds it, and says what is wrong with that.
    fn module(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Vec<u8> {
        let before = self.content();
        let (output, out) = self.build(arguments, environment);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(self.content(), before, "the checkout is as it was");
        let module = fs::read(&out).unwrap();
        fs::remove_dir_all(out.parent().unwrap()).unwrap();
        module
    }

    /// What is said of it instead.
    fn refusal(&self, arguments: &[&str]) -> String {
        let (output, out) = self.build(arguments, &[]);
        assert!(!output.status.success());
        assert!(!out.exists());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

const MODULE: &str = "module example.com/x\n\ngo 1.24\n";
const HELLO: &str = "package main\n\nimport \"fmt\"\n\nfunc main() { fmt.Println(\"hello\") }\n";

/// A program with what ordinary ones have: packages, a module beside it, embedded files, constraints.
fn ordinary() -> Project {
    Project::new(&[
        (
            "go.mod",
            "module example.com/x\n\ngo 1.24\n\nrequire example.com/y v1.2.3\n\nreplace example.com/y => ./y\n",
        ),
        ("y/go.mod", "module example.com/y\n\ngo 1.24\n"),
        ("y/y.go", "package y\n\nconst Y = \"beside\"\n"),
        (
            "cmd/manager/main.go",
            "package main\n\nimport (\n\t_ \"embed\"\n\t\"fmt\"\n\n\t\"example.com/x/internal\"\n\t\"example.com/y\"\n)\n\n//go:embed text\nvar text string\n\nfunc main() { fmt.Println(text, internal.X, y.Y, version) }\n",
        ),
        (
            "cmd/manager/version.go",
            "package main\n\nvar version = \"none\"\n",
        ),
        (
            "cmd/manager/mount_linux.go",
            "package main\n\nimport \"syscall\"\n\nvar _ = syscall.Mount\n",
        ),
        ("cmd/manager/text", "embedded"),
        ("internal/x.go", "package internal\n\nconst X = 1\n"),
        // Of somebody who vendors: it is not asked.
        ("vendor/modules.txt", "# outdated\n"),
    ])
}

#[test]
fn the_same_source_gives_the_same_bytes_wherever_it_is() {
    let (one, two) = (ordinary(), ordinary());
    let elsewhere = tempfile::tempdir().unwrap();
    let arguments = ["./cmd/manager", "--ldflags", "-X main.version=7"];
    let first = one.module(&arguments, &[("GOFLAGS", "-mod=vendor")]);
    let place = elsewhere.path().to_str().unwrap();
    let second = two.module(&arguments, &[("WASM_OPERATOR_BUILD_DIR", place)]);
    assert!(
        first == second,
        "{} and {} bytes",
        first.len(),
        second.len()
    );

    let mut setup = Setup::alone();
    setup.module("child", &first, json!({}));
    let operator = setup.start();
    operator.wait_for_line("embedded 1 beside 7");
}

#[test]
fn a_workspace_and_the_only_program_in_it() {
    let project = Project::new(&[
        ("go.work", "go 1.24\n\nuse (\n\t./x\n\t./y\n)\n"),
        ("x/go.mod", MODULE),
        (
            "x/main.go",
            "package main\n\nimport (\n\t\"fmt\"\n\n\t\"example.com/y\"\n)\n\nfunc main() { fmt.Println(y.Y) }\n",
        ),
        ("y/go.mod", "module example.com/y\n\ngo 1.24\n"),
        ("y/y.go", "package y\n\nconst Y = \"in a workspace\"\n"),
    ]);
    let before = project.content();
    let out = tempfile::tempdir().unwrap();
    let module = out.path().join("x.wasm");
    let output = Command::new(PROGRAM)
        .arg("build-go")
        .arg(project.path().join("x"))
        .arg("-o")
        .arg(&module)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(project.content(), before);
    let mut setup = Setup::alone();
    setup.module("child", &fs::read(module).unwrap(), json!({}));
    setup.start().wait_for_line("in a workspace");
}

#[test]
fn what_cannot_be_built_is_told() {
    let several = Project::new(&[
        ("go.mod", MODULE),
        ("cmd/a/main.go", HELLO),
        ("cmd/b/main.go", HELLO),
        ("lib/lib.go", "package lib\n"),
    ]);
    let said = several.refusal(&[]);
    assert!(
        said.contains("name one after PROJECT: example.com/x/cmd/a, example.com/x/cmd/b"),
        "{said}"
    );
    let said = several.refusal(&["./lib"]);
    assert!(
        said.contains("example.com/x/lib is package lib, not a program"),
        "{said}"
    );

    let said = Project::new(&[("go.mod", MODULE), ("x.go", "package x\n")]).refusal(&[]);
    assert!(said.contains("there is no program"), "{said}");
    let said = Project::new(&[("main.go", HELLO)]).refusal(&[]);
    assert!(said.contains("needs a go.mod"), "{said}");

    let killer = "package main\n\nimport \"syscall\"\n\nfunc main() { syscall.Mount(\"\", \"\", \"\", 0, \"\") }\n";
    let said = Project::new(&[("go.mod", MODULE), ("main.go", killer)]).refusal(&[]);
    // As Go says it, and what helps.
    assert!(
        said.contains("main.go:5:23: undefined: syscall.Mount"),
        "{said}"
    );
    assert!(
        said.contains("uses syscall.Mount, which is not there for wasip1"),
        "{said}"
    );
}

/// Calls the API server before `main`, through the way of client-go: certificates and all.
const EARLY: &str = r#"package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"time"
)

var early = ask()

func ask() string {
	time.Sleep(50 * time.Millisecond)
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{ServerName: "x"}}}
	answer, err := client.Get("https://kubernetes.default:443/version")
	if err != nil {
		return err.Error()
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return fmt.Sprintf("%d bytes, %v", len(text), err)
}

func main() {
	fmt.Println("early:", early)
	fmt.Println("late:", ask())
	_, err := http.Get("https://example.com/")
	fmt.Println("elsewhere:", err)
	select {}
}
"#;

#[test]
fn initialisers_may_call_the_api_server_and_wait_for_some_time() {
    let module = Project::new(&[("go.mod", MODULE), ("main.go", EARLY)]).module(&[], &[]);
    let cluster = Cluster::shared();
    let mut setup = Setup::on(cluster);
    setup.module("child", &module, json!({}));
    let mut operator = setup.start();
    let elsewhere = operator.wait_for_line("elsewhere:");
    assert!(
        elsewhere.contains("reaches the Kubernetes API server and nothing else"),
        "{elsewhere}"
    );
    let messages = operator.messages("child");
    let of = |what| {
        messages
            .iter()
            .find_map(|m| m.strip_prefix(what))
            .map(str::to_owned)
    };
    assert!(
        of("early: ").unwrap().ends_with(" bytes, <nil>"),
        "{messages:?}"
    );
    assert_eq!(of("early: "), of("late: "));
    operator.stop();

    // Nobody answers: the start goes on in the end, and its neighbour is not held up meanwhile.
    let proxy = FaultProxy::to(cluster);
    let stall = proxy.inject(Fault::Stall, usize::MAX, |request| {
        request.path == "/version"
    });
    let mut setup = Setup::through(&proxy);
    setup.module("child", &module, json!({}));
    let (source, target) = (cluster.namespace(), cluster.namespace());
    let env = [
        ("IN_NAMESPACE", source.name.as_str()),
        ("OUT_NAMESPACE", target.name.as_str()),
    ];
    setup.guest("neighbour", "ring-thin", &env, json!({}));
    setup.argument("--workers").argument("1");
    let operator = setup.start();
    stall.wait_for_hits(1);
    source.set_nonce("object", 1);
    target.wait_for_nonce("object", 1);
    assert_eq!(operator.count("early:"), 0);
    let line = operator.wait_for_line("early:");
    assert!(line.contains("took too long"), "{line}");
}
