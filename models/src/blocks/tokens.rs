//! The tokens of a sample, of which each of several ranks may have a part: context parallelism.

use std::sync::Arc;

use flowtape_engine::comm::{Comm, all_gather, all_to_all};
use flowtape_engine::{Error, Result, Tensor};
use flowtape_flowmatch::ModelInputs;

use super::{RopeTables, attend};

/// One or more sequences that follow each other, whole or shared out among ranks: each has as many neighbours of every sequence, or
/// one more. Layers that look at one token alone need not know. In attention each rank has all tokens of some of the
/// heads instead (Jacobs et al. 2023, DeepSpeed-Ulysses).
///
/// What a model makes of its inputs before [`Tokens::part`] it makes on all ranks alike, and what follows [`Tokens::gather`] has no
/// parameters: so the gradient of each parameter is the sum of what the ranks have of it.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    lens: Vec<usize>,
    ranks: Option<Arc<dyn Comm>>,
}

impl Tokens {
    /// All on this rank.
    pub fn whole() -> Self {
        Self::default()
    }

    /// Sequences of these lengths, shared out among the ranks of the inputs, where there are such.
    ///
    /// # Errors
    /// When a rank would have none of a sequence.
    pub fn of(inputs: &ModelInputs, lens: &[usize]) -> Result<Self> {
        let ranks = inputs.token_ranks().filter(|ranks| !ranks.is_alone()).cloned();
        let tokens = Self { lens: lens.to_vec(), ranks };
        if let Some(ranks) = &tokens.ranks {
            let world = ranks.world_size();
            if let Some(len) = lens.iter().find(|&&len| len < world) {
                return Err(Error::argument("context parallelism", format!("tokens for each of {world} ranks"), len));
            }
        }
        Ok(tokens)
    }

    /// One of the sequences by itself.
    #[must_use]
    pub fn sequence(&self, i: usize) -> Self {
        Self { lens: self.lens.get(i).into_iter().copied().collect(), ranks: self.ranks.clone() }
    }

    /// This rank's tokens of x `[.., L, ..]`, with all sequences along an axis; one that stands for all tokens stays as it is.
    ///
    /// # Errors
    /// When the axis has another length.
    pub fn part(&self, x: &Tensor, axis: usize) -> Result<Tensor> {
        let Some(ranks) = self.ranks.as_ref().filter(|_| x.dims().get(axis) != Some(&1)) else { return Ok(x.clone()) };
        let mut parts = Vec::with_capacity(self.lens.len());
        for (sequence, &len) in x.split(&self.lens, axis)?.iter().zip(&self.lens) {
            let shares = shares(len, ranks.world_size());
            let before = shares[..ranks.rank()].iter().sum();
            parts.push(sequence.narrow(axis, before, shares[ranks.rank()])?);
        }
        chain(parts, axis)
    }

    /// The tables of this rank's tokens.
    ///
    /// # Errors
    /// When they are of another length.
    pub fn rope(&self, tables: &RopeTables) -> Result<RopeTables> {
        let part = |table: &Tensor| self.part(table, table.rank().saturating_sub(2));
        Ok(RopeTables { cos: part(&tables.cos)?, sin: part(&tables.sin)?, layout: tables.layout })
    }

    /// All tokens `[B, L, D]` of x, this rank's, on all ranks.
    ///
    /// # Errors
    /// When the shape does not fit, or a rank has failed.
    pub fn gather(&self, x: &Tensor) -> Result<Tensor> {
        let Some(ranks) = &self.ranks else { return Ok(x.clone()) };
        self.joined(&all_gather(ranks, &self.padded(ranks, x, 1)?)?, 2)?.squeeze(0)
    }

    /// Attention of these tokens to themselves; see [`attend`]. The mask is that of all tokens.
    ///
    /// # Errors
    /// When the shapes do not fit, there are heads that can't be shared out, or a rank has failed.
    pub fn attend(&self, qkv: [Tensor; 3], mask: Option<&Tensor>) -> Result<Tensor> {
        self.attend_to(self, qkv, mask)
    }

