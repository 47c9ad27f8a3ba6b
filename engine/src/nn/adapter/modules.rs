//! Which linear layers get an adapter: NeMo's patterns.

use std::collections::BTreeSet;

use regex_lite::Regex;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What NeMo takes where nothing is named.
const DEFAULT: &str = "*_proj";
/// Module names that an error lists.
const SHOWN: usize = 8;

/// A choice among a model's linear layers by [`ModulePattern`]s, as NeMo's `ModuleMatcher` makes it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModuleSelection {
    /// Patterns of those that are chosen; `*_proj` where nothing else is said.
    pub target_modules: Vec<String>,
    /// All but these, instead.
    pub exclude_modules: Vec<String>,
    /// All of them, instead.
    pub match_all_linear: bool,
}

/// A pattern of module paths, as NeMo reads it: a `*` stands for any text; otherwise it is a regular expression that must match
/// a whole path, so a dot stands for any character.
#[derive(Clone, Debug)]
pub struct ModulePattern<'a> {
    text: &'a str,
    regex: Regex,
}

impl<'a> ModulePattern<'a> {
    /// Reads it.
    ///
    /// # Errors
    /// When it is no regular expression.
    pub fn new(text: &'a str) -> Result<Self> {
        let mut regex = String::new();
        let mut before = ' ';
        for c in text.chars() {
            if c == '*' && before != '.' {
                regex.push('.');
            }
            regex.push(c);
            before = c;
        }
        let regex =
            compile(&regex).map_err(|e| Error::argument("pattern of modules", format!("a pattern ({e})"), text))?;
        Ok(Self { text, regex })
    }

    /// Whether it matches the module of that path.
    pub fn matches(&self, module: &str) -> bool {
        module == self.text || self.regex.is_match(module)
    }

    /// The modules that someone means who writes it: dots are dots, and it may begin behind any dot of a path. None where it is
    /// written as a regular expression.
    fn meant(&self) -> Option<Regex> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.*".contains(c);
        let rest = self.text.strip_prefix("*.").unwrap_or(self.text);
        if !self.text.chars().all(plain) {
            return None;
        }
        let literal = rest.replace('.', "\\.").replace('*', ".*");
        compile(&format!("(.*\\.)?{literal}")).ok()
    }
}

fn compile(regex: &str) -> Result<Regex, regex_lite::Error> {
    Regex::new(&format!("^(?:{regex})$"))
}

impl ModuleSelection {
    /// Checks it without a model.
    ///
    /// # Errors
    /// When more than one of the three is given, or a pattern is no regular expression.
    pub fn check(&self) -> Result<()> {
        let given = [!self.target_modules.is_empty(), !self.exclude_modules.is_empty(), self.match_all_linear];
        if given.into_iter().filter(|given| *given).count() > 1 {
            let one = "one of target_modules, exclude_modules and match_all_linear";
            return Err(Error::argument("modules", one, self));
        }
        self.target_modules.iter().chain(&self.exclude_modules).try_for_each(|text| ModulePattern::new(text).map(drop))
    }

    /// The chosen ones among a model's linear layers, in their order.
    ///
    /// # Errors
    /// When it contradicts itself, or a pattern matches nothing or less than it seems to mean; the error lists module names
    /// that are near.
    pub fn select(&self, linears: &[String]) -> Result<Vec<String>> {
        self.check()?;
        if self.match_all_linear {
            return Ok(linears.to_vec());
        }
        let default = [DEFAULT.to_owned()];
        let (key, texts) = match (&self.target_modules[..], &self.exclude_modules[..]) {
            ([], []) => ("target_modules", &default[..]),
            ([], excluded) => ("exclude_modules", excluded),
            (targets, _) => ("target_modules", targets),
        };
        let mut matched = BTreeSet::new();
        for text in texts {
            let pattern = ModulePattern::new(text)?;
            let found: BTreeSet<&str> = linears.iter().map(String::as_str).filter(|m| pattern.matches(m)).collect();
            check_meant(key, &pattern, &found, linears)?;
            matched.extend(found);
        }
        let chosen = |module: &&String| matched.contains(module.as_str()) != (key == "exclude_modules");
        let chosen: Vec<String> = linears.iter().filter(chosen).cloned().collect();
        if chosen.is_empty() {
            return Err(Error::argument("exclude_modules", "a linear layer that is left", texts));
        }
        Ok(chosen)
    }
}

