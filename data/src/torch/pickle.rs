//! Pickles, as far as they hold tensors, containers, numbers and texts. Functions are not called: those that rebuild a tensor
//! are known by name, and all else is refused by name.

use std::collections::HashMap;
use std::sync::Arc;

/// A value on the machine's stack. Containers are numbers of the machine's, so that a pickle that refers to one many times
/// takes no more memory than its own length.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Nothing,
    Number(i64),
    /// A float, which nobody asks for.
    Float,
    Text(Arc<str>),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Global(Arc<str>),
    Storage(Arc<Storage>),
    Tensor(usize),
    Mark,
}

/// What a storage holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum StorageKind {
    F32,
    F64,
    F16,
    Bf16,
    I64,
    I32,
    U8,
}

impl StorageKind {
    /// Bytes of an element.
    pub fn width(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::U8 => 1,
        }
    }

    fn of_class(class: &str) -> Option<Self> {
        Some(match class.strip_prefix("torch.")?.strip_suffix("Storage")? {
            "Float" => Self::F32,
            "Double" => Self::F64,
            "Half" => Self::F16,
            "BFloat16" => Self::Bf16,
            "Long" => Self::I64,
            "Int" => Self::I32,
            "Byte" | "Bool" => Self::U8,
            _ => return None,
        })
    }
}

/// Memory of tensors: a file of the archive.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Storage {
    pub kind: StorageKind,
    pub key: String,
}

/// A view of a storage, in elements.
#[derive(Clone, Debug)]
pub(super) struct TensorSpec {
    pub storage: Storage,
    pub offset: usize,
    pub dims: Vec<usize>,
    pub strides: Vec<usize>,
}

/// Executes a pickle's instructions, none of which does anything outside the machine.
#[derive(Default)]
pub(super) struct Machine {
    stack: Vec<Value>,
    /// By numbers that the file gives: a great one takes no more room than a small one.
    memo: HashMap<usize, Value>,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    tensors: Vec<TensorSpec>,
}

const CUT: &str = "its pickle is cut short or damaged";

/// A pickle that is being read.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(CUT)?;
        self.0 = rest;
        Ok(taken)
    }

    /// A number of `len` bytes, the low one first.
    fn number(&mut self, len: usize) -> Result<usize, String> {
        let bytes = self.take(len)?;
        let value = bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).map_err(|_| CUT.into())
    }

    fn text(&mut self, len: usize) -> Result<Value, String> {
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| CUT)?;
        Ok(Value::Text(text.into()))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.0.iter().position(|byte| *byte == b'\n').ok_or(CUT)?;
        let line = self.take(end + 1)?;
        std::str::from_utf8(&line[..end]).map_err(|_| CUT.into())
    }
}

