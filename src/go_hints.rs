//! What commonly helps when `go build` says no: a line for each module that is in the way.

use std::collections::BTreeMap;

use crate::go_modules::Module;
use crate::go_patches;

/// More lines than this help nobody.
const MOST: usize = 8;

/// What commonly helps with what a build said, one line each.
pub fn hints(messages: &[String], modules: &[Module]) -> Vec<String> {
    let mut seen: BTreeMap<String, (Trouble, usize)> = BTreeMap::new();
    let mut order = Vec::new();
    for trouble in messages
        .iter()
        .filter_map(|line| Trouble::parse(line, modules))
    {
        let entry = seen.entry(trouble.key()).or_insert_with_key(|key| {
            order.push(key.clone());
            (trouble, 0)
        });
        entry.1 += 1;
    }
    let mut lines: Vec<_> = order
        .iter()
        .take(MOST)
        .filter_map(|key| seen.get(key))
        .map(|(trouble, count)| trouble.advice(*count))
        .collect();
    if order.len() > MOST {
        lines.push(format!("and {} more like these", order.len() - MOST));
    }
    lines
}

/// One error of a build.
#[derive(Debug)]
struct Trouble {
    kind: Kind,
    /// The module, if it is not the program's own: path, version, and whether it is a copy of ours or
    /// a directory of the program's.
    module: Option<(String, String, bool)>,
    /// File and line, or the directory of a package.
    place: String,
}

#[derive(Debug)]
enum Kind {
    /// Something that `wasip1` lacks.
    Missing(String),
    /// No file of the package is for `wasip1`.
    Excluded,
    /// Functions in assembly or C.
    Foreign,
    /// A later Go is needed.
    Older(String),
}

impl Trouble {
    fn parse(line: &str, modules: &[Module]) -> Option<Self> {
        if let Some((_, rest)) = line.split_once("requires go >= ") {
            let version = rest.split([' ', ';']).next()?.to_owned();
            return Some(Self {
                kind: Kind::Older(version),
                module: None,
                place: String::new(),
            });
        }
        if let Some((_, directory)) = line.split_once("build constraints exclude all Go files in ")
        {
            return Some(Self::at(Kind::Excluded, directory, modules));
        }
        if let Some((_, file)) = line.split_once("C source files not allowed") {
            return Some(Self::at(Kind::Foreign, file, modules));
        }
        if let Some((function, _)) = line
            .split_once(": relocation target ")
            .filter(|(_, rest)| rest.ends_with("not defined"))
        {
            return Some(Self::at(Kind::Foreign, function, modules));
        }
        // FILE:LINE:COLUMN: MESSAGE
        let (place, message) = line.split_once(": ")?;
        let mut parts = place.rsplitn(3, ':');
        let (column, row, file) = (parts.next()?, parts.next()?, parts.next()?);
        if !file.ends_with(".go") || column.parse::<u32>().is_err() || row.parse::<u32>().is_err() {
            return None;
        }
        let kind = if message == "missing function body" {
            Kind::Foreign
        } else {
            Kind::Missing(missing(message)?.to_owned())
        };
        Some(Self::at(kind, file, modules))
    }

    fn at(kind: Kind, place: &str, modules: &[Module]) -> Self {
        let place = place.trim();
        let of = modules
            .iter()
            .filter(|module| {
                let directory = module.directory.to_string_lossy();
                !directory.is_empty() && place.contains(directory.as_ref())
                    || place.contains(&format!("{}@{}/", module.path, module.version))
            })
            .max_by_key(|module| module.path.len());
        let rest = |module: &Module| {
            let directory = module.directory.to_string_lossy();
            let start = place
                .find(directory.as_ref())
                .map(|at| at + directory.len());
            let text = start.map_or(place, |start| &place[start..]);
            text.trim_start_matches('/').to_owned()
        };
        Self {
            kind,
            place: of.map_or_else(|| place.to_owned(), rest),
            module: of.map(|module| (module.path.clone(), module.version.clone(), module.is_local)),
        }
    }

    /// What is said once.
    fn key(&self) -> String {
        match (&self.kind, &self.module) {
            (Kind::Older(version), _) => version.clone(),
            (Kind::Missing(_), Some((path, ..))) => format!("{path} misses"),
            (Kind::Excluded, Some((path, ..))) => format!("{path} excludes"),
            (Kind::Foreign, Some((path, ..))) => format!("{path} is foreign"),
            (Kind::Missing(symbol), None) => symbol.clone(),
            (_, None) => self.place.clone(),
        }
    }

