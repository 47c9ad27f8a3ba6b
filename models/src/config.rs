//! What the configurations of all models and adapters share: how they are read, checked and written.
//!
//! A configuration means what diffusers makes of it: a flag is anything that Python takes for true or false (0, 1, null),
//! some numbers may be written as 2.0, and some may be null. What diffusers' constructors refuse is refused.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The greatest width, length or number of channels that a configuration may state, and the greatest product of those
/// that make one: far beyond all models, and small enough that no number of elements exceeds 64 bits.
pub(crate) const MAX_SIZE: usize = 1 << 20;
/// The greatest number of layers.
pub(crate) const MAX_LAYERS: usize = 1 << 10;

/// The configuration of one of diffusers' classes.
pub(crate) trait Config: DeserializeOwned + Serialize + Default {
    /// diffusers' class.
    const CLASS: &'static str;
    /// Keys whose null means the default.
    const NULLABLE: &'static [&'static str] = &[];

    /// Checks what no single value shows.
    ///
    /// # Errors
    /// The first value that does not fit.
    fn check(&self) -> Result<()>;
}

/// Reads and checks the object of `config.json`. Keys that start with `_` say where it came from, and are passed over.
///
/// # Errors
/// When keys are unknown or values do not fit: of those that say so by themselves all, else the first.
pub(crate) fn read<C: Config>(value: &Value) -> Result<C> {
    let Some(object) = value.as_object() else {
        return Err(Error::config("model", "an object of keys and values", value));
    };
    if object.get("quantization_config").is_some_and(|quantised| !quantised.is_null()) {
        let expected = "none: quantised weights can't be read; load a checkpoint that is not quantised";
        return Err(Error::config("quantization_config", expected, "one"));
    }
    let mut known = object.clone();
    known.retain(|key, value| {
        let default = value.is_null() && (C::NULLABLE.contains(&&**key) || key == "quantization_config");
        !(key.starts_with('_') || default)
    });
    let config: C = parse("model", C::CLASS, known)?;
    config.check()?;
    Ok(config)
}

/// The keys that a class does not know.
pub(crate) fn unknown_keys<C: Config>(object: &Map<String, Value>) -> Vec<String> {
    let known = serde_json::json!(C::default());
    let is_known = |key: &str| key.starts_with('_') || key == "quantization_config" || known.get(key).is_some();
    object.keys().filter(|key| !is_known(key)).cloned().collect()
}

/// The object of `config.json` for a configuration.
pub(crate) fn config_json<C: Config>(config: &C) -> Value {
    let mut value = serde_json::json!(config);
    value["_class_name"] = C::CLASS.into();
    value
}

/// Python's truth of a flag: true and false, 1 and 0, and null, which is false.
pub(crate) fn truth<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<bool, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(false),
        Value::Bool(flag) => Ok(flag),
        Value::Number(number) if number.as_f64() == Some(0.0) => Ok(false),
        Value::Number(number) if number.as_f64() == Some(1.0) => Ok(true),
        other => Err(D::Error::custom(format!("expected true or false, got {other}"))),
    }
}

/// A whole number that may be written as 2.0.
pub(crate) fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    let value = Value::deserialize(deserializer)?;
    value
        .as_u64()
        .or_else(|| {
            value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..=MAX_SIZE as f64).contains(x)).map(|x| x as u64)
        })
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| D::Error::custom(format!("expected a whole number, got {value}")))
}

