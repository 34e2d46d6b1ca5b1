//! What a child cannot have, looked for in an operator's crates and sources before it is built:
//! rustc's errors say which name is missing, and not why.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::rust_mirror::{Mirror, SUPPORT_LINK};
use crate::rust_support::{self, StandIn};

/// What `cargo metadata` says.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    /// All packages that were looked at.
    pub packages: Vec<Package>,
    /// Those of the workspace, by their ids.
    pub workspace_members: Vec<String>,
    /// The workspace's root.
    pub workspace_root: PathBuf,
    /// Who uses whom; not there with `--no-deps`.
    pub resolve: Option<Resolve>,
}

/// A package.
#[derive(Debug, Deserialize)]
pub struct Package {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Where it comes from; nothing for a path.
    pub source: Option<String>,
    /// Its Cargo.toml.
    pub manifest_path: PathBuf,
    /// What it is about to build.
    pub targets: Vec<Target>,
    /// The program that `cargo run` runs.
    pub default_run: Option<String>,
    /// The library of another language that it builds or links to.
    pub links: Option<String>,
    /// What its manifest depends on.
    pub dependencies: Vec<Dependency>,
}

/// A library, program or test.
#[derive(Debug, Deserialize)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// `bin`, `lib` and so on.
    pub kind: Vec<String>,
}

/// A line of a manifest.
#[derive(Debug, Deserialize)]
pub struct Dependency {
    /// The package's name.
    pub name: String,
    /// `build`, `dev`, or nothing.
    pub kind: Option<String>,
}

/// Who uses whom.
#[derive(Debug, Deserialize)]
pub struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<Edge>,
}

#[derive(Debug, Deserialize)]
struct Edge {
    pkg: String,
    dep_kinds: Vec<EdgeKind>,
}

#[derive(Debug, Deserialize)]
struct EdgeKind {
    kind: Option<String>,
}

/// What is compiled, by name and version, with which features: `cargo metadata` tells of optional
/// crates too that nobody has turned on, `cargo tree` does not.
#[derive(Debug, Default)]
pub struct Used(HashMap<(String, String), Vec<String>>);

impl Used {
    /// How `cargo tree` has to be asked.
    pub const ARGUMENTS: &[&str] = &[
        "--edges",
        "normal,no-proc-macro",
        "--prefix",
        "none",
        "--format",
        "{f}\t{p}",
    ];

    /// Reads what it answers.
    pub fn read(tree: &str) -> Self {
        let lines = tree.lines().filter_map(|line| {
            let (features, package) = line.split_once('\t')?;
            let mut words = package.split_whitespace();
            let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
            let features = features.split(',').map(str::to_owned).collect();
            Some(((name.to_owned(), version.to_owned()), features))
        });
        Self(lines.collect())
    }

    fn features(&self, package: &Package) -> Option<&[String]> {
        let key = (package.name.clone(), package.version.clone());
        self.0.get(&key).map(Vec::as_slice)
    }
}

impl Package {
    /// The names of its programs.
    pub fn programs(&self) -> impl Iterator<Item = &str> {
        let programs = self
            .targets
            .iter()
            .filter(|t| t.kind.iter().any(|k| k == "bin"));
        programs.map(|t| t.name.as_str())
    }
}

/// Something that a child cannot have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// It surely does not build or start; otherwise it may.
    pub fatal: bool,
    /// What, who wants it, and what to do.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A crate of which something is known.
struct Known {
    names: &'static [&'static str],
    /// Only with this feature.
    feature: Option<&'static str>,
    fatal: bool,
    why: &'static str,
    instead: &'static str,
}

const LEAVE_OUT: &str = "leave it out of the child: an optional feature, or a dependency of [target.'cfg(not(target_family = \"wasm\"))'.dependencies]";
const NO_SERVER: &str = "a web server, and a child cannot listen";
const NO_SERVER_INSTEAD: &str = "leave it out of the child (an optional feature, or [target.'cfg(not(target_family = \"wasm\"))'.dependencies]): the parent serves metrics and health, webhooks are not offered";
const NO_CLIENT: &str = "it opens connections of its own, and a child has no sockets";
const NO_CLIENT_INSTEAD: &str =
    "only the Kubernetes API can be called, by kube's client; leave the rest out of the child";
const C_CODE: &str = "C code, which needs a C compiler for wasm32-wasip1";

