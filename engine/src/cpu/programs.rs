//! Programs that the CPU runs with a kernel of its own: the same values, faster than step by step.

use std::sync::LazyLock;

use super::isa::Isa;
use super::{View, adamw};
use crate::expr::Program;
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
