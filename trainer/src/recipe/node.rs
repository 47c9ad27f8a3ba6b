//! A recipe's values with their places, before it is known what they are.

use std::sync::Arc;

use serde_json::{Map, Number, Value};

use super::problems::{Place, Problem};

/// A value as it is written.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Node {
    pub place: Place,
    pub content: Content,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Content {
    /// `plain` is without quotes: what it means depends on what is asked for.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    /// In the order of the file; no key stands twice.
    Section(Vec<Entry>),
}

/// A key and its value.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Entry {
    pub key: String,
    pub place: Place,
    pub value: Node,
}

/// A number as it is written.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Written {
    Whole(i128),
    Float(f64),
}

impl Node {
    /// A value without quotes.
    pub fn plain(place: &Place, text: impl Into<String>) -> Self {
        Self { place: place.clone(), content: Content::Scalar { text: text.into(), plain: true } }
    }

    /// What a program gave instead of a file.
    pub fn from_json(value: Value) -> Self {
        let content = match value {
            Value::Null => Content::Scalar { text: String::new(), plain: true },
            Value::Bool(flag) => Content::Scalar { text: flag.to_string(), plain: true },
            Value::Number(number) => Content::Scalar { text: number.to_string(), plain: true },
            Value::String(text) => Content::Scalar { text, plain: false },
            Value::Array(items) => Content::List(items.into_iter().map(Self::from_json).collect()),
            Value::Object(map) => {
                let entry = |(key, value)| Entry { key, place: Place::Nowhere, value: Self::from_json(value) };
                Content::Section(map.into_iter().map(entry).collect())
            }
        };
        Self { place: Place::Nowhere, content }
    }

    /// The keys and values of a section; none of anything else.
    pub fn entries(&self) -> &[Entry] {
        match &self.content {
            Content::Section(entries) => entries,
            _ => &[],
        }
    }

    /// The entry at a path such as `optimizer.lr`.
    pub fn entry(&self, path: &str) -> Option<&Entry> {
        let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
        let found = self.entries().iter().find(|entry| entry.key == first)?;
        rest.map_or(Some(found), |rest| found.value.entry(rest))
    }

    /// The value at a path.
    pub fn get(&self, path: &str) -> Option<&Self> {
        self.entry(path).map(|entry| &entry.value)
    }

    /// The text of a value that has one.
    pub fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar { text, .. } if !self.is_null() => Some(text),
            _ => None,
        }
    }

    /// Where the value at a path stands, or the section that it is missing from.
    pub fn place_of(&self, path: &str) -> Place {
        let mut path = path;
        loop {
            match (self.entry(path), path.rsplit_once('.')) {
                (Some(Entry { place, value: Node { content: Content::Section(_), .. }, .. }), _) => {
                    return place.clone();
                }
                (Some(entry), _) => return entry.value.place.clone(),
                (None, Some((outer, _))) => path = outer,
                (None, None) => return Place::Nowhere,
            }
        }
    }

    /// Takes an entry out.
    pub fn take(&mut self, path: &str) -> Option<Entry> {
        let Content::Section(entries) = &mut self.content else { return None };
        match path.split_once('.') {
            Some((first, rest)) => entries.iter_mut().find(|entry| entry.key == first)?.value.take(rest),
            None => entries.iter().position(|entry| entry.key == path).map(|i| entries.remove(i)),
        }
    }

    /// Puts a value at a path, in the place of what is there; sections on the way are made where there are none.
    ///
    /// # Errors
    /// The key that is inside a value.
    pub fn put(&mut self, path: &str, value: Self) -> Result<(), String> {
        let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
        if self.is_null() {
            self.content = Content::Section(Vec::new());
        }
        let inside = format!("`{first}` is inside a value, not a section");
        let into = match &mut self.content {
            Content::Scalar { .. } => return Err(inside),
            Content::List(items) => first.parse().ok().and_then(|i: usize| items.get_mut(i)).ok_or(inside)?,
            Content::Section(entries) => {
                let i = entries.iter().position(|entry| entry.key == first).unwrap_or_else(|| {
                    let nothing = Self::plain(&value.place, "");
                    entries.push(Entry { key: first.into(), place: value.place.clone(), value: nothing });
                    entries.len() - 1
                });
                &mut entries[i].value
            }
        };
        match rest {
            Some(rest) => into.put(rest, value),
            None => {
                *into = value;
                Ok(())
            }
        }
    }

    /// Whether nothing stands there.
    pub fn is_null(&self) -> bool {
        matches!(&self.content, Content::Scalar { text, plain: true }
            if matches!(&text[..], "" | "~" | "null" | "Null" | "NULL"))
    }

    /// Whether nothing stands there, or the word `none` for it.
    pub fn is_none(&self) -> bool {
        self.is_null() || matches!(&self.content, Content::Scalar { text, .. } if matches!(&text[..], "none" | "None"))
    }

    /// True and false, as YAML of either version writes them.
    pub fn boolean(&self) -> Option<bool> {
        match &self.content {
            Content::Scalar { text, plain: true } => match &text[..] {
                "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Some(true),
                "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => Some(false),
                _ => None,
            },
            _ => None,
        }
    }

    /// What it is by its looks, where anything is allowed.
    pub fn value(&self, path: &str, problems: &mut Vec<Problem>) -> Value {
        match &self.content {
            Content::Scalar { text, plain: false } => Value::String(text.clone()),
            Content::Scalar { text, .. } => {
                if self.is_null() {
                    return Value::Null;
                }
                if let Some(flag) = self.boolean() {
                    return Value::Bool(flag);
                }
                match number(text) {
                    None => Value::String(text.clone()),
                    Some(found) => found.and_then(json).unwrap_or_else(|what| {
                        problems.push(Problem::new(&self.place, format!("{path}: {what}, got {text}")));
                        Value::Null
                    }),
                }
            }
            Content::List(items) => items.iter().map(|item| item.value(path, problems)).collect(),
            Content::Section(entries) => {
                let value =
                    |entry: &Entry| (entry.key.clone(), entry.value.value(&format!("{path}.{}", entry.key), problems));
                Value::Object(entries.iter().map(value).collect::<Map<_, _>>())
            }
        }
    }

    /// What stands there, for an error.
    pub fn shown(&self) -> String {
        match &self.content {
            _ if self.is_null() => "nothing".into(),
            Content::Scalar { text, .. } => {
                let start: String = text.chars().take(60).collect();
                let end = if start.len() < text.len() { "…" } else { "" };
                format!("{start:?}{end}")
            }
            Content::List(_) => "a list".into(),
            Content::Section(_) => "a section".into(),
        }
    }

    /// Applies a setting such as `optimizer.lr=1e-4`.
    ///
    /// # Errors
    /// When it is malformed.
    pub fn set(&mut self, setting: &str) -> Result<(), Problem> {
        let place = Place::Setting(Arc::from(setting));
        let wrong = |what: &str| Err(Problem::new(&place, what));
        let Some((path, value)) = setting.split_once('=') else {
            return wrong("expected key=value, such as optimizer.lr=1e-4");
        };
        if path.split('.').any(|key| key.trim().is_empty()) {
            return wrong("expected a key before =, such as optimizer.lr");
        }
        if value.trim().is_empty() {
            return wrong("expected a value after =; null takes an optional section away");
        }
        let mut value = super::yaml::parse(value).map_err(|problems| {
            let what = problems.into_iter().next().map_or(String::new(), |problem| problem.what);
            Problem::new(&place, format!("{path}: {what}"))
        })?;
        value.move_to(&place);
        self.put(path, value).map_err(|what| Problem::new(&place, format!("{path}: {what}")))
    }

    fn move_to(&mut self, place: &Place) {
        self.place = place.clone();
        match &mut self.content {
            Content::Scalar { .. } => {}
            Content::List(items) => items.iter_mut().for_each(|item| item.move_to(place)),
            Content::Section(entries) => entries.iter_mut().for_each(|entry| {
                entry.place = place.clone();
                entry.value.move_to(place);
            }),
        }
    }
}

