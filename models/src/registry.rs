//! Every model by name.

use flowtape_engine::nn::ParamBuilder;
use flowtape_flowmatch::{DataType, FlowMatchingConfig, FlowMatchingPipeline, ModelAdapter};
use serde_json::{Map, Value};

use crate::chroma::{ChromaAdapter, ChromaConfig, ChromaTransformer2DModel};
use crate::config::{Config, config_json, read, unknown_keys};
use crate::flux::{FluxAdapter, FluxConfig, FluxTransformer2DModel};
use crate::flux2::{Flux2Adapter, Flux2Config, Flux2EditAdapter, Flux2Transformer2DModel};
use crate::flux3::{Flux3Adapter, Flux3Config, Flux3Transformer2DModel};
use crate::hunyuan_video::{HunyuanAdapter, HunyuanVideo15Config, HunyuanVideo15Transformer3DModel};
use crate::krea2::{Krea2Adapter, Krea2Config, Krea2Transformer2DModel};
use crate::ltx2::{LTX2Adapter, LTX2Config, LTX2VideoTransformer3DModel};
use crate::lumina2::{Lumina2Adapter, Lumina2Config, Lumina2Transformer2DModel};
use crate::qwen_image::{QwenImageAdapter, QwenImageConfig, QwenImageEditAdapter, QwenImageTransformer2DModel};
use crate::qwen_image_21::{QwenImage21Adapter, QwenImage21Config, QwenImage21Transformer2DModel};
use crate::requirements::Requirements;
use crate::wan::{SimpleAdapter, WanConfig, WanI2VAdapter, WanTI2VAdapter, WanTransformer3DModel};
use crate::z_image::{ZImageAdapter, ZImageConfig, ZImageTransformer2DModel};
use crate::{Error, Result, Transformer};

/// Makes an adapter from its `adapter_kwargs`.
pub type NewAdapter = fn(&Map<String, Value>) -> Result<Box<dyn ModelAdapter>>;
/// Says what a model asks of a batch, from the object of `config.json` and its adapter's `adapter_kwargs`.
pub type NewRequirements = fn(&Value, &Map<String, Value>) -> Result<Requirements>;
/// Makes a model from the object of `config.json`.
pub type NewModel = fn(&Value, &ParamBuilder) -> Result<Box<dyn Transformer>>;

/// What a model generates from, beside a text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Condition {
    /// The clean first frame of a video (image-to-video): the batch's latents hold it.
    FirstFrame,
    /// Latents of a video in which the given frames alone are there (image-to-video): `condition_latents` of a batch.
    GivenFrames,
    /// Clean latents of images to edit: the list `context_latents` of a batch. FLUX.3 does without, too.
    ReferenceImages,
    /// Audio that is generated along with its video: `audio_latents` of a batch.
    Audio,
}

/// How a model is guided when it is sampled, unless its adapter is told otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuidanceKind {
    /// It is told a scale, which it embeds: guidance is distilled into it.
    Embedded,
    /// It runs a second time on a negative prompt (Ho and Salimans 2022).
    ClassifierFree,
}

/// What a model can do, for whoever feeds or samples it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Capabilities {
    /// What its latents are: images `[B, C, H, W]` or videos `[B, C, F, H, W]`.
    pub data: DataType,
    /// What else it takes.
    pub conditions: &'static [Condition],
    /// How it is guided.
    pub guidance: GuidanceKind,
}

/// Reads configurations of a class of diffusers.
#[derive(Clone, Copy, Debug)]
pub struct ConfigReader {
    complete: fn(&Value) -> Result<Value>,
    unknown_keys: fn(&Map<String, Value>) -> Vec<String>,
}

impl ConfigReader {
    pub(crate) const fn of<C: Config>() -> Self {
        Self { complete: |config| Ok(config_json(&read::<C>(config)?)), unknown_keys: unknown_keys::<C> }
    }

