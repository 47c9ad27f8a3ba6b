//! PTX text to instructions.

use std::collections::HashMap;

/// A type of an instruction: its kind and width in bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Type {
    U(u32),
    S(u32),
    B(u32),
    F(u32),
    Bf16,
    Bf16x2,
    F16x2,
    Pred,
}

impl Type {
    fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "pred" => Self::Pred,
            "bf16" => Self::Bf16,
            "bf16x2" => Self::Bf16x2,
            "f16x2" => Self::F16x2,
            _ => {
                let bits: u32 = word.get(1..)?.parse().ok().filter(|b| [8, 16, 32, 64].contains(b))?;
                match word.as_bytes()[0] {
                    b'u' => Self::U(bits),
                    b's' => Self::S(bits),
                    b'b' => Self::B(bits),
                    b'f' => Self::F(bits),
                    _ => return None,
                }
            }
        })
    }

    pub fn bits(self) -> u32 {
        match self {
            Self::U(b) | Self::S(b) | Self::B(b) | Self::F(b) => b,
            Self::Bf16 => 16,
            Self::Bf16x2 | Self::F16x2 => 32,
            Self::Pred => 1,
        }
    }
}

/// What an instruction reads.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Source {
    Register(u32),
    Immediate(u64),
    /// Of `tid`, `ntid`, `ctaid`, `nctaid` (by three axes each), then the lane.
    Special(u8),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Space {
    Param,
    Global,
    Shared,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// True with NaN, too: `leu`, `gtu` and their like.
    Unordered(&'static Compare),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Arithmetic {
    Add,
    Sub,
    /// The low half of a product.
    Mul,
    MulHigh,
    /// Twice as wide as its operands.
    MulWide,
    Div,
    Rem,
    Min,
    Max,
    MinNan,
    MaxNan,
    And,
    Or,
    Xor,
    Shl,
    Shr,
    Not,
    Neg,
    Abs,
    Sqrt,
    Rcp,
    Exp2,
    Log2,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rounding {
    Nearest,
    NearestInteger,
    ZeroInteger,
}

/// An instruction. Registers are numbers.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Mov(u32, Source),
    /// The first operand in the low half; with the width of a half.
    Join(u32, [Source; 2], u32),
    Split([u32; 2], Source, u32),
    Load(Space, u32, bool, Vec<u32>, Source, i64),
    Store(Space, u32, Vec<Source>, Source, i64),
    Arithmetic(Arithmetic, Type, u32, [Source; 2]),
    /// `a * b + c`, of integers or floats; wide if the sum is of twice the width.
    MulAdd(Type, bool, u32, [Source; 3]),
    Select(u32, [Source; 2], Source),
    Insert(u32, u32, [Source; 4]),
    Set(Compare, Type, u32, [Source; 2]),
    Convert(Type, Type, Option<Rounding>, u32, Vec<Source>),
    Branch(usize),
    Return,
    Barrier,
    WarpBarrier,
    /// Exchange with the lane whose number differs by the mask.
    Shuffle(u32, Source, Source),
    /// d, a, b, c; bf16 or f16.
    Mma(Type, [u32; 4], [Source; 4], [Source; 2], [Source; 4]),
    LoadMatrices(bool, [u32; 4], Source, i64),
    CopyAsync((Source, i64), (Source, i64), Source),
    Commit,
    Wait(usize),
}

#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    /// A predicate, and whether it must be false.
    pub guard: Option<(u32, bool)>,
    pub op: Op,
}

/// A kernel.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    pub(crate) code: Vec<Instruction>,
    pub(crate) registers: usize,
    pub(crate) parameter: usize,
    /// Static shared memory in bytes; dynamic memory follows it.
    pub(crate) shared: usize,
    pub(crate) most_threads: u32,
}

/// The kernels of a PTX text, by name.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// The kernels.
    pub kernels: HashMap<String, std::sync::Arc<Kernel>>,
}

fn tokens(text: &str) -> Vec<&str> {
    let mut all = Vec::new();
    for line in text.lines() {
        let mut line = line.split("//").next().unwrap_or("");
        while let Some(start) = line.find(|c: char| !c.is_whitespace()) {
            line = &line[start..];
            let word = |c: char| c.is_ascii_alphanumeric() || "_.$%|".contains(c);
            let len = match line.as_bytes()[0] {
                b'"' => line[1..].find('"').map_or(line.len(), |i| i + 2),
                b'-' => 1 + line[1..].find(|c| !word(c)).unwrap_or(line.len() - 1),
                _ => line.find(|c| !word(c)).unwrap_or(line.len()).max(1),
            };
            all.push(&line[..len]);
            line = &line[len..];
        }
    }
    all
}

