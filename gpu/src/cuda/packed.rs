//! The kernels of `kernels/*.cu` as PTX for sm_80: `gpu/ptx`, which `kernels/build.sh` writes.

use std::io::Read;

use flate2::read::GzDecoder;

/// A line for each kernel file, in the order of the archive: name, packed bytes, hash of its sources.
const INDEX: &str = include_str!("../../ptx/INDEX");
/// The texts, each a gzip file, one after the other.
const ARCHIVE: &[u8] = include_bytes!("../../ptx/kernels.bin");

/// Names of the kernel files and their packed texts.
fn entries() -> impl Iterator<Item = (&'static str, &'static [u8])> {
    INDEX.lines().scan(ARCHIVE, |rest, line| {
        let mut words = line.split(' ');
        let (name, bytes) = (words.next()?, words.next()?.parse().ok()?);
        let (packed, after) = rest.split_at_checked(bytes)?;
        *rest = after;
        Some((name, packed))
    })
}

/// The text of a kernel file, unpacked; `None` if there is none of that name.
pub(super) fn text(name: &str) -> Option<String> {
    let (_, packed) = entries().find(|(n, _)| *n == name)?;
    let mut text = String::new();
    GzDecoder::new(packed).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_of_the_archive_is_there_and_whole() {
        let names: Vec<&str> = entries().map(|(name, _)| name).collect();
        assert_eq!(names.len(), INDEX.lines().count());
        assert_eq!(entries().map(|(_, packed)| packed.len()).sum::<usize>(), ARCHIVE.len());
        for name in names {
            let text = text(name).unwrap();
            assert!(text.starts_with(".version 8.0\n.target sm_80\n"), "{name}: {}", &text[..100]);
            assert!(text.contains(".entry") && text.trim_end().ends_with('}'), "{name}");
        }
        assert!(["gemm_bf16", "norm_f32", "attention_f16_64", "index", "random"].iter().all(|n| text(n).is_some()));
        assert_eq!(text("none"), None);
    }
}