    /// The object of `config.json` with every key of the class, its values checked.
    ///
    /// # Errors
    /// When a key is unknown or a value does not fit.
    pub fn complete(&self, config: &Value) -> Result<Value> {
        (self.complete)(config)
    }

    /// The keys of an object of `config.json` that the class does not know.
    pub fn unknown_keys(&self, config: &Map<String, Value>) -> Vec<String> {
        (self.unknown_keys)(config)
    }
}

/// A model, its adapter and how both are made.
#[derive(Debug)]
pub struct ModelKind {
    /// The adapter's name in recipes.
    pub adapter: &'static str,
    /// diffusers' class, as in `_class_name` of `config.json`.
    pub class: &'static str,
    /// How its configurations are read.
    pub config: ConfigReader,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Makes the adapter.
    pub new_adapter: NewAdapter,
    /// What a model of a configuration and these `adapter_kwargs` asks of a batch.
    pub requirements: NewRequirements,
    /// Makes the model.
    pub new_model: NewModel,
}

/// All models. Adapters of one class share its model.
pub const MODELS: &[ModelKind] = &[
    ModelKind {
        adapter: "simple",
        class: WanConfig::CLASS,
        config: ConfigReader::of::<WanConfig>(),
        capabilities: Capabilities { data: DataType::Video, conditions: &[], guidance: GuidanceKind::ClassifierFree },
        new_adapter: |kwargs| Ok(Box::new(SimpleAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| SimpleAdapter::from_kwargs(kwargs)?.requirements(&WanConfig::from_json(config)?),
        new_model: new_wan,
    },
    ModelKind {
        adapter: "wan_i2v",
        class: WanConfig::CLASS,
        config: ConfigReader::of::<WanConfig>(),
        capabilities: Capabilities {
            data: DataType::Video,
            conditions: &[Condition::GivenFrames],
            guidance: GuidanceKind::ClassifierFree,
        },
        new_adapter: |kwargs| Ok(Box::new(WanI2VAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| WanI2VAdapter::from_kwargs(kwargs)?.requirements(&WanConfig::from_json(config)?),
        new_model: new_wan,
    },
    ModelKind {
        adapter: "wan_ti2v",
        class: WanConfig::CLASS,
        config: ConfigReader::of::<WanConfig>(),
        capabilities: Capabilities {
            data: DataType::Video,
            conditions: &[Condition::FirstFrame],
            guidance: GuidanceKind::ClassifierFree,
        },
        new_adapter: |kwargs| Ok(Box::new(WanTI2VAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            WanTI2VAdapter::from_kwargs(kwargs)?.requirements(&WanConfig::from_json(config)?)
        },
        new_model: new_wan,
    },
    ModelKind {
        adapter: "flux",
        class: FluxConfig::CLASS,
        config: ConfigReader::of::<FluxConfig>(),
        capabilities: Capabilities { data: DataType::Image, conditions: &[], guidance: GuidanceKind::Embedded },
        new_adapter: |kwargs| Ok(Box::new(FluxAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| FluxAdapter::from_kwargs(kwargs)?.requirements(&FluxConfig::from_json(config)?),
        new_model: |config, params| Ok(Box::new(FluxTransformer2DModel::new(FluxConfig::from_json(config)?, params)?)),
    },
    ModelKind {
        adapter: "flux2",
        class: Flux2Config::CLASS,
        config: ConfigReader::of::<Flux2Config>(),
        capabilities: Capabilities { data: DataType::Image, conditions: &[], guidance: GuidanceKind::Embedded },
        new_adapter: |kwargs| Ok(Box::new(Flux2Adapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            Flux2Adapter::from_kwargs(kwargs)?.requirements(&Flux2Config::from_json(config)?)
        },
        new_model: new_flux2,
    },
    ModelKind {
        adapter: "flux2_edit",
        class: Flux2Config::CLASS,
        config: ConfigReader::of::<Flux2Config>(),
        capabilities: Capabilities {
            data: DataType::Image,
            conditions: &[Condition::ReferenceImages],
            guidance: GuidanceKind::Embedded,
        },
        new_adapter: |kwargs| Ok(Box::new(Flux2EditAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            Flux2EditAdapter::from_kwargs(kwargs)?.requirements(&Flux2Config::from_json(config)?)
        },
        new_model: new_flux2,
    },
    ModelKind {
        adapter: "hunyuan",
        class: HunyuanVideo15Config::CLASS,
        config: ConfigReader::of::<HunyuanVideo15Config>(),
        capabilities: Capabilities {
            data: DataType::Video,
            conditions: &[Condition::FirstFrame],
            guidance: GuidanceKind::ClassifierFree,
        },
        new_adapter: |kwargs| Ok(Box::new(HunyuanAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            HunyuanAdapter::from_kwargs(kwargs)?.requirements(&HunyuanVideo15Config::from_json(config)?)
        },
        new_model: |config, params| {
            Ok(Box::new(HunyuanVideo15Transformer3DModel::new(HunyuanVideo15Config::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "ltx2",
        class: LTX2Config::CLASS,
        config: ConfigReader::of::<LTX2Config>(),
        capabilities: Capabilities {
            data: DataType::Video,
            conditions: &[Condition::Audio],
            guidance: GuidanceKind::ClassifierFree,
        },
        new_adapter: |kwargs| Ok(Box::new(LTX2Adapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| LTX2Adapter::from_kwargs(kwargs)?.requirements(&LTX2Config::from_json(config)?),
        new_model: |config, params| {
            Ok(Box::new(LTX2VideoTransformer3DModel::new(LTX2Config::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "qwen_image",
        class: QwenImageConfig::CLASS,
        config: ConfigReader::of::<QwenImageConfig>(),
        capabilities: Capabilities { data: DataType::Image, conditions: &[], guidance: GuidanceKind::ClassifierFree },
        new_adapter: |kwargs| Ok(Box::new(QwenImageAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            QwenImageAdapter::from_kwargs(kwargs)?.requirements(&QwenImageConfig::from_json(config)?)
        },
        new_model: new_qwen_image,
    },
    ModelKind {
        adapter: "qwen_image_edit",
        class: QwenImageConfig::CLASS,
        config: ConfigReader::of::<QwenImageConfig>(),
        capabilities: Capabilities {
            data: DataType::Image,
            conditions: &[Condition::ReferenceImages],
            guidance: GuidanceKind::ClassifierFree,
        },
        new_adapter: |kwargs| Ok(Box::new(QwenImageEditAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            QwenImageEditAdapter::from_kwargs(kwargs)?.requirements(&QwenImageConfig::from_json(config)?)
        },
        new_model: new_qwen_image,
    },
    ModelKind {
        adapter: "chroma",
        class: ChromaConfig::CLASS,
        config: ConfigReader::of::<ChromaConfig>(),
        capabilities: Capabilities { data: DataType::Image, conditions: &[], guidance: GuidanceKind::ClassifierFree },
        new_adapter: |kwargs| Ok(Box::new(ChromaAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            ChromaAdapter::from_kwargs(kwargs)?.requirements(&ChromaConfig::from_json(config)?)
        },
        new_model: |config, params| {
            Ok(Box::new(ChromaTransformer2DModel::new(ChromaConfig::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "lumina2",
        class: Lumina2Config::CLASS,
        config: ConfigReader::of::<Lumina2Config>(),
        capabilities: Capabilities { data: DataType::Image, conditions: &[], guidance: GuidanceKind::ClassifierFree },
        new_adapter: |kwargs| Ok(Box::new(Lumina2Adapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            Lumina2Adapter::from_kwargs(kwargs)?.requirements(&Lumina2Config::from_json(config)?)
        },
        new_model: |config, params| {
            Ok(Box::new(Lumina2Transformer2DModel::new(Lumina2Config::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "qwen_image_21",
        class: QwenImage21Config::CLASS,
        config: ConfigReader::of::<QwenImage21Config>(),
        capabilities: Capabilities { data: DataType::Image, conditions: &[], guidance: GuidanceKind::ClassifierFree },
        new_adapter: |kwargs| Ok(Box::new(QwenImage21Adapter::from_kwargs(kwargs, false)?)),
        requirements: |config, kwargs| {
            QwenImage21Adapter::from_kwargs(kwargs, false)?.requirements(&QwenImage21Config::from_json(config)?)
        },
        new_model: new_qwen_image_21,
    },
    ModelKind {
        adapter: "qwen_image_21_edit",
        class: QwenImage21Config::CLASS,
        config: ConfigReader::of::<QwenImage21Config>(),
        capabilities: Capabilities {
            data: DataType::Image,
            conditions: &[Condition::ReferenceImages],
            guidance: GuidanceKind::ClassifierFree,
        },
        new_adapter: |kwargs| Ok(Box::new(QwenImage21Adapter::from_kwargs(kwargs, true)?)),
        requirements: |config, kwargs| {
            QwenImage21Adapter::from_kwargs(kwargs, true)?.requirements(&QwenImage21Config::from_json(config)?)
        },
        new_model: new_qwen_image_21,
    },
    ModelKind {
        adapter: "flux3",
        class: Flux3Config::CLASS,
        config: ConfigReader::of::<Flux3Config>(),
        capabilities: Capabilities {
            data: DataType::Image,
            conditions: &[Condition::ReferenceImages],
            guidance: GuidanceKind::ClassifierFree,
        },
        new_adapter: |kwargs| Ok(Box::new(Flux3Adapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            Flux3Adapter::from_kwargs(kwargs)?.requirements(&Flux3Config::from_json(config)?)
        },
        new_model: |config, params| {
            Ok(Box::new(Flux3Transformer2DModel::new(Flux3Config::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "krea2",
        class: Krea2Config::CLASS,
        config: ConfigReader::of::<Krea2Config>(),
        capabilities: Capabilities { data: DataType::Image, conditions: &[], guidance: GuidanceKind::ClassifierFree },
        new_adapter: |kwargs| Ok(Box::new(Krea2Adapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            Krea2Adapter::from_kwargs(kwargs)?.requirements(&Krea2Config::from_json(config)?)
        },
        new_model: |config, params| {
            Ok(Box::new(Krea2Transformer2DModel::new(Krea2Config::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "z_image",
        class: ZImageConfig::CLASS,
        config: ConfigReader::of::<ZImageConfig>(),
        capabilities: Capabilities { data: DataType::Image, conditions: &[], guidance: GuidanceKind::ClassifierFree },
        new_adapter: |kwargs| Ok(Box::new(ZImageAdapter::from_kwargs(kwargs)?)),
        requirements: |config, kwargs| {
            ZImageAdapter::from_kwargs(kwargs)?.requirements(&ZImageConfig::from_json(config)?)
        },
        new_model: |config, params| {
            Ok(Box::new(ZImageTransformer2DModel::new(ZImageConfig::from_json(config)?, params)?))
        },
    },
];

fn new_qwen_image_21(config: &Value, params: &ParamBuilder) -> Result<Box<dyn Transformer>> {
    Ok(Box::new(QwenImage21Transformer2DModel::new(QwenImage21Config::from_json(config)?, params)?))
}

fn new_wan(config: &Value, params: &ParamBuilder) -> Result<Box<dyn Transformer>> {
    Ok(Box::new(WanTransformer3DModel::new(WanConfig::from_json(config)?, params)?))
}

fn new_flux2(config: &Value, params: &ParamBuilder) -> Result<Box<dyn Transformer>> {
    Ok(Box::new(Flux2Transformer2DModel::new(Flux2Config::from_json(config)?, params)?))
}

fn new_qwen_image(config: &Value, params: &ParamBuilder) -> Result<Box<dyn Transformer>> {
    Ok(Box::new(QwenImageTransformer2DModel::new(QwenImageConfig::from_json(config)?, params)?))
}

impl ModelKind {
    /// The model behind the adapter of that name.
    ///
    /// # Errors
    /// When there is none: the error lists all.
    pub fn of_adapter(name: &str) -> Result<&'static Self> {
        Self::find("adapter_type", name, |kind| kind.adapter)
    }

    /// A model of that class of diffusers: the first, where several adapters share it.
    ///
    /// # Errors
    /// When there is none: the error lists all.
    pub fn of_class(name: &str) -> Result<&'static Self> {
        Self::find("_class_name", name, |kind| kind.class)
    }

    fn find(key: &'static str, wanted: &str, name: fn(&Self) -> &'static str) -> Result<&'static Self> {
        let mut names: Vec<_> = MODELS.iter().map(name).collect();
        names.dedup();
        let found = MODELS.iter().find(|kind| name(kind) == wanted);
        found.ok_or_else(|| Error::config(key, format!("one of {}", names.join(", ")), wanted))
    }

    /// Whether it takes a condition.
    pub fn takes(&self, condition: Condition) -> bool {
        self.capabilities.conditions.contains(&condition)
    }
}

impl Condition {
    /// The names of all adapters that take it, for errors.
    pub fn adapters(self) -> Vec<&'static str> {
        MODELS.iter().filter(|kind| kind.takes(self)).map(|kind| kind.adapter).collect()
    }
}

/// The adapter of that name.
///
/// # Errors
/// When there is none (the error lists all), or an argument does not fit.
pub fn create_adapter(name: &str, kwargs: &Map<String, Value>) -> Result<Box<dyn ModelAdapter>> {
    (ModelKind::of_adapter(name)?.new_adapter)(kwargs)
}

/// A pipeline with the adapter that its configuration names.
///
/// # Errors
/// When the adapter is unknown (the error lists all), or an argument or a value does not fit.
pub fn create_pipeline(config: FlowMatchingConfig) -> Result<FlowMatchingPipeline> {
    let adapter = create_adapter(&config.adapter_type, &config.adapter_kwargs)?;
    FlowMatchingPipeline::new(config, adapter)
}

/// A model of the object of `config.json`, whose `_class_name` says which.
///
/// # Errors
/// When the class is unknown (the error lists all), or a value does not fit.
pub fn create_model(config: &Value, params: &ParamBuilder) -> Result<Box<dyn Transformer>> {
    let class = config["_class_name"].as_str().unwrap_or("no _class_name");
    (ModelKind::of_class(class)?.new_model)(config, params)
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{DType, Device, Tensor};
    use flowtape_flowmatch::{Batch, FlowModel, ModelInputs, ModelOutput, PhiloxDraws, StepOptions};

    use super::*;
    use crate::testing::normal;

    #[test]
    fn names_are_unique_and_unknown_ones_are_listed() {
        for (i, a) in MODELS.iter().enumerate() {
            assert!(MODELS[..i].iter().all(|b| b.adapter != a.adapter));
            assert_eq!(create_adapter(a.adapter, &Map::new()).unwrap().name(), a.adapter);
            let config = FlowMatchingConfig { adapter_type: a.adapter.into(), ..FlowMatchingConfig::default() };
            assert_eq!(create_pipeline(config).unwrap().adapter().name(), a.adapter);
        }
        let Err(error) = create_adapter("fluxx", &Map::new()) else { panic!("an unknown adapter was made") };
        assert!(error.to_string().contains("flux") && error.to_string().contains("fluxx"), "{error}");
        let kwargs = Map::from_iter([("guidance".into(), Value::from(1.0))]);
        let Err(error) = create_adapter("flux", &kwargs) else { panic!("an unknown argument was taken") };
        assert!(error.to_string().contains("guidance_scale"), "{error}");
    }

    /// Keeps its inputs, and gives the tokens or latents among them back.
    struct Listening(std::sync::Mutex<ModelInputs>);

    impl FlowModel for Listening {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            *self.0.lock().unwrap() = inputs.clone();
            let rest = inputs.optional("audio_hidden_states").cloned().into_iter().collect();
            Ok(ModelOutput { sample: inputs.tensor("hidden_states")?.narrow(1, 0, 2)?, rest })
        }
    }

    /// What the adapter's model is called with for a batch, or what is wrong with it.
    fn told(kind: &ModelKind, batch: &Batch, i2v_prob: f64) -> Result<ModelInputs> {
        let config =
            FlowMatchingConfig { adapter_type: kind.adapter.into(), i2v_prob, ..FlowMatchingConfig::default() };
        let model = Listening(std::sync::Mutex::default());
        // Where the prediction is not of the latents' shape, its loss is refused after the model was called.
        let step = create_pipeline(config)?.step(&model, batch, 1, &mut PhiloxDraws::new(1), &StepOptions::default());
        let inputs = model.0.into_inner().unwrap();
        if inputs.iter().next().is_none() { step.map(|step| step.inputs) } else { Ok(inputs) }
    }

    #[test]
    fn capabilities_are_what_the_adapters_do() {
        for kind in MODELS {
            let Capabilities { data, guidance, .. } = &kind.capabilities;
            let dims: &[usize] = if *data == DataType::Image { &[2, 3, 4, 4] } else { &[2, 3, 2, 4, 4] };
            let mask = || Tensor::ones(&[2, 5], DType::F32, &Device::cpu()).unwrap();
            // The states of several layers where a model takes them.
            let config = kind.config.complete(&serde_json::json!({"_class_name": kind.class})).unwrap();
            let layers: &[usize] = if config.get("num_text_layers").is_some() { &[3] } else { &[] };
            let all = Batch::new(normal(dims), data.clone())
                .with("text_embeddings", normal(&[&[2, 5], layers, &[7]].concat()))
                .with("audio_text_embeddings", normal(&[2, 5, 7]))
                .with("text_mask", mask())
                .with("text_attention_mask", mask())
                .with("audio_latents", normal(&[2, 2, 3, 16]))
                .with("image_pad_mask", Tensor::ones(&[2, 5], DType::F32, &Device::cpu()).unwrap())
                .with("condition_latents", normal(dims))
                .with_list("context_latents", vec![normal(&[2, 3, 2, 2])]);
            let plain = told(kind, &all, 0.0).unwrap_or_else(|e| panic!("{}: {e}", kind.adapter));
            let embedded = plain.get("guidance").is_some();
            assert_eq!(embedded, *guidance == GuidanceKind::Embedded, "{}", kind.adapter);
            let values = |inputs: &ModelInputs| inputs.tensor("hidden_states").unwrap().to_vec::<f32>().unwrap();
            let animated = *data == DataType::Video && values(&told(kind, &all, 1.0).unwrap()) != values(&plain);
            assert_eq!(animated, kind.takes(Condition::FirstFrame), "{}", kind.adapter);
            let mut without = all.clone();
            without.tensors.remove("audio_latents");
            assert_eq!(told(kind, &without, 0.0).is_err(), kind.takes(Condition::Audio), "{}", kind.adapter);
            let mut without = all.clone();
            without.tensors.remove("condition_latents");
            assert_eq!(told(kind, &without, 0.0).is_err(), kind.takes(Condition::GivenFrames), "{}", kind.adapter);
            let mut without = all.clone();
            without.lists.clear();
            let names = |inputs: &ModelInputs| inputs.iter().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
            let counts = told(kind, &without, 0.0).map_or(true, |without| names(&without) != names(&plain));
            assert_eq!(counts, kind.takes(Condition::ReferenceImages), "{}", kind.adapter);
        }
        assert_eq!(Condition::FirstFrame.adapters(), ["wan_ti2v", "hunyuan"]);
    }
}