    /// The same of these tokens' queries to keys and values of others, which the same ranks share.
    ///
    /// # Errors
    /// When the shapes do not fit, there are heads that can't be shared out, or a rank has failed.
    pub fn attend_to(&self, others: &Self, [q, k, v]: [Tensor; 3], mask: Option<&Tensor>) -> Result<Tensor> {
        let Some(ranks) = &self.ranks else { return attend([q, k, v], mask) };
        let (world, heads) = (ranks.world_size(), q.dim(1)?);
        if !heads.is_multiple_of(world) {
            let expected = format!("a number of heads that {world} ranks can share out");
            return Err(Error::argument("context parallelism", expected, heads));
        }
        let [q, k, v] = [self.by_heads(ranks, &q)?, others.by_heads(ranks, &k)?, others.by_heads(ranks, &v)?];
        self.by_tokens(ranks, &attend([q, k, v], mask)?)
    }

    /// x `[B, H, L / N, D]` of this rank as `[B, H / N, L, D]`.
    fn by_heads(&self, ranks: &Arc<dyn Comm>, x: &Tensor) -> Result<Tensor> {
        let x = self.padded(ranks, x, 2)?;
        let [batch, heads, len, width] = *x.dims() else { return Err(Error::shape("attention", "4 axes", x.dims())) };
        let world = ranks.world_size();
        let parts = x.reshape(&[batch, world, heads / world, len, width])?.permute(&[1, 0, 2, 3, 4])?;
        self.joined(&all_to_all(ranks, &parts)?, 3)?.squeeze(0)
    }

    /// x `[B, L, H / N * D]` of this rank's heads as `[B, L / N, H * D]`.
    fn by_tokens(&self, ranks: &Arc<dyn Comm>, x: &Tensor) -> Result<Tensor> {
        let world = ranks.world_size();
        let mut sequences = Vec::with_capacity(self.lens.len());
        for (sequence, &len) in x.split(&self.lens, 1)?.iter().zip(&self.lens) {
            let parts = sequence.split(&shares(len, world), 1)?;
            let parts = parts.iter().map(|part| filled(part, 1, len.div_ceil(world)));
            sequences.push(Tensor::stack(&parts.collect::<Result<Vec<_>>>()?.iter().collect::<Vec<_>>(), 0)?);
        }
        let heads = all_to_all(ranks, &chain(sequences, 2)?)?.permute(&[1, 2, 0, 3])?.flatten(2, 3)?;
        // Without what fills up this rank's parts.
        let (mut own, mut at) = (Vec::with_capacity(self.lens.len()), 0);
        for &len in &self.lens {
            own.push(heads.narrow(1, at, shares(len, world)[ranks.rank()])?);
            at += len.div_ceil(world);
        }
        chain(own, 1)
    }

    /// This rank's tokens along an axis, each sequence filled up to the length of the longest part.
    fn padded(&self, ranks: &Arc<dyn Comm>, x: &Tensor, axis: usize) -> Result<Tensor> {
        let world = ranks.world_size();
        let own: Vec<usize> = self.lens.iter().map(|&len| shares(len, world)[ranks.rank()]).collect();
        let mut parts = x.split(&own, axis)?;
        for (part, len) in parts.iter_mut().zip(&self.lens) {
            *part = filled(part, axis, len.div_ceil(world))?;
        }
        chain(parts, axis)
    }

    /// The sequences of parts `[N, ..]` whose tokens lie along an axis, filled up: `[1, ..]`.
    fn joined(&self, parts: &Tensor, axis: usize) -> Result<Tensor> {
        let ranks = parts.chunk(parts.dim(0)?, 0)?;
        let (mut all, mut at) = (Vec::new(), 0);
        for &len in &self.lens {
            for (rank, share) in ranks.iter().zip(shares(len, ranks.len())) {
                all.push(rank.narrow(axis, at, share)?);
            }
            at += len.div_ceil(ranks.len());
        }
        chain(all, axis)
    }
}

/// How many tokens of a sequence each of so many ranks has.
fn shares(len: usize, world: usize) -> Vec<usize> {
    (0..world).map(|rank| len / world + usize::from(rank < len % world)).collect()
}

