//! Programs that the CPU runs with a kernel of its own: the same values, faster than step by step.

use std::sync::LazyLock;

use super::isa::Isa;
use super::{View, adamw};
use crate::expr::{Function, Program};
use crate::optim::{AdamW, functions};

/// Runs a program on inputs, scalars and outputs; `false`, and nothing is done, where it does not take such views.
///
/// # Safety
/// As for running the program.
type Kernel = unsafe fn(Isa, &[View<'_>], &[f64], &[View<'_>]) -> bool;

/// Kernels by the numbers of their programs.
static KERNELS: LazyLock<Vec<(u64, Kernel)>> = LazyLock::new(|| {
    let adamw = functions(&AdamW::default()).map(|function| (Program::of(&function).id(), adamw::adamw as Kernel));
    adamw.into()
});

/// The kernel of a program.
pub(super) fn kernel(program: &Program) -> Option<Kernel> {
    KERNELS.iter().find(|(id, _)| *id == program.id()).map(|(_, kernel)| *kernel)
}

/// Whether a program is the square of one number.
pub(super) fn is_square(program: &Program) -> bool {
    static SQUARE: LazyLock<u64> = LazyLock::new(|| Program::of(&Function::build(|[x]| [x.square()])).id());
    program.id() == *SQUARE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::pointwise::run_pointwise;
    use crate::optim::Sgd;
    use crate::{DType, Device, Result, Tensor};

    #[test]
    fn a_program_is_recognised_and_written_elsewhere_runs_step_by_step() -> Result<()> {
        let [plain, rounding] = functions(&AdamW::default());
        assert!(kernel(&Program::of(&plain)).is_some() && kernel(&Program::of(&rounding)).is_some());
        assert!(kernel(&Program::of(&functions(&Sgd::default())[0])).is_none());
        let scalars = [0.5, 0.99, 0.999, 0.01, 0.03, 1e-8, 0.1, 0.001];
        let run = |in_place: bool, rounded: Option<DType>| -> Result<Vec<Vec<f64>>> {
            let full = |value| Tensor::full(&[9], value, DType::F32, &Device::cpu());
            let inputs = [full(1.0)?, full(0.3)?, full(0.1)?, full(0.2)?];
            let mut outputs: Vec<Tensor> = [0, 2, 3].map(|i| inputs[i].clone()).into();
            if !in_place {
                outputs = outputs.iter().map(|_| full(0.0)).collect::<Result<_>>()?;
            }
            outputs.extend(rounded.map(|dtype| Tensor::zeros(&[9], dtype, &Device::cpu())).transpose()?);
            let function = if rounded.is_some() { &rounding } else { &plain };
            let (inputs, to): (Vec<_>, Vec<_>) = (inputs.iter().collect(), outputs.iter().collect());
            run_pointwise(function, &inputs, &scalars, &to)?;
            outputs.iter().map(Tensor::to_vec).collect()
        };
        for rounded in [None, Some(DType::F32), Some(DType::BF16), Some(DType::F16)] {
            for (a, b) in run(true, rounded)?.iter().flatten().zip(run(false, rounded)?.iter().flatten()) {
                assert!((a - b).abs() < 1e-6, "{rounded:?}: {a} and {b}");
            }
        }
        Ok(())
    }
}
