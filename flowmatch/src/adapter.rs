//! How a model meets the pipeline: an adapter turns a context into the model's inputs, and its output into a velocity.

use std::collections::BTreeMap;
use std::sync::Arc;

use flowtape_engine::comm::Comm;
use flowtape_engine::{DType, Device, Tape, Tensor};

use crate::{Batch, DataType, Draws, Error, LinearInterpolationSchedule, Result, TaskType};

/// All that an adapter may read to prepare a model's inputs.
#[derive(Clone, Debug)]
pub struct FlowMatchingContext<'a> {
    /// `x_t` in the compute dtype, `[B, C, H, W]` or `[B, C, F, H, W]`; on the tape when the step is recorded.
    pub noisy_latents: Tensor,
    /// Clean latents `x_0` in the compute dtype, of the same shape.
    pub latents: Tensor,
    /// `[B]` f32, `σ · num_train_timesteps`.
    pub timesteps: Tensor,
    /// `[B]` f32 in `[0, 1]`.
    pub sigma: Tensor,
    /// What is generated from what.
    pub task_type: TaskType,
    /// What the latents are.
    pub data_type: DataType,
    /// Where everything lies.
    pub device: Device,
    /// The compute dtype: inputs of the model are cast to it.
    pub dtype: DType,
    /// Probability that a sample's conditioning is dropped, for classifier-free guidance.
    pub cfg_dropout_prob: f64,
    /// Further streams of the batch with their noise, by the names of [`ModelAdapter::stream_latents`].
    pub streams: BTreeMap<String, NoisedStream>,
    /// The whole batch, for tensors that only this model knows.
    pub batch: &'a Batch,
}

impl FlowMatchingContext<'_> {
    /// A further stream that must be there.
    ///
    /// # Errors
    /// When it is not: what samples noises the main latents alone.
    pub fn stream(&self, name: &str) -> Result<&NoisedStream> {
        let got = || format!("the streams {:?}", self.streams.keys().collect::<Vec<_>>());
        self.streams.get(name).ok_or_else(|| Error::batch(format!("noised latents of the stream `{name}`"), got()))
    }
}

/// Latents of a further stream, noised with the σ of their sample and a noise of their own.
#[derive(Clone, Debug)]
pub struct NoisedStream {
    /// `x_t`, f32.
    pub noisy_latents: Tensor,
    /// The velocity `ε - x_0`, f32 in the same shape.
    pub target: Tensor,
}

impl NoisedStream {
    /// Noises the further streams of a batch, in the adapter's order, at one `sigma` per sample `[B]`.
    ///
    /// # Errors
    /// When the batch lacks a stream, or the draws run out.
    pub fn of_batch(
        adapter: &dyn ModelAdapter,
        batch: &Batch,
        sigma: &Tensor,
        draws: &mut dyn Draws,
    ) -> Result<BTreeMap<String, Self>> {
        let path = LinearInterpolationSchedule;
        let mut noised = |(name, latents): (&str, &Tensor)| {
            let clean = latents.detach().to_dtype(DType::F32)?;
            let noise = draws.noise(clean.dims(), clean.device())?;
            let (noisy_latents, target) = (path.forward(&clean, &noise, sigma)?, path.velocity(&clean, &noise)?);
            Ok((name.to_owned(), Self { noisy_latents, target }))
        };
        adapter.stream_latents(batch)?.into_iter().map(&mut noised).collect()
    }
}

/// One entry of [`ModelInputs`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Input {
    /// A tensor.
    Tensor(Tensor),
    /// An ordered list of tensors.
    Tensors(Vec<Tensor>),
    /// A number.
    Number(f64),
    /// Lists of shapes per sample, such as `img_shapes`.
    Shapes(Vec<Vec<Vec<usize>>>),
    /// Ranks that work on the same batch.
    Ranks(Arc<dyn Comm>),
}

impl Input {
    fn kind(&self) -> &'static str {
        match self {
            Self::Tensor(_) => "a tensor",
            Self::Tensors(_) => "a list of tensors",
            Self::Number(_) => "a number",
            Self::Shapes(_) => "lists of shapes",
            Self::Ranks(_) => "ranks",
        }
    }
}