const KNOWN: &[Known] = &[
    Known {
        names: &["axum"],
        feature: Some("tokio"),
        fatal: true,
        why: NO_SERVER,
        instead: NO_SERVER_INSTEAD,
    },
    Known {
        names: &[
            "actix-rt",
            "actix-server",
            "axum-server",
            "metrics-exporter-prometheus",
            "poem",
            "rocket",
            "salvo",
            "salvo_core",
            "warp",
        ],
        feature: None,
        fatal: true,
        why: NO_SERVER,
        instead: NO_SERVER_INSTEAD,
    },
    Known {
        names: &["tiny_http", "rouille"],
        feature: None,
        fatal: false,
        why: NO_SERVER,
        instead: NO_SERVER_INSTEAD,
    },
    Known {
        names: &[
            "reqwest",
            "tokio-postgres",
            "tokio-rustls",
            "tokio-native-tls",
            "lapin",
            "console-subscriber",
        ],
        feature: None,
        fatal: true,
        why: NO_CLIENT,
        instead: NO_CLIENT_INSTEAD,
    },
    Known {
        names: &["tonic"],
        feature: Some("transport"),
        fatal: true,
        why: NO_CLIENT,
        instead: NO_CLIENT_INSTEAD,
    },
    Known {
        names: &["tokio-tungstenite"],
        feature: Some("connect"),
        fatal: true,
        why: NO_CLIENT,
        instead: "leave out kube's feature \"ws\" (exec, attach, port-forward)",
    },
    Known {
        names: &["ureq", "redis", "sqlx-core", "socket2", "async-nats"],
        feature: None,
        fatal: false,
        why: NO_CLIENT,
        instead: NO_CLIENT_INSTEAD,
    },
    Known {
        names: &["openssl-sys", "native-tls"],
        feature: None,
        fatal: true,
        why: "OpenSSL does not exist for wasm32-wasip1",
        instead: "TLS to the API server is the parent's and needs none of it; for the rest, crates in Rust",
    },
    Known {
        names: &["aws-lc-sys", "ring"],
        feature: None,
        fatal: false,
        why: C_CODE,
        instead: "TLS to the API server is the parent's and needs none of it; for the rest, crates in Rust",
    },
    Known {
        names: &[
            "tikv-jemalloc-sys",
            "jemalloc-sys",
            "libmimalloc-sys",
            "snmalloc-sys",
        ],
        feature: None,
        fatal: true,
        why: "an allocator in C for operating systems",
        instead: LEAVE_OUT,
    },
    Known {
        names: &["rayon-core"],
        feature: None,
        fatal: false,
        why: "a child has one thread: rayon runs everything on it",
        instead: "it works; keep each event short",
    },
    Known {
        names: &["wasm-bindgen"],
        feature: None,
        fatal: false,
        why: "it calls a browser's functions, which the parent does not have",
        instead: "leave out the feature of its user that is for browsers (\"js\", \"wasmbind\")",
    },
];

/// Crates whose use of hyper the stand-ins cover.
const HYPER_USERS: &[&str] = &[
    "hyper",
    "hyper-openssl",
    "hyper-rustls",
    "hyper-timeout",
    "hyper-util",
    "kube",
    "kube-client",
];

/// Without these in a version of ours there is no child. The others only make it smaller, or are
/// named when they do not compile.
const ESSENTIAL: &[&str] = &["hyper", "hyper-util", "tokio"];

/// What in the crates of the package with that manifest a child cannot have, and the directories of
/// the crates that come from no registry: the operator's own.
pub fn crates(metadata: &Metadata, used: &Used, manifest: &Path) -> (Vec<Finding>, Vec<PathBuf>) {
    let packages: HashMap<_, _> = metadata.packages.iter().map(|p| (&*p.id, p)).collect();
    let nodes = metadata.resolve.iter().flat_map(|r| &r.nodes);
    let nodes: HashMap<_, _> = nodes.map(|n| (&*n.id, n)).collect();
    let Some(first) = metadata
        .packages
        .iter()
        .find(|p| p.manifest_path == manifest)
    else {
        return (Vec::new(), Vec::new());
    };
    // Breadth first, so that the shortest way to a crate is the one that is told.
    let mut users: HashMap<&str, Option<&str>> = [(&*first.id, None)].into();
    let mut next = VecDeque::from([&*first.id]);
    let mut findings = Vec::new();
    let mut own = Vec::new();
    while let Some(id) = next.pop_front() {
        let (Some(package), Some(node)) = (packages.get(id), nodes.get(id)) else {
            continue;
        };
        let Some(features) = used.features(package) else {
            continue;
        };
        if package.source.is_none() && !package.manifest_path.iter().any(|n| n == SUPPORT_LINK) {
            own.extend(package.manifest_path.parent().map(Path::to_owned));
        }
        let found =
            look_at(package, features).or_else(|| package_uses_hyper(package, &users, &packages));
        let fatal = found.as_ref().is_some_and(|(fatal, _)| *fatal);
        if let Some((fatal, text)) = found {
            let text = format!("{text}\n  wanted by: {}", chain(id, &users, &packages));
            findings.push(Finding { fatal, text });
        }
        // What only serves a crate that has to go goes with it.
        if fatal {
            continue;
        }
        for edge in &node.deps {
            let at_run_time = edge.dep_kinds.iter().any(|k| k.kind.is_none());
            if at_run_time && !users.contains_key(&*edge.pkg) {
                users.insert(&edge.pkg, Some(id));
                next.push_back(&edge.pkg);
            }
        }
    }
    (findings, own)
}

