//! Cuts a stream of chunks into lines.
//!
//! A watch response is one JSON document per line (see [watch], "Efficient detection of changes"),
//! and HTTP chunks cut lines anywhere: a chunk is not an event.
//!
//! [watch]: https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes

use bytes::{Bytes, BytesMut};

/// Keeps the unfinished line between chunks.
#[derive(Debug, Default)]
pub struct LineBuffer {
    rest: BytesMut,
}

impl LineBuffer {
    /// Adds a chunk and returns all whole lines there are now, as one piece that ends in a line
    /// feed; `None` while no line is complete.
    pub fn push(&mut self, chunk: &[u8]) -> Option<Bytes> {
        match chunk.iter().rposition(|b| *b == b'\n') {
            Some(end) => {
                self.rest.extend_from_slice(&chunk[..=end]);
                let lines = self.rest.split().freeze();
                self.rest.extend_from_slice(&chunk[end + 1..]);
                Some(lines)
            }
            None => {
                self.rest.extend_from_slice(chunk);
                None
            }
        }
    }

    /// Bytes of the unfinished line.
    pub fn pending_bytes(&self) -> usize {
        self.rest.len()
    }

    /// Gives up the unfinished line.
    pub fn take_rest(&mut self) -> Bytes {
        self.rest.split().freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_the_same_however_the_stream_is_cut() {
        let text = b"{\"a\":1}\n{\"b\":\"\xc3\xa4\"}\n\n{\"c\":3}\nrest";
        for size in 1..=text.len() {
            let mut buffer = LineBuffer::default();
            let mut lines = Vec::new();
            for chunk in text.chunks(size) {
                if let Some(whole) = buffer.push(chunk) {
                    assert_eq!(whole.last(), Some(&b'\n'));
                    lines.extend_from_slice(&whole);
                }
            }
            assert_eq!(lines, &text[..text.len() - 4], "chunks of {size}");
            assert_eq!(&buffer.take_rest()[..], b"rest");
            assert_eq!(buffer.pending_bytes(), 0);
        }
    }
}
