//! Sample grids and the report.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How grids are sampled.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Steps between sample grids; 0 for one at the end alone.
    pub every_steps: u64,
    /// Steps; the pipeline's own number if it is left out, 20 without one.
    #[schemars(range(min = 1, max = 10_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_inference_steps: Option<usize>,
    /// The scale of guidance, 1 for none: as the pipeline means it, and its own if it is left out; without one that of classifier-free
    /// guidance, 2 if it is left out.
    #[schemars(range(max = 1000), extend("exclusiveMinimum" = 0))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<f64>,
    /// Whether grids of data that names a pipeline are made as that pipeline makes pictures: with its scheduler's noise levels and
    /// solver, and its guidance. Else Euler goes in equal steps, away from a dropped caption.
    pub pipeline: bool,
    /// What grids show, row by row; some of the captions if nothing is named. The digits have grids of their own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<String>,
    /// Whether grids and the report also show videos that go on from a given first frame.
    pub image_to_video: bool,
}

impl SamplingConfig {
    /// Steps without a pipeline.
    pub fn steps(&self) -> usize {
        self.num_inference_steps.unwrap_or(20)
    }

    /// The scale of classifier-free guidance without a pipeline.
    pub fn guidance(&self) -> f64 {
        self.guidance_scale.unwrap_or(2.0)
    }
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            every_steps: 0,
            num_inference_steps: None,
            guidance_scale: None,
            pipeline: true,
            prompts: Vec::new(),
            image_to_video: false,
        }
    }
}

/// What the last report measures.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReportConfig {
    /// Generated samples of each class.
    #[schemars(range(min = 1, max = 100_000))]
    pub samples_per_class: usize,
}