/// Three of [`whole`].
pub(crate) fn wholes<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<[usize; 3], D::Error> {
    #[derive(Deserialize)]
    struct Whole(#[serde(deserialize_with = "whole")] usize);
    Ok(<[Whole; 3]>::deserialize(deserializer)?.map(|n| n.0))
}

/// A product of sizes; one that is too large for [`check_sizes`] stays so.
pub(crate) fn product(sizes: &[usize]) -> usize {
    sizes.iter().fold(1, |product: usize, size| product.saturating_mul(*size))
}

/// Checks that each of these sizes of a configuration is at least 1 and at most [`MAX_SIZE`].
pub(crate) fn check_sizes<const N: usize>(sizes: [(&'static str, usize); N]) -> Result<()> {
    match sizes.into_iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
        Some((key, size)) => Err(Error::config(key, format!("at least 1 and at most {MAX_SIZE}"), size)),
        None => Ok(()),
    }
}

/// Checks that there are at most [`MAX_LAYERS`] of each kind of layer, and at least `least`.
pub(crate) fn check_layers<const N: usize>(least: usize, layers: [(&'static str, usize); N]) -> Result<()> {
    match layers.into_iter().find(|(_, count)| !(least..=MAX_LAYERS).contains(count)) {
        Some((key, count)) => Err(Error::config(key, format!("at least {least} and at most {MAX_LAYERS}"), count)),
        None => Ok(()),
    }
}

/// Checks that a width is shared out among heads without rest.
pub(crate) fn check_heads((width_key, width): (&str, usize), (key, heads): (&'static str, usize)) -> Result<()> {
    match width.checked_rem(heads) {
        Some(0) => Ok(()),
        _ => Err(Error::config(key, format!("a divisor of {width_key}, {width}"), heads)),
    }
}

/// Checks that the axes of a rotary embedding, `N` of them, are even and fill a head.
pub(crate) fn check_rope_axes<const N: usize>(key: &'static str, axes: &[usize], head_dim: usize) -> Result<()> {
    let sum = axes.iter().fold(0, |sum: usize, axis| sum.saturating_add(*axis));
    if axes.len() == N && axes.iter().all(|axis| axis % 2 == 0) && sum == head_dim {
        return Ok(());
    }
    Err(Error::config(key, format!("{N} even numbers with the sum {head_dim} (attention_head_dim)"), axes))
}

/// The keys of a file's object.
///
/// # Errors
/// When it is none.
pub(crate) fn object(value: &Value) -> Result<Map<String, Value>> {
    let object = value.as_object().cloned();
    object.ok_or_else(|| Error::config("config.json", "an object of keys and values", value))
}

/// Reads an adapter's arguments from a recipe's `adapter_kwargs`.
pub(crate) fn parse_kwargs<T: DeserializeOwned>(kwargs: &Map<String, Value>) -> Result<T> {
    parse("adapter_kwargs", "this adapter", kwargs.clone())
}

/// The most problems of a section that are told.
const MAX_PROBLEMS: usize = 20;

/// Reads an object, every key of which has a default. What does not fit is put aside, so that one reading tells all of it.
pub(crate) fn parse<T: DeserializeOwned>(
    section: &'static str,
    whose: &str,
    mut object: Map<String, Value>,
) -> Result<T> {
    let mut problems = Vec::new();
    loop {
        let error = match serde_path_to_error::deserialize(Value::Object(object.clone())) {
            Ok(read) if problems.is_empty() => return Ok(read),
            Ok(_) => break,
            Err(error) => error,
        };
        let (path, message) = (error.path().to_string(), error.inner().to_string());
        let key = match message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next()) {
            Some(unknown) => {
                problems.push(format!("{unknown}: no key of {whose}{}", nearest(&message)));
                unknown.to_owned()
            }
            None => {
                problems.push(format!("{path}: {}", in_words(&message)));
                path.split(['.', '[']).next().unwrap_or_default().to_owned()
            }
        };
        if object.remove(&key).is_none() || problems.len() == MAX_PROBLEMS {
            break;
        }
    }
    Err(Error::Section { key: section, problems })
}

/// `; did you mean ..?`, where the first name of serde's message is like one of the others.
fn nearest(message: &str) -> String {
    let mut names = message.split('`').skip(1).step_by(2);
    let unknown = names.next().unwrap_or_default();
    let best = names.map(|name| (strsim::jaro(name, unknown), name)).max_by(|a, b| a.0.total_cmp(&b.0));
    best.filter(|(likeness, _)| *likeness > 0.8).map_or(String::new(), |(_, name)| format!("; did you mean `{name}`?"))
}

/// serde's message without names of Rust's types.
fn in_words(message: &str) -> String {
    let Some((got, expected)) = message.rsplit_once(", expected ") else { return message.to_owned() };
    let expected = match expected {
        "usize" | "u64" | "u32" | "i64" => "a whole number of at least 0",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a string" => "text",
        "a sequence" => "a list",
        "a map" => "keys and values",
        other => other,
    };
    let got = got.trim_start_matches("invalid type: ").trim_start_matches("invalid value: ");
    let kinds = ["string ", "integer ", "floating point ", "boolean "];
    let got = kinds.iter().find_map(|kind| got.strip_prefix(kind)).unwrap_or(got).replace('`', "");
    let got = match &got[..] {
        "sequence" => "a list",
        "map" => "keys and values",
        other => other,
    };
    format!("expected {expected}, got {got}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_wrong_with_a_section_is_told_at_once_and_in_words() {
        #[derive(Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        #[allow(dead_code)] // only what is refused is looked at
        struct Known {
            layers: usize,
            scale: f64,
            flag: bool,
            name: Option<String>,
            sides: [usize; 2],
        }
        let object = |value: Value| value.as_object().cloned().unwrap_or_default();
        let wrong = object(serde_json::json!({
            "layer": 1, "layers": "two", "scale": "fast", "flag": 3, "name": [1], "sides": [1, -2],
        }));
        let Err(Error::Section { problems, .. }) = parse::<Known>("section", "these", wrong) else { panic!("taken") };
        for expected in [
            "layer: no key of these; did you mean `layers`?",
            "layers: expected a whole number of at least 0, got \"two\"",
            "scale: expected a number, got \"fast\"",
            "flag: expected true or false, got 3",
            "name: expected text, got a list",
            "sides[1]: expected a whole number of at least 0, got -2",
        ] {
            assert!(problems.iter().any(|p| p == expected), "{expected} in {problems:#?}");
        }
        assert_eq!(problems.len(), 6, "{problems:#?}");
        parse::<Known>("section", "these", object(serde_json::json!({"layers": 2, "name": null}))).unwrap();
    }
}
