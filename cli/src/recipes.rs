//! The recipes that come with the binary, so that it trains wherever it is installed.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use flowtape_trainer::Recipe;
use flowtape_trainer::recipe::suggestion;

use crate::terminal::{delivered, out, say};

/// All of `recipes/`, by the names of its files.
const RECIPES: &[(&str, &str)] = &[
    ("chroma_finetune", include_str!("../../recipes/chroma_finetune.yaml")),
    ("chroma_lora", include_str!("../../recipes/chroma_lora.yaml")),
    ("chroma_pretrain", include_str!("../../recipes/chroma_pretrain.yaml")),
    ("digits", include_str!("../../recipes/digits.yaml")),
    ("digits_lora", include_str!("../../recipes/digits_lora.yaml")),
    ("digits_no_sevens", include_str!("../../recipes/digits_no_sevens.yaml")),
    ("emoji", include_str!("../../recipes/emoji.yaml")),
    ("emoji_all", include_str!("../../recipes/emoji_all.yaml")),
    ("emoji_lora", include_str!("../../recipes/emoji_lora.yaml")),
    ("flux1_finetune", include_str!("../../recipes/flux1_finetune.yaml")),
    ("flux1_lora", include_str!("../../recipes/flux1_lora.yaml")),
    ("flux1_pretrain", include_str!("../../recipes/flux1_pretrain.yaml")),
    ("flux2_finetune", include_str!("../../recipes/flux2_finetune.yaml")),
    ("flux2_klein_edit_finetune", include_str!("../../recipes/flux2_klein_edit_finetune.yaml")),
    ("flux2_klein_edit_lora", include_str!("../../recipes/flux2_klein_edit_lora.yaml")),
    ("flux2_klein_finetune", include_str!("../../recipes/flux2_klein_finetune.yaml")),
    ("flux2_klein_lora", include_str!("../../recipes/flux2_klein_lora.yaml")),
    ("flux2_klein_pretrain", include_str!("../../recipes/flux2_klein_pretrain.yaml")),
    ("flux2_lora", include_str!("../../recipes/flux2_lora.yaml")),
    ("flux2_pretrain", include_str!("../../recipes/flux2_pretrain.yaml")),
    ("flux3_finetune", include_str!("../../recipes/flux3_finetune.yaml")),
    ("flux3_lora", include_str!("../../recipes/flux3_lora.yaml")),
    ("flux3_pretrain", include_str!("../../recipes/flux3_pretrain.yaml")),
    ("hunyuan_finetune", include_str!("../../recipes/hunyuan_finetune.yaml")),
    ("hunyuan_lora", include_str!("../../recipes/hunyuan_lora.yaml")),
    ("hunyuan_pretrain", include_str!("../../recipes/hunyuan_pretrain.yaml")),
    ("krea2_finetune", include_str!("../../recipes/krea2_finetune.yaml")),
    ("krea2_lora", include_str!("../../recipes/krea2_lora.yaml")),
    ("krea2_pretrain", include_str!("../../recipes/krea2_pretrain.yaml")),
    ("ltx2_5_finetune", include_str!("../../recipes/ltx2_5_finetune.yaml")),
    ("ltx2_5_lora", include_str!("../../recipes/ltx2_5_lora.yaml")),
    ("ltx2_finetune", include_str!("../../recipes/ltx2_finetune.yaml")),
    ("ltx2_lora", include_str!("../../recipes/ltx2_lora.yaml")),
    ("ltx2_pretrain", include_str!("../../recipes/ltx2_pretrain.yaml")),
    ("lumina2_finetune", include_str!("../../recipes/lumina2_finetune.yaml")),
    ("lumina2_lora", include_str!("../../recipes/lumina2_lora.yaml")),
    ("lumina2_pretrain", include_str!("../../recipes/lumina2_pretrain.yaml")),
    ("moving_digits_hunyuan", include_str!("../../recipes/moving_digits_hunyuan.yaml")),
    ("moving_digits_wan", include_str!("../../recipes/moving_digits_wan.yaml")),
    ("qwen_image_21_edit_finetune", include_str!("../../recipes/qwen_image_21_edit_finetune.yaml")),
    ("qwen_image_21_edit_lora", include_str!("../../recipes/qwen_image_21_edit_lora.yaml")),
    ("qwen_image_21_finetune", include_str!("../../recipes/qwen_image_21_finetune.yaml")),
    ("qwen_image_21_lora", include_str!("../../recipes/qwen_image_21_lora.yaml")),
    ("qwen_image_21_pretrain", include_str!("../../recipes/qwen_image_21_pretrain.yaml")),
    ("qwen_image_finetune", include_str!("../../recipes/qwen_image_finetune.yaml")),
    ("qwen_image_lora", include_str!("../../recipes/qwen_image_lora.yaml")),
    ("qwen_image_pretrain", include_str!("../../recipes/qwen_image_pretrain.yaml")),
    ("wan2_1_finetune", include_str!("../../recipes/wan2_1_finetune.yaml")),
    ("wan2_1_i2v_finetune", include_str!("../../recipes/wan2_1_i2v_finetune.yaml")),
    ("wan2_1_i2v_lora", include_str!("../../recipes/wan2_1_i2v_lora.yaml")),
    ("wan2_1_i2v_pretrain", include_str!("../../recipes/wan2_1_i2v_pretrain.yaml")),
    ("wan2_1_lora", include_str!("../../recipes/wan2_1_lora.yaml")),
    ("wan2_1_pretrain", include_str!("../../recipes/wan2_1_pretrain.yaml")),
    ("wan2_2_finetune", include_str!("../../recipes/wan2_2_finetune.yaml")),
    ("wan2_2_i2v_finetune", include_str!("../../recipes/wan2_2_i2v_finetune.yaml")),
    ("wan2_2_i2v_lora", include_str!("../../recipes/wan2_2_i2v_lora.yaml")),
    ("wan2_2_lora", include_str!("../../recipes/wan2_2_lora.yaml")),
    ("wan2_2_ti2v_finetune", include_str!("../../recipes/wan2_2_ti2v_finetune.yaml")),
    ("wan2_2_ti2v_lora", include_str!("../../recipes/wan2_2_ti2v_lora.yaml")),
    ("wan2_2_ti2v_pretrain", include_str!("../../recipes/wan2_2_ti2v_pretrain.yaml")),
    ("z_image_finetune", include_str!("../../recipes/z_image_finetune.yaml")),
    ("z_image_lora", include_str!("../../recipes/z_image_lora.yaml")),
    ("z_image_pretrain", include_str!("../../recipes/z_image_pretrain.yaml")),
];

