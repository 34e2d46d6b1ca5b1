//! `wasm_config.yaml`: which children there are and what each may have.
//!
//! Read in two stages: the file as written, then [`Child`]ren whose every field is valid. All
//! problems are found in one go, each with document, line and field; a problem spoils its own
//! child only.

use std::collections::HashMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_yaml::Value;

use crate::api::Identity;
use crate::child::{Child, HibernationSettings, Limits, Origin, Source};
use crate::quantity;
use crate::region::MAX_MEMORY_BYTES;
use crate::yaml::{Document, documents};

/// The file's name in the directory given on the command line.
pub const FILE_NAME: &str = "wasm_config.yaml";

const FIELDS: [&str; 11] = [
    "name",
    "wasm",
    "sha256",
    "env",
    "args",
    "serviceAccountName",
    "namespace",
    "limits",
    "idleSeconds",
    "hibernate",
    "prediction",
];
const LIMIT_FIELDS: [&str; 4] = ["memory", "eventSeconds", "operations", "requestsPerSecond"];

/// Something wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub origin: Origin,
    /// Field path such as `env[0].name`; empty for the document as a whole.
    pub field: String,
    /// What, and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Origin {
            file,
            document,
            line,
        } = &self.origin;
        write!(f, "{}:{line}: document {document}", file.display())?;
        if !self.field.is_empty() {
            write!(f, ", `{}`", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Reads the configuration in `directory`: the children that can be used, and everything that is
/// wrong. `default_namespace` is that of children which set none.
pub fn load(directory: &Path, default_namespace: &str) -> (Vec<Child>, Vec<Problem>) {
    let file = directory.join(FILE_NAME);
    let origin = Origin {
        file: file.clone(),
        document: 1,
        line: 1,
    };
    match std::fs::read_to_string(&file) {
        Ok(text) => parse(&text, &file, default_namespace),
        Err(error) => {
            let message = format!("{error}; it lists the children, see README.md");
            (
                Vec::new(),
                vec![Problem {
                    origin,
                    field: String::new(),
                    message,
                }],
            )
        }
    }
}

fn parse(text: &str, file: &Path, default_namespace: &str) -> (Vec<Child>, Vec<Problem>) {
    let (documents, syntax_error) = documents(text);
    let mut children: Vec<Child> = Vec::new();
    let mut problems = Vec::new();
    let mut first_lines: HashMap<String, usize> = HashMap::new();
    for document in documents.iter().filter(|d| !d.value.is_null()) {
        let mut reader = Reader {
            document,
            file,
            problems: Vec::new(),
        };
        let child = reader.child(default_namespace);
        if let Some(name) = reader.name() {
            let line = document.line_of("name");
            match first_lines.get(&name) {
                Some(first) => {
                    reader.problem("name", format!("{name:?} is already used in line {first}"));
                }
                None => {
                    first_lines.insert(name, line);
                }
            }
        }
        if reader.problems.is_empty() {
            children.extend(child);
        }
        problems.append(&mut reader.problems);
    }
    if let Some(message) = syntax_error {
        let line = message.split("line ").nth(1).and_then(|rest| {
            rest.split(|c: char| !c.is_ascii_digit())
                .next()?
                .parse()
                .ok()
        });
        let origin = Origin {
            file: file.to_owned(),
            document: documents.len() + 1,
            line: line.unwrap_or(1),
        };
        let message = format!("{message}; nothing after this is read");
        problems.push(Problem {
            origin,
            field: String::new(),
            message,
        });
    } else if children.is_empty() && problems.is_empty() {
        let origin = Origin {
            file: file.to_owned(),
            document: 1,
            line: 1,
        };
        let message = "no child is configured".to_owned();
        problems.push(Problem {
            origin,
            field: String::new(),
            message,
        });
    }
    (children, problems)
}

/// One document, read field by field.
struct Reader<'a> {
    document: &'a Document,
    file: &'a Path,
    problems: Vec<Problem>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Variable {
    name: String,
    #[serde(default)]
    value: String,
}

impl Reader<'_> {
    fn problem(&mut self, field: &str, message: impl Into<String>) {
        let origin = self.origin(field);
        self.problems.push(Problem {
            origin,
            field: field.to_owned(),
            message: message.into(),
        });
    }

    fn origin(&self, field: &str) -> Origin {
        Origin {
            file: self.file.to_owned(),
            document: self.document.number,
            line: self.document.line_of(field),
        }
    }

    fn name(&self) -> Option<String> {
        self.document.value.get("name")?.as_str().map(str::to_owned)
    }

    fn unknown_fields(&mut self, prefix: &str, value: &Value, known: &[&str]) {
        let Value::Mapping(mapping) = value else {
            return;
        };
        for key in mapping.keys() {
            let key = key
                .as_str()
                .map_or_else(|| format!("{key:?}"), str::to_owned);
            if !known.contains(&key.as_str()) {
                let known = known.join(", ");
                self.problem(
                    &format!("{prefix}{key}"),
                    format!("unknown field; there are {known}"),
                );
            }
        }
    }

    /// The field's value, `None` when it is absent or wrong.
    fn field<T: DeserializeOwned>(&mut self, path: &str, value: Option<&Value>) -> Option<T> {
        let value = value.filter(|v| !v.is_null())?;
        match serde_yaml::from_value(value.clone()) {
            Ok(value) => Some(value),
            Err(error) => {
                let mut message = error.to_string();
                if message.contains("expected a string") {
                    message.push_str(" (put it in quotes)");
                }
                self.problem(path, message);
                None
            }
        }
    }

    fn required(&mut self, field: &str) -> Option<String> {
        let document = self.document;
        match document.value.get(field) {
            None | Some(Value::Null) => {
                self.problem(field, "is missing");
                None
            }
            value => self.field(field, value),
        }
    }

    fn child(&mut self, default_namespace: &str) -> Option<Child> {
        let document = self.document;
        if !document.value.is_mapping() {
            self.problem("", "is not a mapping of fields");
            return None;
        }
        self.unknown_fields("", &document.value, &FIELDS);
        let name = self.required("name").filter(|name| self.check_name(name));
        let wasm = self.required("wasm").and_then(|wasm| self.source(&wasm));
        let env = self.env();
        let args = self.args();
        let namespace: Option<String> = self
            .field("namespace", document.value.get("namespace"))
            .filter(|n: &String| self.check_label("namespace", n));
        let account: Option<String> = self
            .field(
                "serviceAccountName",
                document.value.get("serviceAccountName"),
            )
            .filter(|a: &String| self.check_label("serviceAccountName", a));
        let limits = self.limits();
        let hibernation = self.hibernation();
        let namespace = namespace.unwrap_or_else(|| default_namespace.to_owned());
        let identity = match account.map(|a| Identity::service_account(&namespace, &a)) {
            None => Identity::default(),
            Some(Ok(identity)) => identity,
            Some(Err(error)) => {
                self.problem("serviceAccountName", error.to_string());
                return None;
            }
        };
        let wasm_origin = self.origin("wasm");
        Some(Child {
            name: name?,
            wasm: wasm?,
            env,
            args,
            namespace,
            identity,
            limits,
            hibernation,
            wasm_origin,
        })
    }

    fn check_name(&mut self, name: &str) -> bool {
        let mut characters = name.chars();
        let good = characters.next().is_some_and(|c| c.is_ascii_alphanumeric())
            && characters.all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && name.len() <= 63;
        if !good {
            let rule = "must be at most 63 letters, digits, `-`, `_` and `.`, and start with a letter or digit";
            self.problem("name", format!("{name:?} {rule}"));
        }
        // A child's name is the target of its log lines: it must not pass for another's.
        let reserved = ["parent", "wasm_operator", "wasmer", "virtual_fs"];
        if reserved.iter().any(|prefix| name.starts_with(prefix)) {
            let begin = reserved.join(", ");
            self.problem("name", format!("{name:?} would be taken for the parent in the log; names must not begin with {begin}"));
            return false;
        }
        good
    }

    /// Kubernetes object names (RFC 1123 subdomains).
    fn check_label(&mut self, field: &str, name: &str) -> bool {
        let allowed =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        let good = !name.is_empty() && name.len() <= 253 && name.chars().all(allowed);
        if !good {
            self.problem(field, format!("{name:?} is not a Kubernetes name"));
        }
        good
    }

    fn source(&mut self, wasm: &str) -> Option<Source> {
        let sha256: Option<String> = self.field("sha256", self.document.value.get("sha256"));
        if !wasm.starts_with("https://") && !wasm.starts_with("http://") {
            if sha256.is_some() {
                self.problem("sha256", "goes with a URL in `wasm` only");
            }
            return self.module_path(wasm).map(Source::File);
        }
        let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match (surf::Url::parse(wasm), sha256.filter(|hash| is_hash(hash))) {
            (Ok(url), Some(sha256)) => Some(Source::Url {
                url,
                sha256: sha256.to_ascii_lowercase(),
            }),
            (Err(error), _) => {
                self.problem("wasm", format!("{wasm}: {error}"));
                None
            }
            (Ok(_), None) => {
                let message =
                    "a URL in `wasm` needs the module's SHA-256 here, 64 hexadecimal digits";
                self.problem("sha256", message);
                None
            }
        }
    }

    fn module_path(&mut self, wasm: &str) -> Option<PathBuf> {
        let directory = self.file.parent().unwrap_or(Path::new("."));
        let path = directory.join(wasm);
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => Some(path),
            Ok(_) => {
                self.problem("wasm", format!("{} is not a file", path.display()));
                None
            }
            Err(error) => {
                self.problem("wasm", format!("{}: {error}", path.display()));
                None
            }
        }
    }

    fn sequence(&mut self, field: &str) -> Vec<Value> {
        match self.document.value.get(field) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Sequence(values)) => values.clone(),
            Some(_) => {
                self.problem(field, "is not a list");
                Vec::new()
            }
        }
    }

    fn env(&mut self) -> Vec<(String, String)> {
        let mut env: Vec<(String, String)> = Vec::new();
        for (index, value) in self.sequence("env").into_iter().enumerate() {
            let path = format!("env[{index}]");
            let Some(Variable { name, value }) = self.field(&path, Some(&value)) else {
                continue;
            };
            if name.is_empty() || name.contains(['=', '\0']) {
                self.problem(
                    &format!("{path}.name"),
                    format!("{name:?} is not a variable's name"),
                );
            } else if value.contains('\0') {
                self.problem(&format!("{path}.value"), "contains a NUL character");
            } else if env.iter().any(|(n, _)| *n == name) {
                self.problem(&format!("{path}.name"), format!("{name} is already set"));
            } else {
                env.push((name, value));
            }
        }
        env
    }

    fn args(&mut self) -> Vec<String> {
        let mut args = Vec::new();
        for (index, value) in self.sequence("args").into_iter().enumerate() {
            let path = format!("args[{index}]");
            let Some(arg) = self.field::<String>(&path, Some(&value)) else {
                continue;
            };
            if arg.contains('\0') {
                self.problem(&path, "contains a NUL character");
            }
            args.push(arg);
        }
        args
    }

    fn quantity(value: &Value) -> Option<u64> {
        value.as_u64().or_else(|| quantity::bytes(value.as_str()?))
    }

    fn seconds(
        &mut self,
        path: &str,
        value: Option<&Value>,
        range: RangeInclusive<f64>,
    ) -> Option<Duration> {
        let seconds = self.field::<f64>(path, value)?;
        if range.contains(&seconds) {
            return Some(Duration::from_secs_f64(seconds));
        }
        let (from, to) = range.into_inner();
        self.problem(path, format!("must be from {from} to {to}"));
        None
    }

    fn hibernation(&mut self) -> HibernationSettings {
        let mut settings = HibernationSettings::default();
        let document = self.document;
        let idle = document.value.get("idleSeconds");
        if let Some(idle) = self.seconds("idleSeconds", idle, 0.01..=86_400.0) {
            settings.idle = idle;
        }
        let mode: Option<String> = self.field("hibernate", document.value.get("hibernate"));
        match mode.as_deref() {
            None | Some("auto") => {}
            Some("never") => settings.allowed = false,
            Some(other) => {
                self.problem("hibernate", format!("{other:?} must be `auto` or `never`"));
            }
        }
        let model: Option<String> = self.field("prediction", document.value.get("prediction"));
        match model.as_deref().map(|name| (name, name.parse())) {
            None => {}
            Some(("never", _)) => settings.prediction = None,
            Some((_, Ok(model))) => settings.prediction = Some(model),
            Some((name, Err(error))) => {
                self.problem("prediction", format!("{name:?} {error}, or never"));
            }
        }
        settings
    }

    fn limits(&mut self) -> Limits {
        let mut limits = Limits::default();
        let value = match self.document.value.get("limits") {
            None | Some(Value::Null) => return limits,
            Some(value) if value.is_mapping() => value,
            Some(_) => {
                self.problem("limits", "is not a mapping of fields");
                return limits;
            }
        };
        self.unknown_fields("limits.", value, &LIMIT_FIELDS);
        match value.get("memory").map(Self::quantity) {
            None => {}
            Some(Some(bytes)) if (65_536..=MAX_MEMORY_BYTES).contains(&bytes) => {
                limits.memory_bytes = bytes;
            }
            Some(_) => self.problem(
                "limits.memory",
                format!("must be a number of bytes such as 64Mi, from 64Ki to {MAX_MEMORY_BYTES}"),
            ),
        }
        let event_seconds = value.get("eventSeconds");
        if let Some(budget) = self.seconds("limits.eventSeconds", event_seconds, 0.01..=3600.0) {
            limits.event_budget = budget;
        }
        if let Some(operations) = self.field::<usize>("limits.operations", value.get("operations"))
        {
            if (1..=100_000).contains(&operations) {
                limits.max_operations = operations;
            } else {
                self.problem("limits.operations", "must be from 1 to 100000");
            }
        }
        let rate = value.get("requestsPerSecond");
        if let Some(rate) = self.field::<f64>("limits.requestsPerSecond", rate) {
            if (0.1..=100_000.0).contains(&rate) {
                limits.requests_per_second = rate;
            } else {
                self.problem("limits.requestsPerSecond", "must be from 0.1 to 100000");
            }
        }
        limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Vec<Child>, Vec<String>) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.wasm"), "x").unwrap();
        std::fs::write(directory.path().join(FILE_NAME), text).unwrap();
        let (children, problems) = load(directory.path(), "home");
        let prefix = format!("{}/", directory.path().display());
        (
            children,
            problems
                .iter()
                .map(|p| p.to_string().replace(&prefix, ""))
                .collect(),
        )
    }

    #[test]
    fn the_prototypes_documents_are_read() {
        let (children, problems) = read(
            "name: a\nwasm: a.wasm\nenv:\n  - name: X\n    value: \"1\"\nargs: [-v]\n---\n---\nname: b\nwasm: ./a.wasm\n",
        );
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(children.len(), 2);
        assert_eq!(children[0].env, [("X".to_owned(), "1".to_owned())]);
        assert_eq!(children[0].args, ["-v"]);
        assert_eq!(children[1].namespace, "home");
        assert_eq!(children[1].limits, Limits::default());
    }

    #[test]
    fn all_problems_are_told_with_line_and_field() {
        let (children, problems) = read(
            "name: a\nwasm: a.wasm\n---\nname: a\nwasm: b.wasm\nenvv: []\nenv:\n  - name: X\n    value: 1\n  - nam: Y\nlimits:\n  memory: lots\n  cpu: 1\n---\nwasm: 5\n---\n- x\n---\nname: c d\nwasm: a.wasm\nserviceAccountName: A\n",
        );
        assert_eq!(children.len(), 1);
        for expected in [
            "wasm_config.yaml:4: document 2, `name`: \"a\" is already used in line 1",
            "wasm_config.yaml:5: document 2, `wasm`: b.wasm: No such file",
            "wasm_config.yaml:6: document 2, `envv`: unknown field; there are name, wasm",
            "wasm_config.yaml:8: document 2, `env[0]`: invalid type: integer `1`, expected a string (put it in quotes)",
            "wasm_config.yaml:10: document 2, `env[1]`: ",
            "wasm_config.yaml:12: document 2, `limits.memory`: must be a number of bytes",
            "wasm_config.yaml:13: document 2, `limits.cpu`: unknown field",
            "wasm_config.yaml:14: document 3, `name`: is missing",
            "wasm_config.yaml:15: document 3, `wasm`: invalid type: integer",
            "wasm_config.yaml:16: document 4: is not a mapping",
            "wasm_config.yaml:19: document 5, `name`: \"c d\" must be",
            "wasm_config.yaml:21: document 5, `serviceAccountName`: \"A\" is not",
        ] {
            assert!(
                problems.iter().any(|p| p.starts_with(expected)),
                "{expected}\n{problems:#?}"
            );
        }
    }

    #[test]
    fn a_syntax_error_keeps_the_children_before_it() {
        let (children, problems) = read("name: a\nwasm: a.wasm\n---\nname: [\n");
        assert_eq!(children.len(), 1);
        assert!(problems[0].starts_with("wasm_config.yaml:"), "{problems:?}");
        assert!(problems[0].contains("nothing after this is read"));
    }

    #[test]
    fn an_empty_or_absent_file_is_a_problem() {
        assert!(read("---\n---\n").1[0].contains("no child is configured"));
        let (_, problems) = load(Path::new("/nonexistent"), "d");
        assert!(
            problems[0].to_string().contains("wasm_config.yaml:1"),
            "{problems:?}"
        );
    }
}
