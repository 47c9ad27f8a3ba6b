//! Collectives that a tape records.

use std::sync::Arc;

use super::Comm;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{Error, Result, Tensor};

/// An exchange between ranks that all record the same. What a rank makes of its result adds to one loss, which is the sum over ranks.
#[derive(Debug)]
enum Exchange {
    AllToAll(Arc<dyn Comm>),
    AllGather(Arc<dyn Comm>),
}

impl Exchange {
    fn all_to_all(comm: &dyn Comm, x: &Tensor) -> Result<Tensor> {
        let result = Tensor::empty(x.dims(), x.dtype(), x.device())?;
        comm.all_to_all(&x.contiguous()?, &result)?;
        Ok(result)
    }
}

impl Op for Exchange {
    fn name(&self) -> &'static str {
        match self {
            Self::AllToAll(_) => "all-to-all",
            Self::AllGather(_) => "all-gather",
        }
    }

    fn forward(&self, _: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let result = match self {
            Self::AllToAll(comm) => Self::all_to_all(&**comm, x)?,
            Self::AllGather(comm) => {
                let dims = [&[comm.world_size()], x.dims()].concat();
                let result = Tensor::empty(&dims, x.dtype(), x.device())?;
                comm.all_gather(&x.contiguous()?, &result)?;
                result
            }
        };
        Ok(vec![result])
    }

    fn backward(&self, _: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let dx = match self {
            Self::AllToAll(comm) => Self::all_to_all(&**comm, grad)?,
            Self::AllGather(comm) => grad.narrow(0, comm.rank(), 1)?.squeeze(0)?,
        };
        out.set(0, dx);
        Ok(())
    }
}

/// Part `r` of the result is this rank's part of what rank `r` gives, for x `[N, ..]` of N ranks. The gradient goes back likewise.
///
/// # Errors
/// When the sizes do not fit, or a rank has failed.
pub fn all_to_all(comm: &Arc<dyn Comm>, x: &Tensor) -> Result<Tensor> {
    if x.dims().first() != Some(&comm.world_size()) {
        return Err(Error::shape("all-to-all", format!("[{}, ..]", comm.world_size()), x.dims()));
    }
    apply_one(Exchange::AllToAll(comm.clone()), &[x])
}

/// What all ranks give, `[N, ..]` of x `[..]`, on each of them. All make the same of it, of which each has its share in the loss once:
/// the gradient of x is this rank's part alone.
///
/// # Errors
/// When the sizes do not fit, or a rank has failed.
pub fn all_gather(comm: &Arc<dyn Comm>, x: &Tensor) -> Result<Tensor> {
    apply_one(Exchange::AllGather(comm.clone()), &[x])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Threads;
    use crate::{DType, Device, Philox, Tape};

    /// The sum over ranks of squares of what each has, weighted by the place it came to: its gradient by differences of f64.
    #[test]
    fn gradients_go_back_to_the_rank_they_belong_to() -> Result<()> {
        let (world, cpu) = (3, Device::cpu());
        let part = |rank: usize| Philox::new(rank as u64).normal(&[world, 2], &cpu)?.to_dtype(DType::F64);
        let weight = |rank: usize| Philox::new(10 + rank as u64).normal(&[world, 2], &cpu)?.to_dtype(DType::F64);
        // On one host: rank r has row r of each part.
        let whole = |parts: &[Vec<f64>]| -> Result<f64> {
            let mut sum = 0.0;
            for rank in 0..world {
                let weights = weight(rank)?.to_vec::<f64>()?;
                for (from, values) in parts.iter().enumerate() {
                    for i in 0..2 {
                        sum += weights[2 * from + i] * values[2 * rank + i].powi(2);
                    }
                }
            }
            Ok(sum)
        };
        let gradients = Threads::run(world, &cpu, |comm| {
            let tape = Tape::new();
            let x = tape.leaf(&part(comm.rank())?);
            let exchanged = all_to_all(&comm, &x)?;
            let loss = exchanged.square()?.mul(&weight(comm.rank())?)?.sum_all()?;
            tape.backward(&loss)?.of(&x).map(|g| g.to_vec::<f64>()).transpose()
        });
        let parts = (0..world).map(|rank| part(rank)?.to_vec()).collect::<Result<Vec<Vec<f64>>>>()?;
        for (rank, gradient) in gradients.into_iter().enumerate() {
            let gradient = gradient?.unwrap();
            for (i, gradient) in gradient.into_iter().enumerate() {
                let moved = |by: f64| {
                    let mut parts = parts.clone();
                    parts[rank][i] += by;
                    whole(&parts)
                };
                let expected = (moved(1e-6)? - moved(-1e-6)?) / 2e-6;
                assert!((gradient - expected).abs() < 1e-7, "{rank} {i}: {gradient} {expected}");
            }
        }
        // What all make of all: each gets the gradient of its own part, once.
        let gathered = Threads::run(world, &cpu, |comm| {
            let tape = Tape::new();
            let x = tape.leaf(&part(comm.rank())?);
            let all = all_gather(&comm, &x)?;
            assert_eq!(all.dims(), [world, world, 2]);
            let loss = all.square()?.sum_all()?;
            tape.backward(&loss)?.of(&x).map(|g| g.to_vec::<f64>()).transpose()
        });
        for (gradient, values) in gathered.into_iter().zip(&parts) {
            assert_eq!(gradient?.unwrap(), values.iter().map(|x| 2.0 * x).collect::<Vec<_>>());
        }
        Ok(())
    }
}
