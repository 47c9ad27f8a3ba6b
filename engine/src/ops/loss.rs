//! Losses and dropout.

use crate::gradcheck::{Case, Sample};
use crate::{Error, Philox, Result, Tensor, ops::pointwise};

/// The mean squared error of two tensors of one shape, a tensor without axes.
///
/// # Errors
/// When the shapes differ.
pub fn mse(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    if prediction.dims() != target.dims() {
        return Err(Error::shape("mse", format!("{:?}", target.dims()), prediction.dims()));
    }
    pointwise([prediction, target], |[p, t]| (p - t).square())?.mean_all()
}

/// Zeroes each element with probability `p` and scales the rest by `1 / (1 - p)`.
///
/// # Errors
/// When `p` is not in `[0, 1)`.
pub fn dropout(x: &Tensor, p: f64, random: &mut Philox) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        return Err(Error::argument("dropout", "a probability in [0, 1)", p));
    }
    if p == 0.0 {
        return Ok(x.clone());
    }
    let draw = random.uniform(x.dims(), x.device())?;
    let keep = 1.0 / (1.0 - p);
    let mask = pointwise::pointwise_to(x.dtype(), [&draw], |[u]| u.select_lt(p, 0.0, keep))?;
    x.mul(&mask)
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "mse",
        make: |draw| {
            let dims = draw.dims(3);
            Sample::new(vec![draw.standard(&dims)?, draw.standard(&dims)?], |xs| mse(&xs[0], &xs[1]))
        },
    },
    Case {
        name: "dropout",
        make: |draw| {
            let dims = draw.dims(2);
            Sample::new(vec![draw.standard(&dims)?], |xs| dropout(&xs[0], 0.5, &mut Philox::new(7)))
        },
    },
];
