//! The golden suite: it walks the folder, so that all that lies there passes, fails, is skipped or is listed as not built.

use std::io;
use std::path::{Path, PathBuf};

use crate::golden::{Any, broken, collect};
use crate::{Outcome, adapters, lora, ops, optim, pipeline_math, sampling, step, text, vae, vision};

/// Compares the cases of a file `<name>.json` in a folder.
type Check = fn(folder: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()>;

/// Which parts of the goldens (a folder's name, or folder and file) are compared with what. A `*` stands for any text.
const SUBJECTS: &[(&str, Check)] = &[
    ("*_step", step::check),
    #[cfg(feature = "trainer")]
    ("data/*_batches", crate::data::cache),
    #[cfg(feature = "trainer")]
    ("data/bucketing", crate::data::bucketing),
    ("lora_flux", lora::check),
    #[cfg(feature = "trainer")]
    ("ltx2_sound", crate::media::sound),
    #[cfg(feature = "trainer")]
    ("image_preprocess", crate::media::check),
    ("ops/*", ops::check),
    ("optim_flux", optim::check),
    ("pipeline_math/adapter_inputs", adapters::prepared),
    ("pipeline_math/packing", adapters::packing),
    ("pipeline_math/sample_timesteps", pipeline_math::sample_timesteps),
    ("pipeline_math/schedule_and_loss", pipeline_math::schedule_and_loss),
    ("pipeline_math/sigma_statistics", pipeline_math::sigma_statistics),
    ("pipeline_math/time_shift", pipeline_math::time_shifts),
    #[cfg(feature = "trainer")]
    ("pipe_qwen_image_edit", crate::editing::check),
    #[cfg(feature = "trainer")]
    ("pipe_*", crate::pipelines::check),
    #[cfg(feature = "trainer")]
    ("recipe_*", crate::recipe::check),
    ("sampling/flux_trajectory", sampling::trajectories),
    ("sampling/scheduler", sampling::scheduler),
    ("text_byt5", text::states),
    ("text_clip", text::states),
    ("text_gemma2", text::decoder_states),
    ("text_gemma3", text::decoder_states),
    ("text_mistral3", text::decoder_states),
    ("text_qwen25vl", text::decoder_states),
    ("text_qwen25vl_image", vision::qwen25_vl),
    ("text_qwen3", text::decoder_states),
    ("text_qwen3vl", text::decoder_states),
    ("text_t5", text::states),
    ("text_umt5", text::states),
    #[cfg(feature = "trainer")]
    ("tokenizers", crate::prompts::check),
    ("vae_*", vae::check),
    ("vocoder_ltx2", vae::vocoder),
    #[cfg(feature = "trainer")]
    ("vision_clip", vision::clip),
    ("vision_siglip", vision::siglip),
];

/// The outcomes of all that lies in a folder of goldens, in the order of its names.
///
/// # Errors
/// A folder can't be listed.
pub fn outcomes(root: &Path) -> io::Result<Vec<Outcome>> {
    let mut out = Vec::new();
    for entry in list(root)? {
        if !entry.is_dir() {
            // The goldens' own description, and what makes them.
            if !matches!(&*name(&entry), "README.md" | "make.py") {
                out.push(broken(name(&entry), &*Box::<dyn std::error::Error>::from("a file beside the folders")));
            }
            continue;
        }
        match parts(&entry)? {
            Ok(files) => out.extend(files.iter().flat_map(|file| part(&entry, file))),
            Err(problem) => out.push(broken(name(&entry), &*Box::<dyn std::error::Error>::from(problem))),
        }
    }
    Ok(out)
}

/// The outcomes of folders of goldens, a line each and their counts below. `say` gets each line.
///
/// # Errors
/// A folder can't be listed, or a case failed, or none passed.
pub fn report(roots: &[&Path], mut say: impl FnMut(&str)) -> io::Result<()> {
    let mut all = Vec::new();
    for root in roots {
        say(&format!("goldens in {}", root.display()));
        let outcomes = outcomes(root)?;
        outcomes.iter().for_each(|outcome| say(&outcome.to_string()));
        all.extend(outcomes);
    }
    let count = |kind: fn(&Outcome) -> bool| all.iter().filter(|o| kind(o)).count();
    let (passed, failed) = (count(Outcome::passed), count(Outcome::failed));
    let (skipped, not_built) = (count(Outcome::is_skipped), count(Outcome::is_not_built));
    say(&format!("{passed} passed, {failed} failed, {skipped} skipped, {not_built} not built"));
    match (failed, passed) {
        (0, 1..) => Ok(()),
        (0, 0) => Err(io::Error::other("nothing was compared")),
        _ => Err(io::Error::other(format!("{failed} golden cases failed"))),
    }
}

/// The subjects of which folders of goldens have nothing.
///
/// # Errors
/// A folder can't be listed.
pub fn without_goldens(roots: &[&Path]) -> io::Result<Vec<&'static str>> {
    let mut parts_there = Vec::new();
    for root in roots {
        for folder in list(root)?.iter().filter(|entry| entry.is_dir()) {
            parts_there.extend(parts(folder)?.into_iter().flatten().map(|file| title(folder, &file)));
        }
    }
    let patterns = SUBJECTS.iter().map(|(pattern, _)| *pattern);
    Ok(patterns.filter(|pattern| !parts_there.iter().any(|part| matches(pattern, part))).collect())
}

