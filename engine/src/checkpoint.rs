//! Activation checkpointing: keep a block's inputs, run it again in backward.

use std::sync::Arc;

use crate::tape::{self, Forward, GradientSink, InputGradients, Op};
use crate::{Gradients, Result, Tape, Tensor};

type Block = Arc<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

struct Checkpoint(Block);

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
        inputs.iter().for_each(|t| cx.save(t));
        Ok(vec![(self.0)(inputs)?])
    }

    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let tape = Tape::new();
        let inputs: Vec<Tensor> = saved
            .iter()
            .enumerate()
            .map(|(i, t)| if out.needs(i) && t.dtype().is_float() { tape.leaf(t) } else { tape.attach(t) })
            .collect();
        let output = (self.0)(&inputs)?;
        let mut inner = Gradients::default();
        tape.backward_with(&output, grad, &mut inner as &mut dyn GradientSink)?;
        for (i, input) in inputs.iter().enumerate() {
            if let Some(gradient) = input.var().and_then(|v| inner.remove(v)) {
                out.set(i, gradient);
            }
        }
        // What is left are parameters that the block captured.
        let captured: Vec<_> = inner.iter().map(|(v, g)| (v, g.clone())).collect();
        captured.into_iter().for_each(|(v, g)| out.captured(v, g));
        Ok(())
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
    block: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let Some(tape) = inputs.iter().find_map(|t| t.tape().cloned()) else {
        return block(&inputs.iter().map(|t| t.detach()).collect::<Vec<_>>());
    };
    // A leaf of no interest makes the op record even when only captured parameters are trained.
    let marker = tape.leaf(&Tensor::zeros(&[], inputs[0].dtype(), inputs[0].device())?);
    let mut all: Vec<&Tensor> = inputs.to_vec();
    all.push(&marker);
    let count = inputs.len();
    let output = tape::apply_one(Checkpoint(Arc::new(move |xs: &[Tensor]| block(&xs[..count]))), &all)?;
    Ok(output)
}
