//! Samples in safetensors files of their own: plain ones, or the caches of musubi-tuner.

use std::path::{Path, PathBuf};

use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{Device, Philox, Tensor};

use super::{Media, Sample, SampleHeader, Source, Text};
use crate::cache::{LATENTS, OTHER, TEXT};
use crate::{Error, Fingerprint, Result, TextEmbeddings};

/// What musubi-tuner (its `dataset/cache_io.py`, format 1.0.1) keeps of an architecture: latents in
/// `<item>_<width>x<height>_<name>.safetensors`, normalised as diffusers' are, and embeddings in `<item>_<name>_te.safetensors`.
struct Architecture {
    /// As the files' names end.
    name: &'static str,
    /// How the key of the embeddings begins; its dtype follows.
    text: &'static str,
    /// Tokens that embeddings are padded to with zeros, as the model's pipeline does; 0 for as many as there are.
    tokens: usize,
    /// Whether a picture is a film of one frame that the model takes without it.
    single_frame: bool,
    /// Pixels on a side of a latent, and frames that one stands for.
    scale: [usize; 2],
}

const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "wan", text: "varlen_t5_", tokens: 512, single_frame: false, scale: [8, 4] },
    Architecture { name: "qi", text: "varlen_vl_embed_", tokens: 0, single_frame: true, scale: [8, 1] },
    Architecture { name: "f2d", text: "ctx_vec_", tokens: 0, single_frame: false, scale: [16, 1] },
    Architecture { name: "f2k4b", text: "ctx_vec_", tokens: 0, single_frame: false, scale: [16, 1] },
    Architecture { name: "f2k9b", text: "ctx_vec_", tokens: 0, single_frame: false, scale: [16, 1] },
];

/// The samples of a folder, in the order of their names. Files of other kinds are passed over.
#[derive(Clone, Debug)]
pub struct LooseFiles {
    samples: Vec<Loose>,
    kind: String,
    fingerprint: Fingerprint,
}

#[derive(Clone, Debug)]
struct Loose {
    file: PathBuf,
    /// Of musubi-tuner: which architecture, and the file of the embeddings.
    musubi: Option<(&'static Architecture, PathBuf)>,
    header: SampleHeader,
    caption: Option<String>,
}

impl std::fmt::Debug for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

fn wrong(path: &Path, what: impl Into<String>) -> Error {
    Error::Open { name: path.display().to_string(), what: what.into() }
}

impl LooseFiles {
    /// Opens a folder of musubi-tuner's caches, or of files with `latents`, `text.<name>` and `tensor.<name>` as in a shard of
    /// ours but without the axis of samples; their captions stand in `.txt` files beside them.
    ///
    /// # Errors
    /// When there is no such file, one is broken, or musubi-tuner's are of an architecture that is not known here.
    pub fn open(folder: &Path) -> Result<Self> {
        let entries = std::fs::read_dir(folder).map_err(|e| wrong(folder, e.to_string()))?;
        let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
        let mut paths = paths.map_err(|e| wrong(folder, e.to_string()))?;
        paths.retain(|path| path.extension().is_some_and(|end| end == "safetensors"));
        paths.sort();
        let stems: Vec<String> =
            paths.iter().map(|path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned()).collect();
        let musubi = stems.iter().any(|stem| stem.ends_with("_te"));
        let (mut samples, mut fingerprint) = (Vec::new(), Fingerprint::of(b"loose"));
        let mut kind = String::from("plain files");
        for (path, stem) in paths.iter().zip(&stems).filter(|(_, stem)| !(musubi && stem.ends_with("_te"))) {
            let (musubi, caption) = match musubi {
                true => (Some(musubi_text(folder, path, stem)?), None),
                false => (None, std::fs::read_to_string(path.with_extension("txt")).ok()),
            };
            if let Some((architecture, _)) = &musubi {
                kind = format!("musubi-tuner {}", architecture.name);
            }
            let dims = latents_of(&SafeTensors::open(path)?, musubi.is_some())?.1;
            let header = SampleHeader { dims: pixels(&dims, musubi.as_ref().map(|(architecture, _)| *architecture)) };
            fingerprint = fingerprint.and(stem.as_bytes()).and(&[0]);
            let caption = caption.map(|caption| caption.trim().to_owned());
            samples.push(Loose { file: path.clone(), musubi, header, caption });
        }
        if samples.is_empty() {
            let what = "no cache: neither metadata.json of NeMo's preprocessing nor safetensors files of samples";
            return Err(wrong(folder, what));
        }
        Ok(Self { samples, kind, fingerprint })
    }

    /// Whose files they are.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    fn sample(&self, index: usize) -> Result<&Loose> {
        let found = self.samples.get(index);
        found.ok_or_else(|| Error::batch("sample", format!("a number below {}", self.samples.len()), index))
    }
}

