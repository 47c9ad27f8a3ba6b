//! What tells two things apart without keeping them.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use flowtape_engine::{Error, hash};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A [`hash`] of content, written as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Fingerprint(u64);

impl Fingerprint {
    /// Of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(hash::of(bytes))
    }

    /// Of what this is of, followed by these bytes.
    #[must_use]
    pub fn and(self, bytes: &[u8]) -> Self {
        Self(hash::and(self.0, bytes))
    }
}

impl Fingerprint {
    /// Its 64 bits.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Of this, followed by the files of a folder: their names, sizes and content. Of what is large a page in each megabyte is
    /// read, so that weights of many gigabytes are told apart at once.
    ///
    /// # Errors
    /// When a file can't be read.
    pub fn and_folder(self, folder: &Path) -> Result<Self, Error> {
        const PAGE: usize = 4096;
        const EVERY: u64 = 1 << 20;
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        let paths: std::io::Result<Vec<PathBuf>> =
            std::fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
        let mut paths = paths.map_err(io(folder))?;
        paths.retain(|path| path.is_file());
        paths.sort();
        let mut all = self;
        let mut page = vec![0; PAGE];
        for path in paths {
            let mut file = File::open(&path).map_err(io(&path))?;
            let size = file.metadata().map_err(io(&path))?.len();
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            all = all.and(name).and(&[0]).and(&size.to_le_bytes());
            let step = if size <= EVERY { PAGE as u64 } else { EVERY };
            for start in (0..size).step_by(step as usize) {
                let len = PAGE.min((size - start) as usize);
                file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(&mut page[..len])).map_err(io(&path))?;
                all = all.and(&page[..len]);
            }
        }
        Ok(all)
    }

    /// From its 64 bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map(Self).map_err(|_| D::Error::custom("expected 16 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_where_it_was() {
        // FNV-1a of "foobar", by the function's authors.
        assert_eq!(Fingerprint::of(b"foo").and(b"bar").to_string(), "85944171f73967e8");
    }
}
