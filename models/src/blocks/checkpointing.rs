//! Activation checkpointing of a model's blocks.

use flowtape_engine::{Error, Result, Tensor, checkpoint};

/// Runs a block on `inputs`. With `checkpointing` it is one record that keeps its inputs alone and runs again in backward:
/// the gradients are the same, bit for bit. Every tensor that needs a gradient must be an input or a parameter.
///
/// # Errors
/// Those of the block.
pub fn run_block<const N: usize, const M: usize>(
    checkpointing: bool,
    inputs: [&Tensor; N],
    block: impl Fn([&Tensor; N]) -> Result<[Tensor; M]> + Send + Sync + 'static,
) -> Result<[Tensor; M]> {
    if !checkpointing {
        return block(inputs);
    }
    let outputs = checkpoint(&inputs, move |xs| Ok(block(std::array::from_fn(|i| &xs[i]))?.to_vec()))?;
    outputs.try_into().map_err(|all: Vec<Tensor>| Error::argument("checkpoint", format!("{M} outputs"), all.len()))
}
