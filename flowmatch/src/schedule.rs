//! The path from data to noise.

use flowtape_engine::Tensor;

use crate::{Error, Result};

/// The straight path of flow matching (Lipman et al. 2023; Liu et al. 2023): `x_t = (1 - σ) x_0 + σ x_1`.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinearInterpolationSchedule;

impl LinearInterpolationSchedule {
    /// The point at `sigma` between clean latents `x0` and noise `x1`, both `[B, …]`; `sigma` is `[B]` in `[0, 1]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(self, x0: &Tensor, x1: &Tensor, sigma: &Tensor) -> Result<Tensor> {
        if x0.dims() != x1.dims() {
            return Err(Error::batch(format!("noise of shape {:?}", x0.dims()), format!("{:?}", x1.dims())));
        }
        let sigma = per_sample(sigma, x0)?;
        let keep = sigma.neg()?.add_scalar(1.0)?;
        Ok(keep.mul(x0)?.add(&sigma.mul(x1)?)?)
    }

    /// The velocity along the path, the model's target: `x_1 - x_0`.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn velocity(self, x0: &Tensor, x1: &Tensor) -> Result<Tensor> {
        Ok(x1.sub(x0)?)
    }
}

/// A tensor `[B]` as `[B, 1, …]` with the rank of `like` `[B, …]`.
pub(crate) fn per_sample(values: &Tensor, like: &Tensor) -> Result<Tensor> {
    if values.rank() != 1 || like.dims().first() != Some(&values.numel()) {
        let expected = format!("one value per sample of {:?}", like.dims());
        return Err(Error::batch(expected, format!("{:?}", values.dims())));
    }
    let mut dims = vec![1; like.rank()];
    dims[0] = values.numel();
    Ok(values.reshape(&dims)?)
}

#[cfg(test)]
mod tests {
    use flowtape_engine::Device;

    use super::*;

    fn tensor(values: &[f32], dims: &[usize]) -> Tensor {
        Tensor::from_slice(values, dims, &Device::cpu()).unwrap()
    }

    #[test]
    fn ends_are_exact_and_each_sample_has_its_sigma() {
        let schedule = LinearInterpolationSchedule;
        for dims in [vec![3, 1, 1, 2], vec![3, 1, 1, 1, 2]] {
            let x0 = tensor(&[1.1, 2.3, 3.7, 4.1, 5.9, 6.3], &dims);
            let x1 = tensor(&[-1.3, 0.7, 0.3, -2.1, 1.7, 8.9], &dims);
            let got = schedule.forward(&x0, &x1, &tensor(&[0.0, 1.0, 0.25], &[3])).unwrap();
            assert_eq!(got.dims(), dims);
            let got = got.to_vec::<f32>().unwrap();
            assert_eq!(got[..4], [1.1, 2.3, 0.3, -2.1]);
            assert!((got[4] - (0.75 * 5.9 + 0.25 * 1.7)).abs() < 1e-6);
            assert!((got[5] - (0.75 * 6.3 + 0.25 * 8.9)).abs() < 1e-6);
            let v = schedule.velocity(&x0, &x1).unwrap().to_vec::<f32>().unwrap();
            assert!((v[0] + 2.4).abs() < 1e-6);
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (a, b) = (tensor(&[0.0; 4], &[2, 2]), tensor(&[0.0; 4], &[2, 2]));
        let error = LinearInterpolationSchedule.forward(&a, &b, &tensor(&[0.5], &[1])).unwrap_err().to_string();
        assert!(error.contains("one value per sample of [2, 2]") && error.contains("[1]"), "{error}");
        let error = LinearInterpolationSchedule.forward(&a, &tensor(&[0.0; 2], &[2]), &tensor(&[0.5; 2], &[2]));
        assert!(error.unwrap_err().to_string().contains("[2, 2]"));
    }
}