    fn advice(&self, count: usize) -> String {
        let more = match count {
            1 => String::new(),
            count => format!(" (and {} more)", count - 1),
        };
        let place = match &self.module {
            Some((path, version, _)) => format!("{path} {version}: {}", self.place),
            None => self.place.clone(),
        };
        let cure = || match &self.module {
            Some((.., true)) => {
                "it is replaced by a directory, which is yours: add a file named *_wasip1.go there"
            }
            Some((path, ..)) if go_patches::is_known(path) => {
                "wasm-operator patches other versions of it: try a newer one, and please report this"
            }
            Some(_) => {
                "try a newer version, or `replace` it by a copy with a file named *_wasip1.go that has what is missing"
            }
            None => {
                "keep it in a file with `//go:build !wasip1`, and what stands in for it in one named *_wasip1.go"
            }
        };
        match &self.kind {
            Kind::Missing(symbol) => {
                format!(
                    "{place} uses {symbol}, which is not there for wasip1{more}: {}",
                    cure()
                )
            }
            Kind::Excluded => format!(
                "{place} has no files for wasip1 without cgo{more}: leave out by a build tag (--tags) what imports it, or {}",
                cure().trim_start_matches("try a newer version, or ")
            ),
            Kind::Foreign => format!(
                "{place} is written in C or assembly{more}: look for a build tag such as purego, noasm or appengine (--tags), or {}",
                cure()
            ),
            Kind::Older(version) => {
                format!(
                    "a later Go is needed: build with GOTOOLCHAIN=go{version} or GOTOOLCHAIN=auto"
                )
            }
        }
    }
}

/// The name that a message of the compiler misses.
fn missing(message: &str) -> Option<&str> {
    if let Some(symbol) = message.strip_prefix("undefined: ") {
        return symbol.split(' ').next();
    }
    message
        .split_once(" undefined (type ")
        .map(|(symbol, _)| symbol)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str, version: &str, directory: &str) -> Module {
        Module::parse(&format!("{path}\t{version}\t{directory}\t")).unwrap()
    }

    fn hints_of(text: &str, modules: &[Module]) -> String {
        hints(
            &text.lines().map(str::to_owned).collect::<Vec<_>>(),
            modules,
        )
        .join("\n")
    }

    #[test]
    fn a_module_gets_one_line() {
        let modules = [module(
            "example.org/pty",
            "v1.1.24",
            "/go/pkg/mod/example.org/pty@v1.1.24",
        )];
        let said = hints_of(
            "# example.org/pty\n\
             /go/pkg/mod/example.org/pty@v1.1.24/ioctl_inner.go:10:23: undefined: syscall.TIOCGWINSZ\n\
             /go/pkg/mod/example.org/pty@v1.1.24/ioctl_inner.go:15:37: undefined: syscall.SYS_IOCTL\n\
             /go/pkg/mod/example.org/pty@v1.1.24/start.go:22:18: cmd.SysProcAttr.Setsid undefined (type *syscall.SysProcAttr has no field or method Setsid)\n",
            &modules,
        );
        assert_eq!(
            said,
            "example.org/pty v1.1.24: ioctl_inner.go uses syscall.TIOCGWINSZ, which is not there for wasip1 (and 2 more): \
             try a newer version, or `replace` it by a copy with a file named *_wasip1.go that has what is missing"
        );
    }

    #[test]
    fn the_programs_own_file_gets_a_build_tag() {
        let said = hints_of("cmd/main.go:5:23: undefined: syscall.Kill", &[]);
        assert!(said.contains("cmd/main.go uses syscall.Kill, which is not there for wasip1: keep it in a file with `//go:build !wasip1`"), "{said}");
    }

    #[test]
    fn packages_without_files_and_in_c_are_named() {
        let modules = [module(
            "modernc.org/libc",
            "v1.79.0",
            "/go/pkg/mod/modernc.org/libc@v1.79.0",
        )];
        let said = hints_of(
            "package example.com/g\n\timports modernc.org/libc\n\
             \timports modernc.org/libc/errno: build constraints exclude all Go files in /go/pkg/mod/modernc.org/libc@v1.79.0/errno\n\
             package example.com/g/c: C source files not allowed when not using cgo or SWIG: x.c\n\
             asm/x.go:2:6: missing function body\n",
            &modules,
        );
        assert!(said.contains("modernc.org/libc v1.79.0: errno has no files for wasip1 without cgo: leave out by a build tag"), "{said}");
        assert!(
            said.contains(
                "asm/x.go is written in C or assembly: look for a build tag such as purego"
            ),
            "{said}"
        );
    }

    #[test]
    fn a_later_go_is_asked_for() {
        let said = hints_of(
            "go: example.org/api@v0.21.3 requires go >= 1.27.0 (running go 1.26.8; GOTOOLCHAIN=local)",
            &[],
        );
        assert_eq!(
            said,
            "a later Go is needed: build with GOTOOLCHAIN=go1.27.0 or GOTOOLCHAIN=auto"
        );
    }

    #[test]
    fn ordinary_mistakes_get_no_hint() {
        assert_eq!(
            hints_of(
                "main.go:3:2: \"os\" imported and not used\n# x\nnote: module requires Go 1.30",
                &[]
            ),
            ""
        );
    }
}
