//! As much of HTTP/1.1 as the tests need, on blocking streams: heads, and bodies in chunks.

use std::io::{self, Read};

/// The head of a request or response.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// Request line or status line.
    pub first_line: String,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Head {
    /// Reads a head; `None` at the end of the stream.
    pub fn read(stream: &mut impl Read) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if stream.read(&mut byte)? == 0 {
                return if bytes.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
            bytes.push(byte[0]);
        }
        let text = String::from_utf8(bytes).map_err(|_| bad("a head that is not text"))?;
        let mut lines = text.trim_end().split("\r\n");
        let first_line = lines.next().unwrap_or_default().to_owned();
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        Ok(Some(Self {
            first_line,
            headers,
        }))
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name)?;
        Some(&found.1)
    }

    /// The second word of a status line.
    pub fn status(&self) -> io::Result<u16> {
        let word = self.first_line.split(' ').nth(1);
        word.and_then(|w| w.parse().ok())
            .ok_or_else(|| bad("no status"))
    }

    /// How the body that follows is delimited; one without a length goes on to the end.
    pub fn body(&self) -> BodyReader {
        if self.header("transfer-encoding") == Some("chunked") {
            return BodyReader::Chunked { left: 0 };
        }
        match self.header("content-length").map(str::parse) {
            Some(Ok(left)) => BodyReader::Length { left },
            _ => BodyReader::ToEnd,
        }
    }

    /// The same for a request, whose body is empty unless it says otherwise.
    pub fn request_body(&self) -> BodyReader {
        match self.body() {
            BodyReader::ToEnd => BodyReader::Length { left: 0 },
            delimited => delimited,
        }
    }
}

/// Reads a body piece by piece.
#[derive(Debug)]
pub enum BodyReader {
    /// `content-length`.
    Length {
        /// Bytes that have not been read.
        left: usize,
    },
    /// `transfer-encoding: chunked`.
    Chunked {
        /// Bytes of the present chunk that have not been read.
        left: usize,
    },
    /// Up to the end of the stream.
    ToEnd,
}

impl BodyReader {
    /// The next piece; empty at the body's end.
    pub fn next(&mut self, stream: &mut impl Read) -> io::Result<Vec<u8>> {
        let limit = match self {
            Self::Length { left } => *left,
            Self::ToEnd => usize::MAX,
            Self::Chunked { left } => {
                if *left == 0 {
                    let line = read_line(stream)?;
                    let digits = line.split(';').next().unwrap_or_default().trim();
                    *left = usize::from_str_radix(digits, 16).map_err(|_| bad("a chunk's size"))?;
                    if *left == 0 {
                        read_line(stream)?;
                        *self = Self::Length { left: 0 };
                        return Ok(Vec::new());
                    }
                }
                *left
            }
        };
        if limit == 0 {
            return Ok(Vec::new());
        }
        let mut piece = vec![0; limit.min(16 << 10)];
        let read = stream.read(&mut piece)?;
        piece.truncate(read);
        match self {
            Self::ToEnd => return Ok(piece),
            Self::Length { left } | Self::Chunked { left } => *left -= read,
        }
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if matches!(self, Self::Chunked { left: 0 }) {
            read_line(stream)?;
        }
        Ok(piece)
    }

    /// The rest of the body.
    pub fn read_all(mut self, stream: &mut impl Read) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let piece = self.next(stream)?;
            if piece.is_empty() {
                return Ok(body);
            }
            body.extend(piece);
        }
    }
}

fn read_line(stream: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    String::from_utf8(line).map_err(|_| bad("a line that is not text"))
}
