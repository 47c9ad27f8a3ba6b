//! What a model asks of a batch, so that sizes which contradict each other are found before anything is made.

use flowtape_flowmatch::DataType;
use serde_json::{Map, Value};

use crate::{Error, ModelKind, Result};

/// A size that a configuration fixes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fixed {
    /// The key that says so, such as `joint_attention_dim`, or what is made of it.
    pub key: &'static str,
    /// The size.
    pub size: usize,
}

impl Fixed {
    /// A size and its key.
    pub fn new(key: &'static str, size: usize) -> Self {
        Self { key, size }
    }
}

/// What a model of a configuration, behind its adapter, asks of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Requirements {
    /// Channels of the latents.
    pub channels: Fixed,
    /// Sides of the latents, `[H, W]` or `[F, H, W]`, are multiples of these.
    pub patch: Vec<usize>,
    /// Widths of the batch's embeddings, by the tensor's name.
    pub widths: Vec<(&'static str, Fixed)>,
}

/// Checks that what a model predicts has the channels of what it is asked for.
pub(crate) fn check_prediction(key: &'static str, outputs: usize, asked: Fixed) -> Result<()> {
    if outputs == asked.size {
        return Ok(());
    }
    let expected = format!("{} ({}), the channels of what the adapter trains on", asked.key, asked.size);
    Err(Error::config(key, expected, outputs))
}

/// Channels of latents that are packed four to a token of `in_channels`.
pub(crate) fn packed_channels(in_channels: usize) -> Result<Fixed> {
    match in_channels % 4 {
        0 => Ok(Fixed::new("in_channels / 4", in_channels / 4)),
        _ => Err(Error::config("in_channels", "a multiple of 4: a token is 2 x 2 latents", in_channels)),
    }
}

/// One sample, in the terms of whoever makes it.
#[derive(Clone, Copy, Debug)]
pub struct SampleSizes<'a> {
    /// What says which samples there are, such as `data.source`.
    pub source: &'a str,
    /// `[C, H, W]` of an image or `[C, F, H, W]` of a video.
    pub latents: &'a [usize],
    /// Tensors of embeddings, the key that says how wide they are (`data.text_dim`), and how wide.
    pub widths: &'a [(&'a str, &'a str, usize)],
}

impl ModelKind {
    /// What is wrong with a recipe's `model` and `flow_matching.adapter_kwargs` by themselves: a sentence each, with the recipe's
    /// keys.
    pub fn own_problems(&self, config: &Value, kwargs: &Map<String, Value>) -> Vec<String> {
        let class = config["_class_name"].as_str().unwrap_or("nothing");
        if class != self.class {
            return vec![format!(
                "model._class_name ({class}) must be {}, which flow_matching.adapter_type {} runs",
                self.class, self.adapter
            )];
        }
        // Each by itself first, both told.
        let adapter = (self.new_adapter)(kwargs).err().map(|error| problems("flow_matching.", error));
        let model = self.config.complete(config).err().map(|error| match error {
            Error::Config { key: "model", .. } | Error::Section { .. } => problems("", error),
            error => problems("model.", error),
        });
        let wrong: Vec<String> = adapter.into_iter().chain(model).flatten().collect();
        if !wrong.is_empty() {
            return wrong;
        }
        (self.requirements)(config, kwargs).err().map_or(Vec::new(), |error| problems("model.", error))
    }

    /// What contradicts each other in a recipe's `model` and `flow_matching.adapter_kwargs` and the samples. Where a section does
    /// not fit by itself, that alone is told.
    pub fn contradictions(&self, config: &Value, kwargs: &Map<String, Value>, sample: &SampleSizes<'_>) -> Vec<String> {
        let requirements = match (self.requirements)(config, kwargs) {
            Ok(requirements) if config["_class_name"] == self.class => requirements,
            _ => return self.own_problems(config, kwargs),
        };
        let videos = sample.latents.len() == 4;
        if videos != (self.capabilities.data == DataType::Video) {
            let kind = |videos| if videos { "videos" } else { "images" };
            return vec![format!(
                "{} gives {}, but flow_matching.adapter_type {} takes {}",
                sample.source,
                kind(videos),
                self.adapter,
                kind(!videos)
            )];
        }
        requirements.contradictions(sample)
    }
}

/// What an error says of a section, a sentence for each key.
fn problems(prefix: &str, error: Error) -> Vec<String> {
    match error {
        Error::Section { key, problems } => problems.into_iter().map(|p| format!("{prefix}{key}.{p}")).collect(),
        error => vec![format!("{prefix}{error}")],
    }
}