macro_rules! from_input {
    ($($t:ty => $v:ident;)*) => {$(
        impl From<$t> for Input {
            fn from(value: $t) -> Self { Self::$v(value) }
        }
    )*};
}
from_input! {
    Tensor => Tensor;
    Vec<Tensor> => Tensors;
    f64 => Number;
    Vec<Vec<Vec<usize>>> => Shapes;
    Arc<dyn Comm> => Ranks;
}

/// What a model is called with: named entries, with the reference's names. What is `None` there is absent here.
#[derive(Clone, Debug, Default)]
pub struct ModelInputs(BTreeMap<String, Input>);

impl ModelInputs {
    /// The name of the ranks that share the tokens of each sample: context parallelism.
    pub const TOKEN_RANKS: &str = "token_ranks";

    /// No entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// The inputs with one more entry.
    #[must_use]
    pub fn with(mut self, name: &str, input: impl Into<Input>) -> Self {
        self.insert(name, input);
        self
    }

    /// The inputs with one more entry where there is one.
    #[must_use]
    pub fn with_optional(self, name: &str, input: Option<impl Into<Input>>) -> Self {
        match input {
            Some(input) => self.with(name, input),
            None => self,
        }
    }

    /// Sets an entry.
    pub fn insert(&mut self, name: &str, input: impl Into<Input>) {
        self.0.insert(name.to_owned(), input.into());
    }

    /// Takes an entry out.
    pub fn remove(&mut self, name: &str) -> Option<Input> {
        self.0.remove(name)
    }

    /// An entry of any kind.
    pub fn get(&self, name: &str) -> Option<&Input> {
        self.0.get(name)
    }

    /// All entries, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Input)> {
        self.0.iter().map(|(name, input)| (name.as_str(), input))
    }

    /// Puts every tensor on `tape`, so that operations on it record. Variables are kept.
    pub fn attach(&mut self, tape: &Tape) {
        for input in self.0.values_mut() {
            match input {
                Input::Tensor(tensor) => *tensor = tape.attach(tensor),
                Input::Tensors(tensors) => tensors.iter_mut().for_each(|t| *t = tape.attach(t)),
                Input::Number(_) | Input::Shapes(_) | Input::Ranks(_) => {}
            }
        }
    }

    fn wrong(&self, name: &str, expected: &'static str) -> Error {
        let got = self.get(name).map_or("nothing", Input::kind).to_owned();
        Error::Input { name: name.to_owned(), expected, got }
    }

    /// A tensor that must be there.
    ///
    /// # Errors
    /// When it is missing or something else.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.optional(name).ok_or_else(|| self.wrong(name, "a tensor"))
    }

    /// A tensor that may be missing.
    pub fn optional(&self, name: &str) -> Option<&Tensor> {
        match self.get(name) {
            Some(Input::Tensor(tensor)) => Some(tensor),
            _ => None,
        }
    }

    /// A list of tensors that must be there.
    ///
    /// # Errors
    /// When it is missing or something else.
    pub fn tensors(&self, name: &str) -> Result<&[Tensor]> {
        match self.get(name) {
            Some(Input::Tensors(tensors)) => Ok(tensors),
            _ => Err(self.wrong(name, "a list of tensors")),
        }
    }

    /// The ranks that share the tokens of each sample, where there are such.
    pub fn token_ranks(&self) -> Option<&Arc<dyn Comm>> {
        match self.get(Self::TOKEN_RANKS) {
            Some(Input::Ranks(ranks)) => Some(ranks),
            _ => None,
        }
    }

    /// A number that must be there.
    ///
    /// # Errors
    /// When it is missing or something else.
    pub fn number(&self, name: &str) -> Result<f64> {
        match self.get(name) {
            Some(Input::Number(number)) => Ok(*number),
            _ => Err(self.wrong(name, "a number")),
        }
    }

    /// Lists of shapes that must be there.
    ///
    /// # Errors
    /// When they are missing or something else.
    pub fn shapes(&self, name: &str) -> Result<&[Vec<Vec<usize>>]> {
        match self.get(name) {
            Some(Input::Shapes(shapes)) => Ok(shapes),
            _ => Err(self.wrong(name, "lists of shapes")),
        }
    }
}

