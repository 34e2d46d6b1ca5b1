//! Cuts a raw watch into events, and keeps back what need not wake anybody.
//!
//! A watch is a sequence of documents: one JSON text per line, or protobuf messages with their length
//! in front (see [watch] and [protobuf]). What a guest gets at a time are whole ones. Bookmarks only
//! tell it where to resume; they are held until the next document, or the end, so that a child that
//! sleeps is not woken once a minute for each of its watches.
//!
//! [watch]: https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
//! [protobuf]: https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding

use bytes::{Bytes, BytesMut};

use crate::abi::MAX_DATA_BYTES;

/// Length of a protobuf message, in front of it, big-endian.
const LENGTH_BYTES: usize = 4;
/// How the API server begins a bookmark: the type stands first.
const JSON_BOOKMARK: &[u8] = b"{\"type\":\"BOOKMARK\"";
const PROTOBUF_BOOKMARK: &[u8] = b"\x0a\x08BOOKMARK";
/// The annotation of the bookmark that ends a list within a watch (KEP-3157). Somebody waits for it.
const INITIAL_EVENTS_END: &[u8] = b"k8s.io/initial-events-end";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Lines,
    Lengths,
    /// Passed on as it comes.
    Other,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Frames {
    format: Format,
    rest: BytesMut,
    /// Bytes of `rest` in which there is no line's end.
    searched: usize,
    /// A document that is too long for one event is being passed on in pieces: how much of it is
    /// still to come, as far as that is known.
    missing: Option<usize>,
    bookmark: Option<Bytes>,
}

impl Frames {
    /// For an answer of that `Content-Type`.
    pub fn new(content_type: &str) -> Self {
        let format = match content_type.split(';').next().unwrap_or_default().trim() {
            "application/json" => Format::Lines,
            "application/vnd.kubernetes.protobuf" => Format::Lengths,
            _ => Format::Other,
        };
        Self {
            format,
            rest: BytesMut::new(),
            searched: 0,
            missing: None,
            bookmark: None,
        }
    }

    /// Adds a chunk; the payloads of the events that are due now.
    pub fn push(&mut self, chunk: &[u8]) -> Vec<Bytes> {
        self.rest.extend_from_slice(chunk);
        let mut events = Events::default();
        while let Some((frame, is_whole)) = self.next() {
            if is_whole && self.is_quiet(&frame) {
                self.bookmark = Some(frame);
                continue;
            }
            events.extend(self.bookmark.take());
            events.add(&frame);
        }
        events.finish()
    }

    /// The stream has ended: what is left of it.
    pub fn finish(&mut self) -> Vec<Bytes> {
        let mut events = Events::default();
        events.extend(self.bookmark.take());
        events.add(&self.rest.split());
        events.finish()
    }

    /// The next document, or the next piece of a long one.
    fn next(&mut self) -> Option<(Bytes, bool)> {
        let known_end = match (self.format, self.missing) {
            _ if self.rest.is_empty() => return None,
            (Format::Other, _) => Some(self.rest.len()),
            (Format::Lengths, Some(missing)) => Some(missing),
            (Format::Lengths, None) => self.length(),
            (Format::Lines, _) => {
                let new = self.rest.get(self.searched..).unwrap_or_default();
                let end = new.iter().position(|b| *b == b'\n');
                end.map(|end| self.searched + end + 1)
            }
        };
        if let Some(end) = known_end.filter(|end| *end <= self.rest.len()) {
            self.searched = 0;
            let is_whole = self.missing.take().is_none();
            return Some((self.rest.split_to(end).freeze(), is_whole));
        }
        self.searched = self.rest.len();
        // Sent on without waiting for its end, so that nothing large is kept here.
        if self.rest.len() < MAX_DATA_BYTES {
            return None;
        }
        self.missing = Some(known_end.map_or(0, |end| end - self.rest.len()));
        self.searched = 0;
        Some((self.rest.split().freeze(), false))
    }

    /// Of the message in front, with its length.
    fn length(&self) -> Option<usize> {
        let length = self.rest.first_chunk::<LENGTH_BYTES>()?;
        usize::try_from(u32::from_be_bytes(*length))
            .ok()?
            .checked_add(LENGTH_BYTES)
    }

    fn is_quiet(&self, frame: &[u8]) -> bool {
        let is_bookmark = match self.format {
            Format::Lines => frame.starts_with(JSON_BOOKMARK),
            Format::Lengths => frame
                .get(LENGTH_BYTES..)
                .is_some_and(|message| message.starts_with(PROTOBUF_BOOKMARK)),
            Format::Other => false,
        };
        is_bookmark
            && !frame
                .windows(INITIAL_EVENTS_END.len())
                .any(|part| part == INITIAL_EVENTS_END)
    }
}