/// The architecture of a file of latents, and the file of its embeddings.
fn musubi_text(folder: &Path, path: &Path, stem: &str) -> Result<(&'static Architecture, PathBuf)> {
    let mut parts: Vec<&str> = stem.split('_').collect();
    let name = parts.pop().unwrap_or_default();
    let known = ARCHITECTURES.iter().find(|architecture| architecture.name == name);
    let architecture = known.ok_or_else(|| {
        let names: Vec<&str> = ARCHITECTURES.iter().map(|architecture| architecture.name).collect();
        wrong(path, format!("a cache of musubi-tuner's {name}: expected one of {}", names.join(", ")))
    })?;
    // The size, and of a film its first frame and how many there are.
    parts.pop();
    let frames = |part: &str| {
        part.len() > 5 && part.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') && part.contains('-')
    };
    let mut items = vec![parts.join("_")];
    if parts.last().is_some_and(|part| frames(part)) {
        parts.pop();
        items.insert(0, parts.join("_"));
    }
    let files = items.iter().map(|item| folder.join(format!("{item}_{name}_te.safetensors")));
    let found = files.into_iter().find(|file| file.exists());
    let missing = || wrong(path, format!("no embeddings beside it: expected {}_{name}_te.safetensors", items[0]));
    Ok((architecture, found.ok_or_else(missing)?))
}