impl Machine {
    /// What a pickle holds.
    pub fn run(&mut self, pickle: &[u8]) -> Result<Value, String> {
        let mut bytes = Bytes(pickle);
        loop {
            let code = bytes.take(1)?[0];
            let value = match code {
                b'.' => return self.pop(),
                // The protocol's version, a frame's length: of no use here.
                0x80 => {
                    bytes.take(1)?;
                    continue;
                }
                0x95 => {
                    bytes.take(8)?;
                    continue;
                }
                b'(' => Value::Mark,
                b'N' => Value::Nothing,
                0x88 => Value::Number(1),
                0x89 => Value::Number(0),
                b'K' => Value::Number(bytes.number(1)? as i64),
                b'M' => Value::Number(bytes.number(2)? as i64),
                b'J' => Value::Number(i64::from(bytes.number(4)? as u32 as i32)),
                0x8a => {
                    let len = bytes.number(1)?;
                    Value::Number(long(bytes.take(len)?)?)
                }
                b'G' => {
                    bytes.take(8)?;
                    Value::Float
                }
                b'X' => {
                    let len = bytes.number(4)?;
                    bytes.text(len)?
                }
                0x8c => {
                    let len = bytes.number(1)?;
                    bytes.text(len)?
                }
                b'}' => self.dict(),
                b']' => self.list(Vec::new(), Value::List),
                b')' => self.list(Vec::new(), Value::Tuple),
                b't' => {
                    let items = self.since_mark()?;
                    self.list(items, Value::Tuple)
                }
                0x85..=0x87 => {
                    let at = self.stack.len().checked_sub(usize::from(code - 0x84)).ok_or(CUT)?;
                    let items = self.stack.split_off(at);
                    self.list(items, Value::Tuple)
                }
                b'a' | b'e' => {
                    let items = if code == b'a' { vec![self.pop()?] } else { self.since_mark()? };
                    let Some(Value::List(list)) = self.stack.last() else { return Err(CUT.into()) };
                    self.lists[*list].extend(items);
                    continue;
                }
                b's' | b'u' => {
                    let items = if code == b's' {
                        let value = self.pop()?;
                        vec![self.pop()?, value]
                    } else {
                        self.since_mark()?
                    };
                    let Some(Value::Dict(dict)) = self.stack.last() else { return Err(CUT.into()) };
                    let (pairs, rest) = items.as_chunks();
                    if !rest.is_empty() {
                        return Err(CUT.into());
                    }
                    self.dicts[*dict].extend(pairs.iter().map(|[key, value]| (key.clone(), value.clone())));
                    continue;
                }
                b'q' | b'r' | 0x94 => {
                    let place = match code {
                        b'q' => bytes.number(1)?,
                        b'r' => bytes.number(4)?,
                        _ => self.memo.len(),
                    };
                    self.memo.insert(place, self.stack.last().ok_or(CUT)?.clone());
                    continue;
                }
                b'h' | b'j' => {
                    let place = bytes.number(if code == b'h' { 1 } else { 4 })?;
                    self.memo.get(&place).cloned().ok_or(CUT)?
                }
                b'c' => {
                    let (module, name) = (bytes.line()?, bytes.line()?);
                    global(module, name)?
                }
                0x93 => match (self.pop()?, self.pop()?) {
                    (Value::Text(name), Value::Text(module)) => global(&module, &name)?,
                    _ => return Err(CUT.into()),
                },
                b'Q' => self.storage()?,
                b'R' => self.rebuild()?,
                other => return Err(format!("its pickle has the instruction {other:#04x}, which tensors do not need")),
            };
            self.stack.push(value);
        }
    }

    /// The entries of a dictionary.
    pub fn entries(&self, dict: usize) -> Vec<(Value, Value)> {
        self.dicts[dict].clone()
    }

    /// A tensor that was rebuilt.
    pub fn tensor(&self, number: usize) -> Result<&TensorSpec, String> {
        self.tensors.get(number).ok_or_else(|| CUT.into())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(|| CUT.into())
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark)).ok_or(CUT)?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn list(&mut self, items: Vec<Value>, kind: fn(usize) -> Value) -> Value {
        self.lists.push(items);
        kind(self.lists.len() - 1)
    }

    fn dict(&mut self) -> Value {
        self.dicts.push(Vec::new());
        Value::Dict(self.dicts.len() - 1)
    }

    fn tuple(&mut self) -> Result<usize, String> {
        match self.pop()? {
            Value::Tuple(tuple) => Ok(tuple),
            _ => Err(CUT.into()),
        }
    }

    /// ('storage', class, key, place, elements).
    fn storage(&mut self) -> Result<Value, String> {
        let tuple = self.tuple()?;
        let [_, Value::Global(class), Value::Text(key), ..] = &self.lists[tuple][..] else { return Err(CUT.into()) };
        let kind = StorageKind::of_class(class).ok_or_else(|| format!("a storage {class} is not supported"))?;
        // The key becomes a name in the archive.
        if !key.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(CUT.into());
        }
        Ok(Value::Storage(Storage { kind, key: key.to_string() }.into()))
    }

    /// A tensor (storage, offset, dims, strides, ..) or an empty dictionary.
    fn rebuild(&mut self) -> Result<Value, String> {
        let tuple = self.tuple()?;
        let Value::Global(function) = self.pop()? else { return Err(CUT.into()) };
        let arguments = &self.lists[tuple][..];
        if &*function == "collections.OrderedDict" && arguments.is_empty() {
            return Ok(self.dict());
        }
        if &*function != "torch._utils._rebuild_tensor_v2" {
            return Err(refused(&function));
        }
        let [Value::Storage(storage), Value::Number(offset), Value::Tuple(dims), Value::Tuple(strides), ..] = arguments
        else {
            return Err(CUT.into());
        };
        let sizes = |tuple: usize| -> Option<Vec<usize>> {
            let size = |value: &Value| match value {
                Value::Number(size) => usize::try_from(*size).ok(),
                _ => None,
            };
            self.lists[tuple].iter().map(size).collect()
        };
        let (dims, strides) = (sizes(*dims).ok_or(CUT)?, sizes(*strides).ok_or(CUT)?);
        if dims.len() != strides.len() || dims.len() > 16 {
            return Err(CUT.into());
        }
        let offset = usize::try_from(*offset).map_err(|_| CUT)?;
        let storage = (**storage).clone();
        self.tensors.push(TensorSpec { storage, offset, dims, strides });
        Ok(Value::Tensor(self.tensors.len() - 1))
    }
}

