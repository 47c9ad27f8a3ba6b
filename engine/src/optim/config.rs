//! An optimiser as a recipe writes it.

use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::rules::{RULES, RuleEntry};
use super::{Optimizer, ParamGroup};
use crate::Result;

/// Keys beside those of the rule.
const KEYS: [&str; 4] = ["name", "lr", "weight_decay", "groups"];

/// Which rule, with which rates, for which groups of parameters. In a file the keys of the rule's own configuration stand
/// beside the others:
///
/// ```yaml
/// name: sgd # adamw if it is left out
/// lr: 0.1
/// weight_decay: 1.0e-4
/// momentum: 0.9
/// groups:
///   - {pattern: "*.bias", wd_mult: 0}
/// ```
#[derive(Clone, PartialEq, Debug)]
pub struct OptimizerConfig {
    /// The rule's name in [`RULES`].
    pub name: String,
    /// The learning rate.
    pub lr: f64,
    /// The weight decay of all parameters.
    pub weight_decay: f64,
    /// Parameters whose rates are others.
    pub groups: Vec<ParamGroup>,
    /// The rule's configuration with all defaults.
    rule: Map<String, Value>,
}

/// AdamW.
impl Default for OptimizerConfig {
    fn default() -> Self {
        let entry = RULES[0];
        let rule = entry.keys().into_iter().collect();
        Self { name: entry.name.into(), lr: 1e-3, weight_decay: 0.01, groups: Vec::new(), rule }
    }
}

impl OptimizerConfig {
    /// The optimiser, without any update so far.
    ///
    /// # Errors
    /// When there is no such rule.
    pub fn build(&self) -> Result<Optimizer> {
        let rule = RuleEntry::rule(&self.name, Value::Object(self.rule.clone()))?;
        Ok(Optimizer::boxed(rule).with_groups(self.groups.clone()))
    }
}

impl Serialize for OptimizerConfig {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        map.serialize_entry("name", &self.name)?;
        map.serialize_entry("lr", &self.lr)?;
        map.serialize_entry("weight_decay", &self.weight_decay)?;
        if !self.groups.is_empty() {
            map.serialize_entry("groups", &self.groups)?;
        }
        self.rule.iter().try_for_each(|(key, value)| map.serialize_entry(key, value))?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for OptimizerConfig {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // Of any form, since YAML takes nothing for an empty map.
        from.deserialize_any(Section)
    }
}

/// A key that this section or any rule has. It is checked as it is read, where a file's line is known.
struct Key(String);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let key = String::deserialize(from)?;
        let of_rules = RULES.iter().flat_map(|entry| entry.keys().into_iter().map(|(key, _)| key));
        let known: Vec<String> = KEYS.map(String::from).into_iter().chain(of_rules).collect();
        if known.contains(&key) {
            return Ok(Self(key));
        }
        let known = known.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
        Err(D::Error::custom(format!("unknown field `{key}`, expected one of {known}")))
    }
}

struct Section;

impl<'de> Visitor<'de> for Section {
    type Value = OptimizerConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the section of an optimiser, such as `lr: 1e-3`")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut from: M) -> Result<OptimizerConfig, M::Error> {
        let mut out = OptimizerConfig { rule: Map::new(), ..OptimizerConfig::default() };
        let mut seen: Vec<String> = Vec::new();
        while let Some(Key(key)) = from.next_key()? {
            if seen.contains(&key) {
                return Err(M::Error::custom(format!("duplicate field `{key}`")));
            }
            match &key[..] {
                "name" => out.name = from.next_value()?,
                "lr" => out.lr = from.next_value()?,
                "weight_decay" => out.weight_decay = from.next_value()?,
                "groups" => out.groups = from.next_value()?,
                _ => drop(out.rule.insert(key.clone(), from.next_value()?)),
            }
            seen.push(key);
        }
        for group in &out.groups {
            group.check().map_err(M::Error::custom)?;
        }
        let others = out.groups.iter().find(|group| group.lr_mult != 0.0 && group.lr_mult != 1.0);
        if let (Some(group), true) = (others, RuleEntry::shares_step_size(&out.name)) {
            return Err(M::Error::custom(format!(
                "groups: all parameters of {} share one step size: expected an lr_mult of 0 or 1 for {}, got {}",
                out.name, group.pattern, group.lr_mult
            )));
        }
        out.rule = RuleEntry::resolved(&out.name, Value::Object(out.rule)).map_err(M::Error::custom)?;
        Ok(out)
    }
}

