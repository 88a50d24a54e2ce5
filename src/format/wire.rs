//! Little-endian fields, read with every bound checked.

/// Bytes that are not what the layout says; names the field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatError(pub String);

impl FormatError {
    pub fn new(text: impl Into<String>) -> Self {
        FormatError(text.into())
    }
}

impl std::fmt::Display for FormatError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FormatError {}

/// Reads fields from the front of a byte slice.
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Fields { rest: bytes }
    }

    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub fn bytes(&mut self, length: usize, field: &str) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or_else(|| FormatError(format!("cut short in {field}")))?;
        self.rest = rest;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], FormatError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N, field)?);
        Ok(array)
    }

    pub fn u8(&mut self, field: &str) -> Result<u8, FormatError> {
        self.array::<1>(field).map(u8::from_le_bytes)
    }

    pub fn u16(&mut self, field: &str) -> Result<u16, FormatError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub fn u32(&mut self, field: &str) -> Result<u32, FormatError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: &str) -> Result<u64, FormatError> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub fn i64(&mut self, field: &str) -> Result<i64, FormatError> {
        self.array(field).map(i64::from_le_bytes)
    }

    /// A text: length u32, then UTF-8; at most `max` bytes.
    pub fn text(&mut self, max: usize, field: &str) -> Result<&'a str, FormatError> {
        let length = self.u32(field)? as usize;
        if length > max {
            return Err(FormatError(format!("{field} is longer than {max} bytes")));
        }
        std::str::from_utf8(self.bytes(length, field)?)
            .map_err(|_| FormatError(format!("{field} is not UTF-8")))
    }

    pub fn magic(&mut self, magic: &[u8; 8], what: &str) -> Result<(), FormatError> {
        match self.array::<8>("magic")? == *magic {
            true => Ok(()),
            false => Err(FormatError(format!("is not a {what} of format version 1"))),
        }
    }

    pub fn end(&self, what: &str) -> Result<(), FormatError> {
        match self.rest.is_empty() {
            true => Ok(()),
            false => Err(FormatError(format!("bytes after the end of the {what}"))),
        }
    }
}

pub fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}
