//! What lies in the host's memory instead of a GPU's: the frozen weights of blocks (`performance.blocks_to_swap`), and what the optimiser
//! remembers (`performance.optimizer_cpu_offload`).

use std::sync::Arc;

use flowtape_engine::Device;
use flowtape_engine::nn::{Params, Units};

use crate::{Error, Recipe, Result};

const SWAP: &str = "blocks_to_swap";
const OFFLOAD: &str = "optimizer_cpu_offload";

fn refused(key: &str, what: &str) -> Error {
    Error::Run { path: "recipe".into(), what: format!("performance.{key}: {what}") }
}

/// Whether a device can do what a recipe wants of it.
///
/// # Errors
/// When it computes in the host's memory.
pub(crate) fn check_device(recipe: &Recipe, device: &Device) -> Result<()> {
    let performance = &recipe.performance;
    let wanted = [(SWAP, performance.blocks_to_swap > 0), (OFFLOAD, performance.optimizer_cpu_offload)];
    let wanted = wanted.into_iter().find(|(_, wanted)| *wanted);
    let Some((key, _)) = wanted.filter(|_| device.backend().is_host()) else { return Ok(()) };
    let what = "the CPU computes in the host's memory, so nothing can lie there instead: leave it out, or choose a GPU";
    Err(refused(key, what))
}

/// Whether ranks can do it, which may share out the parameters (`shared`).
///
/// # Errors
/// When they can't.
pub(crate) fn check_ranks(recipe: &Recipe, shared: bool) -> Result<()> {
    if !shared || !recipe.performance.optimizer_cpu_offload {
        return Ok(());
    }
    Err(refused(OFFLOAD, "ranks share out what the optimiser remembers (`fsdp`) already: leave one of the two out"))
}

/// The blocks of a recipe's model that come and go, where it wants some. `shapes` are its parameters on a device without data.
///
/// # Errors
/// When there are not as many blocks with frozen weights, or ranks share out the weights (`shared`).
pub(crate) fn units(recipe: &Recipe, shapes: &Params, shared: bool) -> Result<Arc<Units>> {
    let (wanted, all) = (recipe.performance.blocks_to_swap, Units::swappable(shapes).len());
    if all == 0 {
        let what =
            "all weights are trained, and only frozen ones can lie elsewhere: leave it out, or train adapters (`peft`)";
        return Err(refused(SWAP, what));
    }
    if wanted > all {
        return Err(refused(SWAP, &format!("expected at most the model's {all} blocks, got {wanted}")));
    }
    if shared {
        let what = "ranks share out the weights of blocks (`fsdp`) already: leave one of the two out";
        return Err(refused(SWAP, what));
    }
    Ok(Units::swapped(shapes, wanted))
}
