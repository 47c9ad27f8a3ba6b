//! Blocks whose frozen weights lie in the host's memory (`performance.blocks_to_swap`).

use std::sync::Arc;

use flowtape_engine::Device;
use flowtape_engine::nn::{Params, Units};

use crate::{Error, Recipe, Result};

fn refused(what: String) -> Error {
    Error::Run { path: "recipe".into(), what: format!("performance.blocks_to_swap: {what}") }
}

/// Whether a device can do it.
///
/// # Errors
/// When it computes in the host's memory.
pub(crate) fn check_device(recipe: &Recipe, device: &Device) -> Result<()> {
    if recipe.performance.blocks_to_swap == 0 || !device.backend().is_host() {
        return Ok(());
    }
    let what = "the CPU computes in the host's memory, so nothing can lie there instead: leave it out, or choose a GPU";
    Err(refused(what.into()))
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
        return Err(refused(what.into()));
    }
    if wanted > all {
        return Err(refused(format!("expected at most the model's {all} blocks, got {wanted}")));
    }
    if shared {
        let what = "ranks share out the weights of blocks (`fsdp`) already: leave one of the two out";
        return Err(refused(what.into()));
    }
    Ok(Units::swapped(shapes, wanted))
}