/// A number of JSON.
fn json(number: Written) -> Result<Value, String> {
    match number {
        Written::Whole(n) => u64::try_from(n)
            .map(Value::from)
            .or_else(|_| i64::try_from(n).map(Value::from))
            .map_err(|_| format!("expected a whole number from {} to {}", i64::MIN, u64::MAX)),
        Written::Float(x) => Number::from_f64(x).map(Value::Number).ok_or_else(|| "expected a finite number".into()),
    }
}

/// The number that a text is, if it is one: decimal, hexadecimal (`0x`) or octal (`0o`), with `_` between digits if one likes.
///
/// # Errors
/// When it is one that can't be meant.
pub(crate) fn number(text: &str) -> Option<Result<Written, String>> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let sign = if text.starts_with('-') { -1 } else { 1 };
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let bytes = unsigned.as_bytes();
    let between =
        |i: usize| i > 0 && bytes[i - 1].is_ascii_hexdigit() && bytes.get(i + 1).is_some_and(u8::is_ascii_hexdigit);
    if unsigned.match_indices('_').any(|(i, _)| !between(i)) {
        return None;
    }
    let digits = unsigned.replace('_', "");
    for (prefix, radix) in [("0x", 16), ("0o", 8)] {
        if let Some(found) = digits.strip_prefix(prefix).and_then(|rest| i128::from_str_radix(rest, radix).ok()) {
            return Some(Ok(Written::Whole(sign * found)));
        }
    }
    if digits.bytes().all(|b| b.is_ascii_digit()) {
        if digits.len() > 1 && digits.starts_with('0') {
            return Some(Err("expected a number without leading zeros, which some read as octal".into()));
        }
        let found = digits.parse::<i128>().map(|n| Written::Whole(sign * n));
        return Some(found.map_err(|_| "expected a smaller number".into()));
    }
    if !digits.bytes().all(|b| b.is_ascii_digit() || b".eE+-".contains(&b)) {
        return None;
    }
    let found = digits.parse::<f64>().ok()?;
    if !found.is_finite() {
        return Some(Err("expected a smaller number".into()));
    }
    Some(Ok(Written::Float(f64::from(sign as i8) * found)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_people_mean_or_refused() {
        for (text, expected) in [
            ("0", 0.0),
            ("-7", -7.0),
            ("+7", 7.0),
            ("1_000", 1000.0),
            ("1_000.5", 1000.5),
            (".5", 0.5),
            ("-.5", -0.5),
            ("5.", 5.0),
            ("5e-6", 5e-6),
            ("5E+6", 5e6),
            ("0x10", 16.0),
            ("0o10", 8.0),
            ("1.0e-3", 1e-3),
        ] {
            let found = match number(text) {
                Some(Ok(Written::Whole(n))) => n as f64,
                Some(Ok(Written::Float(x))) => x,
                other => panic!("{text}: {other:?}"),
            };
            assert_eq!(found, expected, "{text}");
        }
        for text in ["010", "-007", "1e999", &"9".repeat(60)] {
            assert!(matches!(number(text), Some(Err(_))), "{text}");
        }
        for text in
            ["", "fast", "1:30", "1__0", "_1", "1_", ".", ".inf", ".nan", "inf", "1.2.3", "0x", "e5", "1 000", "-"]
        {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