impl Requirements {
    fn contradictions(&self, sample: &SampleSizes<'_>) -> Vec<String> {
        let unequal = |name: &str, got: usize, fixed: &Fixed| {
            let Fixed { key, size } = fixed;
            (got != *size).then(|| format!("{name} ({got}) must equal model.{key} ({size})"))
        };
        let (channels, sides) = sample.latents.split_first().map_or((0, sample.latents), |(c, sides)| (*c, sides));
        let channels = unequal(&format!("the channels of {}", sample.source), channels, &self.channels);
        let whole = sides.iter().zip(&self.patch).all(|(side, patch)| side.is_multiple_of(*patch));
        let sides = (!whole).then(|| {
            format!("the sides {sides:?} of the samples of {} must be multiples of {:?}", sample.source, self.patch)
        });
        let widths = sample.widths.iter().filter_map(|(tensor, name, width)| {
            let (_, fixed) = self.widths.iter().find(|(asked, _)| asked == tensor)?;
            unequal(name, *width, fixed)
        });
        let mut all: Vec<String> = channels.into_iter().chain(sides).chain(widths).collect();
        all.dedup();
        all
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(adapter: &str, config: Value, kwargs: Value, latents: &[usize], width: usize) -> Vec<String> {
        let kind = ModelKind::of_adapter(adapter).unwrap();
        let tensors = ["text_embeddings", "text_embeddings_2", "pooled_prompt_embeds"];
        let widths = tensors.map(|tensor| (tensor, "data.text_dim", width));
        let mut all = json!({"_class_name": kind.class});
        all.as_object_mut().unwrap().extend(config.as_object().cloned().unwrap());
        let sample = SampleSizes { source: "data.source", latents, widths: &widths };
        kind.contradictions(&all, kwargs.as_object().unwrap(), &sample)
    }

    #[test]
    fn contradictions_are_told_in_the_terms_of_the_recipe() {
        let flux = |changes: Value, latents: &[usize], width| {
            let mut config = json!({"in_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32});
            config.as_object_mut().unwrap().extend(changes.as_object().cloned().unwrap());
            found("flux", config, json!({}), latents, width)
        };
        assert_eq!(flux(json!({}), &[1, 8, 8], 32), [""; 0]);
        assert_eq!(
            flux(json!({"pooled_projection_dim": 31}), &[1, 8, 8], 31),
            ["data.text_dim (31) must equal model.joint_attention_dim (32)"]
        );
        let both = flux(json!({"in_channels": 8}), &[1, 7, 8], 32);
        assert_eq!(both[0], "the channels of data.source (1) must equal model.in_channels / 4 (2)");
        assert!(both[1].contains("[7, 8]") && both[1].contains("multiples of [2, 2]") && both.len() == 2, "{both:?}");
        let one = |all: Vec<String>, parts: &[&str]| {
            assert!(all.len() == 1 && parts.iter().all(|part| all[0].contains(part)), "{all:?}");
        };
        one(flux(json!({"in_channels": 6}), &[1, 8, 8], 32), &["model.in_channels", "multiple of 4"]);
        one(flux(json!({"out_channels": 8}), &[1, 8, 8], 32), &["model.out_channels", "in_channels (4)"]);
        one(flux(json!({"num_layer": 8}), &[1, 8, 8], 32), &["model.num_layer: ", "did you mean `num_layers`"]);
        one(flux(json!({"num_layers": "x"}), &[1, 8, 8], 32), &["model.num_layers: expected a whole number", "\"x\""]);
        one(flux(json!({}), &[1, 2, 8, 8], 32), &["data.source gives videos", "flux takes images"]);
        one(flux(json!({"_class_name": "WanTransformer3DModel"}), &[1, 8, 8], 32), &["FluxTransformer2DModel"]);
        one(found("flux", json!({}), json!({"scale": 1}), &[1, 8, 8], 8), &["flow_matching.adapter_kwargs.scale: "]);
        // The model is told its guidance all the same, as in the reference.
        let guided =
            json!({"in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "guidance_embeds": true});
        assert_eq!(found("flux", guided, json!({"use_guidance_embeds": false}), &[1, 8, 8], 8), [""; 0]);
    }

    #[test]
    fn each_adapter_says_what_its_model_asks() {
        let hunyuan = json!({"in_channels": 5, "out_channels": 2, "text_embed_dim": 8, "text_embed_2_dim": 9});
        let zeros = json!({"default_image_embed_shape": [1, 1152]});
        let found_9 = found("hunyuan", hunyuan.clone(), zeros, &[2, 3, 4, 4], 8);
        assert_eq!(found_9, ["data.text_dim (8) must equal model.text_embed_2_dim (9)"]);
        let narrow = found("hunyuan", hunyuan, json!({"default_image_embed_shape": [1, 8]}), &[2, 3, 4, 4], 8);
        assert!(narrow.len() == 1 && narrow[0].contains("model.image_embed_dim"), "{narrow:?}");
        let wan = |changes: Value| {
            let mut config = json!({"in_channels": 3, "out_channels": 3, "text_dim": 8});
            config.as_object_mut().unwrap().extend(changes.as_object().cloned().unwrap());
            found("simple", config, json!({}), &[3, 3, 4, 4], 8)
        };
        assert_eq!(wan(json!({})), [""; 0]);
        assert!(wan(json!({"in_channels": 36, "out_channels": 16}))[0].contains("model.out_channels"));
        assert!(wan(json!({"patch_size": [2, 2, 2]}))[0].contains("multiples of [2, 2, 2]"));
        let ltx2 = json!({"in_channels": 3, "out_channels": 3, "caption_channels": 9});
        assert_eq!(
            found("ltx2", ltx2, json!({}), &[3, 3, 4, 4], 8),
            ["data.text_dim (8) must equal model.caption_channels (9)"]
        );
        for (adapter, key) in [("qwen_image", "in_channels / 4 (16)"), ("flux2", "in_channels (128)")] {
            let all = found(adapter, json!({}), json!({}), &[1, 4, 4], 8);
            assert!(all.len() == 2 && all[0].contains(key) && all[1].contains("joint_attention_dim"), "{all:?}");
        }
    }
}
