//! The sink that exchanges gradients with other ranks.

use std::collections::HashMap;

use super::StepSink;
use super::ranks::{Bucket, Ranks};
use crate::comm::Work;
use crate::nn::Params;
use crate::{DType, Error, GradientSink, Result, Tensor, VarId};

/// Adds up the gradients of all ranks, in f32 (f64 for f64) and in the order of the ranks, and hands on the sums: all of them on each
/// rank, or those of the parameters that the rank updates.
///
/// Gradients travel in buckets. One leaves as soon as its gradients are final, while backward goes on, and is handed on when the next
/// one has left. Buckets leave in one order on all ranks, whatever order their gradients have. A parameter that some ranks have no
/// gradient of gets the sum of the others'; one that no rank reached gets none, as on one rank.
#[derive(Debug)]
pub struct Reduce<'a, S> {
    next: S,
    ranks: &'a Ranks,
    params: &'a Params,
    buckets: Vec<Bucket<'a>>,
    /// Of each bucket, what is under way.
    state: Vec<State>,
    /// Bucket and member of each parameter.
    places: HashMap<VarId, (usize, usize)>,
    /// Buckets that have left, and those that were handed on.
    left: usize,
    handed_on: usize,
}

#[derive(Debug, Default)]
struct State {
    buffer: Option<Tensor>,
    /// Which members' gradients came.
    came: Vec<bool>,
    /// What this rank has of the sums, when the work is done.
    sums: Option<(Tensor, Box<dyn Work>)>,
}

impl<'a, S: StepSink> Reduce<'a, S> {
    /// The sums over all ranks go to `next`.
    pub fn new(ranks: &'a Ranks, params: &'a Params, next: S) -> Self {
        let buckets = ranks.buckets(params, |param| param.dtype().promote(DType::F32));
        let state = buckets.iter().map(|_| State::default()).collect();
        let mut places = HashMap::new();
        for (b, bucket) in buckets.iter().enumerate() {
            let vars = bucket.members.iter().enumerate().filter_map(|(m, member)| Some((member.param.var()?, (b, m))));
            places.extend(vars);
        }
        Self { next, ranks, params, buckets, state, places, left: 0, handed_on: 0 }
    }

    /// The memory of a bucket.
    fn buffer(&mut self, b: usize) -> Result<Tensor> {
        let (bucket, state) = (&self.buckets[b], &mut self.state[b]);
        if state.buffer.is_none() {
            let device =
                bucket.members.first().map_or_else(|| self.ranks.comm().device(), |m| m.param.device().clone());
            state.came = vec![false; bucket.members.len()];
            return Ok(state.buffer.insert(bucket.buffer(&device)?).clone());
        }
        state.buffer.clone().ok_or_else(|| Error::argument("reduce", "memory of a bucket", "none"))
    }

    /// Sends the next bucket.
    fn leave(&mut self) -> Result<()> {
        let b = self.left;
        let buffer = self.buffer(b)?;
        let (bucket, state) = (&self.buckets[b], &mut self.state[b]);
        bucket.flag(&buffer, &state.came)?;
        for (member, _) in bucket.members.iter().zip(&state.came).filter(|(_, came)| !**came) {
            let zeros = Tensor::zeros(member.param.dims(), bucket.dtype, buffer.device())?;
            bucket.view(&buffer, member).copy_from(&zeros)?;
        }
        state.buffer = None;
        state.sums = Some(self.ranks.sum(bucket, buffer)?);
        self.left += 1;
        Ok(())
    }

    /// Waits for a bucket, and gives its sums to the next sink.
    fn hand_on(&mut self) -> Result<()> {
        let (bucket, state) = (&self.buckets[self.handed_on], std::mem::take(&mut self.state[self.handed_on]));
        self.handed_on += 1;
        let Some((sums, work)) = state.sums else { return Ok(()) };
        work.wait()?;
        let members = bucket.members.iter().zip(state.came).filter(|(member, _)| self.ranks.updates(member.param));
        let (own, came): (Vec<_>, Vec<_>) = members.unzip();
        let Some(first) = own.first() else { return Ok(()) };
        let has_data = sums.device().backend().has_data();
        let reached = if has_data { bucket.flagged(&sums, first.part)? } else { came };
        for (member, reached) in own.into_iter().zip(reached) {
            if let Some(var) = member.param.var().filter(|_| reached) {
                self.next.gradient(var, member.value(&sums))?;
            }
        }
        Ok(())
    }
}

impl<S: StepSink> GradientSink for Reduce<'_, S> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        let Some(&(b, m)) = self.places.get(&var) else { return Ok(()) };
        let buffer = self.buffer(b)?;
        let bucket = &self.buckets[b];
        bucket.view(&buffer, &bucket.members[m]).copy_from(&gradient)?;
        drop(gradient);
        self.state[b].came[m] = true;
        let is_full = |state: &State| !state.came.is_empty() && state.came.iter().all(|came| *came);
        while self.state.get(self.left).is_some_and(is_full) {
            self.leave()?;
            while self.handed_on + 1 < self.left {
                self.hand_on()?;
            }
        }
        Ok(())
    }
}

