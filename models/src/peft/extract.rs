//! A LoRA of what tells two checkpoints of one model apart.

use std::collections::BTreeMap;

use flowtape_engine::nn::{AdapterSpec, Params, Placement};
use flowtape_engine::{DType, Device, Error as EngineError, Philox, Tensor};

use super::{AdapterWeights, ModuleAdapter};
use crate::Result;

/// Columns that are looked at beyond the rank, and how often the difference is applied to them: what Halko, Martinsson and Tropp
/// (2011) find enough.
const OVERSAMPLING: usize = 8;
const POWER_STEPS: usize = 4;

/// What was found.
#[derive(Clone, Debug)]
pub struct Extracted {
    /// The adapters of the layers that differ.
    pub weights: AdapterWeights,
    /// The share of the difference's squares that they hold, by layer.
    pub kept: BTreeMap<String, f64>,
    /// Parameters that differ and are no linear layers' weights: no adapter can hold them.
    pub left_out: Vec<String>,
}

/// The best adapters of a rank: for each linear layer whose weights differ, the greatest singular values of the difference.
///
/// # Errors
/// When the two are not of one model, or hold values that are not finite.
pub fn extract(base: &Params, tuned: &Params, rank: usize) -> Result<Extracted> {
    let mut found = Extracted { weights: AdapterWeights::default(), kept: BTreeMap::new(), left_out: Vec::new() };
    for param in base.base().iter() {
        let path = param.path();
        let other =
            || EngineError::argument("extract", format!("two checkpoints of one model, both with {path}"), "one");
        let other = tuned.get(path).filter(|p| p.dims() == param.dims()).ok_or_else(other)?;
        let wide = |t: Tensor| t.to_device(&Device::cpu())?.to_dtype(DType::F32);
        let difference = wide(other.kept()?)?.sub(&wide(param.kept()?)?)?;
        let squares = difference.square()?.sum_all()?.item()?;
        if squares == 0.0 {
            continue;
        }
        if !squares.is_finite() {
            return Err(EngineError::NonFinite { op: "extract", what: format!("a difference of {path}") }.into());
        }
        let module = path.strip_suffix(".weight").filter(|module| base.linears().iter().any(|m| m == module));
        let Some(module) = module else {
            found.left_out.push(path.to_owned());
            continue;
        };
        let (a, b, held) = low_rank(&difference, rank)?;
        found.kept.insert(module.to_owned(), held / squares);
        let dim = a.dim(0)?;
        let parts = [("lora_A.weight".to_owned(), a), ("lora_B.weight".to_owned(), b)].into();
        let spec = AdapterSpec::lora(dim, dim as f64, Placement::frozen(DType::F32));
        found.weights.0.insert(module.to_owned(), ModuleAdapter { spec, parts });
    }
    Ok(found)
}

/// `A` `[rank, in]` and `B` `[out, rank]` whose product is nearest to a matrix, and the squares that it holds.
fn low_rank(matrix: &Tensor, rank: usize) -> Result<(Tensor, Tensor, f64)> {
    let (rows, columns) = (matrix.dim(0)?, matrix.dim(1)?);
    let rank = rank.min(rows).min(columns);
    let looked_at = (rank + OVERSAMPLING).min(rows).min(columns);
    let mut basis = matrix.matmul(&Philox::new(0).normal(&[columns, looked_at], &Device::cpu())?)?;
    for _ in 0..POWER_STEPS {
        basis = matrix.matmul(&orthonormal(&matrix.t()?.matmul(&orthonormal(&basis)?)?)?)?;
    }
    let basis = orthonormal(&basis)?;
    let small = basis.t()?.matmul(matrix)?;
    // The singular vectors within the basis are the eigenvectors of a small symmetric matrix.
    let (values, vectors) = eigen(&small.matmul(&small.t()?)?.to_vec::<f64>()?, looked_at);
    let mut order: Vec<usize> = (0..looked_at).collect();
    order.sort_by(|i, j| values[*j].total_cmp(&values[*i]));
    order.truncate(rank);
    // Each factor has the root of the singular values; those that are rounding alone stay small.
    let floor = values.iter().fold(f64::MIN_POSITIVE, |most, v| most.max(1e-16 * v));
    let chosen = |power: f64| -> Result<Tensor> {
        let mut chosen = vec![0f32; looked_at * rank];
        for (to, from) in order.iter().enumerate() {
            let scale = values[*from].max(floor).powf(power);
            for row in 0..looked_at {
                chosen[row * rank + to] = (vectors[row * looked_at + from] * scale) as f32;
            }
        }
        Ok(Tensor::from_vec(chosen, &[looked_at, rank], &Device::cpu())?)
    };
    let held = order.iter().map(|i| values[*i].max(0.0)).sum();
    let b = basis.matmul(&chosen(0.25)?)?;
    let a = chosen(-0.25)?.t()?.matmul(&small)?;
    Ok((a, b, held))
}

