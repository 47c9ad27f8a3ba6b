//! Finished functions.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::{Expr, Graph, Id, Node};

/// A pointwise function: numbers and scalars in, numbers out. Immutable and cheap to clone.
///
/// Inputs vary by element; scalars (a learning rate) are one value for all, given at each run.
#[derive(Clone, Debug)]
pub struct Function(Arc<Inner>);

#[derive(Debug, PartialEq, Eq, Hash)]
struct Inner {
    inputs: usize,
    scalars: usize,
    nodes: Vec<Node>,
    outputs: Vec<Id>,
    hash: u64,
}

impl PartialEq for Function {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Eq for Function {}

impl Hash for Function {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.hash);
    }
}

impl Function {
    /// From a closure on `N` inputs with `M` outputs.
    pub fn build<const N: usize, const M: usize>(f: impl for<'a> FnOnce([Expr<'a>; N]) -> [Expr<'a>; M]) -> Self {
        Self::build_with_scalars(|inputs, []| f(inputs))
    }

    /// The same with `S` scalars.
    pub fn build_with_scalars<const N: usize, const S: usize, const M: usize>(
        f: impl for<'a> FnOnce([Expr<'a>; N], [Expr<'a>; S]) -> [Expr<'a>; M],
    ) -> Self {
        Self::of(N, S, |inputs, scalars| {
            f(std::array::from_fn(|i| inputs[i]), std::array::from_fn(|i| scalars[i])).to_vec()
        })
    }

    /// The same where only the running program knows the counts of inputs, scalars and outputs.
    pub fn of(
        inputs: usize,
        scalars: usize,
        f: impl for<'a> FnOnce(&[Expr<'a>], &[Expr<'a>]) -> Vec<Expr<'a>>,
    ) -> Self {
        let graph = Graph::default();
        let leaves: Vec<Expr<'_>> = (0..inputs).map(|i| graph.push(Node::Input(i as u32))).collect();
        let uniforms: Vec<Expr<'_>> = (0..scalars).map(|i| graph.push(Node::Scalar(i as u32))).collect();
        let outputs: Vec<Id> = f(&leaves, &uniforms).into_iter().map(Expr::id).collect();
        Self::new(inputs, scalars, graph.into_nodes(), &outputs)
    }

    /// Keeps what the outputs reach.
    pub(super) fn new(inputs: usize, scalars: usize, nodes: Vec<Node>, outputs: &[Id]) -> Self {
        let mut live = vec![false; nodes.len()];
        outputs.iter().for_each(|&id| live[id as usize] = true);
        for at in (0..nodes.len()).rev() {
            if live[at] {
                nodes[at].operands().for_each(|id| live[id as usize] = true);
            }
        }
        let mut moved = vec![0; nodes.len()];
        let mut kept = Vec::new();
        for (at, node) in nodes.into_iter().enumerate() {
            if live[at] {
                moved[at] = kept.len() as Id;
                kept.push(node.map(|id| moved[id as usize]));
            }
        }
        let outputs: Vec<Id> = outputs.iter().map(|&id| moved[id as usize]).collect();
        let mut hasher = DefaultHasher::new();
        (inputs, scalars, &kept, &outputs).hash(&mut hasher);
        Self(Arc::new(Inner { inputs, scalars, nodes: kept, outputs, hash: hasher.finish() }))
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.0.inputs
    }

    /// Number of scalars.
    pub fn scalars(&self) -> usize {
        self.0.scalars
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.0.outputs.len()
    }

    /// Whether some output depends on input `i`.
    pub fn uses(&self, i: usize) -> bool {
        self.0.nodes.contains(&Node::Input(i as u32))
    }

    /// The input that an output is, unchanged.
    pub fn passes(&self, output: usize) -> Option<usize> {
        match self.0.nodes[*self.0.outputs.get(output)? as usize] {
            Node::Input(i) => Some(i as usize),
            _ => None,
        }
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.0.nodes
    }

    pub(super) fn output_ids(&self) -> &[Id] {
        &self.0.outputs
    }
}