fn refused(name: &str) -> String {
    format!("its pickle asks for {name}, which is refused: expected tensors, containers, numbers and texts alone")
}

/// A function or class by name, if it is one of those that tensors need.
fn global(module: &str, name: &str) -> Result<Value, String> {
    let name = format!("{module}.{name}");
    let known = ["torch._utils._rebuild_tensor_v2", "collections.OrderedDict"].contains(&&*name);
    if known || (module == "torch" && name.ends_with("Storage")) {
        return Ok(Value::Global(name.into()));
    }
    Err(refused(&name))
}

/// An integer in two's complement, the low byte first.
fn long(bytes: &[u8]) -> Result<i64, String> {
    if bytes.len() > 8 {
        return Err("an integer of more than 64 bits".into());
    }
    let negative = bytes.last().is_some_and(|byte| *byte >= 0x80);
    let fill = if negative { 0xff } else { 0 };
    let mut wide = [fill; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Ok(i64::from_le_bytes(wide))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pickle: &[u8]) -> Result<Value, String> {
        Machine::default().run(pickle)
    }

    #[test]
    fn nothing_is_called_and_the_refused_name_is_told() {
        let error = run(b"cos\nsystem\n(X\x02\0\0\0lstR.").unwrap_err();
        assert!(error.contains("os.system"), "{error}");
        let error = run(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.").unwrap_err();
        assert!(error.contains("builtins.eval"), "{error}");
        assert!(run(b"(i__main__\nX\n.").unwrap_err().contains("0x69"));
    }

    #[test]
    fn a_great_number_in_the_memo_takes_no_room() {
        let mut machine = Machine::default();
        assert!(matches!(machine.run(b"\x80\x02K\x07r\xff\xff\xff\xffj\xff\xff\xff\xff\x86."), Ok(Value::Tuple(_))));
        assert_eq!(machine.memo.len(), 1);
    }

    #[test]
    fn a_damaged_pickle_is_an_error_whatever_byte_is_wrong() {
        // {"a": (1, 2), "b": []} and all that begins or is changed like it.
        let whole = b"\x80\x02}q\0(X\x01\0\0\0aq\x01K\x01K\x02\x86q\x02X\x01\0\0\0bq\x03]q\x04u.";
        assert!(matches!(run(whole), Ok(Value::Dict(_))));
        for cut in 0..whole.len() {
            assert!(run(&whole[..cut]).is_err());
        }
        for at in 0..whole.len() {
            for byte in 0..=255 {
                let mut changed = whole.to_vec();
                changed[at] = byte;
                let _ = run(&changed);
            }
        }
    }

    #[test]
    fn integers_of_any_length_are_read() {
        assert_eq!([&[][..], &[0xff], &[0, 1], &[0xff, 0]].map(|b| long(b).unwrap()), [0, -1, 256, 255]);
    }
}
