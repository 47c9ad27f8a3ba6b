//! YAML to nodes: what serde's way of reading would lose are all problems but the first, places, and how a value is written.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, Span, Tag};

use super::node::{Content, Entry, Node};
use super::problems::{Place, Problem};

/// The most values of a file, once what is anchored stands everywhere it is asked for.
const MAX_NODES: usize = 100_000;
/// The key that merges sections into its own.
const MERGE: &str = "<<";

/// The text of a file, without a byte order mark.
///
/// # Errors
/// Where it is not UTF-8.
pub(crate) fn decode(bytes: &[u8]) -> Result<&str, Problem> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(Problem::new(&Place::File { line: 1, column: 1 }, "not UTF-8 but UTF-16: save it as UTF-8"));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|error| {
        let good = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
        let line = good.matches('\n').count() + 1;
        let column = good.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        let byte = bytes[error.valid_up_to()];
        Problem::new(&Place::File { line, column }, format!("not UTF-8 (byte 0x{byte:02x}): save it as UTF-8"))
    })
}

/// The one document of a text.
///
/// # Errors
/// Everything that is wrong with it as YAML, up to where it can't be read on.
pub(crate) fn parse(text: &str) -> Result<Node, Vec<Problem>> {
    let mut composer =
        Composer { parser: Parser::new_from_str(text), anchors: HashMap::new(), nodes: 0, problems: Vec::new() };
    let root = composer.document();
    let mut problems = composer.problems;
    match root {
        Ok(root) if problems.is_empty() => Ok(root),
        Ok(_) => Err(problems),
        Err(last) => {
            problems.push(last);
            Err(problems)
        }
    }
}

struct Composer<'t> {
    parser: Parser<'t, granit_parser::StrInput<'t>>,
    /// Values by their anchor, with the number of nodes in them.
    anchors: HashMap<usize, (Node, usize)>,
    nodes: usize,
    problems: Vec<Problem>,
}

fn place(span: &Span) -> Place {
    Place::File { line: span.start.line(), column: span.start.col() + 1 }
}

impl<'t> Composer<'t> {
    fn next(&mut self) -> Result<(Event<'t>, Place), Problem> {
        match self.parser.next() {
            Some(Ok((event, span))) => Ok((event, place(&span))),
            Some(Err(error)) => {
                let marker = error.marker();
                let place = Place::File { line: marker.line(), column: marker.col() + 1 };
                Err(Problem::new(&place, format!("not YAML: {}", error.info())))
            }
            None => Err(Problem::new(&Place::Nowhere, "not YAML: it ends too early")),
        }
    }

    fn document(&mut self) -> Result<Node, Problem> {
        let mut root = None;
        loop {
            let (event, place) = self.next()?;
            match event {
                Event::StreamEnd => return Ok(root.unwrap_or_else(|| Node::plain(&Place::Nowhere, ""))),
                Event::StreamStart | Event::DocumentEnd => {}
                Event::DocumentStart(..) if root.is_some() => {
                    return Err(Problem::new(&place, "a second document (`---`): a recipe is one"));
                }
                Event::DocumentStart(..) => {
                    let (event, place) = self.next()?;
                    root = Some(self.node(event, place)?);
                }
                _ => return Err(Problem::new(&place, "not YAML: something after its end")),
            }
        }
    }

    /// Counts nodes that are made.
    fn count(&mut self, nodes: usize, place: &Place) -> Result<(), Problem> {
        self.nodes += nodes;
        if self.nodes <= MAX_NODES {
            return Ok(());
        }
        Err(Problem::new(place, format!("more than {MAX_NODES} values, with what its anchors and aliases repeat")))
    }

