//! Nodes to values, by the JSON Schema of what is asked for: all problems at once, and a text means what its place asks for.

use serde_json::{Map, Value};

use super::node::{Content, Node, Written, number};
use super::problems::{Place, Problem, suggestion};

/// The greatest whole number where a schema names none: floats and JSON hold it exactly.
const MAX_WHOLE: i128 = 1 << 53;

/// Reads a node as a schema says. What does not fit is a problem, and left out of the value.
pub(crate) fn read(node: &Node, schema: &Value, problems: &mut Vec<Problem>) -> Value {
    Reading { problems }.read(node, schema, "").unwrap_or_default()
}

struct Reading<'p> {
    problems: &'p mut Vec<Problem>,
}

/// What a schema takes.
struct Asked<'s> {
    /// Whether null does.
    nullable: bool,
    /// Names of a closed choice.
    names: Vec<&'s str>,
    /// Everything else.
    schemas: Vec<&'s Value>,
}

impl<'s> Asked<'s> {
    fn of(schema: &'s Value) -> Self {
        let mut asked = Self { nullable: false, names: Vec::new(), schemas: Vec::new() };
        asked.add(schema);
        asked
    }

    fn add(&mut self, schema: &'s Value) {
        let is_null = |kind: &Value| kind == "null";
        let kinds = &schema["type"];
        let nullable = kinds.as_array().is_some_and(|kinds| kinds.iter().any(is_null));
        let choices = schema["enum"].as_array().into_iter().flatten().chain(schema.get("const"));
        let choices: Vec<&Value> = choices.collect();
        self.nullable |= nullable || is_null(kinds) || choices.iter().any(|c| c.is_null());
        self.names.extend(choices.iter().filter_map(|c| c.as_str()));
        match schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array) {
            Some(alternatives) => alternatives.iter().for_each(|alternative| self.add(alternative)),
            None if choices.is_empty() && !is_null(kinds) => self.schemas.push(schema),
            None => {}
        }
    }
}

/// The types that a schema takes but for null.
fn kind(schema: &Value) -> Option<&str> {
    match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null"),
        kind => kind.as_str(),
    }
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.into() } else { format!("{path}.{key}") }
}

