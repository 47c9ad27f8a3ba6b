//! What no single value of a recipe shows.

use flowtape_models::requirements::SampleSizes;
use flowtape_models::{Condition, ModelKind};

use super::node::Node;
use super::{DataConfig, Problem, Recipe, StepScheduler};
use crate::builtin::digits::SIDE;
use crate::start::{PRETRAINED, Start};

/// The most micro-batches of a step.
const MAX_PARTS: usize = 1 << 24;

impl Recipe {
    /// Adds what contradicts each other. A section in which something was found already is not compared with others: its
    /// values are not those that are meant.
    pub(super) fn check(&self, root: &Node, own_data: bool, problems: &mut Vec<Problem>) {
        let starts = |problem: &Problem, section: &str| problem.what.starts_with(section);
        let clean = |sections: &[&str]| sections.iter().all(|s| !problems.iter().any(|p| starts(p, s)));
        let found: Vec<String> = [
            clean(&["name"]).then(|| self.name_problems()),
            clean(&["step_scheduler"]).then(|| self.step_scheduler.problems()),
            clean(&["loss_scale"]).then(|| self.loss_scale.check().err().map(|e| e.to_string()).into_iter().collect()),
            clean(&["ema"])
                .then(|| self.ema.and_then(|ema| ema.check().err()).map(|e| e.to_string()).into_iter().collect()),
            clean(&["lr_scheduler", "optimizer", "step_scheduler"]).then(|| self.schedule_problems()),
            clean(&["data"]).then(|| self.data.problems()),
            clean(&["validation"]).then(|| self.validation.as_ref().map_or(Vec::new(), |v| v.problems())),
            clean(&["peft", "model"]).then(|| self.peft_problems(own_data)),
            clean(&["flow_matching", "sampling", "data"]).then(|| self.adapter_problems()),
            (own_data && clean(&["model", "flow_matching", "data"])).then(|| self.model_problems()),
        ]
        .into_iter()
        .flatten()
        .flatten()
        .collect();
        problems.extend(found.into_iter().map(|what| Problem::new(&root.place_of(key(&what)), what)));
    }

    fn name_problems(&self) -> Vec<String> {
        let fits = |c: char| c.is_alphanumeric() || "-_. ".contains(c);
        let name = &self.name;
        if !name.is_empty() && name.len() <= 100 && !name.starts_with(['.', ' ']) && name.chars().all(fits) {
            return Vec::new();
        }
        let what = "expected letters, digits, `-`, `_` and `.`, since a folder is named so; run_dir names any folder";
        vec![format!("name: {what}, got {name:?}")]
    }

    fn schedule_problems(&self) -> Vec<String> {
        // Epochs are counted when the data is there.
        if self.step_scheduler.max_steps == 0 {
            return Vec::new();
        }
        let made = self.schedule();
        made.err().map(|error| error.to_string()).into_iter().collect()
    }

    fn adapter_problems(&self) -> Vec<String> {
        let mut problems: Vec<String> =
            self.flow_matching.problems().into_iter().map(|error| format!("flow_matching.{error}")).collect();
        let adapter = &self.flow_matching.adapter_type;
        match ModelKind::of_adapter(adapter) {
            Err(error) => problems.push(format!("flow_matching.{error}")),
            Ok(kind) => {
                let able = self.data.video.is_some() && kind.takes(Condition::FirstFrame);
                if self.sampling.image_to_video && !able {
                    let able = Condition::FirstFrame.adapters().join(", ");
                    problems.push(format!(
                        "sampling.image_to_video: expected a source of videos and an adapter that takes a first frame ({able}), got {adapter}"
                    ));
                }
            }
        }
        problems
    }

    fn peft_problems(&self, own_data: bool) -> Vec<String> {
        let Some(config) = &self.peft else { return Vec::new() };
        let mut problems = config.problems();
        if own_data && self.model[PRETRAINED].is_null() {
            problems.push(format!("peft: trains beside a model that is there: name one in model.{PRETRAINED}"));
        }
        problems
    }

    /// Whether model and adapter fit each other and the recipe's own data.
    fn model_problems(&self) -> Vec<String> {
        let Ok(kind) = ModelKind::of_adapter(&self.flow_matching.adapter_type) else { return Vec::new() };
        let DataConfig { video, text_dim, .. } = &self.data;
        let start = match Start::of(&self.model) {
            Ok(start) => start,
            Err(error) => return vec![format!("model.{PRETRAINED}: {error}")],
        };
        // Sizes of encoded samples are known when they are there.
        if self.data.builtin.is_none() {
            return kind.own_problems(&start.config, &self.flow_matching.adapter_kwargs);
        }
        let latents = video.map_or(vec![1, SIDE, SIDE], |v| vec![1, v.frames, v.height, v.width]);
        let widths = ["text_embeddings", "text_embeddings_2", "pooled_prompt_embeds"]
            .map(|tensor| (tensor, "data.text_dim", *text_dim));
        let sample = SampleSizes { source: "data.builtin", latents: &latents, widths: &widths };
        kind.contradictions(&start.config, &self.flow_matching.adapter_kwargs, &sample)
    }
}

impl StepScheduler {
    fn problems(&self) -> Vec<String> {
        if self.max_steps == 0 && self.num_epochs.is_none() {
            return vec!["step_scheduler.max_steps: missing: Optimiser steps (or num_epochs)".into()];
        }
        let (local, global) = (self.local_batch_size, self.global_batch_size());
        if local > 0 && global.is_multiple_of(local) && global / local <= MAX_PARTS {
            return Vec::new();
        }
        vec![format!(
            "step_scheduler.global_batch_size: expected a multiple of local_batch_size ({local}), at most {MAX_PARTS} times it, got {global}"
        )]
    }
}

/// The key that a sentence begins with.
fn key(what: &str) -> &str {
    let end = what.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.')).unwrap_or(what.len());
    what[..end].trim_end_matches('.')
}