/// Whether a pattern matches something, and all that it seems to mean.
fn check_meant(
    key: &'static str,
    pattern: &ModulePattern<'_>,
    found: &BTreeSet<&str>,
    linears: &[String],
) -> Result<()> {
    let meant = pattern.meant();
    let meant: Vec<&str> =
        meant.iter().flat_map(|m| linears.iter().map(String::as_str).filter(|l| m.is_match(l))).collect();
    let missed: Vec<&str> = meant.iter().copied().filter(|module| !found.contains(module)).collect();
    if !found.is_empty() && missed.is_empty() {
        return Ok(());
    }
    let text = pattern.text;
    let tail = text.strip_prefix("*.").unwrap_or(text);
    let got = match (found.len(), meant.len()) {
        (0, 0) => format!("`{text}`, which matches none of {}; near are {}", linears.len(), nearest(text, linears)),
        (0, n) => format!(
            "`{text}`, which must match whole paths and matches none; `*{tail}` matches the {n} it seems to mean: {}",
            shown(&missed)
        ),
        (m, _) => format!(
            "`{text}`, which matches {m} ({}) and not the {} it seems to mean as well: {}; write `*{tail}` for all of them, or ({tail}) in \
             brackets for what it matches now",
            shown(&found.iter().copied().collect::<Vec<_>>()),
            missed.len(),
            shown(&missed)
        ),
    };
    Err(Error::Modules { key, got })
}

/// Some of many names, and how many there are more.
fn shown(names: &[&str]) -> String {
    let rest = names.len().saturating_sub(SHOWN);
    let first = names[..names.len() - rest].join(", ");
    if rest > 0 { format!("{first} and {rest} more") } else { first }
}

/// Kinds of modules whose names are like a pattern, each with its count: block numbers are `*`.
fn nearest(text: &str, linears: &[String]) -> String {
    let kind = |module: &String| {
        let number = |part: &str| part.parse::<usize>().is_ok();
        let parts: Vec<_> = module.split('.').map(|part| if number(part) { "*" } else { part }).collect();
        parts.join(".")
    };
    let mut kinds: Vec<(String, usize)> = Vec::new();
    for kind in linears.iter().map(kind) {
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => kinds.push((kind, 1)),
        }
    }
    kinds.sort_by(|(a, _), (b, _)| strsim::jaro(text, b).total_cmp(&strsim::jaro(text, a)));
    let shown: Vec<_> = kinds.iter().take(SHOWN).map(|(kind, count)| format!("{kind} ({count})")).collect();
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linears() -> Vec<String> {
        let mut all: Vec<String> = vec!["x_embedder".into()];
        for i in 0..2 {
            all.extend(["attn.to_q", "attn.to_out.0", "ff.net.2", "proj_out"].map(|m| format!("blocks.{i}.{m}")));
            all.push(format!("single_blocks.{i}.attn.to_q"));
        }
        all.push("proj_out".into());
        all
    }

    fn select(targets: &[&str]) -> Result<Vec<String>> {
        let target_modules = targets.iter().map(|t| (*t).to_owned()).collect();
        ModuleSelection { target_modules, ..ModuleSelection::default() }.select(&linears())
    }

    #[test]
    fn modules_are_chosen_in_the_models_order() -> Result<()> {
        assert_eq!(select(&["*.ff.net.2", "x_embedder"])?, ["x_embedder", "blocks.0.ff.net.2", "blocks.1.ff.net.2"]);
        assert_eq!(select(&["*.attn.to_q"])?.len(), 4);
        assert_eq!(select(&["blocks.(0|1).attn.to_q"])?, ["blocks.0.attn.to_q", "blocks.1.attn.to_q"]);
        let all = ModuleSelection { match_all_linear: true, ..ModuleSelection::default() };
        assert_eq!(all.select(&linears())?, linears());
        let excluded = ModuleSelection { exclude_modules: vec!["*blocks*".into()], ..ModuleSelection::default() };
        assert_eq!(excluded.select(&linears())?, ["x_embedder", "proj_out"]);
        let both = ModuleSelection { target_modules: vec!["*".into()], ..excluded };
        assert!(both.check().is_err() && ModuleSelection { match_all_linear: true, ..both }.check().is_err());
        Ok(())
    }

    #[test]
    fn a_pattern_that_does_not_match_what_it_seems_to_mean_is_an_error() {
        for (pattern, parts) in [
            ("to_q", &["`to_q`", "`*to_q` matches the 4", "single_blocks.0.attn.to_q"][..]),
            ("*.attn.to_qq", &["none of 12", "blocks.*.attn.to_q (2)", "single_blocks.*.attn.to_q (2)"]),
            ("proj_out", &["matches 1 (proj_out)", "not the 2", "blocks.0.proj_out", "`*proj_out`", "(proj_out)"]),
            ("*.blocks.*.attn.to_q", &["matches 2 (single_blocks", "not the 2", "blocks.0.attn.to_q"]),
            ("(", &["`(`".trim_matches('`'), "pattern"]),
        ] {
            let error = select(&[pattern]).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        assert_eq!(select(&["(proj_out)"]).unwrap(), ["proj_out"]);
        // What NeMo takes where nothing is named.
        let error = select(&[]).unwrap_err().to_string();
        assert!(error.contains("`*_proj`"), "{error}");
        let all_excluded = ModuleSelection { exclude_modules: vec!["*".into()], ..ModuleSelection::default() };
        assert!(all_excluded.select(&linears()).is_err());
    }
}