/// The columns of a matrix made orthonormal (Gram and Schmidt, twice, in f64); those that depend on others become zero.
fn orthonormal(matrix: &Tensor) -> Result<Tensor> {
    let (rows, columns) = (matrix.dim(0)?, matrix.dim(1)?);
    let values = matrix.to_vec::<f64>()?;
    let mut all: Vec<Vec<f64>> = (0..columns).map(|c| (0..rows).map(|r| values[r * columns + c]).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    for c in 0..columns {
        let (done, rest) = all.split_at_mut(c);
        let own = &mut rest[0];
        let before = dot(own, own).sqrt();
        for _ in 0..2 {
            for other in done.iter() {
                let along = dot(own, other);
                own.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let length = dot(own, own).sqrt();
        let factor = if length > 1e-10 * before { 1.0 / length } else { 0.0 };
        own.iter_mut().for_each(|x| *x *= factor);
    }
    let flat = (0..rows * columns).map(|i| all[i % columns][i / columns] as f32).collect();
    Ok(Tensor::from_vec(flat, &[rows, columns], &Device::cpu())?)
}

/// Eigenvalues and eigenvectors (columns) of a symmetric matrix of `n` rows, by Jacobi's rotations.
fn eigen(matrix: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut a = matrix.to_vec();
    let mut vectors: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
    let scale: f64 = a.iter().map(|v| v * v).sum();
    for _ in 0..60 {
        let off: f64 = (0..n * n).filter(|i| i % (n + 1) != 0).map(|i| a[i] * a[i]).sum();
        if off <= 1e-24 * scale {
            break;
        }
        for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
            if a[p * n + q] == 0.0 {
                continue;
            }
            let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * a[p * n + q]);
            // A root in place of hypot, which programs for glibc before 2.35 do not find.
            let length = |x: f64| (x * x + 1.0).sqrt();
            let t = theta.signum() / (theta.abs() + length(theta));
            let cos = 1.0 / length(t);
            let sin = t * cos;
            let rotate = |m: &mut [f64], i: usize, j: usize| {
                let (x, y) = (m[i], m[j]);
                (m[i], m[j]) = (cos * x - sin * y, sin * x + cos * y);
            };
            (0..n).for_each(|k| rotate(&mut a, k * n + p, k * n + q));
            (0..n).for_each(|k| rotate(&mut a, p * n + k, q * n + k));
            (0..n).for_each(|k| rotate(&mut vectors, k * n + p, k * n + q));
        }
    }
    ((0..n).map(|i| a[i * (n + 1)]).collect(), vectors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_of_the_rank_is_found_whole_and_the_rest_in_its_order() {
        let cpu = Device::cpu();
        let mut random = Philox::new(4);
        let [left, right] = [[30, 5], [5, 20]].map(|dims| random.normal(&dims, &cpu).unwrap());
        let matrix = left.matmul(&right).unwrap();
        let largest = |t: &Tensor| t.to_vec::<f64>().unwrap().into_iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        let squares = matrix.square().unwrap().sum_all().unwrap().item().unwrap();
        let (a, b, held) = low_rank(&matrix, 5).unwrap();
        assert!(largest(&b.matmul(&a).unwrap().sub(&matrix).unwrap()) < 1e-4 * largest(&matrix));
        assert!((held / squares - 1.0).abs() < 1e-5);
        // A rank too many adds nothing but zeros, and one too few leaves the least away.
        let (a, b, held) = low_rank(&matrix, 9).unwrap();
        assert!(
            largest(&b.matmul(&a).unwrap().sub(&matrix).unwrap()) < 1e-4 * largest(&matrix) && held / squares < 1.001
        );
        let (a, b, held) = low_rank(&matrix, 4).unwrap();
        let rest = matrix.sub(&b.matmul(&a).unwrap()).unwrap().square().unwrap().sum_all().unwrap().item().unwrap();
        assert!((held + rest - squares).abs() < 1e-4 * squares && rest > 0.0, "{held} {rest} {squares}");
    }

    #[test]
    fn eigenvalues_of_a_known_matrix() {
        let (values, vectors) = eigen(&[2.0, 1.0, 1.0, 2.0], 2);
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        assert!((sorted[0] - 1.0).abs() < 1e-12 && (sorted[1] - 3.0).abs() < 1e-12);
        let of_largest = usize::from(values[1] > values[0]);
        assert!((vectors[of_largest].abs() - 0.5f64.sqrt()).abs() < 1e-12);
    }
}