/// A section for each rule, the first of which needs no name.
#[cfg(feature = "schema")]
impl schemars::JsonSchema for OptimizerConfig {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "OptimizerConfig".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        use serde_json::json;
        let groups = generator.subschema_for::<Vec<ParamGroup>>();
        let rule = |(i, entry): (usize, &RuleEntry)| {
            let mut keys = Map::from_iter([
                ("name".to_owned(), json!({ "const": entry.name, "description": "The rule." })),
                (
                    "lr".to_owned(),
                    json!({ "type": "number", "exclusiveMinimum": 0, "description": "The learning rate." }),
                ),
                (
                    "weight_decay".to_owned(),
                    json!({ "type": "number", "minimum": 0, "description": "The weight decay of all parameters." }),
                ),
                ("groups".to_owned(), json!(groups)),
            ]);
            keys.extend(entry.keys().into_iter().map(|(key, default)| (key, schema_of(&default))));
            let required: &[&str] = if i == 0 { &[] } else { &["name"] };
            json!({ "type": "object", "properties": keys, "required": required, "additionalProperties": false })
        };
        let rules: Vec<Value> = RULES.iter().enumerate().map(rule).collect();
        schemars::json_schema!({ "oneOf": rules })
    }
}

/// What a key takes whose default this is.
#[cfg(feature = "schema")]
fn schema_of(default: &Value) -> Value {
    let kind = match default {
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(items) => {
            let item = items.first().map_or(Value::Bool(true), schema_of);
            return serde_json::json!({ "type": "array", "items": item, "minItems": items.len(), "maxItems": items.len() });
        }
        // What may be left out may be anything that the rule takes.
        Value::Null | Value::Object(_) => return Value::Bool(true),
    };
    serde_json::json!({ "type": kind, "default": default })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<OptimizerConfig, String> {
        serde_json::from_value(value).map_err(|e| e.to_string())
    }

    #[test]
    fn every_rule_is_written_with_its_defaults_and_read_again() {
        for entry in RULES {
            let config =
                read(json!({ "name": entry.name, "lr": 0.5, "groups": [{ "pattern": "*.bias", "wd_mult": 0 }] }));
            let config = config.unwrap();
            let written = serde_json::to_value(&config).unwrap();
            assert!(entry.keys().iter().all(|(key, value)| written[key] == *value), "{written}");
            assert_eq!(read(written).unwrap(), config);
            config.build().unwrap();
            // A key means one thing.
            assert!(entry.keys().iter().all(|(key, _)| !KEYS.contains(&&key[..])), "{}", entry.name);
        }
        assert_eq!(read(json!({})).unwrap(), OptimizerConfig::default());
        let written = serde_json::to_value(OptimizerConfig::default()).unwrap();
        assert_eq!(
            written,
            json!({ "name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "betas": [0.9, 0.999], "eps": 1e-8 })
        );
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (value, part) in [
            (json!({ "lrr": 1 }), "unknown field `lrr`, expected one of `name`, `lr`"),
            (json!({ "name": "sgd", "betas": [0.9, 0.9] }), "unknown field `betas`"),
            (json!({ "name": "adan" }), "adamw or adam or sgd"),
            (json!({ "eps": 0 }), "eps"),
            (json!({ "betas": [0.9, 1.0] }), "betas"),
            (json!({ "name": "sgd", "nesterov": true }), "nesterov"),
            (json!({ "groups": [{ "pattern": "*", "lr_mult": -1.0 }] }), "lr_mult"),
            (json!({ "groups": [{ "pattern": "*", "lr": 1.0 }] }), "unknown field `lr`"),
            (json!({ "name": "prodigy", "groups": [{ "pattern": "x", "lr_mult": 0.5 }] }), "lr_mult of 0 or 1 for x"),
            (json!(null), "the section of an optimiser"),
        ] {
            let error = read(value.clone()).unwrap_err();
            assert!(error.contains(part), "{value}: {error}");
        }
    }
}
