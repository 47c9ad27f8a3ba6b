//! A recipe as rows, with what differs from the defaults.

use serde::Serialize;
use serde_json::Value;

/// A key of a recipe.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Setting {
    /// Such as `optimizer.lr`.
    pub key: String,
    /// What it is.
    pub value: Value,
    /// What it is where a recipe says nothing; none where each must say it.
    pub default: Option<Value>,
    /// Whether the two differ.
    pub differs: bool,
}

/// All keys of a resolved recipe, in its order, beside the defaults of the schema.
pub(super) fn settings(recipe: &Value, schema: &Value) -> Vec<Setting> {
    let mut rows = Vec::new();
    walk("", recipe, Some(schema), None, &mut rows);
    rows
}

fn walk(key: &str, value: &Value, schema: Option<&Value>, default: Option<&Value>, rows: &mut Vec<Setting>) {
    let schema = schema.map(of_object);
    let default = schema.and_then(|schema| schema.get("default")).or(default);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                let inner = schema.and_then(|schema| schema.get("properties")?.get(name));
                walk(&key, field, inner, default.and_then(|default| default.get(name)), rows);
            }
        }
        _ => {
            // What may be left out is null then.
            let differs = default.map_or(!value.is_null(), |default| !same(value, default));
            rows.push(Setting { key: key.into(), value: value.clone(), default: default.cloned(), differs });
        }
    }
}

/// Of alternatives (an object or null) the one with fields.
fn of_object(schema: &Value) -> &Value {
    let alternatives = ["anyOf", "oneOf"].iter().filter_map(|key| schema.get(key)?.as_array()).flatten();
    let mut with_fields = alternatives.filter(|one| one.get("properties").is_some());
    if schema.get("properties").is_some() { schema } else { with_fields.next().unwrap_or(schema) }
}

/// 1 and 1.0 are one number.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Recipe;
    use crate::recipe::schema;

    #[test]
    fn what_a_recipe_says_differs_and_what_it_leaves_open_does_not() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml");
        let recipe = Recipe::load(std::path::Path::new(path), &["ema.decay=0.5".into()]).unwrap();
        let rows = settings(&recipe.to_json(), schema());
        let of = |key: &str| rows.iter().find(|row| row.key == key).unwrap_or_else(|| panic!("{key}"));
        for key in ["optimizer.lr", "name", "sampling.every_steps", "data.builtin", "ema.decay", "model.num_layers"] {
            assert!(of(key).differs, "{:?}", of(key));
        }
        for key in ["dtype", "device", "non_finite", "performance.check_loss", "init", "data.shuffle", "validation"] {
            assert!(!of(key).differs, "{:?}", of(key));
        }
        assert_eq!(of("sampling.every_steps").default, Some(Value::from(0)));
    }
}
