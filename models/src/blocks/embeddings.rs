//! Embeddings of time, guidance and pooled text.

use std::cell::RefCell;
use std::rc::Rc;

use flowtape_engine::nn::{ParamBuilder, TimestepEmbedding, TimestepProjection, timestep_embedding};
use flowtape_engine::{Error, Result, Tensor};

/// Channels of the sinusoidal projections.
pub(crate) const CHANNELS: usize = 256;

/// diffusers' `CombinedTimestepTextProjEmbeddings`, or `CombinedTimestepGuidanceTextProjEmbeddings` where there is a
/// guidance embedder: the sum of the embeddings of time, guidance and pooled text.
#[derive(Clone, Debug)]
pub struct CombinedTimestepTextProjEmbeddings {
    timestep_embedder: TimestepEmbedding,
    guidance_embedder: Option<TimestepEmbedding>,
    text_embedder: TimestepEmbedding,
}

/// What takes the place of a sinusoidal projection: asked with the path of the layer that makes it.
type Probe = dyn Fn(&str) -> Option<Tensor>;

thread_local! {
    static PROBE: RefCell<Option<Rc<Probe>>> = const { RefCell::new(None) };
}

/// Runs `f`, in which this thread's sinusoidal projections are what `probe` gives for diffusers' path of the layer that
/// makes them, where it gives anything.
///
/// Their angles are so large that two right ways of rounding them differ in the fifth digit. A test that compares a model
/// with another implementation to the last digits takes that implementation's.
pub fn with_time_projections<T>(probe: impl Fn(&str) -> Option<Tensor> + 'static, f: impl FnOnce() -> T) -> T {
    struct Restore(Option<Rc<Probe>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            PROBE.set(self.0.take());
        }
    }
    let _restore = Restore(PROBE.replace(Some(Rc::new(probe))));
    f()
}

/// The sinusoidal projection `[N, dim]`, f32, of times `[N]` (0 to 1000). `module` is diffusers' path of the layer that
/// makes it; see [`with_time_projections`].
///
/// # Errors
/// When memory runs out.
pub fn time_proj(module: &str, times: &Tensor, options: &TimestepProjection) -> Result<Tensor> {
    let probe = PROBE.with_borrow(Clone::clone);
    match probe.and_then(|probe| probe(module)) {
        Some(given) => Ok(given.on_tape_of(times)),
        None => timestep_embedding(times, options),
    }
}

impl CombinedTimestepTextProjEmbeddings {
    /// `pooled` is the width of the pooled text.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, dim: usize, pooled: usize, guidance: bool) -> Result<Self> {
        let embedder = |name, inputs| TimestepEmbedding::new(&params.sub(name), inputs, dim);
        Ok(Self {
            timestep_embedder: embedder("timestep_embedder", CHANNELS)?,
            guidance_embedder: if guidance { Some(embedder("guidance_embedder", CHANNELS)?) } else { None },
            text_embedder: embedder("text_embedder", pooled)?,
        })
    }

    /// `[B, dim]` from the projections of time and guidance `[B, 256]` and pooled text `[B, P]`.
    ///
    /// # Errors
    /// When a shape does not fit, or there is a guidance without an embedder or the reverse.
    pub fn forward(&self, timestep: &Tensor, guidance: Option<&Tensor>, pooled: &Tensor) -> Result<Tensor> {
        let project =
            |embedder: &TimestepEmbedding, projection: &Tensor| embedder.forward(&projection.to_dtype(pooled.dtype())?);
        let time = project(&self.timestep_embedder, timestep)?;
        let time = match (&self.guidance_embedder, guidance) {
            (Some(embedder), Some(guidance)) => time.add(&project(embedder, guidance)?)?,
            (None, None) => time,
            (embedder, _) => {
                let says = |there| if there { "a guidance" } else { "no guidance" };
                let (expected, got) = (says(embedder.is_some()), says(guidance.is_some()));
                return Err(Error::argument(
                    "guidance",
                    format!("{expected} (guidance_embeds of the model, use_guidance_embeds of the adapter)"),
                    got,
                ));
            }
        };
        time.add(&self.text_embedder.forward(pooled)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    #[test]
    fn a_probe_is_asked_by_path_and_gone_afterwards() {
        let (times, options) = (normal(&[3]), TimestepProjection::new(4));
        let project = |module: &str| time_proj(module, &times, &options).unwrap().to_vec::<f32>().unwrap();
        let (own, given) = (project("a.time_proj"), normal(&[3, 4]));
        let values = given.to_vec::<f32>().unwrap();
        let probe = move |module: &str| (module == "a.time_proj").then(|| given.clone());
        let inside = with_time_projections(probe, || ["a.time_proj", "b.time_proj"].map(project));
        assert_eq!(inside, [values, own.clone()]);
        assert_eq!(project("a.time_proj"), own);
        // Even where the code inside panics.
        let panicked = std::panic::catch_unwind(|| with_time_projections(|_| Some(normal(&[1])), || panic!("inside")));
        assert!(panicked.is_err());
        assert_eq!(project("a.time_proj"), own);
    }
}
