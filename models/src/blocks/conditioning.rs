//! What adapters do to the tensors of a batch.

use flowtape_engine::{DType, Result, Tensor};

/// A tensor of the batch with a batch axis, which a single sample may lack, in the compute dtype.
///
/// # Errors
/// When the device fails.
pub fn with_batch_axis(tensor: &Tensor, rank: usize, dtype: DType) -> Result<Tensor> {
    let tensor = if tensor.rank() + 1 == rank { tensor.unsqueeze(0)? } else { tensor.clone() };
    tensor.to_dtype(dtype)
}
