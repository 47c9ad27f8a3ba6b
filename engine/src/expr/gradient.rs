//! Symbolic differentiation: one reverse sweep.

use std::collections::HashMap;
use std::f64::consts::FRAC_2_SQRT_PI;
use std::sync::{LazyLock, Mutex, PoisonError};

use super::{Binary, Expr, Function, GELU_CUBIC, GELU_FACTOR, Graph, Node, Unary};

type Cache = Mutex<HashMap<(Function, Vec<usize>), Function>>;

impl Function {
    /// The gradient: a function of the same inputs and, after them, of one upstream gradient an output; its
    /// outputs are the gradients of the inputs `wrt`.
    pub fn gradient(&self, wrt: &[usize]) -> Self {
        static CACHE: LazyLock<Cache> = LazyLock::new(Cache::default);
        let key = (self.clone(), wrt.to_vec());
        let lock = || CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&key) {
            return known.clone();
        }
        let derived = derive(self, wrt);
        lock().insert(key, derived.clone());
        derived
    }
}

fn add<'a>(adjoints: &mut [Option<Expr<'a>>], id: u32, term: Expr<'a>) {
    let slot = &mut adjoints[id as usize];
    *slot = Some(slot.map_or(term, |sum| sum + term));
}

fn derive(function: &Function, wrt: &[usize]) -> Function {
    let graph = Graph::default();
    let mut values: Vec<Expr<'_>> = Vec::new();
    for node in function.nodes() {
        values.push(graph.push(node.map(|id| values[id as usize].id())));
    }
    let mut adjoints: Vec<Option<Expr<'_>>> = vec![None; values.len()];
    for (k, &id) in function.output_ids().iter().enumerate() {
        add(&mut adjoints, id, graph.push(Node::Input((function.inputs() + k) as u32)));
    }
    for (at, node) in function.nodes().iter().enumerate().rev() {
        let (Some(g), y) = (adjoints[at], values[at]) else { continue };
        let value = |id: u32| values[id as usize];
        match *node {
            Node::Input(_) | Node::Scalar(_) | Node::Const(_) => {}
            Node::Unary(op, a) => {
                let x = value(a);
                let term = match op {
                    Unary::Neg => -g,
                    Unary::Exp => g * y,
                    Unary::Log => g / x,
                    Unary::Sqrt => g * 0.5 / y,
                    Unary::Rsqrt => g * -0.5 * (y * y * y),
                    Unary::Recip => -(g * y * y),
                    Unary::Abs => x.select_lt(0.0, -g, graph.constant(0.0).select_lt(x, g, 0.0)),
                    Unary::Sin => g * x.cos(),
                    Unary::Cos => -(g * x.sin()),
                    Unary::Tanh => g * (1.0 - y * y),
                    Unary::Erf => g * FRAC_2_SQRT_PI * (-(x * x)).exp(),
                    Unary::Sigmoid => g * (y * (1.0 - y)),
                    Unary::Gelu => g * x.gelu_tanh_slope(),
                    Unary::GeluSlope => {
                        let cubic = x.square() * GELU_CUBIC;
                        let s = (x * GELU_FACTOR * (cubic + 1.0)).sigmoid();
                        let (slope, bend) = ((cubic * 3.0 + 1.0) * GELU_FACTOR, x * (6.0 * GELU_FACTOR * GELU_CUBIC));
                        g * (s * (1.0 - s) * (slope * 2.0 + x * (slope.square() * (1.0 - s * 2.0) + bend)))
                    }
                };
                add(&mut adjoints, a, term);
            }
            Node::Binary(op, a, b) => {
                let (x, z) = (value(a), value(b));
                let (da, db) = match op {
                    Binary::Add => (g, g),
                    Binary::Sub => (g, -g),
                    Binary::Mul => (g * z, g * x),
                    Binary::Div => (g / z, -(g * y / z)),
                    Binary::RoundBf16 => (g, graph.constant(0.0)),
                    Binary::Max => {
                        let half = g * 0.5;
                        (x.select_lt(z, 0.0, z.select_lt(x, g, half)), x.select_lt(z, g, z.select_lt(x, 0.0, half)))
                    }
                    Binary::Min => {
                        let half = g * 0.5;
                        (x.select_lt(z, g, z.select_lt(x, 0.0, half)), x.select_lt(z, 0.0, z.select_lt(x, g, half)))
                    }
                };
                add(&mut adjoints, a, da);
                add(&mut adjoints, b, db);
            }
            Node::Select(a, b, c, d) => {
                let zero = graph.constant(0.0);
                add(&mut adjoints, c, value(a).select_lt(value(b), g, zero));
                add(&mut adjoints, d, value(a).select_lt(value(b), zero, g));
            }
        }
    }
    let gradient_of = |&i: &usize| {
        let at = function.nodes().iter().position(|n| *n == Node::Input(i as u32));
        at.and_then(|at| adjoints[at]).unwrap_or_else(|| graph.constant(0.0)).id()
    };
    let outputs: Vec<u32> = wrt.iter().map(gradient_of).collect();
    Function::new(function.inputs() + function.outputs(), function.scalars(), graph.into_nodes(), &outputs)
}