impl Reading<'_> {
    fn problem<T>(&mut self, place: &Place, what: String) -> Option<T> {
        self.problems.push(Problem::new(place, what));
        None
    }

    fn unfit<T>(&mut self, node: &Node, path: &str, expected: &str) -> Option<T> {
        self.problem(&node.place, format!("{path}: expected {expected}, got {}", node.shown()))
    }

    fn read(&mut self, node: &Node, schema: &Value, path: &str) -> Option<Value> {
        let asked = Asked::of(schema);
        if asked.nullable && node.is_none() {
            return Some(Value::Null);
        }
        if !asked.names.is_empty() {
            return self.choice(node, &asked.names, path);
        }
        match &asked.schemas[..] {
            [] => self.unfit(node, path, "nothing"),
            [schema] => self.one(node, schema, path),
            alternatives => {
                let schema = self.alternative(node, alternatives, path)?;
                self.one(node, schema, path)
            }
        }
    }

    fn choice(&mut self, node: &Node, names: &[&str], path: &str) -> Option<Value> {
        match &node.content {
            Content::Scalar { text, .. } if names.contains(&&**text) => Some(Value::String(text.clone())),
            _ => {
                let expected = format!("one of {}", names.join(", "));
                self.unfit(node, path, &expected)
            }
        }
    }

    /// Of sections that a key tells apart, that which the node names, or the first where it names none.
    fn alternative<'s>(&mut self, node: &Node, alternatives: &[&'s Value], path: &str) -> Option<&'s Value> {
        let told = |schema: &'s Value| {
            schema["properties"].as_object().into_iter().flatten().find(|(_, p)| p.get("const").is_some())
        };
        let name = |schema: &'s Value| told(schema).map(|(_, property)| &property["const"]);
        let (key, _) = told(alternatives[0])?;
        let Some(named) = node.get(key) else { return Some(alternatives[0]) };
        let found = alternatives.iter().find(|schema| name(schema).and_then(Value::as_str) == named.text());
        found.copied().or_else(|| {
            let names: Vec<&str> = alternatives.iter().filter_map(|schema| name(schema)?.as_str()).collect();
            self.choice(named, &names, &joined(path, key))?;
            None
        })
    }

    fn one(&mut self, node: &Node, schema: &Value, path: &str) -> Option<Value> {
        match kind(schema) {
            Some("object") => self.section(node, schema, path),
            Some("array") => self.list(node, schema, path),
            Some("boolean") => match node.boolean() {
                Some(flag) => Some(flag.into()),
                None => self.unfit(node, path, "true or false"),
            },
            Some("string") => match node.text() {
                Some(text) => Some(text.into()),
                None => self.unfit(node, path, "text"),
            },
            Some("integer") => self.number(node, schema, path, true),
            Some("number") => self.number(node, schema, path, false),
            _ => Some(node.value(path, self.problems)),
        }
    }

    fn number(&mut self, node: &Node, schema: &Value, path: &str, whole: bool) -> Option<Value> {
        let written = node.text().and_then(number);
        let found = match written {
            Some(Ok(found)) => found,
            Some(Err(expected)) => {
                return self.problem(&node.place, format!("{path}: {expected}, got {}", node.shown()));
            }
            None => return self.unfit(node, path, &bounds(schema, whole)),
        };
        let bound = |key: &str| schema[key].as_f64();
        let fits = |x: f64| {
            bound("minimum").is_none_or(|least| x >= least)
                && bound("exclusiveMinimum").is_none_or(|above| x > above)
                && bound("maximum").is_none_or(|most| x <= most)
                && bound("exclusiveMaximum").is_none_or(|below| x < below)
        };
        let value = match found {
            Written::Float(x) if !whole && fits(x) => Some(Value::from(x)),
            Written::Whole(n) if !whole && fits(n as f64) => Some(Value::from(n as f64)),
            Written::Float(x) if x.fract() == 0.0 && x.abs() <= MAX_WHOLE as f64 && fits(x) => {
                Some(Value::from(x as i64))
            }
            // A whole number is compared as one.
            Written::Whole(n) if whole && fits(n as f64) && n <= most(schema) => {
                u64::try_from(n).map(Value::from).or_else(|_| i64::try_from(n).map(Value::from)).ok()
            }
            _ => None,
        };
        value.or_else(|| self.unfit(node, path, &bounds(schema, whole)))
    }

    fn list(&mut self, node: &Node, schema: &Value, path: &str) -> Option<Value> {
        let length = |key: &str| schema[key].as_u64().map(|n| n as usize);
        let (least, most) = (length("minItems"), length("maxItems"));
        let fits = |n: usize| least.is_none_or(|least| n >= least) && most.is_none_or(|most| n <= most);
        let items = match &node.content {
            Content::List(items) if fits(items.len()) => items,
            _ => {
                let expected = match (least, most) {
                    (Some(n), Some(m)) if n == m => format!("a list of {n}"),
                    (Some(n), _) => format!("a list of at least {n}"),
                    _ => "a list".into(),
                };
                return self.unfit(node, path, &expected);
            }
        };
        let item = |(i, node): (usize, &Node)| {
            let schema = match &schema["items"] {
                Value::Array(each) => each.get(i).unwrap_or(&Value::Bool(true)),
                schema => schema,
            };
            self.read(node, schema, &joined(path, &i.to_string()))
        };
        // All are read, so that all problems are told.
        let read: Vec<Option<Value>> = items.iter().enumerate().map(item).collect();
        read.into_iter().collect::<Option<Vec<_>>>().map(Value::Array)
    }

    fn section(&mut self, node: &Node, schema: &Value, path: &str) -> Option<Value> {
        let entries = match &node.content {
            Content::Section(entries) => &entries[..],
            // Nothing but comments below a key, which the parser calls `~`.
            Content::Scalar { text, plain: true } if matches!(&text[..], "" | "~") && !path.is_empty() => &[],
            _ => {
                return self.unfit(node, if path.is_empty() { "recipe" } else { path }, "a section of keys and values");
            }
        };
        let nothing = Map::new();
        let known = schema["properties"].as_object().unwrap_or(&nothing);
        let others = &schema["additionalProperties"];
        let mut read = Map::new();
        for entry in entries {
            let at = joined(path, &entry.key);
            let value = match (known.get(&entry.key), others) {
                (Some(schema), _) => self.read(&entry.value, schema, &at),
                (None, Value::Bool(false)) => {
                    let nearest = suggestion(&entry.key, known.keys().map(String::as_str));
                    self.problem(&entry.place, format!("{at}: unknown key{nearest}"))
                }
                (None, schema) => self.read(&entry.value, schema, &at),
            };
            if let Some(value) = value {
                read.insert(entry.key.clone(), value);
            }
        }
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        for key in required.filter(|key| entries.iter().all(|entry| entry.key != *key)) {
            let what = known.get(key).and_then(|schema| schema["description"].as_str()).unwrap_or_default();
            let what = what.split_inclusive('.').next().unwrap_or_default().trim_end_matches('.');
            self.problems.push(Problem::new(&node.place, format!("{}: missing: {what}", joined(path, key))));
        }
        Some(Value::Object(read))
    }
}

fn most(schema: &Value) -> i128 {
    schema["maximum"].as_u64().map_or(MAX_WHOLE, i128::from)
}

/// What a number must be.
fn bounds(schema: &Value, whole: bool) -> String {
    let name = if whole { "a whole number" } else { "a number" };
    let bound = |key: &str| schema[key].as_f64();
    let (least, above) = (bound("minimum"), bound("exclusiveMinimum"));
    let (most, below) =
        (bound("maximum").or((whole && least.is_some()).then_some(MAX_WHOLE as f64)), bound("exclusiveMaximum"));
    match (least, above, most, below) {
        (Some(least), _, Some(most), _) => format!("{name} from {least} to {most}"),
        (Some(least), _, None, Some(below)) => format!("{name} of at least {least}, below {below}"),
        (Some(least), ..) => format!("{name} of at least {least}"),
        (None, Some(above), Some(most), _) => format!("{name} above {above}, at most {most}"),
        (None, Some(above), None, Some(below)) => format!("{name} above {above}, below {below}"),
        (None, Some(above), ..) => format!("{name} above {above}"),
        _ => name.into(),
    }
}
