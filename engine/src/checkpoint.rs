//! Activation checkpointing: keep a block's inputs, run it again in backward.

use crate::tape::{self, Block, Forward, Op};
use crate::{Result, Tape, Tensor};

struct Checkpoint(Box<Block>);

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Checkpoint")
    }
}

impl Op for Checkpoint {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        inputs.iter().enumerate().for_each(|(i, t)| cx.save(("input", i), t));
        let listener = Tape::listener();
        let listened: Vec<Tensor> = inputs.iter().map(|t| listener.attach(t)).collect();
        let outputs = (self.0)(&listened)?;
        cx.capture(listener.heard());
        Ok(outputs.iter().map(Tensor::detach).collect())
    }

    fn replay(&self) -> Option<&Block> {
        Some(&*self.0)
    }
}

/// Runs `block` on `inputs` as one record and runs it again in backward: its activations are not kept.
///
/// Parameters that the block captures get their gradients as without it, bit for bit. The block must give the same
/// result each time (draw random numbers from a captured state).
///
/// # Errors
/// What the block returns.
pub fn checkpoint(
    inputs: &[&Tensor],
    block: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Vec<Tensor>> {
    let Some(tape) = inputs.iter().find_map(|t| t.tape().cloned()) else {
        return block(&inputs.iter().map(|t| t.detach()).collect::<Vec<_>>());
    };
    // A leaf of no interest makes the op record even when only captured parameters are trained.
    let marker = tape.leaf(&Tensor::zeros(&[], inputs[0].dtype(), inputs[0].device())?);
    let mut all: Vec<&Tensor> = inputs.to_vec();
    all.push(&marker);
    let count = inputs.len();
    tape::apply(Checkpoint(Box::new(move |xs: &[Tensor]| block(&xs[..count]))), &all)
}
