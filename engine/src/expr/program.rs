//! Functions as straight-line programs over slots.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

use super::{Binary, Function, Id, Lowered, Node, Unary};
use crate::{Error, Result};

/// What an instruction does with its operands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Opcode {
    /// A function of `a`.
    Unary(Unary),
    /// A function of `a` and `b`.
    Binary(Binary),
    /// `a * b + c`, rounded once where the machine can.
    MulAdd,
    /// `a * b - c`, rounded once where the machine can.
    MulSub,
    /// `if a < b { c } else { d }`.
    Select,
}

/// One step. Operands and target are slots; the target is none of the operands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Instruction {
    /// What is done.
    pub opcode: Opcode,
    /// The slots read; those past the opcode's count are 0.
    pub operands: [usize; 4],
    /// The slot written.
    pub target: usize,
}

/// A function compiled to slots: first the inputs, then the scalars, then the constants, then registers.
#[derive(Debug)]
pub struct Program {
    /// Number of inputs.
    pub inputs: usize,
    /// Number of scalars.
    pub scalars: usize,
    /// The constants.
    pub constants: Vec<f64>,
    /// Number of registers.
    pub registers: usize,
    /// The steps, in order.
    pub instructions: Vec<Instruction>,
    /// The slot of each output.
    pub outputs: Vec<usize>,
    id: u64,
    lowered: OnceLock<Lowered>,
}

type Cache = Mutex<HashMap<Function, Arc<Program>>>;

impl Program {
    /// The program of a function, compiled once.
    pub fn of(function: &Function) -> Arc<Self> {
        static CACHE: LazyLock<Cache> = LazyLock::new(Cache::default);
        let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        cache.entry(function.clone()).or_insert_with(|| Arc::new(Self::compile(function))).clone()
    }

    /// A number of its own in the process: backends keep kernels by it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The program in steps that every machine has, for backends that print kernels.
    pub fn lowered(&self) -> &Lowered {
        self.lowered.get_or_init(|| Lowered::of(self))
    }

    /// Whether it takes so many inputs and scalars and has so many outputs.
    ///
    /// # Errors
    /// When it does not.
    pub fn check_counts(&self, inputs: usize, scalars: usize, outputs: usize) -> Result<()> {
        let (expected, got) = ((self.inputs, self.scalars, self.outputs.len()), (inputs, scalars, outputs));
        if expected == got {
            return Ok(());
        }
        Err(Error::argument("pointwise", format!("{expected:?} inputs, scalars and outputs"), got))
    }

    /// The first slot of scalars and constants.
    pub fn first_uniform(&self) -> usize {
        self.inputs
    }

    /// The first register's slot.
    pub fn first_register(&self) -> usize {
        self.inputs + self.scalars + self.constants.len()
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.first_register() + self.registers
    }

    fn compile(function: &Function) -> Self {
        let nodes = function.nodes();
        let steps = fused(nodes, function.output_ids());
        // The last step that reads each node; outputs are read at the end.
        let mut last = vec![0; nodes.len()];
        for (at, step) in steps.iter().enumerate() {
            step.operands().iter().for_each(|&id| last[id as usize] = at);
        }
        function.output_ids().iter().for_each(|&id| last[id as usize] = usize::MAX);

        let mut constants = Vec::new();
        let mut slots = vec![usize::MAX; nodes.len()];
        let (inputs, scalars) = (function.inputs(), function.scalars());
        for (node, slot) in nodes.iter().zip(&mut slots) {
            match *node {
                Node::Input(i) => *slot = i as usize,
                Node::Scalar(i) => *slot = inputs + i as usize,
                Node::Const(bits) => {
                    *slot = inputs + scalars + constants.len();
                    constants.push(f64::from_bits(bits));
                }
                _ => {}
            }
        }
        let first = inputs + scalars + constants.len();
        let (mut free, mut registers) = (Vec::new(), 0);
        let mut instructions = Vec::new();
        for (at, step) in steps.iter().enumerate() {
            let target = free.pop().unwrap_or_else(|| {
                registers += 1;
                first + registers - 1
            });
            let mut operands = [0; 4];
            for (slot, &id) in operands.iter_mut().zip(step.operands()) {
                *slot = slots[id as usize];
            }
            slots[step.node as usize] = target;
            instructions.push(Instruction { opcode: step.opcode, operands, target });
            // Freed after the target was chosen, so that a step never writes what it reads.
            let mut read = step.operands().to_vec();
            read.sort_unstable();
            read.dedup();
            free.extend(
                read.iter()
                    .filter(|&&id| last[id as usize] == at)
                    .map(|&id| slots[id as usize])
                    .filter(|&s| s >= first),
            );
        }
        let outputs = function.output_ids().iter().map(|&id| slots[id as usize]).collect();
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { inputs, scalars, constants, registers, instructions, outputs, id, lowered: OnceLock::new() }
    }
}

struct Step {
    node: Id,
    opcode: Opcode,
    ids: [Id; 4],
    count: usize,
}

impl Step {
    fn operands(&self) -> &[Id] {
        &self.ids[..self.count]
    }
}

/// The steps of the inner nodes, products that only one sum reads fused into it.
fn fused(nodes: &[Node], outputs: &[Id]) -> Vec<Step> {
    let mut uses = vec![0; nodes.len()];
    nodes.iter().flat_map(Node::operands).chain(outputs.iter().copied()).for_each(|id| uses[id as usize] += 1);
    let product = |id: Id| match nodes[id as usize] {
        Node::Binary(Binary::Mul, a, b) if uses[id as usize] == 1 => Some((a, b)),
        _ => None,
    };
    let mut absorbed = vec![false; nodes.len()];
    let mut steps: Vec<Step> = Vec::new();
    for (at, node) in nodes.iter().enumerate().rev() {
        if absorbed[at] {
            continue;
        }
        let (opcode, ids, count) = match *node {
            Node::Input(_) | Node::Scalar(_) | Node::Const(_) => continue,
            Node::Unary(op, a) => (Opcode::Unary(op), [a, 0, 0, 0], 1),
            Node::Select(a, b, c, d) => (Opcode::Select, [a, b, c, d], 4),
            Node::Binary(op, a, b) => match (op, product(a), product(b)) {
                (Binary::Add, Some((x, y)), _) => {
                    absorbed[a as usize] = true;
                    (Opcode::MulAdd, [x, y, b, 0], 3)
                }
                (Binary::Add, None, Some((x, y))) => {
                    absorbed[b as usize] = true;
                    (Opcode::MulAdd, [x, y, a, 0], 3)
                }
                (Binary::Sub, Some((x, y)), _) => {
                    absorbed[a as usize] = true;
                    (Opcode::MulSub, [x, y, b, 0], 3)
                }
                _ => (Opcode::Binary(op), [a, b, 0, 0], 2),
            },
        };
        steps.push(Step { node: at as Id, opcode, ids, count });
    }
    steps.reverse();
    steps
}