    fn node(&mut self, event: Event<'t>, place: Place) -> Result<Node, Problem> {
        self.count(1, &place)?;
        let before = self.nodes;
        let (content, anchor) = match event {
            Event::Alias(id) => {
                let Some((node, nodes)) = self.anchors.get(&id).cloned() else {
                    return Err(Problem::new(&place, "an alias inside of what it stands for"));
                };
                self.count(nodes, &place)?;
                return Ok(node);
            }
            Event::Scalar(text, style, anchor, tag) => {
                let quoted = self.tag(tag.as_deref(), &place);
                let plain = style == ScalarStyle::Plain && !quoted;
                (Content::Scalar { text: text.into_owned(), plain }, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.tag(tag.as_deref(), &place);
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break,
                        (event, place) => items.push(self.node(event, place)?),
                    }
                }
                (Content::List(items), anchor)
            }
            Event::MappingStart(_, anchor, tag) => {
                self.tag(tag.as_deref(), &place);
                (Content::Section(self.entries()?), anchor)
            }
            _ => return Err(Problem::new(&place, "not YAML: expected a value")),
        };
        let node = Node { place, content };
        if anchor > 0 {
            self.count(self.nodes - before + 1, &node.place)?;
            self.anchors.insert(anchor, (node.clone(), self.nodes - before + 1));
        }
        Ok(node)
    }

    /// Whether a tag makes text of a value; one that is not YAML's own is a problem.
    fn tag(&mut self, tag: Option<&Tag>, place: &Place) -> bool {
        let Some(tag) = tag else { return false };
        let core = tag.core_suffix();
        if core.is_none() {
            self.problems.push(Problem::new(place, "a tag (`!`) that means nothing here: remove it"));
        }
        core == Some("str")
    }

    fn entries(&mut self) -> Result<Vec<Entry>, Problem> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut lines = HashMap::<String, Place>::new();
        let mut merged = Vec::new();
        loop {
            let (event, place) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                break;
            }
            let plain = matches!(&event, Event::Scalar(_, ScalarStyle::Plain, ..));
            let key = self.node(event, place.clone())?;
            let (event, at) = self.next()?;
            let value = self.node(event, at)?;
            let Content::Scalar { text: key, .. } = key.content else {
                self.problems.push(Problem::new(&place, "expected a name as a key, got a list or a section"));
                continue;
            };
            if let Some(Place::File { line, .. }) = lines.insert(key.clone(), place.clone()) {
                let here = if let Place::File { line, .. } = place { line } else { line };
                let what = format!("the key `{key}` stands twice, in lines {line} and {here}: remove one");
                self.problems.push(Problem::new(&place, what));
            } else if plain && key == MERGE {
                merged = self.sections(value, &place);
            } else {
                entries.push(Entry { key, place, value });
            }
        }
        // The section's own keys come first, then those of the sections in their order.
        for entry in merged.into_iter().flat_map(|section| match section.content {
            Content::Section(entries) => entries,
            _ => Vec::new(),
        }) {
            if !lines.contains_key(&entry.key) {
                lines.insert(entry.key.clone(), entry.place.clone());
                entries.push(entry);
            }
        }
        Ok(entries)
    }

    /// The sections that `<<` names.
    fn sections(&mut self, value: Node, place: &Place) -> Vec<Node> {
        let all = match value.content {
            Content::List(items) => items,
            _ => vec![value],
        };
        if all.iter().any(|section| !matches!(section.content, Content::Section(_))) {
            self.problems.push(Problem::new(place, "expected a section or a list of sections after <<"));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(text: &str) -> serde_json::Value {
        parse(text).unwrap().value("", &mut Vec::new())
    }

    fn wrong(text: &str) -> String {
        let lines = parse(text).unwrap_err().iter().map(|p| p.line(&"f")).collect::<Vec<_>>();
        lines.join("\n")
    }

    #[test]
    fn values_are_what_they_look_like() {
        let text = "a: 1\nb: '1'\nc: [yes, no, ~, 1e-3, x]\nd: {e: !!str 5, f: |\n  text\n  }\n";
        let found = value(&text.replace("|\n  text\n  ", "\"t\""));
        assert_eq!(found, json!({"a": 1, "b": "1", "c": [true, false, null, 1e-3, "x"], "d": {"e": "5", "f": "t"}}));
        assert_eq!(value("a: 1\r\nb: 2\r\n"), json!({"a": 1, "b": 2}));
        assert_eq!(value(""), json!(null));
        assert_eq!(value("# nothing\n--- # here\n"), json!(null));
    }

    #[test]
    fn anchors_repeat_and_merges_give_way() {
        assert_eq!(value("a: &x {k: 1}\nb: *x"), json!({"a": {"k": 1}, "b": {"k": 1}}));
        let text = "a: &a {k: 1, l: 1}\nb: &b {k: 2, m: 2}\nc: {<<: [*a, *b], l: 3}\nd:\n  <<: *b\n  k: 4\n";
        let found = value(text);
        assert_eq!(found["c"], json!({"k": 1, "l": 3, "m": 2}));
        assert_eq!(found["d"], json!({"k": 4, "m": 2}));
        assert_eq!(value("'<<': 1"), json!({"<<": 1}));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        assert_eq!(
            wrong("a: 1\nb: {c: 1, c: 2}\na: 3"),
            "f:2:11: the key `c` stands twice, in lines 2 and 2: remove one\nf:3:1: the key `a` stands twice, in lines 1 and 3: remove one"
        );
        assert!(wrong("a:\n\t- 1").starts_with("f:2:"), "{}", wrong("a:\n\t- 1"));
        assert!(wrong("a: [1, 2").contains("not YAML"));
        assert!(wrong("a: *x").starts_with("f:1:4: not YAML"), "{}", wrong("a: *x"));
        assert!(wrong("a: &x [*x]").contains("inside of what it stands for"));
        assert!(wrong("a: !!python/tuple [1]").contains("means nothing here"));
        assert!(wrong("? [a]\n: 1").contains("as a key"));
        assert!(wrong("a: 1\n---\nb: 2").contains("a second document"));
        assert!(wrong("<<: 1").contains("after <<"));
        assert!(wrong(&"[".repeat(100_000)).contains("not YAML"));
    }

    #[test]
    fn other_encodings_are_named() {
        assert_eq!(decode(b"\xef\xbb\xbfa: 1").unwrap(), "a: 1");
        assert_eq!(
            decode(b"a: 1\nb: gr\xfc\xdfe").unwrap_err().line(&"f"),
            "f:2:6: not UTF-8 (byte 0xfc): save it as UTF-8"
        );
        assert!(decode(b"\xff\xfea\0").unwrap_err().what.contains("UTF-16"));
    }
}
