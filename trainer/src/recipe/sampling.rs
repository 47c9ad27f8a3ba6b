//! Sample grids and the report.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How grids are sampled.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Steps between sample grids; 0 for one at the end alone.
    pub every_steps: u64,
    /// Euler steps.
    #[schemars(range(min = 1, max = 10_000))]
    pub num_inference_steps: usize,
    /// Scale of classifier-free guidance; 1 for none.
    #[schemars(range(max = 1000), extend("exclusiveMinimum" = 0))]
    pub guidance_scale: f64,
    /// What grids show, row by row; some of the captions if nothing is named. The digits have grids of their own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<String>,
    /// Whether grids and the report also show videos that go on from a given first frame.
    pub image_to_video: bool,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            every_steps: 0,
            num_inference_steps: 20,
            guidance_scale: 2.0,
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