/// The key of a file's latents, and their sizes.
fn latents_of(file: &SafeTensors, musubi: bool) -> Result<(String, Vec<usize>)> {
    let sized = |name: &String| {
        name.strip_prefix("latents_").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let names = file.names();
    let found = names.iter().find(|name| if musubi { sized(name) } else { *name == LATENTS });
    let expected = if musubi { "latents_<sizes>_<dtype>" } else { LATENTS };
    let name = found.ok_or_else(|| wrong(file.path(), format!("no tensor {expected}")))?;
    // What says where to go or what to look like would be lost.
    if let Some(other) = names.iter().find(|other| musubi && *other != name) {
        return Err(wrong(file.path(), format!("{other}: a cache with such a tensor is not taken over")));
    }
    Ok((name.clone(), file.dims(name).unwrap_or_default().to_vec()))
}

/// Sizes of the pixels that latents were made of; their own where that is not known.
fn pixels(latents: &[usize], architecture: Option<&Architecture>) -> Vec<usize> {
    let Some(Architecture { scale: [side, frames], single_frame, .. }) = architecture else { return latents.to_vec() };
    match *latents {
        [_, f, h, w] if !single_frame => vec![3, f.saturating_sub(1).saturating_mul(*frames) + 1, h * side, w * side],
        [_, _, h, w] | [_, h, w] => vec![3, h * side, w * side],
        _ => latents.to_vec(),
    }
}

impl Source for LooseFiles {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn header(&self, index: usize) -> Result<SampleHeader> {
        Ok(self.sample(index)?.header.clone())
    }

    fn read(&self, index: usize, _: &mut Philox) -> Result<Sample> {
        let (own, cpu) = (self.sample(index)?, Device::cpu());
        let file = SafeTensors::open(&own.file)?;
        let (key, dims) = latents_of(&file, own.musubi.is_some())?;
        let latents = file.get(&key, &cpu, None)?;
        let Some((architecture, text)) = &own.musubi else {
            let mut embeddings = TextEmbeddings::default();
            let mut tensors = Vec::new();
            for name in file.names() {
                if let Some(inner) = name.strip_prefix(TEXT) {
                    embeddings = embeddings.with(inner, file.get(&name, &cpu, None)?);
                } else if let Some(inner) = name.strip_prefix(OTHER) {
                    tensors.push((inner.to_owned(), file.get(&name, &cpu, None)?));
                } else if name != LATENTS {
                    return Err(wrong(&own.file, format!("{name}: expected {LATENTS}, {TEXT}<name> or {OTHER}<name>")));
                }
            }
            let mut sample = Sample::new(Media::Latents(latents), Text::Embeddings(embeddings));
            sample.tensors.extend(tensors);
            return Ok(sample);
        };
        let latents = match dims[..] {
            [_, 1, _, _] if architecture.single_frame => latents.squeeze(1)?,
            _ => latents,
        };
        let file = SafeTensors::open(text)?;
        let names = file.names();
        let [name] = &names[..] else {
            return Err(wrong(text, format!("expected one tensor, got {}", names.join(", "))));
        };
        if !name.starts_with(architecture.text) {
            return Err(wrong(text, format!("expected {}<dtype>, got {name}", architecture.text)));
        }
        let embeddings: Tensor = file.get(name, &cpu, None)?;
        let length = embeddings.dims().first().copied().unwrap_or(0);
        let embeddings = embeddings.pad(0, 0, architecture.tokens.saturating_sub(length))?;
        let embeddings = TextEmbeddings::default().with("text_embeddings", embeddings);
        Ok(Sample::new(Media::Latents(latents), Text::Embeddings(embeddings)))
    }

    fn name(&self, index: usize) -> String {
        self.samples.get(index).map_or_else(|| format!("sample {index}"), |own| own.file.display().to_string())
    }

    fn file(&self, index: usize) -> Result<Option<String>> {
        Ok(Some(self.sample(index)?.file.display().to_string()))
    }

    fn caption(&self, index: usize) -> Result<Option<String>> {
        Ok(self.sample(index)?.caption.clone())
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use flowtape_engine::safetensors::save;

    use super::*;

    fn write(folder: &Path, file: &str, tensors: &[(&str, &[usize])]) {
        let tensor = |dims: &[usize]| Philox::new(dims[0] as u64).normal(dims, &Device::cpu()).unwrap();
        let tensors: Vec<_> = tensors.iter().map(|(name, dims)| ((*name).to_owned(), tensor(dims))).collect();
        save(folder.join(file), &tensors, &BTreeMap::new()).unwrap();
    }

    fn read(source: &LooseFiles, index: usize) -> (Vec<usize>, Vec<(String, Vec<usize>)>) {
        let sample = source.read(index, &mut Philox::new(0)).unwrap();
        let Text::Embeddings(text) = &sample.text else { panic!("embeddings") };
        let all = text.tensors.iter().chain(&sample.tensors).map(|(name, t)| (name.clone(), t.dims().to_vec()));
        (sample.media.tensor().dims().to_vec(), all.collect())
    }

    #[test]
    fn plain_files_are_samples() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        write(
            at,
            "b.safetensors",
            &[("latents", &[4, 2, 3]), ("text.text_embeddings", &[5, 6]), ("tensor.extra", &[2])],
        );
        write(at, "a.safetensors", &[("latents", &[4, 2, 2]), ("text.text_embeddings", &[3, 6])]);
        std::fs::write(at.join("a.txt"), "an apple\n").unwrap();
        let source = LooseFiles::open(at).unwrap();
        assert_eq!((source.len(), source.kind()), (2, "plain files"));
        assert_eq!((source.caption(0).unwrap().as_deref(), source.caption(1).unwrap()), (Some("an apple"), None));
        let text = ("text_embeddings".to_owned(), vec![5, 6]);
        assert_eq!(read(&source, 1), (vec![4, 2, 3], vec![text, ("extra".to_owned(), vec![2])]));
        write(at, "c.safetensors", &[("latents", &[4, 2, 2]), ("moments", &[1])]);
        let error = LooseFiles::open(at).unwrap().read(2, &mut Philox::new(0)).unwrap_err().to_string();
        assert!(error.contains("c.safetensors") && error.contains("moments"), "{error}");
    }

    #[test]
    fn musubis_caches_are_read_by_architecture() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        write(at, "a_cat_00000-017_0832x0480_wan.safetensors", &[("latents_5x60x104_bfloat16", &[16, 5, 6, 10])]);
        write(at, "a_cat_wan_te.safetensors", &[("varlen_t5_bfloat16", &[7, 12])]);
        write(at, "dog_0512x0512_qi.safetensors", &[("latents_1x64x64_float32", &[16, 1, 8, 6])]);
        write(at, "dog_qi_te.safetensors", &[("varlen_vl_embed_bfloat16", &[9, 20])]);
        write(at, "fox_0512x0512_f2d.safetensors", &[("latents_32x32_float32", &[128, 4, 3])]);
        write(at, "fox_f2d_te.safetensors", &[("ctx_vec_bfloat16", &[11, 20])]);
        let source = LooseFiles::open(at).unwrap();
        let text = |dims: &[usize]| vec![("text_embeddings".to_owned(), dims.to_vec())];
        assert_eq!(read(&source, 0), (vec![16, 5, 6, 10], text(&[512, 12])));
        assert_eq!(source.header(0).unwrap().dims, [3, 17, 48, 80]);
        assert_eq!(
            (read(&source, 1), source.header(1).unwrap().dims),
            ((vec![16, 8, 6], text(&[9, 20])), vec![3, 64, 48])
        );
        assert_eq!(
            (read(&source, 2), source.header(2).unwrap().dims),
            ((vec![128, 4, 3], text(&[11, 20])), vec![3, 64, 48])
        );

        let refused = |file: &str, tensors: &[(&str, &[usize])], part: &str| {
            write(at, file, tensors);
            let error = LooseFiles::open(at).unwrap_err().to_string();
            assert!(error.contains(file) && error.contains(part), "{error}");
            std::fs::remove_file(at.join(file)).unwrap();
        };
        refused("x_0512x0512_k5.safetensors", &[("latents_1x1x1_float32", &[1, 1, 1, 1])], "expected one of wan, qi");
        refused("x_0512x0512_qi.safetensors", &[("latents_1x1x1_float32", &[1, 1, 1, 1])], "x_qi_te.safetensors");
        let control: &[(&str, &[usize])] =
            &[("latents_1x1x1_float32", &[1, 1, 1, 1]), ("latents_control_0_1x1x1_float32", &[1, 1, 1, 1])];
        refused("dog_0256x0256_qi.safetensors", control, "latents_control_0");
    }
}