/// A statement's operands as text: a word, a `{list}` or an `[address]`.
#[derive(Clone, Debug)]
enum Operand<'a> {
    Word(&'a str),
    List(Vec<&'a str>),
    Address(&'a str, i64),
}

#[derive(Default)]
struct Reader<'a> {
    registers: HashMap<&'a str, u32>,
    /// Addresses of names in their space.
    names: HashMap<&'a str, u64>,
    labels: HashMap<&'a str, usize>,
    branches: Vec<(usize, &'a str)>,
    kernel: Kernel,
}

type Parsed<T> = Result<T, String>;

impl<'a> Reader<'a> {
    fn register(&mut self, name: &'a str) -> u32 {
        let next = self.registers.len() as u32;
        *self.registers.entry(name).or_insert(next)
    }

    fn source(&mut self, word: &'a str) -> Parsed<Source> {
        if let Some(name) = word.strip_prefix('%') {
            let special = [
                "tid.x", "tid.y", "tid.z", "ntid.x", "ntid.y", "ntid.z", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x",
                "nctaid.y", "nctaid.z", "laneid",
            ];
            if let Some(i) = special.iter().position(|s| *s == name) {
                return Ok(Source::Special(i as u8));
            }
            return Ok(Source::Register(self.register(word)));
        }
        if let Some(bits) = word.strip_prefix("0f").or(word.strip_prefix("0d")) {
            return u64::from_str_radix(bits, 16).map(Source::Immediate).map_err(|e| format!("{word}: {e}"));
        }
        if let Some(&address) = self.names.get(word) {
            return Ok(Source::Immediate(address));
        }
        let digits = word.trim_end_matches('U');
        let value = match digits.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).map_err(|e| format!("{word}: {e}")),
            None => digits.parse::<i128>().map(|v| v as u64).map_err(|e| format!("{word}: {e}")),
        };
        value.map(Source::Immediate)
    }

    fn operands(tokens: &[&'a str]) -> Parsed<Vec<Operand<'a>>> {
        let mut out = Vec::new();
        let mut i = 0;
        while i < tokens.len() {
            match tokens[i] {
                "," => i += 1,
                open @ ("{" | "[") => {
                    let close = if open == "{" { "}" } else { "]" };
                    let len = tokens[i..].iter().position(|t| *t == close).ok_or("an open bracket")?;
                    let inner = &tokens[i + 1..i + len];
                    out.push(if open == "{" {
                        Operand::List(inner.iter().filter(|t| **t != ",").copied().collect())
                    } else {
                        let offset = inner.last().filter(|_| inner.len() > 1).map_or(Ok(0), |t| t.parse::<i64>());
                        Operand::Address(inner[0], offset.map_err(|e| format!("{inner:?}: {e}"))?)
                    });
                    i += len + 1;
                }
                word => {
                    out.push(Operand::Word(word));
                    i += 1;
                }
            }
        }
        Ok(out)
    }

    fn list<const N: usize>(&mut self, operand: &Operand<'a>) -> Parsed<[Source; N]> {
        let words: Vec<&str> = match operand {
            Operand::List(words) => words.clone(),
            Operand::Word(word) => vec![word],
            Operand::Address(..) => return Err("an address where registers stand".into()),
        };
        let sources: Vec<Source> = words.into_iter().map(|w| self.source(w)).collect::<Parsed<_>>()?;
        sources.try_into().map_err(|s: Vec<_>| format!("{} operands instead of {N}", s.len()))
    }

    fn targets<const N: usize>(&mut self, operand: &Operand<'a>) -> Parsed<[u32; N]> {
        let mut out = [0; N];
        for (to, source) in out.iter_mut().zip(self.list::<N>(operand)?) {
            *to = match source {
                Source::Register(r) => r,
                _ => return Err("a result that is no register".into()),
            };
        }
        Ok(out)
    }

    fn statement(&mut self, tokens: &[&'a str]) -> Parsed<()> {
        let mut tokens = tokens;
        let mut guard = None;
        if tokens[0] == "@" {
            let not = tokens[1] == "!";
            let at = 1 + usize::from(not);
            guard = Some((self.register(tokens[at]), not));
            tokens = &tokens[at + 1..];
        }
        let name = tokens[0];
        let words: Vec<&str> = name.split('.').collect();
        let types: Vec<Type> = words[1..].iter().filter_map(|w| Type::parse(w)).collect();
        let operands = Self::operands(&tokens[1..])?;
        let has = |word: &str| words.contains(&word);
        let kind = types.first().copied().unwrap_or(Type::Pred);
        let one = |this: &mut Self, i: usize| -> Parsed<Source> {
            operands.get(i).ok_or_else(|| format!("operand {i} is missing")).and_then(|o| Ok(this.list::<1>(o)?[0]))
        };
        let target = |this: &mut Self| -> Parsed<u32> {
            operands.first().ok_or_else(|| "no result".to_owned()).and_then(|o| Ok(this.targets::<1>(o)?[0]))
        };
        let address = |this: &mut Self, i: usize| match operands.get(i) {
            Some(&Operand::Address(base, offset)) => Ok((this.source(base)?, offset)),
            _ => Err(format!("operand {i} is no address")),
        };
        let space = || match words.get(1) {
            Some(&"param") => Ok(Space::Param),
            Some(&"global") => Ok(Space::Global),
            Some(&"shared") => Ok(Space::Shared),
            _ => Err("a generic address".to_owned()),
        };
        use Arithmetic as A;
        let arithmetic = |a: A| Some(a);
        let simple = match words[0] {
            "add" => arithmetic(A::Add),
            "sub" => arithmetic(A::Sub),
            "mul" if has("wide") => arithmetic(A::MulWide),
            "mul" if has("hi") => arithmetic(A::MulHigh),
            "mul" => arithmetic(A::Mul),
            "div" => arithmetic(A::Div),
            "rem" => arithmetic(A::Rem),
            "min" if has("NaN") => arithmetic(A::MinNan),
            "max" if has("NaN") => arithmetic(A::MaxNan),
            "min" => arithmetic(A::Min),
            "max" => arithmetic(A::Max),
            "and" => arithmetic(A::And),
            "or" => arithmetic(A::Or),
            "xor" => arithmetic(A::Xor),
            "shl" => arithmetic(A::Shl),
            "shr" => arithmetic(A::Shr),
            "not" => arithmetic(A::Not),
            "neg" => arithmetic(A::Neg),
            "abs" => arithmetic(A::Abs),
            "sqrt" => arithmetic(A::Sqrt),
            "rcp" => arithmetic(A::Rcp),
            "ex2" => arithmetic(A::Exp2),
            "lg2" => arithmetic(A::Log2),
            _ => None,
        };
        let op = match words[0] {
            _ if simple.is_some() => {
                let a = one(self, 1)?;
                let b = if operands.len() > 2 { one(self, 2)? } else { a };
                Op::Arithmetic(simple.unwrap(), kind, target(self)?, [a, b])
            }
            "mov" => match (&operands[0], &operands[1]) {
                (to @ Operand::List(_), from) => {
                    let from = self.list::<1>(from)?[0];
                    Op::Split(self.targets(to)?, from, kind.bits() / 2)
                }
                (to, from @ Operand::List(_)) => Op::Join(self.targets::<1>(to)?[0], self.list(from)?, kind.bits() / 2),
                _ => Op::Mov(target(self)?, one(self, 1)?),
            },
            "cvta" => Op::Mov(target(self)?, one(self, 1)?),
            "ld" | "st" => {
                let at = usize::from(words[0] == "ld");
                let (base, offset) = address(self, at)?;
                let values = match &operands[1 - at] {
                    Operand::List(words) => words.clone(),
                    Operand::Word(word) => vec![*word],
                    Operand::Address(..) => return Err("two addresses".into()),
                };
                let values: Vec<Source> = values.into_iter().map(|w| self.source(w)).collect::<Parsed<_>>()?;
                let bytes = kind.bits() / 8;
                if at == 0 {
                    Op::Store(space()?, bytes, values, base, offset)
                } else {
                    let registers = values.iter().map(|v| match v {
                        Source::Register(r) => Ok(*r),
                        _ => Err("a result that is no register".to_owned()),
                    });
                    let signed = matches!(kind, Type::S(_));
                    Op::Load(space()?, bytes, signed, registers.collect::<Parsed<_>>()?, base, offset)
                }
            }
            "fma" | "mad" => {
                Op::MulAdd(kind, has("wide"), target(self)?, [one(self, 1)?, one(self, 2)?, one(self, 3)?])
            }
            "selp" => Op::Select(target(self)?, [one(self, 1)?, one(self, 2)?], one(self, 3)?),
            "bfi" => {
                let sources = [one(self, 1)?, one(self, 2)?, one(self, 3)?, one(self, 4)?];
                Op::Insert(kind.bits(), target(self)?, sources)
            }
            "setp" => {
                let compare = match words[1] {
                    "eq" => Compare::Eq,
                    "ne" => Compare::Ne,
                    "lt" | "lo" => Compare::Lt,
                    "le" | "ls" => Compare::Le,
                    "gt" | "hi" => Compare::Gt,
                    "ge" | "hs" => Compare::Ge,
                    "ltu" => Compare::Unordered(&Compare::Lt),
                    "leu" => Compare::Unordered(&Compare::Le),
                    "gtu" => Compare::Unordered(&Compare::Gt),
                    "geu" => Compare::Unordered(&Compare::Ge),
                    "neu" => Compare::Unordered(&Compare::Ne),
                    other => return Err(format!("comparison {other}")),
                };
                if words.len() != 3 {
                    return Err("a comparison with more parts".into());
                }
                Op::Set(compare, kind, target(self)?, [one(self, 1)?, one(self, 2)?])
            }
            "cvt" => {
                let [to, from] = types[..] else { return Err("two types".into()) };
                let rounding = words[1..].iter().find_map(|w| match *w {
                    "rn" => Some(Rounding::Nearest),
                    "rni" => Some(Rounding::NearestInteger),
                    "rzi" => Some(Rounding::ZeroInteger),
                    _ => None,
                });
                let known = |w: &&str| Type::parse(w).is_some() || ["rn", "rni", "rzi"].contains(w);
                if !words[1..].iter().all(known) {
                    return Err("a conversion with more parts".into());
                }
                let sources = (1..operands.len()).map(|i| one(self, i)).collect::<Parsed<_>>()?;
                Op::Convert(to, from, rounding, target(self)?, sources)
            }
            "bra" => {
                let Operand::Word(label) = operands[0] else { return Err("a label".into()) };
                self.branches.push((self.kernel.code.len(), label));
                Op::Branch(0)
            }
            "ret" => Op::Return,
            "bar" if words[1] == "sync" => Op::Barrier,
            "bar" if words[1..] == ["warp", "sync"] => Op::WarpBarrier,
            "shfl" if words[1..] == ["sync", "bfly", "b32"] => {
                // The result may be paired with a predicate, which is not used.
                let Operand::Word(to) = operands[0] else { return Err("a result".into()) };
                Op::Shuffle(self.register(to.split('|').next().unwrap_or(to)), one(self, 1)?, one(self, 2)?)
            }
            "mma" if name.starts_with("mma.sync.aligned.m16n8k16.row.col.f32.") => {
                let kind = if has("bf16") { Type::Bf16 } else { Type::F(16) };
                let d = self.targets(&operands[0])?;
                Op::Mma(kind, d, self.list(&operands[1])?, self.list(&operands[2])?, self.list(&operands[3])?)
            }
            "ldmatrix" if name.starts_with("ldmatrix.sync.aligned.m8n8.x4.") => {
                let (base, offset) = address(self, 1)?;
                Op::LoadMatrices(has("trans"), self.targets(&operands[0])?, base, offset)
            }
            "cp" if name == "cp.async.cg.shared.global" => {
                Op::CopyAsync(address(self, 0)?, address(self, 1)?, one(self, 3)?)
            }
            "cp" if name == "cp.async.commit_group" => Op::Commit,
            "cp" if name == "cp.async.wait_group" => match one(self, 0)? {
                Source::Immediate(n) => Op::Wait(n as usize),
                _ => return Err("a count".into()),
            },
            _ => return Err("no such instruction here".into()),
        };
        self.kernel.code.push(Instruction { guard, op });
        Ok(())
    }
}

fn number(word: &str) -> Parsed<usize> {
    word.parse().map_err(|e| format!("{word}: {e}"))
}

impl Module {
    /// Parses a text.
    ///
    /// # Errors
    /// Which statement is not known.
    pub fn parse(text: &str) -> Result<Self, String> {
        let all = tokens(text);
        let mut module = Self::default();
        // Static shared memory of the module, by name, alignment and size; of size `None` where it is dynamic.
        let mut outer: Vec<(&str, usize, Option<usize>)> = Vec::new();
        let shared = |statement: &[&'_ str]| -> Parsed<(usize, Option<usize>)> {
            let align = statement.iter().position(|t| *t == ".align").map_or(Ok(1), |i| number(statement[i + 1]))?;
            let open = statement.iter().position(|t| *t == "[").ok_or("an array")?;
            Ok((align, (statement[open + 1] != "]").then(|| number(statement[open + 1])).transpose()?))
        };
        let mut i = 0;
        while i < all.len() {
            let end = |what: &str, from: usize| all[from..].iter().position(|t| *t == what).map(|n| from + n);
            match all[i] {
                ".version" | ".target" | ".address_size" => i += 2,
                ".extern" | ".shared" => {
                    let close = end(";", i).ok_or("an open statement")?;
                    let statement = &all[i..close];
                    let open = statement.iter().position(|t| *t == "[").ok_or("an array")?;
                    let (align, size) = shared(statement)?;
                    outer.push((statement[open - 1], align, size));
                    i = close + 1;
                }
                ".visible" | ".entry" => {
                    let entry = end(".entry", i).ok_or("a kernel")?;
                    let (name, begin) = (all[entry + 1], end("{", entry).ok_or("a body")?);
                    let mut reader = Reader::default();
                    let head = &all[entry + 2..begin];
                    let open = head.iter().position(|t| *t == "[").ok_or("one parameter, a struct")?;
                    reader.names.insert(head[open - 1], 0);
                    reader.kernel.parameter = number(head[open + 1])?;
                    let most = head.iter().position(|t| *t == ".maxntid").map_or(Ok(1024), |i| number(head[i + 1]))?;
                    reader.kernel.most_threads = most as u32;
                    let place = |reader: &mut Reader<'_>, align: usize, size: usize| {
                        let at = reader.kernel.shared.next_multiple_of(align);
                        reader.kernel.shared = at + size;
                        at as u64
                    };
                    for &(name, align, size) in &outer {
                        if let Some(size) = size {
                            let at = place(&mut reader, align, size);
                            reader.names.insert(name, at);
                        }
                    }
                    i = begin + 1;
                    // Static arrays come first, so that dynamic memory lies behind them.
                    let mut at = i;
                    while all[at] != "}" {
                        let close = end(";", at).ok_or("an open statement")?;
                        if all[at] == ".shared" {
                            let statement = &all[at..close];
                            let open = statement.iter().position(|t| *t == "[").ok_or("an array")?;
                            let (align, size) = shared(statement)?;
                            let address = place(&mut reader, align, size.ok_or("a size")?);
                            reader.names.insert(statement[open - 1], address);
                        }
                        at = close + 1;
                    }
                    for &(name, align, size) in &outer {
                        if size.is_none() {
                            let at = place(&mut reader, align, 0);
                            reader.names.insert(name, at);
                        }
                    }
                    while all[i] != "}" {
                        if all.get(i + 1) == Some(&":") {
                            reader.labels.insert(all[i], reader.kernel.code.len());
                            i += 2;
                            continue;
                        }
                        let close = end(";", i).ok_or("an open statement")?;
                        if !all[i].starts_with('.') {
                            let statement = &all[i..close];
                            reader.statement(statement).map_err(|e| format!("{name}: {}: {e}", statement.join(" ")))?;
                        }
                        i = close + 1;
                    }
                    i += 1;
                    for (at, label) in std::mem::take(&mut reader.branches) {
                        let to = *reader.labels.get(label).ok_or_else(|| format!("{name}: no label {label}"))?;
                        reader.kernel.code[at].op = Op::Branch(to);
                    }
                    reader.kernel.registers = reader.registers.len();
                    module.kernels.insert(name.to_owned(), std::sync::Arc::new(reader.kernel));
                }
                other => return Err(format!("{other} outside of a kernel")),
            }
        }
        Ok(module)
    }
}
