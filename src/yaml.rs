//! A stream of YAML documents, with the line of every key.
//!
//! `serde_yaml` makes the values; it keeps no positions, so a second pass over the parser's events
//! notes where each key stands. Only messages depend on that.

use std::collections::HashMap;

use granit_parser::{Event, Parser};
use serde::Deserialize;
use serde_yaml::Value;

/// One document of a stream.
#[derive(Debug)]
pub struct Document {
    /// Position in the stream, from 1, empty documents included.
    pub number: usize,
    /// Its content; `Null` when it is empty.
    pub value: Value,
    lines: HashMap<String, usize>,
    line: usize,
}

impl Document {
    /// The line, from 1, of a key such as `limits.memory` or `env[0].name`; else that of the
    /// nearest key around it.
    pub fn line_of(&self, path: &str) -> usize {
        let mut path = path;
        loop {
            if let Some(line) = self.lines.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return self.line,
            }
        }
    }
}

/// Reads all documents up to the end or the first syntax error, which comes with its line.
pub fn documents(text: &str) -> (Vec<Document>, Option<String>) {
    let mut positions = positions(text).into_iter();
    let mut documents = Vec::new();
    for (index, document) in serde_yaml::Deserializer::from_str(text).enumerate() {
        match Value::deserialize(document) {
            Ok(value) => {
                let (line, lines) = positions.next().unwrap_or_default();
                documents.push(Document {
                    number: index + 1,
                    value,
                    lines,
                    line: line.max(1),
                });
            }
            Err(error) => return (documents, Some(error.to_string())),
        }
    }
    (documents, None)
}

/// What surrounds the event that is read.
enum Around {
    Sequence {
        path: String,
        index: usize,
    },
    /// `key` is the key whose value comes next.
    Mapping {
        path: String,
        key: Option<String>,
    },
}

/// The path of the node that comes next; notes the line of a key.
fn enter(
    stack: &mut [Around],
    lines: &mut HashMap<String, usize>,
    line: usize,
    text: &str,
) -> String {
    match stack.last_mut() {
        None => String::new(),
        Some(Around::Sequence { path, index }) => {
            let element = format!("{path}[{index}]");
            *index += 1;
            lines.entry(element.clone()).or_insert(line);
            element
        }
        Some(Around::Mapping { path, key }) => match key.take() {
            Some(key) => key,
            None => {
                let name = if path.is_empty() {
                    text.to_owned()
                } else {
                    format!("{path}.{text}")
                };
                lines.entry(name.clone()).or_insert(line);
                *key = Some(name);
                String::new()
            }
        },
    }
}

/// First line and key lines of each document, as far as the parser gets.
fn positions(text: &str) -> Vec<(usize, HashMap<String, usize>)> {
    let mut documents = Vec::new();
    let mut stack: Vec<Around> = Vec::new();
    let mut lines = HashMap::new();
    let mut first = 1;
    for (event, span) in Parser::new_from_str(text).map_while(Result::ok) {
        let line = span.start.line();
        match event {
            Event::DocumentStart(..) => {
                first = line;
                lines = HashMap::new();
                stack.clear();
            }
            Event::DocumentEnd => documents.push((first, std::mem::take(&mut lines))),
            Event::Scalar(value, ..) => {
                enter(&mut stack, &mut lines, line, &value);
            }
            Event::Alias(..) => {
                enter(&mut stack, &mut lines, line, "*");
            }
            Event::SequenceStart(..) => {
                let path = enter(&mut stack, &mut lines, line, "?");
                stack.push(Around::Sequence { path, index: 0 });
            }
            Event::MappingStart(..) => {
                let path = enter(&mut stack, &mut lines, line, "?");
                stack.push(Around::Mapping { path, key: None });
            }
            Event::SequenceEnd | Event::MappingEnd => {
                stack.pop();
            }
            _ => {}
        }
    }
    documents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_split_by_the_grammar_and_not_by_text() {
        let text =
            "a: |\r\n  x\r\n  ---\r\n  y\r\n---\r\n---\r\nb: 1\r\n...\r\n---\r\n# nothing\r\n";
        let (documents, error) = documents(text);
        assert_eq!(error, None);
        let values: Vec<_> = documents.iter().map(|d| d.value.clone()).collect();
        assert_eq!(values.len(), 4);
        assert_eq!(values[0]["a"], Value::from("x\n---\ny\n"));
        assert!(values[1].is_null() && values[3].is_null());
        assert_eq!(values[2]["b"], Value::from(1));
        assert_eq!(documents[2].line_of("b"), 7);
    }

    #[test]
    fn keys_have_their_lines_and_unknown_paths_the_nearest() {
        let text = "name: a\nenv:\n  - name: X\n    value: '1'\n  - {name: Y}\nlimits:\n  memory: 1\n---\nname: b\n";
        let (documents, _) = documents(text);
        let first = &documents[0];
        for (path, line) in [
            ("name", 1),
            ("env", 2),
            ("env[0].value", 4),
            ("env[1].name", 5),
            ("env[1].value", 5),
            ("limits.memory", 7),
            ("limits.nothing", 6),
            ("wasm", 1),
        ] {
            assert_eq!(first.line_of(path), line, "{path}");
        }
        assert_eq!(documents[1].line_of("name"), 9);
    }

    #[test]
    fn a_syntax_error_keeps_what_came_before() {
        let (documents, error) = documents("a: 1\n---\nb: [\n");
        assert_eq!(documents.len(), 1);
        assert!(error.unwrap().contains("line"));
    }
}