/// Which to show.
#[derive(Args)]
pub struct Recipes {
    /// Print this one, to be kept in a file and changed.
    name: Option<String>,
}

/// Lists the recipes of the binary, or prints one.
pub fn run(args: &Recipes) -> Result<ExitCode> {
    match &args.name {
        Some(name) => match embedded(name) {
            Some(text) => out(format_args!("{text}")),
            None => bail!("{name}: no recipe of the binary{}", suggestion(name, names())),
        },
        None => {
            for (name, text) in RECIPES {
                say!("{name:<28}{}", about(text));
            }
            say!("\ntrain one with `flowtape train NAME`; `flowtape recipes NAME` prints it");
        }
    }
    delivered()
}

/// A recipe from a file, or by the name of one of the binary's.
pub fn load(named: &Path, set: &[String]) -> Result<Recipe> {
    match named.to_str().and_then(embedded) {
        Some(text) if !named.exists() => Ok(Recipe::from_yaml(named, text.as_bytes(), set)?),
        _ if named.extension().is_none() && !named.exists() => {
            let name = named.display();
            bail!("{name}: neither a file nor a recipe of the binary{}", suggestion(&name.to_string(), names()))
        }
        _ if named.is_dir() => {
            bail!("{}: a folder, not a recipe; name a file, such as the recipe.yaml of a run's folder", named.display())
        }
        _ => Ok(Recipe::load(named, set)?),
    }
}

fn embedded(name: &str) -> Option<&'static str> {
    RECIPES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

fn names() -> impl Iterator<Item = &'static str> {
    RECIPES.iter().map(|(name, _)| *name)
}

/// The first sentence of the comment that a recipe begins with.
fn about(text: &str) -> String {
    let lines = text.lines().map_while(|line| line.strip_prefix("# "));
    let comment = lines.collect::<Vec<_>>().join(" ");
    let end = [": ", ". "].iter().filter_map(|mark| comment.find(mark)).min().unwrap_or(comment.len());
    comment[..end].trim_end_matches([':', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_binary_has_all_of_the_folder() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        files.sort();
        assert_eq!(RECIPES.iter().map(|(name, _)| *name).collect::<Vec<_>>(), files);
        for (name, text) in RECIPES {
            assert!(!about(text).is_empty(), "{name} begins with a comment that says what it is");
            // One that goes on from another's run, or from a published model, says so.
            if let Err(error) = load(Path::new(name), &[]) {
                let says = |part: &str| error.to_string().contains(part);
                let key = "model.pretrained_model_name_or_path: ";
                assert!(says(&format!("{key}runs/")) || (says(key) && says("hf download")), "{name}: {error}");
            }
        }
        assert!(load(Path::new("digit"), &[]).unwrap_err().to_string().contains("did you mean `digits`?"));
        assert!(load(Path::new("no/digits.yaml"), &[]).is_err());
    }
}