/// From the operator to a crate.
fn chain(
    id: &str,
    users: &HashMap<&str, Option<&str>>,
    packages: &HashMap<&str, &Package>,
) -> String {
    let mut names = Vec::new();
    let mut at = Some(id);
    while let Some(id) = at {
        if let Some(package) = packages.get(id) {
            names.push(format!("{} {}", package.name, package.version));
        }
        at = users.get(id).copied().flatten();
    }
    names.reverse();
    names.join(" -> ")
}

fn look_at(package: &Package, features: &[String]) -> Option<(bool, String)> {
    let Package { name, version, .. } = package;
    if package.source.is_some()
        && ESSENTIAL.contains(&&**name)
        && let Some(StandIn { series, .. }) = rust_support::stand_ins().find(|s| s.name == name)
    {
        return Some((
            true,
            format!(
                "{name} {version}: a child has {name} {series}999 in place of any {series}x, and this is none\n  instead: let its user accept {series}999 (no `=`, no `~`), or a newer version of the user; kube has to be 0.98 or newer"
            ),
        ));
    }
    let known = KNOWN.iter().find(|known| {
        let with = |feature: &str| features.iter().any(|f| f == feature);
        known.names.contains(&&**name) && known.feature.is_none_or(with)
    });
    if let Some(Known {
        fatal,
        why,
        instead,
        ..
    }) = known
    {
        return Some((
            *fatal,
            format!("{name} {version}: {why}\n  instead: {instead}"),
        ));
    }
    let compiles_c = |d: &Dependency| {
        d.kind.as_deref() == Some("build") && ["cc", "cmake", "bindgen"].contains(&&*d.name)
    };
    if package.links.is_some() && package.dependencies.iter().any(compiles_c) {
        return Some((
            false,
            format!("{name} {version}: {C_CODE}\n  instead: a crate in Rust, or {LEAVE_OUT}"),
        ));
    }
    None
}

/// The stand-in for hyper has no connections, so other users than kube have no luck with it.
fn package_uses_hyper(
    package: &Package,
    users: &HashMap<&str, Option<&str>>,
    packages: &HashMap<&str, &Package>,
) -> Option<(bool, String)> {
    if !["hyper", "hyper-util"].contains(&&*package.name) {
        return None;
    }
    let user = packages.get(users.get(&*package.id).copied().flatten()?)?;
    (!HYPER_USERS.contains(&&*user.name)).then(|| {
        (false, format!(
            "{} {}: uses {}, of which a child has only the names that kube-client uses\n  instead: {NO_CLIENT_INSTEAD}",
            user.name, user.version, package.name
        ))
    })
}

/// Names in a program's own text that a child cannot have.
const NAMES: &[(&str, &str)] = &[
    (
        "TcpListener",
        "a child cannot listen: leave metrics, health checks and webhooks to `#[cfg(not(target_family = \"wasm\"))]`",
    ),
    ("UnixListener", "a child cannot listen"),
    (
        "TcpStream",
        "a child has no sockets: only the Kubernetes API can be called, by kube's client",
    ),
    ("UdpSocket", "a child has no sockets"),
    (
        "tokio::fs",
        "a child has no files but a few to read, by std::fs",
    ),
    ("tokio::process", "a child cannot start programs"),
    ("process::Command", "a child cannot start programs"),
    ("thread::spawn", "a child has one thread: use tokio::spawn"),
    (
        "thread::sleep",
        "a child must not block: use tokio::time::sleep",
    ),
];

/// What in the sources of these crates a child cannot have.
pub fn sources(crates: &[PathBuf], mirror: &Mirror) -> Vec<Finding> {
    let mut findings = Vec::new();
    for directory in crates {
        scan(&directory.join("src"), &mut |file, text| {
            for (number, line, why) in names(text) {
                let place = mirror.real(file);
                findings.push(Finding {
                    fatal: false,
                    text: format!("{}:{number}: {why}\n  {line}", place.display()),
                });
            }
        });
    }
    findings
}

