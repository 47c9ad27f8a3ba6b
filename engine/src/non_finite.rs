//! Where numbers stop being finite: a backend that looks at what each call of another writes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::call::{Call, Checked, Gather, MatMul, Pointwise, PointwiseEach, Reduction, ScatterAdd};
use crate::backend::{Backend, Decorator, Fused, Ran};
use crate::ops::pointwise::map;
use crate::profile::operands;
use crate::{DType, Device, Result, Tensor};

/// The first operation that wrote a number which is not finite. Negative infinity is no such, since masks are made of it. Clones share
/// it.
#[derive(Clone, Debug, Default)]
pub struct FirstNonFinite(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    found: Mutex<Option<String>>,
    /// Looking runs operations too.
    looking: AtomicBool,
}

impl FirstNonFinite {
    /// A device that does what `device` does, and waits after each operation to look at what it wrote.
    pub fn device(&self, device: &Device) -> Device {
        Device::new(Watched { inner: device.clone(), first: self.clone() })
    }

    /// The operation with its operands' sizes and dtype, such as `matmul 4x16x64 f32`; none where all was finite so far.
    pub fn found(&self) -> Option<String> {
        self.0.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets what was found.
    pub fn reset(&self) {
        *self.0.found.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Looks at what a call wrote, unless something was found already.
    fn look<'a>(&self, name: &str, call: &impl Call<'a>) -> Result<()> {
        if self.found().is_some() || self.0.looking.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let mut bad = Ok(false);
        for tensor in call.writes() {
            bad = is_bad(tensor);
            if !matches!(bad, Ok(false)) {
                break;
            }
        }
        self.0.looking.store(false, Ordering::Release);
        if bad? {
            let what = format!("{name} {}", operands(call));
            self.0.found.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
        }
        Ok(())
    }
}

/// Whether a tensor holds NaN or positive infinity. Waits for the device.
///
/// # Errors
/// When the device fails.
pub fn is_bad(tensor: &Tensor) -> Result<bool> {
    if !tensor.dtype().is_float() || tensor.numel() == 0 {
        return Ok(false);
    }
    let wide = if tensor.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Ok(map(wide, [&tensor.detach()], |[x]| x.select_lt(f64::INFINITY, 0.0, 1.0))?.sum_all()?.item()? > 0.0)
}

#[derive(Debug)]
struct Watched {
    inner: Device,
    first: FirstNonFinite,
}

impl Watched {
    fn run<'a, C: Call<'a> + Clone, R>(
        &self,
        call: Checked<C>,
        work: impl FnOnce(&dyn Backend, Checked<C>) -> Result<R>,
    ) -> Result<R> {
        let seen = (*call).clone();
        let result = work(self.inner(), call)?;
        self.first.look(seen.name(), &seen)?;
        Ok(result)
    }
}

impl Decorator for Watched {
    fn inner(&self) -> &dyn Backend {
        self.inner.backend()
    }

    fn pointwise(&self, call: Checked<Pointwise<'_>>) -> Result<()> {
        self.run(call, |backend, call| backend.pointwise(call))
    }

    fn pointwise_each(&self, call: Checked<PointwiseEach<'_>>) -> Result<()> {
        self.run(call, |backend, call| backend.pointwise_each(call))
    }

    fn reduce(&self, call: Checked<Reduction<'_>>) -> Result<()> {
        self.run(call, |backend, call| backend.reduce(call))
    }

    fn matmul(&self, call: Checked<MatMul<'_>>) -> Result<()> {
        self.run(call, |backend, call| backend.matmul(call))
    }

    fn gather(&self, call: Checked<Gather<'_>>) -> Result<()> {
        self.run(call, |backend, call| backend.gather(call))
    }

    fn scatter_add(&self, call: Checked<ScatterAdd<'_>>) -> Result<()> {
        self.run(call, |backend, call| backend.scatter_add(call))
    }

    fn fused(&self, call: Checked<Fused<'_>>) -> Result<Ran> {
        let seen = *call;
        let ran = self.inner().fused(call)?;
        if ran == Ran::Done {
            self.first.look(seen.name(), &seen)?;
        }
        Ok(ran)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_operation_is_named_and_masks_are_none() -> Result<()> {
        let first = FirstNonFinite::default();
        let device = first.device(&Device::cpu());
        let x = Tensor::from_vec(vec![1f32, -2.0, 0.5, f32::NEG_INFINITY], &[2, 2], &device)?;
        let y = x.mul_scalar(2.0)?.add(&x)?;
        assert_eq!(first.found(), None);
        // The root of a negative number, then a product that hands it on.
        let root = y.narrow(0, 0, 1)?.sqrt()?;
        root.matmul(&root.t()?)?;
        let found = first.found().unwrap();
        assert!(found.starts_with("pointwise") && found.contains("f32"), "{found}");
        assert!(is_bad(&root)? && !is_bad(&y)?);
        Ok(())
    }
}