/// The file of cases of a folder that is one case.
const CASE: &str = "case";

/// The files of cases in a folder, without `.json`: `case` alone, or one for each file; or what is wrong with the folder.
fn parts(folder: &Path) -> io::Result<Result<Vec<String>, String>> {
    if folder.join(CASE).with_extension("json").exists() {
        return Ok(Ok(vec![CASE.to_owned()]));
    }
    let files = list(folder)?;
    let of_kind = |extension: &str| -> Vec<String> {
        let kind = |path: &&PathBuf| path.extension().is_some_and(|e| e == extension);
        files.iter().filter(kind).map(|path| name(&path.with_extension(""))).collect()
    };
    let cases = of_kind("json");
    if cases.is_empty() {
        return Ok(Err("neither case.json nor other JSON files of cases".to_owned()));
    }
    Ok(match of_kind("safetensors").into_iter().find(|file| !cases.contains(file)) {
        Some(file) => Err(format!("{file}.safetensors has no {file}.json beside it")),
        None => Ok(cases),
    })
}

fn title(folder: &Path, file: &str) -> String {
    if file == CASE { name(folder) } else { format!("{}/{file}", name(folder)) }
}

fn part(folder: &Path, file: &str) -> Vec<Outcome> {
    let title = title(folder, file);
    match SUBJECTS.iter().find(|(pattern, _)| matches(pattern, &title)) {
        Some((_, check)) => collect(&title, |out| check(folder, file, out)),
        None => vec![Outcome::not_built(title)],
    }
}

fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        Some((start, end)) => text.strip_prefix(start).is_some_and(|rest| rest.ends_with(end)),
        None => text == pattern,
    }
}

fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries: io::Result<Vec<_>> = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect();
    let mut entries = entries?;
    entries.sort();
    Ok(entries)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_lies_in_the_folder_is_left_out() {
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str| {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        };
        for file in ["README.md", "new/case.json", "new/outputs.safetensors", "data/batches.json"] {
            write(file);
        }
        for file in ["data/batches.safetensors", "ops/new.json", "ops/lonely.safetensors", "stray.bin", "sampling/x/y"]
        {
            write(file);
        }
        write("new_step/case.json");
        let outcomes = outcomes(root.path()).unwrap();
        let of = |kind: fn(&Outcome) -> bool| -> Vec<&str> {
            outcomes.iter().filter(|o| kind(o)).map(|o| &*o.case).collect()
        };
        assert_eq!(of(Outcome::is_not_built), ["data/batches", "new"]);
        assert_eq!(of(Outcome::failed), ["new_step/aborted", "ops", "sampling", "stray.bin"]);
        assert_eq!(outcomes.len(), 6);
        std::fs::remove_file(root.path().join("ops/lonely.safetensors")).unwrap();
        assert!(without_goldens(&[root.path()]).unwrap().contains(&"optim_flux"));
        assert!(!without_goldens(&[root.path()]).unwrap().contains(&"ops/*"));
    }
}
