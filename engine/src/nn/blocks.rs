//! The blocks of a model, one after the other.

use std::sync::Arc;

use super::ParamBuilder;
use crate::{Error, Result, Tensor, checkpoint};

/// Blocks of one kind and the loop over them: the one place where what concerns a block as a whole happens.
#[derive(Clone, Debug)]
pub struct Blocks<B> {
    items: Vec<Arc<B>>,
    checkpointing: bool,
}

impl<B: Send + Sync + 'static> Blocks<B> {
    /// `count` blocks, each made from its number and under it: what they hold are units of parameters, which ranks may share out
    /// ([`Units`](super::Units)).
    ///
    /// # Errors
    /// Those of `make`.
    pub fn new<E>(
        params: &ParamBuilder,
        count: usize,
        mut make: impl FnMut(&ParamBuilder, usize) -> Result<B, E>,
    ) -> Result<Self, E> {
        let block = |i| make(&params.sub(i).block(), i).map(Arc::new);
        let items = (0..count).map(block).collect::<Result<_, E>>()?;
        Ok(Self { items, checkpointing: false })
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The blocks.
    pub fn iter(&self) -> impl Iterator<Item = &B> {
        self.items.iter().map(|block| &**block)
    }

    /// Whether each block keeps its inputs alone and runs again in backward: less memory for a second forward. The gradients
    /// are the same, bit for bit.
    pub fn set_checkpointing(&mut self, on: bool) {
        self.checkpointing = on;
    }

    /// Runs all blocks: `state` goes from one to the next, `shared` is the same for all. Every tensor that needs a gradient
    /// must be among these or a parameter.
    ///
    /// # Errors
    /// Those of a block.
    pub fn run<const N: usize, const M: usize>(
        &self,
        mut state: [Tensor; N],
        shared: [&Tensor; M],
        step: impl Fn(&B, [&Tensor; N], [&Tensor; M]) -> Result<[Tensor; N]> + Send + Sync + 'static,
    ) -> Result<[Tensor; N]> {
        let step = Arc::new(step);
        for block in &self.items {
            if !self.checkpointing {
                state = step(block, state.each_ref(), shared)?;
                continue;
            }
            let (block, step) = (block.clone(), step.clone());
            let inputs: Vec<&Tensor> = state.iter().chain(shared).collect();
            let outputs = checkpoint(&inputs, move |xs| {
                let (state, shared) = (std::array::from_fn(|i| &xs[i]), std::array::from_fn(|i| &xs[N + i]));
                Ok(step(&block, state, shared)?.to_vec())
            })?;
            let count = |all: Vec<Tensor>| Error::argument("checkpoint", format!("{N} outputs"), all.len());
            state = outputs.try_into().map_err(count)?;
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Linear, ParamBuilder};
    use crate::{DType, Device, Philox, Tape};

    #[test]
    fn checkpointed_blocks_give_the_same_bits() -> Result<()> {
        let cpu = Device::cpu();
        let run = |checkpointing: bool| -> Result<Vec<Vec<f32>>> {
            let root = ParamBuilder::new(1, DType::F32, &cpu);
            let mut blocks = Blocks::new(&root.sub("blocks"), 3, |params, _| Linear::new(params, 4, 4, true))?;
            blocks.set_checkpointing(checkpointing);
            assert_eq!((blocks.len(), blocks.iter().count(), blocks.is_empty()), (3, 3, false));
            let tape = Tape::new();
            let mut random = Philox::new(2);
            let (x, y) = (tape.leaf(&random.normal(&[2, 4], &cpu)?), tape.leaf(&random.normal(&[2, 4], &cpu)?));
            let shared = tape.leaf(&random.normal(&[1, 4], &cpu)?);
            let [a, b] = blocks.run([x.clone(), y.clone()], [&shared], |block, [a, b], [shared]| {
                Ok([block.forward(b)?.mul(shared)?, a.add(b)?])
            })?;
            let gradients = tape.backward(&a.mul(&b)?.sum_all()?)?;
            let params = root.params();
            let leaves = [&x, &y, &shared].into_iter().map(|t| gradients.of(t));
            let all = leaves.chain(params.iter().map(|p| gradients.of(p))).map(|g| g.unwrap().to_vec());
            all.collect()
        };
        assert_eq!(run(true)?, run(false)?);
        Ok(())
    }
}