/// What a model returns: its main output, and further ones where it has several streams.
#[derive(Clone, Debug)]
pub struct ModelOutput {
    /// The main output, in the model's own layout.
    pub sample: Tensor,
    /// Further outputs, in the model's order.
    pub rest: Vec<Tensor>,
}

impl From<Tensor> for ModelOutput {
    fn from(sample: Tensor) -> Self {
        Self { sample, rest: Vec::new() }
    }
}

/// A model that predicts a velocity from its inputs. Any crate may implement it.
pub trait FlowModel: Send + Sync {
    /// Runs the model. It records where its inputs carry a tape.
    ///
    /// # Errors
    /// When an input is missing or does not fit.
    fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput>;
}

/// What an adapter makes of a model's output.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// The velocity, in the shape of the latents.
    pub velocity: Tensor,
    /// Predictions of further streams by name, for [`ModelAdapter::auxiliary_losses`].
    pub auxiliary: BTreeMap<String, Tensor>,
}

impl From<Tensor> for Prediction {
    fn from(velocity: Tensor) -> Self {
        Self { velocity, auxiliary: BTreeMap::new() }
    }
}

/// The logic of one family of models. Any crate may implement it; only two methods are needed.
pub trait ModelAdapter: Send + Sync {
    /// The name in recipes and errors.
    fn name(&self) -> &str;

    /// Clean latents of further streams that the batch holds, by name, such as a video's audio: `[B, ..]`, float. The
    /// pipeline noises each with the σ of its sample and a noise of its own ([`FlowMatchingContext::streams`]).
    ///
    /// # Errors
    /// When the batch lacks one.
    fn stream_latents<'b>(&self, batch: &'b Batch) -> Result<Vec<(&'static str, &'b Tensor)>> {
        let _ = batch;
        Ok(Vec::new())
    }

    /// The model's inputs from the context. Random numbers (guidance dropout) come from `draws`, in a fixed order.
    ///
    /// # Errors
    /// When the batch lacks a tensor, or a shape does not fit.
    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs>;

    /// Runs the model on what [`Self::prepare_inputs`] made of the same context, and brings its output into the shape of
    /// the latents. Without an implementation the main output already has it.
    ///
    /// # Errors
    /// Those of the model.
    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let _ = cx;
        Ok(model.forward(inputs)?.sample.into())
    }

    /// The unreduced loss, f32 in the shape of `target`: the squared error, unless overridden.
    ///
    /// # Errors
    /// When the shapes differ.
    fn compute_loss(&self, model_pred: &Tensor, target: &Tensor) -> Result<Tensor> {
        if model_pred.dims() != target.dims() {
            let got = format!("{:?}", model_pred.dims());
            return Err(Error::adapter(self.name(), format!("a prediction of shape {:?}", target.dims()), got));
        }
        Ok(model_pred.to_dtype(DType::F32)?.sub(&target.to_dtype(DType::F32)?)?.square()?)
    }

    /// Named scalar losses of further streams. `step` adds them to the loss and reports them by name.
    ///
    /// # Errors
    /// When a stream does not fit its target.
    fn auxiliary_losses(&self, cx: &FlowMatchingContext<'_>, prediction: &Prediction) -> Result<Vec<(String, Tensor)>> {
        let _ = (cx, prediction);
        Ok(Vec::new())
    }
}

impl<A: ModelAdapter + ?Sized> ModelAdapter for Box<A> {
    fn name(&self) -> &str {
        (**self).name()
    }
    fn stream_latents<'b>(&self, batch: &'b Batch) -> Result<Vec<(&'static str, &'b Tensor)>> {
        (**self).stream_latents(batch)
    }
    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        (**self).prepare_inputs(cx, draws)
    }
    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        (**self).forward(cx, model, inputs)
    }
    fn compute_loss(&self, model_pred: &Tensor, target: &Tensor) -> Result<Tensor> {
        (**self).compute_loss(model_pred, target)
    }
    fn auxiliary_losses(&self, cx: &FlowMatchingContext<'_>, prediction: &Prediction) -> Result<Vec<(String, Tensor)>> {
        (**self).auxiliary_losses(cx, prediction)
    }
}