/// With zeros behind it up to a length.
fn filled(x: &Tensor, axis: usize, len: usize) -> Result<Tensor> {
    match len - x.dim(axis)? {
        0 => Ok(x.clone()),
        missing => x.pad(axis, 0, missing),
    }
}

/// Tensors one behind the other.
fn chain(parts: Vec<Tensor>, axis: usize) -> Result<Tensor> {
    match &parts[..] {
        [one] => Ok(one.clone()),
        _ => Tensor::cat(&parts.iter().collect::<Vec<_>>(), axis),
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::comm::Threads;
    use flowtape_engine::{DType, Device, Tape};

    use super::*;
    use crate::testing::normal;

    /// A text and latents that ranks share: numbers that they do and do not divide.
    const LENS: [usize; 2] = [5, 16];
    const HEADS: usize = 12;
    const WIDTH: usize = 4;

    fn tables(len: usize) -> Result<RopeTables> {
        let positions: Vec<f32> = (0..len).map(|i| i as f32).collect();
        RopeTables::new(&positions, &[WIDTH], 100.0, super::super::RopePrecision::F64, &Device::cpu())
    }

    /// Rotated attention over x `[B, L, H D]` as queries, keys and values, and the gradient of x from squares of all of it.
    fn attended(tokens: &Tokens, x: &Tensor, mask: &Tensor) -> Result<[Vec<f32>; 2]> {
        let tape = Tape::new();
        let leaf = tape.leaf(x);
        let own = tokens.part(&leaf, 1)?;
        let heads = super::super::split_heads(&own, HEADS)?.transpose(1, 2)?;
        let rotated = tokens.rope(&tables(x.dim(1)?)?)?.apply(&heads)?;
        let result = tokens.gather(&tokens.attend([rotated.clone(), rotated, heads], Some(mask))?)?;
        let gradient = tape.backward(&result.square()?.sum_all()?)?.of(&leaf).map(Tensor::to_vec);
        Ok([result.to_vec()?, gradient.transpose()?.unwrap_or_default()])
    }

    #[test]
    fn attention_among_ranks_is_that_of_one() {
        let cpu = Device::cpu();
        let len = LENS.iter().sum::<usize>();
        let x = normal(&[2, len, HEADS * WIDTH]);
        let marks: Vec<f32> = (0..2 * len).map(|i| if i % len == 3 { 0.0 } else { 1.0 }).collect();
        let mask = super::super::key_mask(&Tensor::from_vec(marks, &[2, len], &cpu).unwrap()).unwrap();
        let [expected, gradient] = attended(&Tokens::whole(), &x, &mask).unwrap();
        for world in [1, 2, 3, 4, 6] {
            let ranks = Threads::run(world, &cpu, |comm| {
                let inputs = ModelInputs::new().with(ModelInputs::TOKEN_RANKS, comm);
                Tokens::of(&inputs, &LENS).and_then(|tokens| attended(&tokens, &x, &mask))
            });
            if world > LENS[0] {
                // One would have none of the text.
                assert!(ranks.into_iter().all(|rank| rank.unwrap_err().to_string().contains("6 ranks, got 5")));
                continue;
            }
            let mut sum = vec![0f32; gradient.len()];
            for rank in ranks {
                let [result, gradient] = rank.unwrap();
                assert_eq!(result, expected, "{world} ranks");
                sum.iter_mut().zip(gradient).for_each(|(sum, part)| *sum += part);
            }
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * (1.0 + b.abs());
            assert!(sum.iter().zip(&gradient).all(near), "{world} ranks");
        }
    }

    #[test]
    fn heads_that_ranks_can_not_share_out_are_told() {
        let refused = Threads::run(5, &Device::cpu(), |comm| {
            let tokens = Tokens::of(&ModelInputs::new().with(ModelInputs::TOKEN_RANKS, comm), &[10])?;
            let own = Tensor::zeros(&[1, HEADS, 2, WIDTH], DType::F32, &Device::cpu())?;
            tokens.attend([own.clone(), own.clone(), own], None)
        });
        assert!(
            refused.into_iter().all(|rank| rank.unwrap_err().to_string().contains("5 ranks can share out, got 12"))
        );
    }
}
