//! Embeddings of time, guidance and pooled text.

use flowtape_engine::nn::{ParamBuilder, TimestepEmbedding, TimestepProjection, timestep_embedding};
use flowtape_engine::{Error, Result, Tensor};
use flowtape_flowmatch::ModelInputs;

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

/// The sinusoidal projection `[N, dim]` of times `[N]` (0 to 1000). A projection that the inputs hold under `module`,
/// diffusers' path of the layer that makes it, is taken instead: its angles are so large that two right ways of
/// rounding them differ in the fifth digit.
///
/// # Errors
/// When memory runs out.
pub fn time_proj(inputs: &ModelInputs, module: &str, times: &Tensor, options: &TimestepProjection) -> Result<Tensor> {
    match inputs.optional(module) {
        Some(given) => Ok(given.clone()),
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
                return Err(Error::argument("guidance", format!("{expected} (guidance_embeds of the model)"), got));
            }
        };
        time.add(&self.text_embedder.forward(pooled)?)
    }
}
