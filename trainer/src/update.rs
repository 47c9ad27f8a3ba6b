//! Backward and optimiser in one: each parameter is updated as soon as its gradient is final.

use std::collections::HashSet;

use flowtape_engine::nn::Params;
use flowtape_engine::optim::{AdamW, SquareSums, Stepping};
use flowtape_engine::{GradientSink, Result, Tape, Tensor, VarId};

/// Updates parameters and keeps what their gradients' norm needs.
struct Updating<'a> {
    stepping: Stepping<'a>,
    squares: SquareSums,
    reached: HashSet<VarId>,
}

impl GradientSink for Updating<'_> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        if let Some(place) = self.stepping.place(var) {
            self.squares.add(place, &gradient)?;
            self.reached.insert(var);
        }
        self.stepping.gradient(var, gradient)
    }
}

/// Runs backward from `loss` (one element) and updates each parameter on the way, so that never all gradients are in
/// memory together. Returns the norm of all gradients, still on the device.
///
/// # Errors
/// When the tape fails, or a parameter got no gradient that is not named in `without`: the parameters are updated then.
pub(crate) fn backward_and_step(
    tape: &Tape,
    loss: &Tensor,
    optimizer: &mut AdamW,
    params: &Params,
    (lr, weight_decay): (f64, f64),
    without: &[String],
) -> Result<Tensor> {
    let squares = SquareSums::new(params.len(), loss.device())?;
    let mut sink =
        Updating { stepping: optimizer.stepping(params, lr, weight_decay), squares, reached: HashSet::new() };
    let one = Tensor::ones(loss.dims(), loss.dtype(), loss.device())?;
    tape.backward_with(&[(loss, &one)], &mut sink)?;
    params.check_reached(|var| sink.reached.contains(&var), without)?;
    sink.squares.norm()
}
