//! Stands in for the build helper of `cust` and `cust_raw`.
//!
//! The original looks for a CUDA toolkit and panics where there is none. Flowtape needs no toolkit: the driver's
//! functions are defined by `flowtape-cuda-driver`, which loads the driver at run time.

/// Does nothing: no library is linked.
pub fn include_cuda() {}
