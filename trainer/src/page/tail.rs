//! Files of lines that grow while they are read.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;

use serde::de::DeserializeOwned;

/// Bytes before the place that was read up to by which a file is known again.
const MARK: usize = 64;

/// Reads the lines of a file that came since it was read last.
#[derive(Clone, Debug)]
pub(super) struct Tail {
    path: PathBuf,
    offset: u64,
    mark: Vec<u8>,
}

impl Tail {
    /// From the file's beginning; it need not be there yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, mark: Vec::new() }
    }

    /// Goes back to the beginning where what was read is not what the file holds now, as after a run went on from an earlier
    /// checkpoint; whether it did.
    pub fn begins_anew(&mut self) -> bool {
        let anew = self.offset > 0 && !self.is_known();
        if anew {
            *self = Self::new(std::mem::take(&mut self.path));
        }
        anew
    }

    fn is_known(&self) -> bool {
        let Ok(mut file) = File::open(&self.path) else { return false };
        let mut found = vec![0; self.mark.len()];
        let at = self.offset - self.mark.len() as u64;
        file.seek(SeekFrom::Start(at)).is_ok() && file.read_exact(&mut found).is_ok() && found == self.mark
    }

    /// Hands on each new line that is a `T`. A line without its end is left for later, one that is no `T` is passed over, and a file
    /// that can't be read has none.
    pub fn each<T: DeserializeOwned>(&mut self, mut take: impl FnMut(T)) {
        let Ok(mut file) = File::open(&self.path) else { return };
        if file.seek(SeekFrom::Start(self.offset)).is_err() {
            return;
        }
        let (mut reader, mut line) = (BufReader::with_capacity(1 << 16, file), Vec::new());
        while reader.read_until(b'\n', &mut line).is_ok() && line.ends_with(b"\n") {
            if let Ok(found) = serde_json::from_slice(&line) {
                take(found);
            }
            self.offset += line.len() as u64;
            self.mark.extend_from_slice(&line[line.len().saturating_sub(MARK)..]);
            self.mark.drain(..self.mark.len().saturating_sub(MARK));
            line.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_are_read_once_and_again_where_the_file_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines.jsonl");
        let mut tail = Tail::new(path.clone());
        let read = |tail: &mut Tail| {
            let mut found: Vec<u64> = Vec::new();
            let anew = tail.begins_anew();
            tail.each(|n| found.push(n));
            (anew, found)
        };
        assert_eq!(read(&mut tail), (false, vec![]));
        std::fs::write(&path, "1\n2\nbroken\n3").unwrap();
        assert_eq!(read(&mut tail), (false, vec![1, 2]));
        let append = |text: &str| File::options().append(true).open(&path).unwrap().write_all(text.as_bytes()).unwrap();
        append("3\n4\n");
        assert_eq!(read(&mut tail), (false, vec![33, 4]));
        assert_eq!(read(&mut tail), (false, vec![]));
        // Cut, and longer again than it was.
        std::fs::write(&path, "1\n2\n7\n8\n9\n10\n11\n12\n13\n14\n").unwrap();
        assert_eq!(read(&mut tail), (true, vec![1, 2, 7, 8, 9, 10, 11, 12, 13, 14]));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&mut tail), (true, vec![]));
    }
}