fn scan(directory: &Path, file: &mut impl FnMut(&Path, &str)) {
    let mut entries: Vec<_> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if path.is_dir() && !entry.file_type().is_ok_and(|t| t.is_symlink()) {
            scan(&path, file);
        } else if path.extension().is_some_and(|e| e == "rs")
            && let Ok(text) = fs::read_to_string(&path)
        {
            file(&path, &text);
        }
    }
}

/// Lines of a source file with a name that a child does not have: number, line, why.
fn names(text: &str) -> impl Iterator<Item = (usize, &str, &'static str)> {
    // Tests stand at the end and stay at home; what is left out of wasm is the next item, but a
    // guess is enough here.
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()));
    let mut skip = false;
    std::iter::from_fn(move || {
        loop {
            let (number, line) = lines.next().filter(|(_, line)| *line != "#[cfg(test)]")?;
            let attribute = line.starts_with("#[");
            let skipped = skip && !attribute;
            skip = line.starts_with("#[cfg(not(target_") || skip && attribute;
            if skipped || line.starts_with("//") {
                continue;
            }
            if let Some((_, why)) = NAMES.iter().find(|(name, _)| line.contains(name)) {
                return Some((number, line, *why));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn package(name: &str, version: &str, source: bool) -> serde_json::Value {
        json!({
            "id": name, "name": name, "version": version, "manifest_path": format!("/{name}/Cargo.toml"),
            "source": source.then_some("registry"), "targets": [{"name": name, "kind": ["lib"]}],
            "default_run": null, "links": null, "dependencies": [],
        })
    }

    fn node(name: &str, uses: &[&str]) -> serde_json::Value {
        let deps: Vec<_> = uses
            .iter()
            .map(|name| json!({"pkg": name, "dep_kinds": [{"kind": null}]}))
            .collect();
        json!({"id": name, "deps": deps})
    }

    fn metadata(packages: &[serde_json::Value], nodes: &[serde_json::Value]) -> Metadata {
        serde_json::from_value(json!({
            "packages": packages, "workspace_members": ["mine"], "workspace_root": "/",
            "resolve": {"nodes": nodes},
        }))
        .unwrap()
    }

    #[test]
    fn a_crate_is_named_with_who_wants_it() {
        let packages = [
            package("mine", "0.1.0", false),
            package("metrics", "2.0.0", true),
            package("axum", "0.8.0", true),
            package("ring", "0.17.0", true),
            package("hyper", "0.14.0", true),
            package("warp", "0.4.0", true),
        ];
        let nodes = [
            node("mine", &["metrics", "hyper", "warp"]),
            node("metrics", &["axum"]),
            node("axum", &["ring"]),
            node("ring", &[]),
            node("hyper", &[]),
            node("warp", &[]),
        ];
        let used = Used::read(
            "default\tmine v0.1.0 (/mine)\n\tmetrics v2.0.0\ntokio,json\taxum v0.8.0\n\tring v0.17.0 (*)\n\thyper v0.14.0\n",
        );
        let metadata = metadata(&packages, &nodes);
        let (found, own) = crates(&metadata, &used, Path::new("/mine/Cargo.toml"));
        assert_eq!(own, [Path::new("/mine")]);
        let texts: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found.len(), 2, "ring is axum's: {texts:?}");
        assert!(texts[0].starts_with("hyper 0.14.0: "), "{texts:?}");
        assert!(
            texts[1].contains("mine 0.1.0 -> metrics 2.0.0 -> axum 0.8.0"),
            "{texts:?}"
        );
        assert!(found.iter().all(|f| f.fatal));
    }

    #[test]
    fn without_the_feature_that_needs_sockets_axum_may_stay() {
        let packages = [
            package("mine", "0.1.0", false),
            package("axum", "0.8.0", true),
        ];
        let nodes = [node("mine", &["axum"]), node("axum", &[])];
        let used = Used::read("\tmine v0.1.0 (/mine)\njson\taxum v0.8.0\n");
        let metadata = metadata(&packages, &nodes);
        let (found, _) = crates(&metadata, &used, Path::new("/mine/Cargo.toml"));
        assert_eq!(found, []);
    }

    #[test]
    fn names_are_found_in_code_only() {
        let text = "// TcpListener\nuse tokio::net::TcpListener;\n#[cfg(not(target_family = \"wasm\"))]\nuse std::net::TcpStream;\n#[cfg(test)]\nmod tests { use std::net::UdpSocket; }\n";
        let found: Vec<_> = names(text).map(|(number, ..)| number).collect();
        assert_eq!(found, [2]);
    }
}