/// Payloads of events, each as full as whole documents allow.
#[derive(Default)]
struct Events {
    full: Vec<Bytes>,
    last: BytesMut,
}

impl Events {
    fn extend(&mut self, frame: Option<Bytes>) {
        if let Some(frame) = frame {
            self.add(&frame);
        }
    }

    fn add(&mut self, frame: &[u8]) {
        if self.last.len() + frame.len() > MAX_DATA_BYTES && !self.last.is_empty() {
            self.full.push(self.last.split().freeze());
        }
        for piece in frame.chunks(MAX_DATA_BYTES) {
            if self.last.len() == MAX_DATA_BYTES {
                self.full.push(self.last.split().freeze());
            }
            self.last.extend_from_slice(piece);
        }
    }

    fn finish(mut self) -> Vec<Bytes> {
        if !self.last.is_empty() {
            self.full.push(self.last.freeze());
        }
        self.full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(events: &[Bytes]) -> Vec<u8> {
        events.concat()
    }

    fn message(content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(content.len()).unwrap().to_be_bytes();
        [&length[..], content].concat()
    }

    #[test]
    fn whole_documents_come_however_the_stream_is_cut() {
        let lines = b"{\"a\":1}\n{\"b\":\"\xc3\xa4\"}\n\n{\"c\":3}\nrest".to_vec();
        let messages = [
            message(b"one\n"),
            message(b""),
            message(b"t\nwo"),
            b"\0\0".to_vec(),
        ]
        .concat();
        for (kind, text, rest) in [
            ("application/json", lines, 4),
            (
                "application/vnd.kubernetes.protobuf;stream=watch",
                messages,
                2,
            ),
        ] {
            for size in 1..=text.len() {
                let mut frames = Frames::new(kind);
                let mut seen = Vec::new();
                for chunk in text.chunks(size) {
                    for event in frames.push(chunk) {
                        seen.extend_from_slice(&event);
                        let is_boundary = match kind {
                            "application/json" => event.ends_with(b"\n"),
                            _ => [8, 12, 20].contains(&seen.len()),
                        };
                        assert!(is_boundary, "{kind} in chunks of {size}: {event:?}");
                    }
                }
                assert_eq!(
                    seen,
                    text[..text.len() - rest],
                    "{kind} in chunks of {size}"
                );
                assert_eq!(joined(&frames.finish()), text[text.len() - rest..]);
            }
        }
    }

    #[test]
    fn bookmarks_wait_for_the_next_document_or_the_end() {
        let bookmark =
            b"{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{\"resourceVersion\":\"1\"}}}\n";
        let later =
            b"{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{\"resourceVersion\":\"2\"}}}\n";
        let added = b"{\"type\":\"ADDED\"}\n";
        let mut frames = Frames::new("application/json");
        assert!(frames.push(bookmark).is_empty());
        assert!(frames.push(later).is_empty());
        assert_eq!(joined(&frames.push(added)), [&later[..], added].concat());
        assert!(frames.push(bookmark).is_empty());
        assert_eq!(joined(&frames.finish()), bookmark);

        let mut frames = Frames::new("application/vnd.kubernetes.protobuf;stream=watch");
        let bookmark = message(b"\x0a\x08BOOKMARK\x12\x01x");
        let added = message(b"\x0a\x05ADDED");
        assert!(frames.push(&bookmark).is_empty());
        assert_eq!(joined(&frames.push(&added)), [bookmark, added].concat());
    }

    #[test]
    fn the_bookmark_that_ends_a_list_comes_at_once() {
        let end = b"{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{\"annotations\":{\"k8s.io/initial-events-end\":\"true\"}}}}\n";
        assert_eq!(joined(&Frames::new("application/json").push(end)), end);
    }

    #[test]
    fn a_long_document_comes_in_pieces_and_is_no_bookmark_in_the_middle() {
        let long = [
            &b"{\"type\":\"ADDED\",\"x\":\""[..],
            &[b'x'; 200_000],
            b"\"}\n",
        ]
        .concat();
        let whole = message(&long);
        for (kind, text) in [
            ("application/json", &long),
            ("application/vnd.kubernetes.protobuf", &whole),
            ("text/plain", &long),
        ] {
            let mut frames = Frames::new(kind);
            let mut events = Vec::new();
            for chunk in text.chunks(50_000) {
                events.extend(frames.push(chunk));
                assert!(frames.rest.len() < MAX_DATA_BYTES);
            }
            assert!(events.iter().all(|event| event.len() <= MAX_DATA_BYTES));
            assert_eq!(&joined(&events), text, "{kind}");
            assert!(frames.finish().is_empty());
        }
    }
}