impl<S: StepSink> StepSink for Reduce<'_, S> {
    fn end(&mut self) -> Result<Option<Tensor>> {
        while self.left < self.buckets.len() {
            self.leave()?;
        }
        while self.handed_on < self.buckets.len() {
            self.hand_on()?;
        }
        (self.left, self.handed_on) = (0, 0);
        let norm = self.next.end()?;
        if norm.is_some() {
            self.ranks.gather(self.params)?;
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Comm, Threads};
    use crate::nn::{Init, Param, ParamBuilder, Placement};
    use crate::optim::{AdamW, Muon, Optimizer, OptimizerStep, Rates, Rule, StepConfig};
    use crate::{Device, Philox, Tape};
    use std::sync::Arc;

    const RATES: Rates = Rates { lr: 1e-2, weight_decay: 0.1 };

    fn model(dtype: DType, master: DType) -> Result<Params> {
        let builder = ParamBuilder::with_plan(1, Placement::trained(dtype).with_master(master), &Device::cpu());
        let normal = Init::Normal { std: 1.0 };
        // The first is larger than a bucket, the last one has no gradient.
        for (name, dims) in [("a", &[40, 5][..]), ("b", &[3, 2]), ("c", &[7]), ("d", &[]), ("none", &[2])] {
            builder.get(name, dims, normal)?;
        }
        Ok(builder.params())
    }

    /// A loss whose gradients are normal numbers; that of every third micro-batch has none of `b`.
    fn loss(params: &Params, tape: &Tape, part: u64) -> Result<Tensor> {
        let (cpu, mut random) = (Device::cpu(), Philox::new(part));
        let mut total = tape.attach(&Tensor::zeros(&[], DType::F32, &cpu)?);
        for p in params.iter().filter(|p| p.path() != "none" && (p.path() != "b" || part % 3 != 1)) {
            let x = random.normal(p.dims(), &cpu)?.to_dtype(p.dtype())?;
            total = total.add(&tape.attach(&x).mul(&p.value()?)?.to_dtype(DType::F32)?.sum_all()?)?;
        }
        Ok(total)
    }

    /// Three steps of all micro-batches on one rank, or of one on each: the norms, and each parameter as its owner keeps it and as all
    /// compute with it.
    #[expect(clippy::type_complexity)]
    fn train(
        rule: impl Rule + 'static,
        (dtype, master): (DType, DType),
        max_norm: Option<f64>,
        parts: u64,
        ranks: Option<(&Arc<dyn Comm>, bool)>,
    ) -> Result<(Vec<f64>, Vec<Option<Vec<f64>>>, Vec<Vec<f64>>)> {
        let params = model(dtype, master)?;
        let ranks = ranks.map(|(comm, sharded)| {
            let ranks =
                if sharded { Ranks::sharded(comm.clone(), &params, 1)? } else { Ranks::replicated(comm.clone()) };
            Ok::<_, Error>(ranks.with_bucket_bytes(256))
        });
        let ranks = ranks.transpose()?;
        let mut optimizer = Optimizer::new(rule);
        let (first, own) = match &ranks {
            Some(ranks) => (ranks.comm().rank() as u64, 1),
            None => (0, parts),
        };
        let config = StepConfig { micro_batches: own as usize, max_norm, skip_non_finite: false };
        let mut norms = Vec::new();
        for step in 0..3 {
            let mut sinks = OptimizerStep::on_ranks(config, RATES, &mut optimizer, &params, None, ranks.as_ref())?;
            for part in 0..own {
                let tape = Tape::new();
                let loss = loss(&params, &tape, step * parts + first + part)?;
                norms.extend(sinks.backward(&tape, &loss, &["b".into(), "none".into()])?);
            }
        }
        let kept = |p: &Param| -> Result<_> {
            if ranks.as_ref().is_none_or(|ranks| ranks.updates(p)) { Ok(Some(p.kept()?.to_vec()?)) } else { Ok(None) }
        };
        let norms = norms.iter().map(Tensor::item).collect::<Result<_>>()?;
        let kept = params.iter().map(kept).collect::<Result<_>>()?;
        Ok((norms, kept, params.iter().map(|p| p.value()?.to_vec()).collect::<Result<_>>()?))
    }

    #[test]
    fn ranks_step_as_one_with_their_micro_batches() -> Result<()> {
        fn check<R: Rule + Default + 'static>() -> Result<()> {
            for dtypes in [
                (DType::F32, DType::F32),
                (DType::BF16, DType::F32),
                (DType::BF16, DType::BF16),
                (DType::F64, DType::F64),
            ] {
                for max_norm in [None, Some(0.5)] {
                    for world in [2, 3, 6] {
                        let (norms, kept, values) = train(R::default(), dtypes, max_norm, world as u64, None)?;
                        for sharded in [false, true] {
                            let all = Threads::run(world, &Device::cpu(), |comm| {
                                train(R::default(), dtypes, max_norm, world as u64, Some((&comm, sharded)))
                            });
                            let mut owned = vec![0; kept.len()];
                            for (rank, done) in all.into_iter().enumerate() {
                                let what =
                                    format!("{dtypes:?}, {max_norm:?}, rank {rank} of {world}, sharded {sharded}");
                                let (own_norms, own, own_values) = done?;
                                // The sum of squares has one place more where ranks share out the parameters.
                                let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-12 * b;
                                assert!(
                                    own_norms.len() == 3 && own_norms.iter().zip(&norms).all(near),
                                    "{what}: {own_norms:?} {norms:?}"
                                );
                                assert_eq!(own_values, values, "{what}");
                                for (i, own) in own.iter().enumerate().filter_map(|(i, own)| Some((i, own.as_ref()?))) {
                                    assert_eq!(own, kept[i].as_ref().unwrap(), "{what}");
                                    owned[i] += 1;
                                }
                            }
                            assert!(owned.iter().all(|n| *n == if sharded { 1 } else { world }), "{owned:?}");
                        }
                    }
                }
            }
            Ok(())
        }
        check::<AdamW>()?;
        check::<Muon>()
    }
}
